"""Feature-based distillation: hidden states, attention maps, and which layers are compared.

Everything is computed in float32 (float64 for float64 input), whatever the input's dtype and
autocast say. Teachers are constants: no gradient flows into them. Where ``mask`` is False nothing
is read, so padding may hold NaN; if it is False everywhere, the loss is 0 and stays connected to
the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..functional import fused_kd_loss
from .masking import check_mask, check_pair, full_precision, masked_mean, unit, widened

DISTANCES = ("mse", "cosine", "smooth_l1")

#: (student layer, teacher layer); 0 is the output of the embeddings, n that of the n-th layer.
LayerPair = tuple[int, int]


def hidden_state_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    distance: str = "mse",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Mean over the positions that count of the distance between two vectors h_s and h_t.

    ==========  ==================================================================================
    mse         ``mean_w (h_s - h_t)^2``. FitNets, Romero et al. 2015, arXiv:1412.6550; TinyBERT,
                Jiao et al. 2020, arXiv:1909.10351
    cosine      ``1 - h_s.h_t / (|h_s| |h_t|)``; 1 if either is 0. DistilBERT, Sanh et al. 2019,
                arXiv:1910.01108
    smooth_l1   ``mean_w huber(h_s - h_t)``; ``huber(x) = x^2 / 2`` to |x| = 1, then ``|x| - 1/2``
    ==========  ==================================================================================

    Args:
        student, teacher: [..., W], any floating dtype; project first where widths differ.
        mask: [...], which positions count; None: all.
        distance: one of the names above.
        num_items: denominator instead of the number of positions that count, for gradient
            accumulation.

    Returns:
        The loss [], float32 (float64 for a float64 student); no unit but that of the features.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_pair(student, teacher, same_width=True)
    if distance not in DISTANCES:
        raise ValueError(f"distance: {distance!r} is not one of {', '.join(DISTANCES)}")
    counted = check_mask(mask, student.shape[:-1], student.device)
    with full_precision(student):
        ours, theirs = widened(student, counted), widened(teacher.detach(), counted)
        theirs = theirs.to(ours.dtype)
        if distance == "mse":
            values = (ours - theirs).square().mean(-1)
        elif distance == "cosine":
            values = 1 - (unit(ours) * unit(theirs)).sum(-1)
        else:
            values = functional.smooth_l1_loss(ours, theirs, reduction="none").mean(-1)
        return masked_mean(values, counted, num_items)


def row_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    mask: Tensor,
    num_items: float | Tensor | None,
    backend: str | None,
) -> Tensor:
    """KL(teacher || student) of the softmax over keys, averaged over heads and counted queries.

    Scores are [B, H, S, S] (a log-probability is its own score), ``mask`` [B, S] masks queries and
    keys. ``num_items`` counts queries, not heads. The one KL is :func:`fused_kd_loss`'s.
    """
    heads = student_scores.shape[1]
    excluded = ~mask[:, None, None, :]
    queries = torch.where(mask, 0, -100)[:, None, :].expand(-1, heads, -1)
    items = None if num_items is None else num_items * heads
    # A backend may refuse a row without any finite entry even where the row does not count.
    excluded = excluded & mask[:, None, :, None]
    loss = fused_kd_loss(
        student_scores.masked_fill(excluded, -torch.inf),
        teacher_scores.masked_fill(excluded, -torch.inf),
        queries,
        alpha=1.0,
        divergence="forward_kl",
        num_items=items,
        backend=backend,
    )
    assert isinstance(loss, Tensor)
    return loss


def attention_map_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    num_items: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL(teacher's attention || student's) in nats, mean over heads and queries that count.

    Attention maps are what the models give: probabilities over the keys for each query. With a
    different number of heads the mean over heads is compared, a distribution, too. Probabilities
    below float32's smallest normal number count as that number. Used by MiniLM (Wang et al. 2020,
    arXiv:2002.10957) for the last layer; TinyBERT compares with the MSE instead.

    Args:
        student: [B, H_s, S, S], rows sum to 1: without dropout.
        teacher: [B, H_t, S, S].
        mask: [B, S], which tokens are no padding, as queries and as keys; None: all.
        num_items: denominator instead of the number of queries that count.
        backend: of the KL, as for :func:`kdkernels.fused_kd_loss`.

    Returns:
        The loss [], float32 (float64 for a float64 student).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, maps in (("student", student), ("teacher", teacher)):
        if maps.ndim != 4 or maps.shape[-1] != maps.shape[-2]:
            raise ValueError(f"{name}: shape {tuple(maps.shape)} is not [B, heads, S, S]")
    if student.shape[0] != teacher.shape[0] or student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"teacher: shape {tuple(teacher.shape)} does not fit the student's "
            f"{tuple(student.shape)}"
        )
    counted = check_mask(mask, student.shape[::2], student.device)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    rows = counted[:, None, :]
    tiny = torch.finfo(torch.float32).tiny
    with full_precision(student):
        scores = [widened(maps, rows).clamp_min(tiny).log() for maps in (student, teacher.detach())]
        return row_kl(scores[0], scores[1], counted, num_items, backend)


# ---- layer maps ---------------------------------------------------------------------------------


def layer_map(
    spec: str | Sequence[Sequence[int]],
    student_layers: int,
    teacher_layers: int,
    *,
    student: str = "student",
    teacher: str = "teacher",
) -> tuple[LayerPair, ...]:
    """The pairs of layers that ``spec`` names; ValueError if one does not exist.

    Args:
        spec: ``"uniform"`` (student layer i and teacher layer ceil(i * T / S), i = 1..S, so that
            the last ones meet), ``"last"`` (the last ones only), or pairs: ``"1:2,2:4"`` or
            ``[[1, 2], [2, 4]]``. Layer 0 is the embeddings.
        student_layers, teacher_layers: S and T, without the embeddings.
        student, teacher: what the models are called in the error.
    """
    if spec == "last":
        return ((student_layers, teacher_layers),)
    if spec == "uniform":
        if teacher_layers < student_layers:
            raise ValueError(
                f"layer_map: 'uniform' needs a teacher with at least as many layers as the "
                f"student; {teacher} has {teacher_layers}, {student} has {student_layers}"
            )
        steps = range(1, student_layers + 1)
        return tuple((i, -(-i * teacher_layers // student_layers)) for i in steps)
    pairs = _parse_pairs(spec)
    for side, name, layers in ((0, student, student_layers), (1, teacher, teacher_layers)):
        for pair in pairs:
            if not 0 <= pair[side] <= layers:
                raise ValueError(
                    f"layer_map: {('student', 'teacher')[side]} layer {pair[side]} of pair "
                    f"{pair[0]}:{pair[1]} does not exist; {name} has layers 1..{layers} "
                    "(0 is the embeddings)"
                )
    return pairs


def _parse_pairs(spec: str | Sequence[Sequence[int]]) -> tuple[LayerPair, ...]:
    error = ValueError(f"layer_map: {spec!r} is not uniform, last, or pairs such as 1:2,2:4")
    try:
        items = [part.split(":") for part in spec.split(",")] if isinstance(spec, str) else spec
        pairs = tuple((int(ours), int(theirs)) for ours, theirs in items)
    except (TypeError, ValueError):
        raise error from None
    if not pairs or len(set(pairs)) != len(pairs):
        raise error
    return pairs


class FeatureProjections(nn.Module):
    """Learned maps from the student's width to the teacher's, one for each pair that needs one.

    ``weight`` is [teacher width, student width], float32, without bias (TinyBERT's W_h). A pair of
    equal widths is left as it is. The module belongs to the training only: into the optimizer and
    the checkpoint, not into the exported student.

    Args:
        pairs: the pairs of layers, as from :func:`layer_map`.
        student_widths, teacher_widths: width of every hidden state, the embeddings' first.
    """

    def __init__(
        self,
        pairs: Sequence[LayerPair],
        student_widths: Sequence[int],
        teacher_widths: Sequence[int],
    ) -> None:
        super().__init__()
        self.maps = nn.ModuleDict()
        for ours, theirs in pairs:
            widths = student_widths[ours], teacher_widths[theirs]
            if widths[0] != widths[1]:
                self.maps[f"{ours}-{theirs}"] = nn.Linear(*widths, bias=False)

    def forward(self, hidden: Tensor, pair: LayerPair) -> Tensor:
        """Hidden states [..., student width] -> [..., teacher width] of this pair."""
        name = f"{pair[0]}-{pair[1]}"
        if name not in self.maps:
            return hidden
        weight = self.maps[name].get_parameter("weight")
        with full_precision(hidden):
            return functional.linear(hidden.to(weight.dtype), weight)
