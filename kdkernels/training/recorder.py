"""What a model shows of its inside in one forward: hidden states, attention maps, q/k/v."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .models import decoder_layers, describe
from .output_layer import Head, Hidden

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
    hidden: tuple[Tensor, ...] = ()  #: [B, S, W] each; the embeddings' first
    attentions: tuple[Tensor, ...] = ()  #: [B, heads, S, S] each, probabilities
    relations: tuple[Tensor, ...] = ()  #: queries, keys, values [B, S, W'] before any rotation
    entered: Hidden | None = None  #: what went into the output layer where it was left out

    @property
    def logits(self) -> Tensor | None:
        return None if self.entered is not None else getattr(self.outputs, "logits", None)

    @property
    def response(self) -> Tensor | Hidden | None:
        """Logits, or what they are made of; None for a model without a head."""
        return self.logits if self.entered is None else self.entered

    def to(self, device: torch.device) -> Features:
        """All that the loss looks at, on ``device``."""
        if self.logits is not None and self.logits.device != device:
            self.outputs.logits = self.logits.to(device)
        hidden, attentions, relations = (tuple(t.to(device) for t in ts) for ts in self[1:4])
        return Features(self.outputs, hidden, attentions, relations, self.entered)


class Recorder:
    """Runs a model and records what is needed.

    Args:
        model: its modules are hooked for queries, keys and values, during :meth:`run` only.
        needs: what to record. Attention maps switch the model to eager attention, the only one
            that has them.
        role: "student" or "teacher", for messages.

    Raises:
        ValueError: the model does not have what is needed; with its name and the layer's number.
    """

    def __init__(self, model: PreTrainedModel, needs: Needs, role: str) -> None:
        self.needs = needs
        self.name = f"{role} {describe(model)}"
        self._projections: tuple[nn.Module, ...] = ()
        if needs.relations is not None:
            self._projections = _attention_projections(model, needs.relations, self.name)
        if needs.attentions:
            model.set_attn_implementation("eager")
        self._options: dict[str, Any] = {}
        if needs.hidden:
            self._options["output_hidden_states"] = True
        if needs.attentions:
            self._options["output_attentions"] = True

    def run(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Features:
        """Forward ``model``, the one given at construction or a wrapper of it."""
        with self._recorded() as relations:
            outputs = model(**inputs, **self._options, **options)
        return Features(
            outputs,
            tuple(outputs.hidden_states) if self.needs.hidden else (),
            tuple(outputs.attentions) if self.needs.attentions else (),
            tuple(relations[i] for i in range(len(self._projections))),
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
    def probe(self, model: PreTrainedModel) -> Features:
        """The features of two tokens, to learn their number and widths; ValueError if missing."""
        training = model.training
        ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        try:
            outputs = model.eval()(input_ids=ids, **self._options)
            for kind, wanted in (
                ("hidden_states", self.needs.hidden),
                ("attentions", self.needs.attentions),
            ):
                given = getattr(outputs, kind, None)
                if wanted and (not given or any(item is None for item in given)):
                    raise ValueError(f"terms: the {self.name} gives no {kind.replace('_', ' ')}")
            return self.run(model, {"input_ids": ids})
        finally:
            model.train(training)


def run_without(head: Head | None, model: PreTrainedModel, run: Callable[[], Features]) -> Features:
    """``run()``, a forward of ``model`` that makes no logits if there is a head to leave out."""
    if head is None:
        return run()
    with head.left_out(model) as entered:
        features = run()
    return features._replace(entered=entered())


def _attention_projections(model: PreTrainedModel, layer: int, name: str) -> tuple[nn.Module, ...]:
    """The modules that make queries, keys and values in this layer (from 1)."""
    owner, attribute = decoder_layers(model, "terms: minilm")
    layers = getattr(owner, attribute)
    for module in layers[layer - 1].modules():
        children = dict(module.named_children())
        for names in _PROJECTION_NAMES:
            if all(isinstance(children.get(child), nn.Linear) for child in names):
                return tuple(children[child] for child in names)
    raise ValueError(
        f"terms: minilm: layer {layer} of the {name} has no separate linear maps for queries, "
        f"keys and values ({', '.join('/'.join(names) for names in _PROJECTION_NAMES)})"
    )
