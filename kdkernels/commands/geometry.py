"""How much of an encoder's geometry a student keeps: numbers over held-out examples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..losses.masking import unit

#: Neighbours of an example that are compared.
NEIGHBOURS = 5
#: With fewer vectors there are too few pairs for a correlation.
FEWEST_VECTORS = 3


def _cosines(vectors: Tensor) -> Tensor:
    """Cosines [N, N] of vectors [N, D]."""
    rows = unit(vectors.double())
    return rows @ rows.T


def pairwise_cosines(vectors: Tensor) -> Tensor:
    """The N (N - 1) / 2 cosines of all pairs of vectors [N, D], each pair once."""
    first, second = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return _cosines(vectors)[first, second]


def _correlation(ours: Tensor, theirs: Tensor) -> float:
    return float((unit(ours - ours.mean()) * unit(theirs - theirs.mean())).sum())


def pearson(student: Tensor, teacher: Tensor) -> float:
    """Linear correlation, in [-1, 1], of the pairwise cosines of both models.

    Args:
        student: [N, D_s]. teacher: [N, D_t]. N >= 3.
    """
    return _correlation(pairwise_cosines(student), pairwise_cosines(teacher))


def spearman(student: Tensor, teacher: Tensor) -> float:
    """Rank correlation, in [-1, 1], of the pairwise cosines; arguments as for :func:`pearson`."""
    ranks = []
    for vectors in (student, teacher):
        cosines = pairwise_cosines(vectors)
        rank = torch.empty_like(cosines)  # ties (identical sentences) get neighbouring ranks
        rank[cosines.argsort(stable=True)] = torch.arange(len(cosines), dtype=rank.dtype)
        ranks.append(rank)
    return _correlation(ranks[0], ranks[1])


def neighbour_overlap(student: Tensor, teacher: Tensor, k: int = NEIGHBOURS) -> float:
    """Mean share of an example's k nearest (by cosine) that both models agree on, in [0, 1]."""
    k = min(k, len(student) - 1)
    nearest = []
    for vectors in (student, teacher):
        cosines = _cosines(vectors).fill_diagonal_(-torch.inf)
        hits = torch.zeros_like(cosines).scatter_(1, cosines.topk(k, dim=1).indices, 1.0)
        nearest.append(hits)
    return float((nearest[0] * nearest[1]).sum(1).mean() / k)


def mean_cosine(student: Tensor, teacher: Tensor) -> float | None:
    """Mean cosine of the two models' vectors of one example; None if the widths differ."""
    if student.shape != teacher.shape:
        return None
    return float((unit(student.double()) * unit(teacher.double())).sum(-1).mean())


def compare(student: Tensor, teacher: Tensor) -> dict[str, float | None]:
    """All of them, by the names that the table uses; NaN for a student that has diverged."""
    if not student.isfinite().all():  # NaN has no rank, but would get one
        return dict.fromkeys(("spearman", "pearson", "cosine", "neighbours"), math.nan)
    return {
        "spearman": spearman(student, teacher),
        "pearson": pearson(student, teacher),
        "cosine": mean_cosine(student, teacher),
        "neighbours": neighbour_overlap(student, teacher),
    }
