"""Feature losses against plain formulas in float64; layer maps; projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels.losses import features
from kdkernels.losses.features import FeatureProjections, attention_map_loss, hidden_state_loss


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_mask(*shape: int) -> Tensor:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(9)) < 0.7
    mask[..., 0] = True
    return mask


def check(loss: Callable[..., Tensor], want: Callable[[Tensor], Tensor], student: Tensor) -> None:
    """Value and gradient of ``loss`` are those of the formula; gradcheck; float32 is near."""
    a, b = (student.clone().requires_grad_() for _ in range(2))
    got, expected = loss(a), want(b)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, a)[0], torch.autograd.grad(expected, b)[0], rtol=1e-8, atol=1e-11
    )
    assert torch.autograd.gradcheck(loss, (a,))
    assert loss(student.float()).dtype == torch.float32
    torch.testing.assert_close(loss(student.float()).double(), expected, rtol=1e-4, atol=1e-6)


def hidden_formula(student: Tensor, teacher: Tensor, mask: Tensor, distance: str) -> Tensor:
    values = []
    for s, t in zip(student[mask], teacher[mask], strict=True):
        if distance == "mse":
            values.append(sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / len(s))
        elif distance == "cosine":
            values.append(1 - (s @ t) / (math.sqrt(t @ t) * (s @ s).sqrt()))
        else:
            gaps = [(x - y).abs() for x, y in zip(s, t, strict=True)]
            values.append(sum(g**2 / 2 if g < 1 else g - 0.5 for g in gaps) / len(s))
    return sum(values) / len(values)


@pytest.mark.parametrize("distance", features.DISTANCES)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 2, 3)])
def test_hidden_states(distance: str, leading: tuple[int, ...]) -> None:
    student, teacher, mask = randn(*leading, 4), randn(*leading, 4, seed=1), some_mask(*leading)
    check(
        lambda s: hidden_state_loss(s, teacher, mask, distance=distance),
        lambda s: hidden_formula(s, teacher, mask, distance),
        student,
    )


def attention_formula(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    rows = []
    for b in range(len(mask)):
        keys = mask[b]
        for head in range(student.shape[1]):
            for query in keys.nonzero()[:, 0]:
                # The softmax of the KL divides by the sum, 1 in a real map.
                p, q = (m[b, head, query, keys] for m in (teacher, student))
                p, q = p / p.sum(), q / q.sum()
                rows.append((p * (p / q).log()).sum())
    return sum(rows) / len(rows)


@pytest.mark.parametrize("heads", [(2, 2), (1, 3)])
def test_attention_maps(heads: tuple[int, int]) -> None:
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    excluded = ~mask[:, None, None, :]
    student, teacher = (
        randn(2, h, 4, 4, seed=h + i).masked_fill(excluded, -math.inf).softmax(-1)
        for i, h in enumerate(heads)
    )
    check(
        lambda s: attention_map_loss(s, teacher, mask),
        lambda s: attention_formula(s, teacher, mask),
        student,
    )
    assert attention_map_loss(teacher, teacher, mask).abs() < 1e-12


def test_attention_that_is_zero_has_a_finite_gradient() -> None:
    """Causal maps are 0 above the diagonal."""
    causal = torch.ones(4, 4).tril().bool()
    student = randn(1, 1, 4, 4).float().requires_grad_()
    maps = student.masked_fill(~causal, -math.inf).softmax(-1)
    teacher = randn(1, 1, 4, 4, seed=3).float().masked_fill(~causal, -math.inf).softmax(-1)
    loss = attention_map_loss(maps, teacher)
    loss.backward()
    assert math.isfinite(loss.item()) and loss > 0 and student.grad.isfinite().all()


def hidden(**options: Any) -> Callable[..., Tensor]:
    return lambda s, t, m: hidden_state_loss(s, t, m, **options)


LOSSES = {name: hidden(distance=name) for name in features.DISTANCES}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_is_masked_is_not_read(loss: Callable[..., Tensor]) -> None:
    student, teacher, mask = randn(2, 3, 4), randn(2, 3, 4, seed=1), some_mask(2, 3)
    clean = loss(student, teacher, mask)
    student[~mask], teacher[~mask] = math.nan, math.inf
    student.requires_grad_()
    assert loss(student, teacher, mask) == clean
    (gradient,) = torch.autograd.grad(loss(student, teacher, mask), student)
    assert gradient.isfinite().all() and (gradient[~mask] == 0).all()
    nothing = loss(student, teacher, torch.zeros_like(mask))
    assert nothing == 0 and (torch.autograd.grad(nothing, student)[0] == 0).all()
    empty = loss(student[:0], teacher[:0], mask[:0])
    assert empty == 0 and empty.requires_grad


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_zero_vectors_have_a_finite_gradient(loss: Callable[..., Tensor]) -> None:
    student = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(student, torch.ones(2, 3), None), student)
    assert gradient.isfinite().all()


def test_the_denominator_adds_up_over_micro_batches() -> None:
    student, teacher, mask = randn(4, 3, 5), randn(4, 3, 5, seed=1), some_mask(4, 3)
    items = mask.sum()
    parts = [
        hidden_state_loss(student[i : i + 2], teacher[i : i + 2], mask[i : i + 2], num_items=items)
        for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts), hidden_state_loss(student, teacher, mask))
    maps, other = (randn(4, 2, 3, 3, seed=i).softmax(-1) for i in range(2))
    parts = [
        attention_map_loss(maps[i : i + 2], other[i : i + 2], mask[i : i + 2], num_items=items)
        for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts), attention_map_loss(maps, other, mask))


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = (randn(8, 64, seed=i).to(torch.bfloat16) * 300 for i in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        for distance in features.DISTANCES:
            got = hidden_state_loss(student, teacher, distance=distance)
            want = hidden_state_loss(student.double(), teacher.double(), distance=distance)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [
        ("uniform", ((1, 2), (2, 4), (3, 6))),
        ("last", ((3, 6),)),
        ("0:0,1:2", ((0, 0), (1, 2))),
        ([[3, 1], [1, 1]], ((3, 1), (1, 1))),
    ],
)
def test_layer_maps(spec: Any, pairs: Any) -> None:
    assert features.layer_map(spec, 3, 6) == pairs


def test_uniform_ends_at_the_last_layers() -> None:
    assert features.layer_map("uniform", 4, 6) == ((1, 2), (2, 3), (3, 5), (4, 6))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("1:7", "layer_map: teacher layer 7 of pair 1:7 does not exist; T has layers 1..6"),
        ([[4, 1]], "layer_map: student layer 4 of pair 4:1 does not exist; S has layers 1..3"),
        ("-1:1", "student layer -1"),
        ("all", "layer_map: 'all' is not uniform, last, or pairs"),
        ("1:2,1:2", "layer_map: '1:2,1:2' is not"),
        ([], r"layer_map: \[\] is not"),
        ([1, 2], r"layer_map: \[1, 2\] is not"),
    ],
)
def test_layer_maps_that_do_not_exist(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features.layer_map(spec, 3, 6, student="S", teacher="T")


def test_a_teacher_smaller_than_its_map() -> None:
    with pytest.raises(ValueError, match="T has 2, S has 3"):
        features.layer_map("uniform", 3, 2, student="S", teacher="T")


def test_projections_are_made_where_widths_differ() -> None:
    projections = FeatureProjections([(0, 0), (1, 2)], [4, 6], [4, 6, 8])
    assert {name: tuple(p.shape) for name, p in projections.named_parameters()} == {
        "maps.1-2.weight": (8, 6)
    }
    hidden = torch.randn(2, 3, 4)
    assert projections(hidden, (0, 0)) is hidden
    wide = projections(torch.randn(2, 3, 6, dtype=torch.bfloat16), (1, 2))
    assert wide.shape == (2, 3, 8) and wide.dtype == torch.float32


def test_bad_arguments_are_named() -> None:
    a, maps = torch.randn(2, 3, 4), torch.rand(2, 2, 3, 3)
    with pytest.raises(ValueError, match=r"teacher: shape \(2, 3, 5\)"):
        hidden_state_loss(a, torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"mask: shape \(2,\) is not \(2, 3\)"):
        hidden_state_loss(a, a, torch.ones(2))
    with pytest.raises(ValueError, match="distance: 'l1' is not one of mse, cosine, smooth_l1"):
        hidden_state_loss(a, a, distance="l1")
    with pytest.raises(TypeError, match="student: expected a floating-point tensor"):
        hidden_state_loss(a.long(), a)
    with pytest.raises(ValueError, match=r"student: shape \(2, 3, 4\) is not \[B, heads, S, S\]"):
        attention_map_loss(a, maps)
    with pytest.raises(ValueError, match="teacher: shape"):
        attention_map_loss(maps, torch.rand(2, 2, 4, 4))
