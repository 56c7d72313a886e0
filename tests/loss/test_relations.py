"""Relation losses against plain loops in float64: values, gradients, masks, coinciding vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from test_features import check, randn, some_mask
from torch import Tensor

from kdkernels.losses import relations
from kdkernels.losses.relations import (
    gram_loss,
    pooled,
    rkd_angle_loss,
    rkd_distance_loss,
    self_attention_relation_loss,
)


def huber(x: Tensor) -> Tensor:
    return x**2 / 2 if x.abs() < 1 else x.abs() - 0.5


def groups(student: Tensor, teacher: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The vectors that count of each group."""
    flat = (x.flatten(0, -3) if x.ndim > 2 else x[None] for x in (student, teacher))
    masks = mask.reshape(-1, mask.shape[-1])
    return [(s[m], t[m]) for s, t, m in zip(*flat, masks, strict=True)]


def distance_formula(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    values = []
    for s, t in groups(student, teacher, mask):
        pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if i != j]
        d = [[(x[i] - x[j]).square().sum().sqrt() for i, j in pairs] for x in (s, t)]
        mu = [sum(of_model) / len(pairs) for of_model in d if pairs]
        values += [huber(a / mu[0] - b / mu[1]) for a, b in zip(*d, strict=True)]
    return sum(values) / len(values)


def angle_formula(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    values = []
    for s, t in groups(student, teacher, mask):
        n = range(len(s))
        for i, j, k in ((i, j, k) for i in n for j in n for k in n if len({i, j, k}) == 3):
            a, b = (
                (x[i] - x[j]) @ (x[k] - x[j]) / ((x[i] - x[j]).norm() * (x[k] - x[j]).norm())
                for x in (s, t)
            )
            values.append(huber(a - b))
    return sum(values) / len(values)


def gram_formula(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    values = []
    for s, t in groups(student, teacher, mask):
        rows = []
        for x in (s, t):
            gram = [[a @ b for b in x] for a in x]
            rows.append([g / sum(v**2 for v in row).sqrt() for row in gram for g in row])
        values += [(a - b) ** 2 for a, b in zip(*rows, strict=True)]
    return sum(values) / len(values)


FORMULAS = {
    "distance": (rkd_distance_loss, distance_formula),
    "angle": (rkd_angle_loss, angle_formula),
    "gram": (gram_loss, gram_formula),
}
every_relation = pytest.mark.parametrize("name", FORMULAS)


@every_relation
@pytest.mark.parametrize("leading", [(5,), (2, 4), (2, 1, 4)])
def test_relations_of_examples(name: str, leading: tuple[int, ...]) -> None:
    loss, formula = FORMULAS[name]
    student, teacher, mask = randn(*leading, 3), randn(*leading, 6, seed=1), some_mask(*leading)
    check(lambda s: loss(s, teacher, mask), lambda s: formula(s, teacher, mask), student)


def test_distances_do_not_see_scale_and_shift() -> None:
    student = randn(6, 4)
    for loss in (rkd_distance_loss, rkd_angle_loss):
        assert loss(student, 3 * student + 7) < 1e-20


def relation_formula(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    values = []
    for s, t in groups(student, teacher, mask):
        for head in range(heads):
            p, q = (
                (a @ a.T / math.sqrt(a.shape[-1])).softmax(-1)
                for a in (x.reshape(len(x), heads, -1)[:, head] for x in (t, s))
            )
            values += list((p * (p / q).log()).sum(-1))
    return sum(values) / len(values)


def test_relations_of_queries_keys_or_values() -> None:
    student, teacher, mask = randn(2, 4, 4), randn(2, 4, 6, seed=1), some_mask(2, 4)
    check(
        lambda s: self_attention_relation_loss(s, teacher, mask, heads=2),
        lambda s: relation_formula(s, teacher, mask, 2),
        student,
    )
    parts = [
        self_attention_relation_loss(
            student[i : i + 1], teacher[i : i + 1], mask[i : i + 1], heads=2, num_items=mask.sum()
        )
        for i in range(2)
    ]
    whole = self_attention_relation_loss(student, teacher, mask, heads=2)
    torch.testing.assert_close(sum(parts), whole)


LOSSES: dict[str, Callable[..., Tensor]] = {
    **{name: loss for name, (loss, _) in FORMULAS.items()},
    "attention": lambda s, t, m=None: self_attention_relation_loss(s, t, m, heads=1),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_what_is_masked_is_not_read(loss: Callable[..., Tensor]) -> None:
    student, teacher, mask = randn(2, 5, 4), randn(2, 5, 4, seed=1), some_mask(2, 5)
    clean = loss(student, teacher, mask)
    student[~mask], teacher[~mask] = math.nan, math.inf
    student.requires_grad_()
    torch.testing.assert_close(loss(student, teacher, mask), clean)
    (gradient,) = torch.autograd.grad(loss(student, teacher, mask), student)
    assert gradient.isfinite().all() and (gradient[~mask] == 0).all()


@every_loss
def test_nothing_to_relate_is_zero_with_a_graph(loss: Callable[..., Tensor]) -> None:
    student, teacher = randn(1, 4, 3).requires_grad_(), randn(1, 4, 3, seed=1)
    one = torch.tensor([[True, False, False, False]])
    for value in (
        loss(student, teacher, torch.zeros_like(one)),
        loss(student, teacher, one),
        loss(student[:, :1], teacher[:, :1]),
        loss(student[:0], teacher[:0]),
    ):
        assert value.abs() < 1e-12 and value.requires_grad
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.abs().max() < 1e-12


@every_loss
def test_coinciding_vectors_have_finite_gradients(loss: Callable[..., Tensor]) -> None:
    for student in (torch.zeros(1, 4, 3), torch.ones(1, 4, 3), torch.eye(4, 3)[None]):
        student[:, 1] = student[:, 0]
        student.requires_grad_()
        value = loss(student, randn(1, 4, 3).float())
        (gradient,) = torch.autograd.grad(value, student)
        assert math.isfinite(value.item()) and gradient.isfinite().all()
        assert math.isfinite(loss(randn(1, 4, 3).float(), student).item())


@every_loss
def test_autocast_does_not_round(loss: Callable[..., Tensor]) -> None:
    student, teacher = randn(1, 6, 8), randn(1, 6, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(student.float(), teacher.float())
    torch.testing.assert_close(got.double(), loss(student, teacher), rtol=1e-4, atol=1e-6)


def test_pooling() -> None:
    hidden, mask = randn(3, 4, 2), torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    hidden[0, 0] = math.nan
    assert torch.equal(pooled(hidden, mask)[0], hidden[0, 1:3].mean(0))
    for how in ("first", "cls"):
        assert torch.equal(pooled(hidden, mask, how=how)[:2], hidden[[0, 1], [1, 0]])
    for how in ("last", "lasttoken"):
        assert torch.equal(pooled(hidden, mask, how=how)[:2], hidden[[0, 1], [2, 3]])
    assert torch.equal(pooled(hidden, mask, how="max")[0], hidden[0, 1:3].amax(0))
    weighted = (hidden[0, 1] + 2 * hidden[0, 2]) / 3
    torch.testing.assert_close(pooled(hidden, mask, how="weightedmean")[0], weighted)
    rooted = hidden[0, 1:3].sum(0) / math.sqrt(2)
    torch.testing.assert_close(pooled(hidden, mask, how="mean_sqrt_len_tokens")[0], rooted)
    for how in relations.POOLINGS:
        assert (pooled(hidden, mask, how=how)[2] == 0).all()
    with pytest.raises(ValueError, match="pooling: 'median' is not one of mean, first, last"):
        pooled(hidden, mask, how="median")


def test_bad_arguments_are_named() -> None:
    a = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"teacher: shape \(2, 4, 4\)"):
        rkd_distance_loss(a, torch.randn(2, 4, 4))
    with pytest.raises(ValueError, match=r"student: shape \(4,\) is not \[..., N, D\]"):
        gram_loss(a[0, 0], a[0, 0])
    with pytest.raises(ValueError, match="heads: 3 does not divide the student's width 4"):
        self_attention_relation_loss(a, a, heads=3)
    with pytest.raises(ValueError, match="mask: shape"):
        rkd_angle_loss(a, a, torch.ones(2))
