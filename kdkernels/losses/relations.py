"""Relation-based distillation: how examples, or tokens, stand to each other.

Widths of student and teacher may differ: only their relations are compared, no projection is
needed. Everything is computed in float32 (float64 for float64 input) whatever autocast says;
teachers are constants. Where ``mask`` is False nothing is read (padding may hold NaN). A loss
without any pair that counts is 0 and stays connected to the graph.

Vectors are [..., N, D]: each leading index is a group of its own, pairs are formed within a group
only, and the mean is over the pairs of all groups. [B, D] relates the examples of a batch,
[B, S, D] the tokens of each example. Under gradient accumulation a relation exists within a
micro-batch: cutting a batch of 32 into 4 leaves 4 * 8 * 7 of its 32 * 31 ordered pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from .features import row_kl
from .masking import check_mask, check_pair, full_precision, masked_mean, unit, widened

#: sentence-transformers' names; "first" and "last" are "cls" and "lasttoken".
POOLINGS = (
    "mean",
    "first",
    "last",
    "cls",
    "lasttoken",
    "max",
    "weightedmean",
    "mean_sqrt_len_tokens",
)
_SHORT = {"first": "cls", "last": "lasttoken"}


def same_pooling(one: str | None, other: str | None) -> bool:
    """Whether two names are of one pooling."""
    return _SHORT.get(one or "", one) == _SHORT.get(other or "", other)


def pooled(hidden: Tensor, mask: Tensor | None = None, *, how: str = "mean") -> Tensor:
    """One vector [B, D] for each example, from hidden states [B, S, D] and mask [B, S].

    ``mean`` over the tokens that count, x_1 to x_n; the first (``first``, ``cls``) or last of them
    (``last``, ``lasttoken``); ``max``, of each entry; ``weightedmean``: ``sum_i i x_i / sum_i i``;
    ``mean_sqrt_len_tokens``: ``sum_i x_i / sqrt(n)``. 0 if there is none.
    float32 (float64 for float64 input).
    """
    if how not in POOLINGS:
        raise ValueError(f"pooling: {how!r} is not one of {', '.join(POOLINGS)}")
    counted = check_mask(mask, hidden.shape[:-1], hidden.device)
    with full_precision(hidden):
        wide = widened(hidden, counted)
        number = counted.sum(-1, keepdim=True).clamp(min=1)
        if how == "mean":
            return wide.sum(-2) / number
        if how == "mean_sqrt_len_tokens":
            return wide.sum(-2) / number.sqrt()
        if how == "max":
            largest = wide.masked_fill(~counted.unsqueeze(-1), -math.inf).amax(-2)
            return torch.where(counted.any(-1, keepdim=True), largest, 0.0)
        order = counted.cumsum(-1)
        if how == "weightedmean":
            weights = (order * counted).unsqueeze(-1)
            return (wide * weights).sum(-2) / weights.sum(-2).clamp(min=1)
        wanted = order == (1 if same_pooling(how, "cls") else order[..., -1:])
        return (wide * (wanted & counted).unsqueeze(-1)).sum(-2)


def _inputs(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    check_pair(student, teacher, same_width=False)
    if student.ndim < 2:
        raise ValueError(f"student: shape {tuple(student.shape)} is not [..., N, D]")
    counted = check_mask(mask, student.shape[:-1], student.device)
    ours, theirs = widened(student, counted), widened(teacher.detach(), counted)
    return ours, theirs.to(ours.dtype), counted


def _pairs(counted: Tensor, *, diagonal: bool) -> Tensor:
    """Bool [..., N, N]: both count, and they are two (unless ``diagonal``)."""
    pairs = counted.unsqueeze(-1) & counted.unsqueeze(-2)
    if diagonal:
        return pairs
    return pairs & ~torch.eye(counted.shape[-1], dtype=torch.bool, device=counted.device)


def rkd_distance_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Distance-wise relational distillation, Park et al. 2019, arXiv:1904.05068, eq. 4-7.

    ``mean_{i != j} huber(|s_i - s_j| / mu_s - |t_i - t_j| / mu_t)``, mu the mean distance of the
    pairs i != j that count, of each model and group; huber as in
    :func:`~kdkernels.losses.features.hidden_state_loss`. Invariant to rotation, shift and scale of
    either model. (The authors' code also averages over the zeros of the diagonal: their value is
    this one times (N - 1) / N.) Coinciding vectors have distance 0 and gradient 0.

    Args:
        student: [..., N, D_s]. teacher: [..., N, D_t]. mask: [..., N]; None: all.

    Returns:
        The loss [], without unit.
    """
    with full_precision(student):
        ours, theirs, counted = _inputs(student, teacher, mask)
        pairs = _pairs(counted, diagonal=False)
        a, b = (_relative_distances(x, pairs) for x in (ours, theirs))
        return masked_mean(functional.smooth_l1_loss(a, b, reduction="none"), pairs)


def _relative_distances(vectors: Tensor, pairs: Tensor) -> Tensor:
    # Not through the matrix product, whose cancellation makes small distances noise.
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    total = torch.where(pairs, distances, 0.0).sum((-2, -1), keepdim=True)
    mean = total / pairs.sum((-2, -1), keepdim=True).clamp(min=1)
    return distances / torch.where(mean == 0, 1.0, mean)


def rkd_angle_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Angle-wise relational distillation, Park et al. 2019, arXiv:1904.05068, eq. 8-10.

    ``mean_{i, j, k all different} huber(cos_s(i, j, k) - cos_t(i, j, k))`` with the cosine of the
    angle at j: ``<unit(x_i - x_j), unit(x_k - x_j)>``, 0 where vectors coincide. (The authors' code
    averages over all N^3 triplets, degenerate ones included.)

    Memory: N^2 * D and N^3 numbers for each group and model; meant for N up to a few hundred.

    Args:
        student: [..., N, D_s]. teacher: [..., N, D_t]. mask: [..., N]; None: all.

    Returns:
        The loss [], without unit.
    """
    with full_precision(student):
        ours, theirs, counted = _inputs(student, teacher, mask)
        different = _pairs(counted, diagonal=False)
        triplets = different.unsqueeze(-1) & different.unsqueeze(-2) & different.unsqueeze(-3)
        a, b = (_cosines(x) for x in (ours, theirs))
        return masked_mean(functional.smooth_l1_loss(a, b, reduction="none"), triplets)


def _cosines(vectors: Tensor) -> Tensor:
    """[..., N, N, N]: vertex, one end, other end."""
    rays = unit(vectors.unsqueeze(-3) - vectors.unsqueeze(-2))  # [..., vertex, end, D]
    return rays @ rays.transpose(-2, -1)


def gram_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Similarity-preserving distillation, Tung and Mori 2019, arXiv:1907.09682, eq. 1-4.

    ``|G_s - G_t|_F^2 / N^2`` with ``G = X X^T``, each row divided by its Euclidean norm. N counts
    the vectors that the mask leaves; a zero row stays 0.

    Args:
        student: [..., N, D_s]. teacher: [..., N, D_t]. mask: [..., N]; None: all.

    Returns:
        The loss [], without unit.
    """
    with full_precision(student):
        ours, theirs, counted = _inputs(student, teacher, mask)
        grams = [unit(x @ x.transpose(-2, -1)) for x in (ours, theirs)]
        return masked_mean((grams[0] - grams[1]).square(), _pairs(counted, diagonal=True))


def self_attention_relation_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    heads: int,
    num_items: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head self-attention relations of queries, keys or values: MiniLM.

    Each model's vectors are cut into ``heads`` relation heads, whatever its own number of heads;
    ``R = softmax(A A^T / sqrt(D / heads))`` for each head, and the loss is KL(R_teacher ||
    R_student) in nats, mean over heads and tokens that count. Wang et al. 2020, arXiv:2002.10957
    (value relation, eq. 8) and 2021, arXiv:2012.15828 (queries and keys as well, relation heads).

    Args:
        student: [B, S, D_s], all queries (or keys, or values) of one layer. teacher: [B, S, D_t].
        mask: [B, S], which tokens are no padding; None: all.
        heads: number of relation heads; divides D_s and D_t.
        num_items: denominator instead of the number of tokens that count.
        backend: of the KL, as for :func:`kdkernels.fused_kd_loss`.

    Returns:
        The loss [], float32 (float64 for a float64 student).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if student.ndim != 3:
        raise ValueError(f"student: shape {tuple(student.shape)} is not [B, S, D]")
    for name, width in (("student", student.shape[-1]), ("teacher", teacher.shape[-1])):
        if heads < 1 or width % heads:
            raise ValueError(f"heads: {heads} does not divide the {name}'s width {width}")
    with full_precision(student):
        ours, theirs, counted = _inputs(student, teacher, mask)
        a, b = (_relation_scores(x, heads) for x in (ours, theirs))
        return row_kl(a, b, counted, num_items, backend)


def _relation_scores(vectors: Tensor, heads: int) -> Tensor:
    """Scaled dot products [B, heads, S, S] of vectors [B, S, D] with themselves."""
    split = vectors.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split @ split.transpose(-2, -1) / math.sqrt(split.shape[-1])
