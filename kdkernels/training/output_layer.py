"""A language model's output layer: found, checked, and left out of the model's forward.

With it, :func:`kdkernels.fused_linear_kd_loss` starts from what goes into the layer, and the logits
never exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..problem import LOGIT_DTYPES
from .layer_configs import text_config
from .models import describe, evaluating
from .tasks import base_of

#: Logits given to a model to see what it does to them behind its output layer. The last is large
#: enough for a soft cap to give the cap; one that the cap leaves alone comes first.
_PROBE = (0.0, -1.0, 1.0, 10.0, 100.0, 2.0**15)
_SMALL = {torch.float64: 2.0**-20, torch.float32: 2.0**-10}
_SMALL_HALF = 2.0**-3  # smaller ones would be subnormal in float16


class Hidden(NamedTuple):
    """What goes into an output layer, and the layer: logits = hidden @ weight^T + bias."""

    hidden: Tensor  #: [..., H]
    weight: Tensor  #: [V, H]
    bias: Tensor | None  #: [V]
    softcap: float | None  #: what the model then does to the logits, as in ``fused_kd_loss``
    scale: float | None

    def no_teacher(self) -> Tensor:
        """Logits [..., V] of 0 that take no memory, for a loss whose teacher has weight 0."""
        zero = self.hidden.new_zeros((1,))
        return zero.expand(*self.hidden.shape[:-1], self.weight.shape[0])


class NoHead(ValueError):
    """Why a model's output layer cannot be left out of its forward."""


class Head:
    """The output layer of a model whose logits are ``softcap(scale * (hidden @ W^T + b))``.

    Construction runs the model on a few tokens, in ``eval()`` and without gradients: the layer's
    own numbers, capped and scaled as the model does it, have to be the model's logits.

    Raises:
        NoHead: they are not, or the layer is no plain linear map; with the reason.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layer = _layer(model)
        self.name = next(name for name, module in model.named_modules() if module is layer)
        with evaluating(model), torch.no_grad():
            self.softcap, self.scale = _after_the_layer(model)
            self._check(model)

    def __str__(self) -> str:
        extra = {"softcap": self.softcap, "scale": self.scale}
        found = (f"{name} {value:g}" for name, value in extra.items() if value is not None)
        return ", ".join([self.name, *found])

    @contextlib.contextmanager
    def left_out(self, model: PreTrainedModel) -> Iterator[Callable[[], Hidden]]:
        """While this is open, forwards of ``model``, or of a wrapper of it, have logits [..., 0].

        Gives a function that returns what went into the layer in the one forward that was made.
        """
        layer = _layer(model)
        entered: list[Tensor] = []

        def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            entered.append(hidden)
            bias = None if layer.bias is None else layer.bias[:0]
            # A function of the weight: DistributedDataParallel takes parameters that the model's
            # outputs do not depend on for unused.
            return functional.linear(hidden, layer.weight[:0], bias)

        def result() -> Hidden:
            if len(entered) != 1:
                raise RuntimeError(f"{self.name}: called {len(entered)} times in one forward")
            return Hidden(entered[0], layer.weight, layer.bias, self.softcap, self.scale)

        with _replaced(layer, forward):
            yield result

    def _check(self, model: PreTrainedModel) -> None:
        """NoHead unless the model's logits are those of the formula."""
        layer = _layer(model)
        logits = _run(model)
        with self.left_out(model) as entered:
            _run(model)
        try:
            given = entered()
        except RuntimeError as error:
            raise NoHead(str(error)) from error
        found = given.hidden.float() @ layer.weight.float().t()
        found = found if layer.bias is None else found + layer.bias.float()
        found = _capped(found, self.softcap, self.scale)
        if found.shape != logits.shape:
            raise NoHead(
                f"{self.name}: it gives {tuple(found.shape)}, the model {tuple(logits.shape)}"
            )
        # Both sides have rounded inputs and sums of their own; -inf has to be -inf.
        largest = float(logits.nan_to_num(0.0, 0.0, 0.0).abs().max())
        tolerance = 8 * torch.finfo(layer.weight.dtype).eps * largest
        if not torch.allclose(found, logits.float(), rtol=0.0, atol=max(tolerance, 1e-5)):
            raise NoHead(f"{self.name}: the model's logits are not its output, capped and scaled")


class Heads(NamedTuple):
    """The output layers that are left out, by the role of their model."""

    found: dict[str, Head]
    reasons: dict[str, str]  #: why the others are not

    def __str__(self) -> str:
        tiles = [f"{role} ({head})" for role, head in self.found.items()]
        whole = [f"{role} ({reason})" for role, reason in self.reasons.items()]
        parts = ["in tiles only: " + ", ".join(tiles)] if tiles else []
        parts += ["as a whole: " + ", ".join(whole)] if whole else []
        return "; ".join(parts)


def find_heads(models: dict[str, nn.Module], device: torch.device) -> Heads:
    """The output layer of each model; a teacher's has to be on ``device``, where the loss is."""
    heads = Heads({}, {})
    for role, model in models.items():
        try:
            if role == "teacher" and next(model.parameters()).device != device:
                raise NoHead("it is on another device")
            if _is_compiled(model):
                raise NoHead("torch.compile has compiled the whole forward")
            heads.found[role] = Head(base_of(model))
        except NoHead as error:
            heads.reasons[role] = f"{describe(model)}: {error}"
    return heads


def _is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``Module.compile`` has a part in running ``model``."""
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )


def _layer(model: PreTrainedModel) -> nn.Linear:
    """The output layer, if its parameters can be used outside of its forward."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise NoHead("the model names no output layer (get_output_embeddings)")
    kind = type(layer).__name__
    if not isinstance(layer, nn.Linear) or "forward" in vars(layer):
        raise NoHead(f"its output layer is a {kind} that is not run as a plain nn.Linear")
    if type(layer.weight).__name__ == "DTensor" or hasattr(layer.weight, "ds_id"):
        raise NoHead("its output layer is sharded over processes")
    if layer.weight.dtype not in LOGIT_DTYPES or layer.weight.is_meta:
        raise NoHead(
            f"its output layer is a {kind} of {layer.weight.dtype} on {layer.weight.device}"
        )
    return layer


def _run(model: PreTrainedModel) -> Tensor:
    """The model's logits of a few tokens."""
    layer = model.get_output_embeddings()
    ids = torch.arange(min(8, layer.weight.shape[0]), device=layer.weight.device)[None]
    try:
        return model(input_ids=ids).logits
    except Exception as error:  # whatever a model does with logits of another width
        first = (str(error).splitlines() or [""])[0]
        raise NoHead(
            f"a forward of {ids.numel()} tokens: {type(error).__name__}: {first}"
        ) from error


def _after_the_layer(model: PreTrainedModel) -> tuple[float | None, float | None]:
    """(soft cap, scale) of what the model does to the logits behind its output layer."""
    layer = _layer(model)
    small = _SMALL.get(layer.weight.dtype, _SMALL_HALF)
    probe = torch.tensor((small, *_PROBE), dtype=torch.float64)

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return probe.to(hidden).expand(*hidden.shape[:-1], len(probe))

    with _replaced(layer, forward):
        logits = _run(model)
    if logits.shape[-1] != len(probe):
        raise NoHead("the model changes the width of its output layer's logits")
    seen = logits.reshape(-1, len(probe))[0].double().cpu()
    rounding = 4 * torch.finfo(layer.weight.dtype).eps
    scale = float(seen[0]) / small
    last = float(seen[-1])
    capped = abs(last) < abs(scale) * _PROBE[-1] / 2
    scale = _configured(model, scale, rounding)
    softcap = _configured(model, abs(last), rounding) if capped else None
    expected = _capped(probe, softcap, scale)
    # Relative to each number, and to nothing less than what the small one becomes.
    if not scale or not torch.allclose(seen, expected, rtol=rounding, atol=0.0):
        raise NoHead("the model does more to its logits than to scale and cap them")
    return softcap, None if scale == 1 else scale


def _configured(model: PreTrainedModel, measured: float, rounding: float) -> float:
    """The number of the model's configuration, or 1 / it, that was seen here after rounding."""
    candidates = [1.0]
    for value in vars(text_config(model.config)).values():
        if isinstance(value, float | int) and value:
            candidates += [float(value), 1 / value]
    nearest = min(candidates, key=lambda c: abs(c - measured))
    return nearest if abs(nearest - measured) <= rounding * abs(measured) else measured


def _capped(logits: Tensor, softcap: float | None, scale: float | None) -> Tensor:
    logits = logits if scale is None else logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@contextlib.contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """The layer's forward is this one; hooks around it stay."""
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
