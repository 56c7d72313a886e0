"""Laws that hold for every input (hypothesis)."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from cases import evaluate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

settings.register_profile(
    "kdkernels",
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("kdkernels")

SPECS = st.sampled_from(cases.SPECS)
#: Those without negative powers, which no float32 holds for peaked distributions.
TAME = st.sampled_from([s for s in cases.SPECS if min((*s.parameters, 0.0)) >= 0])
SEEDS = st.integers(0, 2**20)
ROWS, VOCABS = st.integers(1, 9), st.integers(1, 150)
DTYPES = st.sampled_from(cases.DTYPES[:3])
TEMPERATURES = st.sampled_from((0.5, 1.0, 2.0, 3.0, 7.3))


def near(one: Tensor, other: Tensor, relative: float = 2e-5) -> None:
    """Equal relative to the largest entry."""
    scale = float(other.double().abs().max()) if other.numel() else 0.0
    torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=relative * scale + 1e-6)


@given(spec=TAME, seed=SEEDS, rows=ROWS, vocab=VOCABS, temperature=TEMPERATURES)
def test_constants_added_to_rows_change_nothing(
    backend: str,
    device: str,
    spec: cases.Spec,
    seed: int,
    rows: int,
    vocab: int,
    temperature: float,
) -> None:
    """Integers added to multiples of 1/64: no rounding."""
    student, teacher = (
        (z * 64).round() / 64 for z in cases.pair((rows, vocab), seed=seed, device=device)
    )
    shifts = torch.randint(-500, 500, (2, rows, 1), generator=cases.generator(seed)).to(device)
    options = {"backend": backend, "temperature": temperature, **spec.arguments}
    base = evaluate(student, teacher, **options)
    moved = evaluate(student + shifts[0], teacher + shifts[1], **options)
    near(moved.loss, base.loss, 1e-3)
    near(moved.gradient, base.gradient, 1e-3)


@given(spec=SPECS, seed=SEEDS, rows=ROWS, vocab=VOCABS)
def test_the_order_of_the_vocabulary_and_of_the_rows_is_immaterial(
    backend: str, device: str, spec: cases.Spec, seed: int, rows: int, vocab: int
) -> None:
    student, teacher = cases.pair((rows, vocab), seed=seed, device=device)
    labels = cases.labels_for((rows,), vocab, seed=seed, device=device)
    chance = cases.generator(seed)
    columns = torch.randperm(vocab, generator=chance).to(device)
    order = torch.randperm(rows, generator=chance).to(device)
    position = torch.argsort(columns)
    moved_labels = torch.where(labels < 0, labels, position[labels.clamp(min=0)])
    options = {"backend": backend, **spec.arguments}
    base = evaluate(student, teacher, labels, **options)
    moved = evaluate(
        student[order][:, columns], teacher[order][:, columns], moved_labels[order], **options
    )
    near(moved.loss, base.loss)
    near(moved.gradient, base.gradient[order][:, columns])


@given(spec=SPECS, seed=SEEDS, rows=ROWS, vocab=VOCABS, log=st.integers(-2, 3), dtype=DTYPES)
def test_temperature_is_a_scale_of_the_logits(
    backend: str,
    device: str,
    spec: cases.Spec,
    seed: int,
    rows: int,
    vocab: int,
    log: int,
    dtype: torch.dtype,
) -> None:
    """loss(z, T) = T^2 loss(z / T, 1): a power of two, so that z / T is exact."""
    temperature = 2.0**log
    student, teacher = cases.pair((rows, vocab), dtype, seed=seed, scale=1.0, device=device)
    options = {"backend": backend, **spec.arguments}
    hot = evaluate(student, teacher, temperature=temperature, **options)
    cold = evaluate(student.float() / temperature, teacher.float() / temperature, **options)
    near(hot.loss, cold.loss * temperature**2)
    near(hot.gradient, cold.gradient * temperature, 2e-5 + torch.finfo(dtype).eps)
    scaled = evaluate(student, teacher, logit_scale=1 / temperature, **options)
    near(scaled.loss, cold.loss)


@given(spec=SPECS, seed=SEEDS, rows=ROWS, vocab=VOCABS, dtype=DTYPES, distance=st.integers(0, 9))
def test_no_row_is_negative_and_equal_rows_are_exactly_zero(
    backend: str,
    device: str,
    spec: cases.Spec,
    seed: int,
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    distance: int,
) -> None:
    student, teacher = cases.pair((rows, vocab), seed=seed, device=device)
    teacher = (student + teacher * 2.0**-distance).to(dtype)
    student = student.to(dtype)
    options = {"backend": backend, "reduction": "none", "temperature": 2.0, **spec.arguments}
    assert (evaluate(student, teacher, **options).loss >= 0).all()
    shifted = student.clone()
    same = evaluate(student, shifted, **options)
    assert (same.loss == 0).all()


@given(seed=SEEDS, rows=ROWS, vocab=VOCABS, temperature=TEMPERATURES, dtype=DTYPES)
def test_jensen_shannon_at_a_half_is_symmetric(
    backend: str,
    device: str,
    seed: int,
    rows: int,
    vocab: int,
    temperature: float,
    dtype: torch.dtype,
) -> None:
    student, teacher = cases.pair((rows, vocab), dtype, seed=seed, device=device)
    options = {"backend": backend, "divergence": "jsd", "temperature": temperature}
    near(
        evaluate(student, teacher, **options).loss,
        evaluate(teacher, student, **options).loss,
        1e-5,
    )


@given(spec=SPECS, seed=SEEDS, rows=st.integers(2, 12), vocab=VOCABS, cut=st.floats(0, 1))
def test_micro_batches_with_num_items_sum_to_the_batch(
    backend: str, device: str, spec: cases.Spec, seed: int, rows: int, vocab: int, cut: float
) -> None:
    student, teacher = cases.pair((rows, vocab), seed=seed, device=device)
    labels = cases.labels_for((rows,), vocab, seed=seed, device=device)
    at = round(cut * rows)
    items = (labels != -100).sum()
    options = {"backend": backend, **spec.arguments}
    whole = evaluate(student, teacher, labels, **options)
    parts = [
        evaluate(student[rows], teacher[rows], labels[rows], num_items=items, **options)
        for rows in (slice(0, at), slice(at, None))
    ]
    near(parts[0].loss + parts[1].loss, whole.loss)
    near(torch.cat([part.gradient for part in parts]), whole.gradient, 1e-6)


@given(spec=TAME, seed=SEEDS, rows=ROWS, vocab=VOCABS, temperature=TEMPERATURES)
def test_gradient_rows_sum_to_zero(
    backend: str,
    device: str,
    spec: cases.Spec,
    seed: int,
    rows: int,
    vocab: int,
    temperature: float,
) -> None:
    student, teacher = cases.pair((rows, vocab), seed=seed, device=device)
    options = {"backend": backend, "temperature": temperature, **spec.arguments}
    gradient = evaluate(student, teacher, **options).gradient.double()
    assert (gradient.sum(-1).abs() <= 1e-5 * (gradient.abs().sum(-1) + temperature)).all()


@given(
    spec=SPECS,
    seed=SEEDS,
    rows=ROWS,
    vocab=VOCABS,
    tail=st.integers(1, 140),
    dtype=DTYPES,
    temperature=TEMPERATURES,
)
def test_a_tail_that_both_exclude_changes_nothing(
    backend: str,
    device: str,
    spec: cases.Spec,
    seed: int,
    rows: int,
    vocab: int,
    tail: int,
    dtype: torch.dtype,
    temperature: float,
) -> None:
    student, teacher = cases.pair((rows, vocab), dtype, seed=seed, device=device)
    labels = cases.labels_for((rows,), vocab, seed=seed, device=device)
    options = {"backend": backend, "temperature": temperature, **spec.arguments}
    base = evaluate(student, teacher, labels, **options)
    dead = torch.full((rows, tail), -math.inf, dtype=dtype, device=device)
    padded = evaluate(
        torch.cat([student, dead], -1), torch.cat([teacher, dead], -1), labels, **options
    )
    near(padded.loss, base.loss)
    near(padded.gradient[:, :vocab], base.gradient, 2e-5 + torch.finfo(dtype).eps)
    assert (padded.gradient[:, vocab:] == 0).all()


@given(seed=SEEDS, rows=ROWS, vocab=VOCABS, weight=st.floats(-2, 2))
def test_the_loss_is_linear_in_alpha_and_in_the_weights(
    backend: str, device: str, seed: int, rows: int, vocab: int, weight: float
) -> None:
    student, teacher = cases.pair((rows, vocab), seed=seed, device=device)
    labels = cases.labels_for((rows,), vocab, seed=seed, ignored=0.0, device=device)
    ce, kd, mixed = (
        evaluate(student, teacher, labels, backend=backend, alpha=alpha)
        for alpha in (0.0, 1.0, weight)
    )
    for part in (0, 1):
        near(mixed[part], weight * kd[part] + (1 - weight) * ce[part])
    weights = torch.full((rows,), weight, device=device)
    weighted = evaluate(student, teacher, labels, backend=backend, alpha=1.0, token_weights=weights)
    near(weighted.loss, weight * kd.loss)
    assert weighted.loss == pytest.approx(float(weight * kd.loss), abs=1e-5, rel=1e-5)
