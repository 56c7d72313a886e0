"""The loss as a named, weighted sum of terms: which there are, their weights, and their balance.

The mathematics is in :mod:`kdkernels.losses`; here a term gets its inputs, its weight and its
denominator. Denominators are those of a whole update, so that the sum over micro-batches is the
update's mean: token terms divide by all tokens that are no padding, terms of examples by all
examples. A relation between examples exists within one micro-batch; its mean there counts with that
micro-batch's share of the examples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses import relations
from ..losses.features import (
    DISTANCES,
    FeatureProjections,
    LayerPair,
    attention_map_loss,
    hidden_state_loss,
    layer_map,
)
from ..losses.masking import unit
from ..losses.relations import POOLINGS, pooled
from . import schedules
from .layer_configs import layer_count, text_config
from .models import attention_dropout, describe
from .recorder import Features, Needs, Recorder
from .schedules import Schedule
from .sentences import settle_from_model
from .tasks import base_of

#: Name of each term -> what it compares.
TERMS = {
    "response": "the logits: alpha * T^2 * divergence + (1 - alpha) * cross-entropy",
    "hidden": "hidden states of the layer map's pairs",
    "embedding": "the outputs of the embeddings",
    "attention": "attention maps of the layer map's pairs (KL)",
    "sentence": "one pooled vector for each example, of the last layers (cosine distance)",
    "rkd_distance": "distances between examples (Park et al. 2019)",
    "rkd_angle": "angles between examples (Park et al. 2019)",
    "gram": "Gram matrices of examples (Tung and Mori 2019)",
    "minilm": "relations of queries, keys and values of the map's last pair (Wang et al. 2020)",
}
_EXAMPLE_RELATIONS = {
    "rkd_distance": relations.rkd_distance_loss,
    "rkd_angle": relations.rkd_angle_loss,
    "gram": relations.gram_loss,
}
#: Terms whose denominator is the number of examples; the others' is the number of tokens.
EXAMPLE_TERMS = ("sentence", *_EXAMPLE_RELATIONS)
#: Terms that the layer map is for.
LAYER_TERMS = {"hidden", "attention", "minilm"}
#: Terms that look at what is computed inside of a layer.
INSIDE_LAYERS = ("attention", "minilm")
BALANCES = ("fixed", "gradient_norm", "uncertainty")

#: How much of a gradient-norm factor is kept when a new one has been measured.
_FACTOR_MEMORY = 0.9


@dataclass
class TermArguments:
    """The options of the terms; mixed into ``DistillationArguments``."""

    terms: dict | str | None = field(
        default=None,
        metadata={
            "help": "Weights of the loss's terms, as hidden=1,gram=linear:0:5 or JSON; response "
            "is 1 unless given. Terms: " + ", ".join(TERMS) + ". A weight is a number, "
            "linear:START:END, cosine:START:END or warmup:VALUE:SHARE."
        },
    )
    layer_map: str = field(
        default="uniform",
        metadata={
            "help": "Layers that hidden and attention compare: uniform, last, or student:teacher "
            "pairs such as 1:2,2:4,3:6 (0 is the embeddings)."
        },
    )
    hidden_distance: str = field(
        default="mse", metadata={"help": "Of hidden and embedding: " + ", ".join(DISTANCES) + "."}
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "help": "How an example becomes one vector: " + ", ".join(POOLINGS) + "; default: as "
            "the teacher's folder says (sentence-transformers), else mean."
        },
    )
    normalize: bool | None = field(
        default=None,
        metadata={
            "help": "Whether these vectors are divided by their length, which only rkd_distance, "
            "rkd_angle and gram see; default: as the teacher's folder says, else not."
        },
    )
    relation_heads: int | None = field(
        default=None,
        metadata={"help": "Heads of the minilm term; default: the teacher's attention heads."},
    )
    balance: str = field(
        default="fixed",
        metadata={
            "help": "fixed: weights as they are; gradient_norm: each term is scaled so that its "
            "gradient is as long as the first one's, before its weight; uncertainty: a learned "
            "scale for each term (Kendall et al. 2018)."
        },
    )
    balance_steps: int = field(
        default=20, metadata={"help": "Measure gradient norms every so many updates."}
    )
    alpha_schedule: str | None = field(
        default=None,
        metadata={
            "help": "alpha over the run, in its place, e.g. linear:1:0.5; evaluations use its end."
        },
    )
    temperature_schedule: str | None = field(
        default=None,
        metadata={
            "help": "temperature over the run, in its place, e.g. cosine:4:1; evaluations use its "
            "end."
        },
    )

    def resolved_terms(self, with_response: bool = True) -> dict[str, Schedule]:
        """Name -> schedule of the weight, ``response`` first; terms that stay 0 are left out.

        ``with_response`` is False for a model without a head.
        """
        given = ({"response": 1.0} if with_response else {}) | _read_terms(self.terms)
        unknown = [name for name in given if name not in TERMS]
        if unknown:
            raise ValueError(f"terms: {unknown[0]!r} is not one of {', '.join(TERMS)}")
        found = {name: schedules.parse(f"terms: {name}", w) for name, w in given.items()}
        for name, weight in found.items():
            if weight.lowest < 0:
                raise ValueError(f"terms: {name}: {given[name]!r} is negative")
        if with_response:
            if not any(weight.highest > 0 for weight in found.values()):
                raise ValueError(f"terms: {self.terms!r}: every weight is 0, nothing is learnt")
            return {name: w for name, w in found.items() if w.highest > 0 or name == "response"}
        if "response" in found and found["response"].highest > 0:
            raise ValueError("terms: response needs logits, and a model without a head has none")
        found = {name: weight for name, weight in found.items() if weight.highest > 0}
        if not found:
            beside = ", ".join(name for name in TERMS if name != "response")
            raise ValueError(f"terms: a model without a head needs at least one of {beside}")
        return found

    def check_terms(self) -> None:
        """ValueError if an option of this class is bad; names the option."""
        self.resolved_terms()
        choices = {"hidden_distance": DISTANCES, "pooling": POOLINGS, "balance": BALANCES}
        for name, allowed in choices.items():
            if getattr(self, name) not in (allowed if name != "pooling" else (*allowed, None)):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        if self.balance_steps < 1:
            raise ValueError(f"balance_steps: {self.balance_steps} is not at least 1")
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"relation_heads: {self.relation_heads} is not at least 1")


def _read_terms(given: dict | str | None) -> dict[str, Any]:
    if not given:
        return {}
    if isinstance(given, dict):
        return given
    try:
        if given.lstrip().startswith("{"):
            return json.loads(given)
        pairs = [part.strip().split("=") for part in given.split(",")]
        found = dict(pairs)
    except ValueError:
        raise ValueError(f"terms: {given!r} is not a list such as hidden=1,gram=0.5") from None
    if len(found) < len(pairs):
        raise ValueError(f"terms: {given!r} holds a term twice")
    return found


def layer_pairs(
    args: TermArguments, student: PreTrainedModel, teacher: PreTrainedModel
) -> tuple[LayerPair, ...]:
    """The pairs of ``args.layer_map``; ValueError, naming both models, if one does not exist."""
    return layer_map(
        args.layer_map,
        layer_count(student.config, "student"),
        layer_count(teacher.config, "teacher"),
        student=f"the student {describe(student)}",
        teacher=f"the teacher {describe(teacher)}",
    )


class Counts(NamedTuple):
    """What the terms of an update are divided by, over micro-batches and processes."""

    positions: Tensor  #: tokens that are no padding
    examples: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Counts:
        """The counts of one batch with this mask [B, S]."""
        return cls(mask.sum(), mask.any(-1).sum())


class _Batch(NamedTuple):
    """One micro-batch, and the counts of its update."""

    student: Features
    teacher: Features
    mask: Tensor  #: bool [B, S]
    counts: Counts


class DistillationTerms(nn.Module):
    """The terms beside ``response``, with everything that training them learns.

    Its parameters (projections; log variances under ``balance="uncertainty"``) and buffers
    (gradient-norm factors) belong into the optimizer and the checkpoint, not into the student.

    Args:
        args: the options.
        student, teacher: or wrappers of them; run once on two tokens to learn numbers and widths of
            their layers.
        weights: of all terms; default: those of ``args`` for models with a head.

    Raises:
        ValueError: a layer, attention maps or a width that the models do not have; with names and
            numbers.
    """

    factors: Tensor

    def __init__(
        self,
        args: TermArguments,
        student: nn.Module,
        teacher: nn.Module,
        weights: dict[str, Schedule] | None = None,
    ) -> None:
        super().__init__()
        run = student, teacher
        student, teacher = base_of(student), base_of(teacher)
        self.args, self.weights = args, args.resolved_terms() if weights is None else weights
        names = [name for name in self.weights if name != "response"]
        self.names = tuple(names)
        layers = layer_count(student.config, "student"), layer_count(teacher.config, "teacher")
        pairs = layer_pairs(args, student, teacher) if LAYER_TERMS & set(names) else ()
        self.pairs, self.last = pairs, layers
        self.attention_pairs = tuple(pair for pair in pairs if 0 not in pair)
        if {"attention", "minilm"} & set(names) and not self.attention_pairs:
            raise ValueError(f"layer_map: {args.layer_map!r} has only embeddings, no attention")
        relation = self.attention_pairs[-1] if "minilm" in names else (None, None)
        attentions = "attention" in names
        if set(EXAMPLE_TERMS) & set(names):
            settle_from_model(teacher, args)
        self.student, self.teacher = (
            Recorder(model, Needs(True, attentions, layer), role)
            for model, layer, role in (
                (run[0], relation[0], "student"),
                (run[1], relation[1], "teacher"),
            )
        )
        ours, theirs = self.student.probe(student), self.teacher.probe(teacher)
        self._check(student, ours, theirs)
        self.heads = args.relation_heads or text_config(teacher.config).num_attention_heads
        self._check_heads(ours, theirs)
        projected: list[LayerPair] = list(pairs) if "hidden" in names else []
        projected += [(0, 0)] if "embedding" in names else []
        projected += [layers] if "sentence" in names else []
        widths = ([h.shape[-1] for h in features.hidden] for features in (ours, theirs))
        self.projections = FeatureProjections(projected, *widths)
        balanced = list(self.weights) if args.balance == "uncertainty" else []
        self.log_variances = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(())) for name in balanced}
        )
        # One for each term; 0: not measured yet.
        self.register_buffer("factors", torch.zeros(len(self.weights)))
        self.to(next(student.parameters()).device)

    def _check(self, student: PreTrainedModel, ours: Features, theirs: Features) -> None:
        for features, recorder, layers in (
            (ours, self.student, self.last[0]),
            (theirs, self.teacher, self.last[1]),
        ):
            if len(features.hidden) != layers + 1:
                raise ValueError(
                    f"terms: the {recorder.name} gives {len(features.hidden)} hidden states for "
                    f"{layers} layers"
                )
        name, probability = attention_dropout(student)
        if "attention" in self.names and probability:
            raise ValueError(
                f"terms: attention: the student's {name} is {probability}, and maps with dropped "
                "entries are no distributions; set it to 0 (--student_dropout 0)"
            )

    def _check_heads(self, ours: Features, theirs: Features) -> None:
        for features, role in ((ours, "student"), (theirs, "teacher")):
            for what, tensor in zip(
                ("queries", "keys", "values"), features.relations, strict=False
            ):
                if tensor.shape[-1] % self.heads:
                    raise ValueError(
                        f"relation_heads: {self.heads} does not divide the width "
                        f"{tensor.shape[-1]} of the {role}'s {what}"
                    )

    # ---- values --------------------------------------------------------------------------------

    def forward(
        self, student: Features, teacher: Features, mask: Tensor, counts: Counts
    ) -> dict[str, Tensor]:
        """Each term's contribution to the update's mean, without its weight.

        Args:
            student, teacher: from the two recorders, on one device.
            mask: bool [B, S], tokens that are no padding.
            counts: of the whole update.
        """
        batch = _Batch(student, teacher, mask, counts)
        return {name: self._value(name, batch) for name in self.names}

    def _value(self, name: str, batch: _Batch) -> Tensor:
        if name in EXAMPLE_TERMS:
            return self._of_examples(name, batch)
        if name == "attention":
            losses = [
                attention_map_loss(
                    batch.student.attentions[ours - 1],
                    batch.teacher.attentions[theirs - 1],
                    batch.mask,
                    num_items=batch.counts.positions,
                )
                for ours, theirs in self.attention_pairs
            ]
        elif name == "minilm":
            losses = [
                relations.self_attention_relation_loss(
                    ours, theirs, batch.mask, heads=self.heads, num_items=batch.counts.positions
                )
                for ours, theirs in zip(
                    batch.student.relations, batch.teacher.relations, strict=True
                )
            ]
        else:
            losses = [
                hidden_state_loss(
                    self.projections(batch.student.hidden[pair[0]], pair),
                    batch.teacher.hidden[pair[1]],
                    batch.mask,
                    distance=self.args.hidden_distance,
                    num_items=batch.counts.positions,
                )
                for pair in (self.pairs if name == "hidden" else ((0, 0),))
            ]
        return torch.stack(losses).mean()

    def _of_examples(self, name: str, batch: _Batch) -> Tensor:
        present, examples = batch.mask.any(-1), batch.counts.examples
        ours, theirs = (
            pooled(features.hidden[-1], batch.mask, how=self.args.pooling or "mean")
            for features in (batch.student, batch.teacher)
        )
        if self.args.normalize:
            ours, theirs = unit(ours), unit(theirs)
        if name == "sentence":
            ours = self.projections(ours, self.last)
            return hidden_state_loss(ours, theirs, present, distance="cosine", num_items=examples)
        mean = _EXAMPLE_RELATIONS[name](ours, theirs, present)
        return mean * (present.sum() / examples.clamp(min=1))

    # ---- weights -------------------------------------------------------------------------------

    def total(self, values: Mapping[str, Tensor], progress: float, share: Tensor | float) -> Tensor:
        """The weighted, balanced sum.

        ``uncertainty``: ``w (exp(-s) L + s) / 2`` with a learned ``s`` for each term (Kendall et
        al. 2018, arXiv:1705.07115). ``share``: the micro-batch's part of the update, so that ``s``
        counts once in it.
        """
        parts = []
        for at, name in enumerate(self.weights):
            if name not in values:
                continue
            value = values[name]
            if self.args.balance == "uncertainty":
                s = self.log_variances[name]
                value = (torch.exp(-s) * value + s * share) / 2
            elif self.args.balance == "gradient_norm":
                factor = self.factors[at]
                value = value * torch.where(factor == 0, 1.0, factor)
            parts.append(self.weights[name].at(progress) * value)
        return torch.stack(parts).sum()

    def gradient_norms(
        self, values: Mapping[str, Tensor], parameters: list[nn.Parameter]
    ) -> Tensor:
        """Length of each term's gradient in ``parameters``, [terms]; 0 where there is none.

        One backward for each term. After GradNorm (Chen et al. 2018, arXiv:1711.02257), with the
        factors computed instead of learned.
        """
        norms = torch.zeros_like(self.factors)
        for at, name in enumerate(self.weights):
            if name in values and values[name].requires_grad:
                gradients = torch.autograd.grad(
                    values[name], parameters, retain_graph=True, allow_unused=True
                )
                squares = [g.float().square().sum() for g in gradients if g is not None]
                if squares:
                    norms[at] = torch.stack(squares).sum().sqrt()
        return norms

    @torch.no_grad()
    def rebalance(self, norms: Tensor) -> None:
        """Move every factor towards (first term's norm) / (its own norm), on a log scale."""
        measured = norms > 0
        reference = norms[measured.to(torch.uint8).argmax()]
        wanted = reference / torch.where(measured, norms, 1.0)
        old = torch.where(self.factors == 0, wanted, self.factors)
        new = old**_FACTOR_MEMORY * wanted ** (1 - _FACTOR_MEMORY)
        self.factors.copy_(torch.where(measured & (reference > 0), new, self.factors))

    def state_to_log(self, progress: float) -> dict[str, float]:
        """Weights that change and what balancing has found, by name."""
        logged = {
            f"{name}_weight": weight.at(progress)
            for name, weight in self.weights.items()
            if weight.kind != "constant"
        }
        if self.args.balance == "gradient_norm":
            factors = zip(self.weights, self.factors.tolist(), strict=True)
            logged |= {f"{name}_factor": factor for name, factor in factors}
        for name, s in self.log_variances.items():
            logged[f"{name}_log_variance"] = s.item()
        return logged
