"""What a model shows of its inside in one forward: hidden states, attention maps, q/k/v."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..topk import TopK
from .models import decoder_layers, describe, table_positions
from .output_layer import Head, Hidden
from .tasks import base_of

#: How architectures call the three linear maps of self-attention.
_PROJECTION_NAMES = (
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, OPT, ModernBERT's relatives
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q", "k", "v"),  # MPNet
)


class Needs(NamedTuple):
    """What has to be recorded; layers count from 1."""

    hidden: bool = False
    attentions: bool = False
    relations: int | None = None  #: the layer whose queries, keys and values are wanted


class Features(NamedTuple):
    """One forward of one model."""

    outputs: Any  #: what the model returned
    logits: Tensor | None = None  #: None: it has no head, or its output layer was left out
    hidden: tuple[Tensor, ...] = ()  #: [B, S, W] each; the embeddings' first
    attentions: tuple[Tensor, ...] = ()  #: [B, heads, S, S] each, probabilities
    relations: tuple[Tensor, ...] = ()  #: queries, keys, values [B, S, W'] before any rotation
    entered: Hidden | None = None  #: what went into the output layer where it was left out
    entries: TopK | None = None  #: of a row, where a few log-probabilities are all that is known

    @property
    def response(self) -> Tensor | Hidden | TopK | None:
        """Logits, what they are made of, or what is known of them; None: the model has no head."""
        known = self.logits if self.entries is None else self.entries
        return known if self.entered is None else self.entered

    def to(self, device: torch.device) -> Features:
        """All that the loss looks at, on ``device``."""
        return self._replace(
            logits=None if self.logits is None else self.logits.to(device),
            hidden=tuple(t.to(device) for t in self.hidden),
            attentions=tuple(t.to(device) for t in self.attentions),
            relations=tuple(t.to(device) for t in self.relations),
        )

    def behind_virtual_tokens(self, tokens: int) -> Features:
        """What belongs to the last ``tokens`` positions: prompts that are learnt stand in front."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, -tokens:] if tensor.ndim == 3 else tensor

        entered = self.entered
        return self._replace(
            logits=None if self.logits is None else cut(self.logits),
            hidden=tuple(map(cut, self.hidden)),
            relations=tuple(map(cut, self.relations)),
            entered=None if entered is None else entered._replace(hidden=cut(entered.hidden)),
        )


class Signature:
    """Which entries of a batch a model is given: those that its forward is made for.

    Teacher and student of one batch may differ in them. An entry that only the other one's forward
    names is left out, even where the forward swallows every name (``**kwargs``); one that neither
    names goes to both, as in ``transformers.Trainer``.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        self.name = describe(base)
        # A wrapper that hands everything on says nothing of its own.
        own = inspect.signature(model.forward).parameters
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in own.values())
        asked = inspect.signature(base.forward).parameters if self._takes_all else own
        self.names = frozenset(asked)
        self.others: frozenset[str] = frozenset()
        self._segments = getattr(base.config, "type_vocab_size", None)
        self._positions = table_positions(base)

    def beside(self, other: Signature) -> None:
        """Share batches with the model of ``other``."""
        self.others, other.others = other.names - self.names, self.names - other.names

    def takes(self, name: str) -> bool:
        """Whether the forward can be called with this argument."""
        return self._takes_all or name in self.names

    def own(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The entries for this model; ValueError if they need more positions or segments.

        The model would raise an error without a name, and on a GPU end the process's use of it.
        """
        chosen = {name: value for name, value in inputs.items() if name not in self.others}
        tokens = chosen.get("input_ids")
        if tokens is not None and tokens.shape[-1] > (self._positions or tokens.shape[-1]):
            raise ValueError(
                f"input_ids: {tokens.shape[-1]} tokens in the batch, but {self.name} has "
                f"{self._positions} positions"
            )
        segments = chosen.get("token_type_ids")
        if segments is None or self._segments is None:
            return chosen
        if self._segments < 2:  # RoBERTa takes the argument, and has nothing to tell apart
            del chosen["token_type_ids"]
        # Elsewhere the look would be a synchronisation for every batch.
        elif segments.device.type == "cpu" and int(segments.max()) >= self._segments:
            raise ValueError(
                f"token_type_ids: {int(segments.max())} in the batch, but {self.name} has "
                f"{self._segments} segments"
            )
        return chosen


class Recorder:
    """Runs a model and records what is needed.

    Args:
        model: or a wrapper of it. Its modules are hooked for queries, keys and values, during
            :meth:`run` only.
        needs: what to record. Attention maps switch the model to eager attention, the only one
            that has them.
        role: "student" or "teacher", for messages.

    Raises:
        ValueError: the model does not have what is needed; with its name and the layer's number.
    """

    def __init__(self, model: nn.Module, needs: Needs, role: str) -> None:
        self.needs, self.signature = needs, Signature(model)
        self.name = f"{role} {self.signature.name}"
        self._prompted = _learns_a_prompt(model)
        model = base_of(model)
        self._projections: tuple[nn.Module, ...] = ()
        if needs.relations is not None:
            self._projections = _attention_projections(model, needs.relations, self.name)
        if needs.attentions:
            if self._prompted:
                raise ValueError(
                    f"terms: attention: the {self.name} learns a prompt, and its maps see that, too"
                )
            model.set_attn_implementation("eager")
        self._options: dict[str, Any] = {}
        if getattr(model.config, "return_dict", True) is False:
            self._options["return_dict"] = True
        if needs.hidden:
            self._options["output_hidden_states"] = True
        if needs.attentions:
            self._options["output_attentions"] = True
        for name in self._options:
            if not self.signature.takes(name):
                raise ValueError(f"terms: {name} is no argument of the forward around {self.name}")

    def run(
        self, model: nn.Module, inputs: dict[str, Any], head: Head | None = None, **options: Any
    ) -> Features:
        """Forward ``model``, the one given at construction or a wrapper of it.

        It makes no logits if there is a ``head``, an output layer to leave out.
        """
        given = self.signature.own(inputs)
        without = contextlib.nullcontext() if head is None else head.left_out(base_of(model))
        with self._recorded() as relations, without as entered:
            outputs = model(**given, **self._options, **options)
        features = self._features(outputs, relations)
        if entered is not None:
            features = features._replace(logits=None, entered=entered())
        if not self._prompted:
            return features
        return features.behind_virtual_tokens(inputs["input_ids"].shape[1])

    def _features(self, outputs: Any, relations: dict[int, Tensor]) -> Features:
        if len(relations) < len(self._projections):
            raise ValueError(
                f"terms: minilm: the {self.name} was compiled without what records its queries, "
                "keys and values; give the model as it was"
            )
        return Features(
            outputs,
            logits=output(outputs, "logits"),
            hidden=tuple(output(outputs, "hidden_states")) if self.needs.hidden else (),
            attentions=tuple(output(outputs, "attentions")) if self.needs.attentions else (),
            relations=tuple(relations[i] for i in range(len(self._projections))),
        )

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[dict[int, Tensor]]:
        found: dict[int, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda _m, _i, out, at=at: found.__setitem__(at, out))
            for at, module in enumerate(self._projections)
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def probe(self, model: nn.Module) -> Features:
        """The features of two tokens, to learn their number and widths; ValueError if missing."""
        training = model.training
        ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        try:
            with self._recorded() as relations:
                outputs = model.eval()(input_ids=ids, **self._options)
            for kind, wanted in (
                ("hidden_states", self.needs.hidden),
                ("attentions", self.needs.attentions),
            ):
                given = output(outputs, kind)
                if wanted and (not given or any(item is None for item in given)):
                    raise ValueError(f"terms: the {self.name} gives no {kind.replace('_', ' ')}")
            return self._features(outputs, relations)
        finally:
            model.train(training)


def output(outputs: Any, name: str) -> Any:
    """This one of a model's outputs; None where it gave none, or a bare tuple."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _learns_a_prompt(model: nn.Module) -> bool:
    """Whether adapters (PEFT) put virtual tokens, or their keys and values, before the text."""
    adapters = (getattr(module, "active_peft_config", None) for module in model.modules())
    return any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters)


def _is_linear(module: nn.Module | None) -> bool:
    """A linear map of any kind: plain, quantised, or with an adapter (PEFT's LoRA) around it."""
    return isinstance(getattr(module, "out_features", None), int)


def _attention_projections(model: PreTrainedModel, layer: int, name: str) -> tuple[nn.Module, ...]:
    """The modules that make queries, keys and values in this layer (from 1)."""
    owner, attribute = decoder_layers(model, "terms: minilm")
    layers = getattr(owner, attribute)
    for module in layers[layer - 1].modules():
        children = dict(module.named_children())
        for names in _PROJECTION_NAMES:
            if all(_is_linear(children.get(child)) for child in names):
                return tuple(children[child] for child in names)
    raise ValueError(
        f"terms: minilm: layer {layer} of the {name} has no separate linear maps for queries, "
        f"keys and values ({', '.join('/'.join(names) for names in _PROJECTION_NAMES)})"
    )
