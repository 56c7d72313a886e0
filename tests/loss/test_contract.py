"""The contract's table of adversarial inputs; ``rowNN`` in a name is the row of the table."""

from __future__ import annotations

import math
import mmap
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import evaluate, labels_for, logits, oracle, pair
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdkernels import fused_kd_loss, ops
from kdkernels.backends import BACKENDS
from kdkernels.problem import Options, Problem

INF = math.inf
#: Divergences that stay finite where the teacher excludes an entry (-inf).
FINITE_WITHOUT_TEACHER = [s for s in cases.FEW if s.name not in ("reverse_kl", "alpha_beta")]
#: Exponents so different that the smaller one's power is still large where the larger one's is 0.
UNEVEN = tuple(cases.Spec("alpha_beta", pair) for pair in ((2.0, 0.05), (0.05, 2.0)))
REDUCTIONS = pytest.mark.parametrize("reduction", ("mean", "sum", "none"))


def close(measured: Tensor, exact: Tensor, ulps: float = 64.0) -> None:
    """Equal to a float64 result within the rounding of the output and of float32 sums."""
    info = torch.finfo(measured.dtype)
    eps = max(info.eps / 2, ulps * torch.finfo(torch.float32).eps)
    if measured.dtype == torch.float64:
        eps = 1e-13
    scale = float(exact[exact.isfinite()].abs().max()) if exact.isfinite().any() else 1.0
    tiny = ulps * torch.finfo(torch.float32).eps if measured.dtype != torch.float64 else 1e-13
    torch.testing.assert_close(
        measured.detach().cpu().double(),
        exact.double(),
        rtol=1.01 * eps,
        atol=max(tiny * scale, info.smallest_normal * info.eps),
        equal_nan=True,
    )


def both_close(measured: cases.Evaluation, exact: cases.Evaluation) -> None:
    close(measured.loss, exact.loss)
    close(measured.gradient, exact.gradient)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(12345.0), other.nan_to_num(12345.0)) and torch.equal(
        one.isnan(), other.isnan()
    )


# ---------------------------------------------------------------- rows 1-5: -inf, NaN, +inf


@cases.each_dtype
@pytest.mark.parametrize("spec", FINITE_WITHOUT_TEACHER, ids=str)
def test_row01_teacher_minus_inf_contributes_nothing(
    backend: str, device: str, spec: cases.Spec, dtype: torch.dtype
) -> None:
    student, teacher = pair((6, 130), dtype, device=device)
    teacher[1, 5] = teacher[3, :64] = teacher[4, 1:] = -INF
    measured = evaluate(student, teacher, backend=backend, **spec.arguments)
    assert measured.loss.isfinite() and measured.gradient.isfinite().all()
    both_close(measured, oracle(student, teacher, **spec.arguments))


def test_row01_forward_kl_equals_eagers_right_form(backend: str, device: str) -> None:
    student, teacher = pair((6, 130), device=device)
    teacher[1, 5] = teacher[3, :64] = -INF
    log_q, p = (
        f(z.cpu().double(), -1) for f, z in ((F.log_softmax, student), (F.softmax, teacher))
    )
    expected = F.kl_div(log_q, p, reduction="batchmean", log_target=False)
    close(evaluate(student, teacher, backend=backend).loss, expected)


@cases.each_dtype
@cases.each_spec
def test_row02_entries_that_both_exclude_change_nothing(
    backend: str, device: str, spec: cases.Spec, dtype: torch.dtype
) -> None:
    student, teacher = pair((4, 160), dtype, device=device)
    dead = torch.zeros(160, dtype=torch.bool, device=device)
    dead[[0, 63, 64, 65, *range(100, 160)]] = True
    labels = torch.tensor([1, 2, 3, 99], device=device)
    options = {"backend": backend, "temperature": 2.0, **spec.arguments}
    few = oracle(student[:, ~dead], teacher[:, ~dead], labels_among(labels, dead), **options)
    student[:, dead] = teacher[:, dead] = -INF
    measured = evaluate(student, teacher, labels, **options)
    close(measured.loss, few.loss)
    close(measured.gradient[:, ~dead], few.gradient)
    assert (measured.gradient[:, dead] == 0).all()


def labels_among(labels: Tensor, dead: Tensor) -> Tensor:
    """The labels' positions in the vocabulary without its dead entries."""
    return (torch.cumsum(~dead, 0) - 1)[labels]


@cases.each_mode
def test_row03_student_excludes_what_the_teacher_has(
    backend: str, device: str, gradient: str
) -> None:
    student, teacher = pair((5, 70), device=device)
    clean = evaluate(student, teacher, backend=backend, reduction="none", gradient=gradient)
    student[2, 7] = -INF
    measured = evaluate(student, teacher, backend=backend, reduction="none", gradient=gradient)
    others = [0, 1, 3, 4]
    assert measured.loss[2] == INF
    assert measured.gradient.isfinite().all()
    assert same_bits(measured.loss[others], clean.loss[others])
    assert same_bits(measured.gradient[others], clean.gradient[others])


@pytest.mark.parametrize("spec", (*cases.SPECS, *UNEVEN), ids=str)
@cases.each_mode
@pytest.mark.parametrize("who", ("student", "teacher"))
def test_row03_every_divergence_is_what_its_formula_says(
    backend: str, device: str, spec: cases.Spec, gradient: str, who: str
) -> None:
    """Finite, or +inf where the formula is; a gradient that exists is given."""
    student, teacher = pair((5, 70), device=device)
    (student if who == "student" else teacher)[2, 7] = -INF
    options = {"reduction": "none", **spec.arguments}
    measured = evaluate(student, teacher, backend=backend, gradient=gradient, **options)
    exact = oracle(student, teacher, **options)
    assert not exact.loss.isnan().any()
    close(measured.loss, exact.loss)
    finite = exact.gradient.isfinite().all(-1)
    assert finite[[0, 1, 3, 4]].all() and (finite[2] or exact.loss[2] == INF)
    close(measured.gradient.cpu()[finite], exact.gradient[finite])


@pytest.mark.parametrize("alpha", (0.0, 0.5))
def test_row03_label_on_an_excluded_token_is_infinite_in_its_row_only(
    backend: str, device: str, alpha: float
) -> None:
    student, teacher = pair((5, 70), device=device)
    labels = torch.arange(5, device=device) + 7
    options = {"backend": backend, "alpha": alpha, "reduction": "none"}
    clean = evaluate(student, teacher, labels, **options)
    student[2, 9] = teacher[2, 9] = -INF
    measured = evaluate(student, teacher, labels, **options)
    assert measured.loss[2] == INF and measured.gradient.isfinite().all()
    for row in (0, 1, 3, 4):
        assert measured.loss[row] == clean.loss[row]
        assert torch.equal(measured.gradient[row], clean.gradient[row])


@pytest.mark.parametrize("who", ("student", "teacher", "both"))
@pytest.mark.parametrize("alive", ([4098], [0], [0, 4098], [2048, 3000], [63, 64]), ids=str)
@pytest.mark.parametrize("divergence", ("forward_kl", "jsd", "tvd"))
def test_row04_wide_rows_that_are_almost_all_excluded_are_exact(
    backend: str, device: str, who: str, alive: list[int], divergence: str
) -> None:
    student, teacher = pair((3, 4099), device=device)
    dead = torch.ones(4099, dtype=torch.bool, device=device)
    dead[alive] = False
    if who != "teacher":
        student[1, dead] = -INF
    if who != "student":
        teacher[1, dead] = -INF
    options = {"divergence": divergence, "reduction": "none"}
    measured = evaluate(student, teacher, backend=backend, **options)
    exact = oracle(student, teacher, **options)
    close(measured.loss, exact.loss)
    # Two entries that share the mass may have slopes of order 1 that cancel.
    torch.testing.assert_close(measured.gradient.cpu().double(), exact.gradient, rtol=0, atol=5e-7)
    if (who, divergence) != ("student", "forward_kl"):
        assert measured.loss.isfinite().all()


@cases.each_mode
@cases.each_name
@pytest.mark.parametrize("who", ("student", "teacher"))
@pytest.mark.parametrize("poison", ("nan", "inf", "all -inf"))
def test_row05_a_broken_row_is_nan_and_alone(
    backend: str, device: str, spec: cases.Spec, who: str, poison: str, gradient: str
) -> None:
    student, teacher = pair((7, 133), device=device)
    options = {"backend": backend, "gradient": gradient, **spec.arguments}
    clean = evaluate(student, teacher, reduction="none", **options)
    tensor = student if who == "student" else teacher
    if poison == "all -inf":
        tensor[3] = -INF
    else:
        tensor[3, 130] = float(poison)
    measured = evaluate(student, teacher, reduction="none", **options)
    others = [0, 1, 2, 4, 5, 6]
    assert measured.loss[3].isnan() and measured.gradient[3].isnan().any()
    assert same_bits(measured.loss[others], clean.loss[others])
    assert same_bits(measured.gradient[others], clean.gradient[others])
    assert evaluate(student, teacher, **options).loss.isnan()


# ------------------------------------------------------- rows 6-8: rows that do not count, N = 0


@cases.each_mode
@cases.each_dtype
@pytest.mark.parametrize("garbage", ("nan", "inf", "-inf", "6e4"))
@REDUCTIONS
def test_row06_an_ignored_row_is_never_read(
    backend: str, device: str, garbage: str, dtype: torch.dtype, reduction: str, gradient: str
) -> None:
    student, teacher = pair((6, 131), dtype, device=device)
    labels = torch.tensor([1, -100, 3, -100, 5, 130], device=device)
    options = {"backend": backend, "reduction": reduction, "gradient": gradient, "z_loss": 0.01}
    clean = evaluate(student, teacher, labels, **options)
    student[1] = teacher[3] = float(garbage)
    teacher[1, 3] = student[3, 130] = float(garbage)
    measured = evaluate(student, teacher, labels, **options)
    assert torch.equal(measured.loss, clean.loss)
    assert torch.equal(measured.gradient, clean.gradient)
    assert (measured.gradient[[1, 3]] == 0).all()


def test_row06_a_row_of_weight_zero_is_never_read(backend: str, device: str) -> None:
    student, teacher = pair((4, 33), device=device)
    student[2] = math.nan
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0], device=device)
    measured = evaluate(student, teacher, backend=backend, token_weights=weights)
    assert measured.loss.isfinite() and (measured.gradient[2] == 0).all()
    assert measured.gradient.isfinite().all()


@cases.each_mode
@REDUCTIONS
@pytest.mark.parametrize("shape", ((5, 17), (2, 3, 17)), ids=str)
def test_row07_all_ignored_is_a_connected_zero(
    backend: str, device: str, gradient: str, reduction: str, shape: tuple[int, ...]
) -> None:
    student, teacher = pair(shape, device=device)
    student.requires_grad_()
    labels = torch.full(shape[:-1], -100, device=device)
    loss = cases.call(
        student, teacher, labels, backend=backend, gradient=gradient, reduction=reduction
    )
    assert loss.requires_grad and (loss == 0).all()
    loss.sum().backward()
    assert student.grad is not None and (student.grad == 0).all()


@pytest.mark.parametrize("items", (0, 0.0), ids=("int", "float"))
def test_row07_a_denominator_tensor_of_zero_gives_zero(
    backend: str, device: str, items: float
) -> None:
    student, teacher = pair((4, 17), device=device)
    labels = torch.full((4,), -100, device=device)
    items = torch.tensor(items, device=device)
    measured = evaluate(student, teacher, labels, backend=backend, num_items=items)
    assert measured.loss == 0 and (measured.gradient == 0).all()


@cases.each_mode
@cases.each_dtype
@REDUCTIONS
@pytest.mark.parametrize("shape", ((0, 9), (2, 0, 9), (0, 3, 9)), ids=str)
def test_row08_no_rows_at_all(
    backend: str,
    device: str,
    dtype: torch.dtype,
    reduction: str,
    gradient: str,
    shape: tuple[int, ...],
) -> None:
    student, teacher = pair(shape, dtype, device=device)
    student.requires_grad_()
    labels = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    loss = cases.call(
        student, teacher, labels, backend=backend, reduction=reduction, gradient=gradient
    )
    assert loss.shape == (shape[:-1] if reduction == "none" else ()) and (loss == 0).all()
    loss.sum().backward()
    assert student.grad is not None and student.grad.shape == shape


# --------------------------------------------------------------- rows 9-13: sizes and arguments


@cases.each_spec
@cases.each_dtype
def test_row09_a_vocabulary_of_one_costs_nothing(
    backend: str, device: str, spec: cases.Spec, dtype: torch.dtype
) -> None:
    student, teacher = pair((5, 1), dtype, device=device)
    labels = torch.zeros(5, dtype=torch.int64, device=device)
    measured = evaluate(student, teacher, labels, backend=backend, **spec.arguments)
    assert measured.loss == 0 and (measured.gradient == 0).all()


@cases.each_mode
@pytest.mark.parametrize("vocab", (*range(2, 36), 63, 64, 65, 127, 129, 255, 257, 1023, 1025, 2047))
def test_row09_every_tail_length_is_exact(
    backend: str, device: str, vocab: int, gradient: str
) -> None:
    """Logits far below 0: a tail that was filled with 0 instead of -inf would dominate."""
    student, teacher = (z - 60 for z in pair((3, vocab), seed=vocab, device=device))
    labels = torch.tensor([0, vocab - 1, vocab // 2], device=device)
    for divergence in ("forward_kl", "jsd"):
        options = {"divergence": divergence, "gradient": gradient, "temperature": 2.0}
        measured = evaluate(student, teacher, labels, backend=backend, **options)
        both_close(measured, oracle(student, teacher, labels, **options))


@pytest.mark.parametrize("bad", (9, 10**6, 2**31 + 3, 2**40, -1, -101, -(2**40)))
@pytest.mark.parametrize("alpha", (0.5, 1.0))
@cases.each_mode
def test_row10_a_label_outside_the_vocabulary_is_an_index_error(
    backend: str, bad: int, alpha: float, gradient: str
) -> None:
    if cases.device_of(backend) != "cpu":
        pytest.skip("a device assert would end the process")
    student, teacher = pair((4, 9))
    labels = torch.tensor([0, 8, bad, -100])
    with pytest.raises(IndexError, match=rf"labels: {bad} at row 2 .*\[0, 9\)"):
        evaluate(student, teacher, labels, backend=backend, alpha=alpha, gradient=gradient)


def test_row10_truncated_vocabulary_bounds_the_labels(backend: str) -> None:
    if cases.device_of(backend) != "cpu":
        pytest.skip("a device assert would end the process")
    student, teacher = logits((2, 9)), logits((2, 7))
    with pytest.raises(IndexError, match=r"labels: 7 at row 1 .*\[0, 7\)"):
        evaluate(student, teacher, torch.tensor([6, 7]), backend=backend, vocab_policy="truncate")


@pytest.mark.parametrize(
    "dtype",
    (torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32),
    ids=str,
)
def test_row11_any_integer_labels_are_the_same_labels(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    student, teacher = pair((6, 100), device=device)
    labels = torch.arange(6, device=device) * 19
    expected = evaluate(student, teacher, labels, backend=backend)
    measured = evaluate(student, teacher, labels.to(dtype), backend=backend)
    assert torch.equal(measured.loss, expected.loss)
    assert torch.equal(measured.gradient, expected.gradient)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bool, torch.complex64), ids=str)
def test_row11_other_labels_are_refused(backend: str, dtype: torch.dtype) -> None:
    student, teacher = pair((6, 100))
    with pytest.raises(TypeError, match="labels"):
        fused_kd_loss(student, teacher, torch.ones(6).to(dtype), backend=backend)


# ---------------------------------------------------- rows 14-17: temperature, half, scaled loss


@cases.each_dtype
@pytest.mark.parametrize("temperature", (1e-3, 1e-2, 0.05))
@cases.each_name
def test_row14_low_temperature_stays_finite_and_exact(
    backend: str, device: str, dtype: torch.dtype, temperature: float, spec: cases.Spec
) -> None:
    student, teacher = pair((5, 133), dtype)
    by = cases.standard(student, teacher, None, spec, temperature=temperature)
    measured = evaluate(
        student.to(device),
        teacher.to(device),
        backend=backend,
        temperature=temperature,
        **spec.arguments,
    )
    assert measured.loss.isfinite() and measured.gradient.isfinite().all()
    cases.assert_accurate(measured, by)


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_row14_fp16_logits_at_the_edge_of_their_range(
    backend: str, device: str, temperature: float
) -> None:
    student, teacher = pair((4, 40), torch.float16, device=device)
    student[0, 3] = teacher[0, 4] = 65504.0
    student[1, 3] = teacher[1, 4] = -65504.0
    teacher[2] = 65504.0
    student[3] = -65504.0
    options = {"temperature": temperature, "reduction": "none"}
    measured = evaluate(student, teacher, backend=backend, **options)
    exact = oracle(student, teacher, **options)
    assert measured.loss.isfinite().all() and measured.gradient.isfinite().all()
    torch.testing.assert_close(measured.loss.cpu().double(), exact.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        measured.gradient.cpu().double(), exact.gradient, rtol=2e-3, atol=1e-6
    )


@pytest.mark.parametrize("temperature", (1e3, 1e4, 1e6))
@cases.each_name
def test_row15_high_temperature_is_no_worse_than_eager(
    backend: str, device: str, temperature: float, spec: cases.Spec
) -> None:
    student, teacher = pair((8, 1000), scale=3.0)
    options = {"temperature": temperature, "reduction": "none"}
    by = cases.standard(student, teacher, None, spec, **options)
    measured = evaluate(
        student.to(device), teacher.to(device), backend=backend, **options, **spec.arguments
    )
    cases.assert_accurate(measured, by)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_row16_a_half_precision_sum_over_many_rows_is_float32(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    student, teacher = pair((40_000, 8), dtype, scale=6.0, device=device)
    measured = evaluate(student, teacher, backend=backend, reduction="sum")
    exact = oracle(student, teacher, reduction="sum")
    assert measured.loss.dtype == torch.float32 and measured.loss > 65504
    torch.testing.assert_close(measured.loss.cpu().double(), exact.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("scale", (65536.0, 2.0**20))
def test_row17_a_scaled_loss_keeps_small_gradients(
    backend: str, device: str, dtype: torch.dtype, scale: float
) -> None:
    """Gradients near 1e-8, below fp16's smallest number: the scale has to come before rounding."""
    student, teacher = pair((300, 500), dtype, scale=0.5, device=device)
    exact = oracle(student, teacher).gradient
    assert float(exact.abs().max()) < 1e-4 and float(exact.abs().median()) < 4e-6
    factor = torch.tensor(scale, device=device)
    measured = evaluate(student, teacher, backend=backend, grad_output=factor).gradient
    roundings = 1 if dtype == torch.float16 else 2
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (measured.cpu().double() - exact * scale).abs()
    noise = 1e-6 * exact.abs().max() * scale
    allowed = roundings * 0.51 * torch.finfo(dtype).eps * exact.abs() * scale + tiny + noise
    assert (error <= allowed).all()


def test_row17_grad_scaler_training_step_equals_an_unscaled_one(backend: str, device: str) -> None:
    student, teacher = pair((64, 200), torch.float16, scale=0.5, device=device)
    parameter = torch.nn.Parameter(torch.zeros(200, device=device))
    scaler = torch.amp.GradScaler(device, init_scale=65536.0)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    loss = cases.call((student + parameter).half(), teacher, backend=backend)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    expected = oracle(student, teacher).gradient.sum(0)
    torch.testing.assert_close(
        -parameter.detach().cpu().double(), expected, rtol=0, atol=float(expected.abs().max()) / 500
    )
    assert scaler.get_scale() == 65536.0


# -------------------------------------------------------------------- rows 18-19: offsets, strides


def only_cpu_tensors(backend: str) -> None:
    if cases.device_of(backend) != "cpu":
        pytest.skip("the memory of this test is the CPU's")


@cases.each_mode
@pytest.mark.parametrize("axis", ("row", "vocabulary", "start"))
def test_row18_offsets_beyond_2_to_the_31(backend: str, gradient: str, axis: str) -> None:
    only_cpu_tensors(backend)
    rows, vocab, start = 3, 40, 0
    strides = {"row": (2**30 + 1, 1), "vocabulary": (1, 2**26 + 1), "start": (vocab, 1)}[axis]
    start = 2**31 + 9 if axis == "start" else 0
    elements = start + (rows - 1) * strides[0] + (vocab - 1) * strides[1] + 1
    assert elements > 2**31
    memory = mmap.mmap(-1, elements * 2)
    student = torch.frombuffer(memory, dtype=torch.float16).as_strided(
        (rows, vocab), strides, start
    )
    values, teacher = pair((rows, vocab), torch.float16)
    student.copy_(values)
    labels = torch.tensor([0, 39, 5])
    measured = evaluate(student, teacher, labels, backend=backend, gradient=gradient)
    expected = evaluate(values, teacher, labels, backend=backend, gradient=gradient)
    assert torch.equal(measured.loss, expected.loss)
    assert torch.equal(measured.gradient, expected.gradient)
    swapped = evaluate(teacher, student, labels, backend=backend, gradient=gradient)
    expected = evaluate(teacher, values, labels, backend=backend, gradient=gradient)
    assert torch.equal(swapped.loss, expected.loss)


def test_row18_more_than_2_to_the_31_logits_in_expanded_rows(backend: str) -> None:
    """Rows of stride 0, all but a few ignored, so that neither memory nor time is needed."""
    only_cpu_tensors(backend)
    if backend != "cpu":
        pytest.skip("computes ignored rows too: minutes. Its offsets are torch's own")
    vocab, rows = 32768, 65_600
    assert vocab * rows > 2**31
    student, teacher = (z.expand(rows, vocab) for z in pair((1, vocab), torch.bfloat16))
    labels = torch.full((rows,), -100)
    labels[[0, 65_536, rows - 1]] = torch.tensor([1, 2, 3])
    with torch.no_grad():
        loss = cases.call(student, teacher, labels, backend=backend, reduction="none")
    few = cases.call(
        student[:3], teacher[:3], torch.tensor([1, 2, 3]), backend=backend, reduction="none"
    )
    assert torch.equal(loss[labels >= 0], few) and (loss[labels < 0] == 0).all()


Layout = Callable[[Tensor], Tensor]


def _wide(z: Tensor) -> Tensor:
    return torch.full((*z.shape[:-1], z.shape[-1] + 37), math.nan, dtype=z.dtype, device=z.device)


def _sliced(z: Tensor) -> Tensor:
    wide = _wide(z)
    wide[..., : z.shape[-1]] = z
    return wide[..., : z.shape[-1]]


def _odd(z: Tensor) -> Tensor:
    storage = torch.full((z.numel() + 1,), math.nan, dtype=z.dtype, device=z.device)
    storage[1:] = z.reshape(-1)
    return storage[1:].view(z.shape)


def _every_second(z: Tensor) -> Tensor:
    wide = torch.full((*z.shape, 2), math.nan, dtype=z.dtype, device=z.device)
    wide[..., 0] = z
    return wide[..., 0]


LAYOUTS: dict[str, Layout] = {
    "contiguous": torch.clone,
    "padded vocabulary": _sliced,
    "odd offset": _odd,
    "stride-2 vocabulary": _every_second,
    "transposed": lambda z: z.transpose(0, -1).contiguous().transpose(0, -1),
    "batch and sequence swapped": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary first": lambda z: z.movedim(-1, 0).contiguous().movedim(0, -1),
    "shifted view": lambda z: torch.cat([z, z[:, :1] * math.nan], 1)[:, :-1],
    "every second row": lambda z: z.repeat_interleave(2, 0)[::2],
}


@cases.each_mode
@cases.each_dtype
@pytest.mark.parametrize("student_layout", LAYOUTS)
@pytest.mark.parametrize("teacher_layout", ("contiguous", "padded vocabulary", "vocabulary first"))
def test_row19_strides_change_nothing(
    backend: str,
    device: str,
    student_layout: str,
    teacher_layout: str,
    dtype: torch.dtype,
    gradient: str,
) -> None:
    student, teacher = pair((3, 4, 67), dtype, device=device)
    labels = labels_for((3, 4), 67, device=device)
    options = {"backend": backend, "gradient": gradient, "temperature": 2.0}
    expected = evaluate(student, teacher, labels, **options)
    student, teacher = LAYOUTS[student_layout](student), LAYOUTS[teacher_layout](teacher)
    measured = evaluate(student, teacher, labels, **options)
    close(measured.loss, expected.loss.cpu(), ulps=4)
    close(measured.gradient, expected.gradient.cpu().double(), ulps=4)


# A student in padded rows has its gradient in such rows: its stores are whole, too.


def gradients_of(
    backend: str, problem: Problem, gradient: str, grad_output: Tensor | None, out: Tensor | None
) -> Tensor:
    """By the backend's own forward or backward, in ``out`` if it is given."""
    kernel = BACKENDS[backend]
    result = kernel.forward(
        problem,
        want_gradient=gradient == "forward",
        extras=False,
        gradient_out=out if gradient == "forward" else None,
    )
    if gradient == "forward":
        assert result.gradient is not None
        return result.gradient
    assert grad_output is not None
    return kernel.backward(problem, result.statistics, grad_output, gradient_out=out)


@cases.each_mode
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("teacher_layout", ("contiguous", "padded"))
@pytest.mark.parametrize("shape", ((5,), (2, 3), (2, 1)), ids=str)
def test_row19_a_padded_student_has_a_padded_gradient(
    backend: str,
    device: str,
    shape: tuple[int, ...],
    teacher_layout: str,
    dtype: torch.dtype,
    gradient: str,
) -> None:
    if dtype == torch.float64:
        cases.needs_float64(backend, device)
    vocab = cases.PADDED[0]
    packed, teacher = pair((*shape, vocab), dtype, device=device)
    labels = labels_for(shape, vocab, device=device)
    student = cases.padded(packed)
    teacher = cases.padded(teacher) if teacher_layout == "padded" else teacher
    shift = len(shape) == 2 and shape[1] > 1
    options = {"backend": backend, "gradient": gradient, "temperature": 2.0, "shift": shift}
    measured = evaluate(student, teacher, labels, **options)
    expected = evaluate(packed, teacher, labels, **options)
    assert measured.gradient.stride() == student.stride()
    assert expected.gradient.is_contiguous()
    close(measured.loss, expected.loss.cpu(), ulps=4)
    close(measured.gradient, expected.gradient.cpu().double(), ulps=4)


@cases.each_mode
@pytest.mark.parametrize("vocab", (67, 60), ids=("whole", "truncated"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@cases.each_dtype
def test_row19_what_is_between_the_rows_of_a_gradient_is_not_touched(
    backend: str, device: str, dtype: torch.dtype, reduction: str, vocab: int, gradient: str
) -> None:
    """And the gradient is the same to the bit, packed or padded."""
    packed, teacher = pair((2, 3, cases.PADDED[0]), dtype, device=device)
    student, teacher = cases.padded(packed), teacher[..., :vocab]
    labels = labels_for((2, 3), vocab, device=device)
    options = Options(temperature=2.0, alpha=0.5, reduction=reduction)
    problem = Problem(student, teacher, labels, None, None, options)
    upstream = torch.rand((2, 3) if reduction == "none" else (), device=device) + 0.5
    outs = [torch.empty_like(packed), cases.padded(torch.empty_like(packed))]
    outs[1].untyped_storage().fill_(7)
    got = [gradients_of(backend, problem, gradient, upstream, out) for out in outs]
    own = gradients_of(backend, problem, gradient, upstream, None)
    assert own.stride() == student.stride()
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], own)
    for overwrite in (False, True):  # last, the rows in place
        scaled = [
            BACKENDS[backend].scale_gradient(one, upstream, overwrite=overwrite) for one in got
        ]
        assert torch.equal(*scaled)
        assert (scaled[1].data_ptr() == outs[1].data_ptr()) == overwrite
    between = outs[1].as_strided((6, 5), (72, 1), 67).contiguous()
    assert (between.view(torch.uint8) == 7).all()


def test_row19_a_padded_gradient_reaches_a_leaf_and_its_base(backend: str, device: str) -> None:
    packed, teacher = pair((4, cases.PADDED[0]), device=device)
    expected = evaluate(packed, teacher, backend=backend).gradient
    leaf = cases.padded(packed).requires_grad_()
    base = torch.nn.functional.pad(packed, (0, 5)).requires_grad_()
    for times in (1, 2):  # the second accumulates
        cases.call(leaf, teacher, backend=backend).backward()
        cases.call(base[:, : cases.PADDED[0]], teacher, backend=backend).backward()
        assert leaf.grad is not None and base.grad is not None
        close(leaf.grad, expected.cpu().double() * times, ulps=4)
        close(base.grad[:, : cases.PADDED[0]], expected.cpu().double() * times, ulps=4)
        assert (base.grad[:, cases.PADDED[0] :] == 0).all()


@cases.each_mode
def test_row19_a_padded_gradient_is_scaled_row_by_row(
    backend: str, device: str, gradient: str
) -> None:
    packed, teacher = pair((2, 3, cases.PADDED[0]), torch.bfloat16, device=device)
    options = {"backend": backend, "gradient": gradient, "reduction": "none"}
    rows = torch.tensor([[1.0, 0.0, -2.0], [0.5, 3.0, 1.0]], device=device)
    measured = evaluate(cases.padded(packed), teacher, grad_output=rows, **options)
    expected = evaluate(packed, teacher, grad_output=rows, **options)
    close(measured.gradient, expected.gradient.cpu().double(), ulps=4)


@pytest.mark.parametrize("leading", ((), (4,), (2, 3), (2, 2, 3), (2, 1, 2, 2)), ids=str)
@pytest.mark.parametrize("order", ("as is", "reversed", "rotated"))
def test_row19_leading_dimensions_in_any_order(
    backend: str, device: str, leading: tuple[int, ...], order: str
) -> None:
    axes = list(range(len(leading)))
    axes = {"as is": axes, "reversed": axes[::-1], "rotated": axes[1:] + axes[:1]}[order]
    student, teacher = pair((*leading, 19), device=device)
    student = student.permute(*axes, -1)
    teacher = teacher.permute(*axes, -1).contiguous()
    labels = labels_for(tuple(student.shape[:-1]), 19, ignored=0.2, device=device)
    options = {"reduction": "none"}
    both_close(
        evaluate(student, teacher, labels, backend=backend, **options),
        oracle(student, teacher, labels, **options),
    )


def test_row19_gradient_reaches_the_base_of_a_view(backend: str, device: str) -> None:
    base = logits((2, 6, 50), device=device).requires_grad_()
    teacher = logits((2, 5, 40), seed=1, device=device)
    cases.call(base[:, :-1, 10:], teacher, backend=backend).backward()
    assert base.grad is not None
    expected = oracle(base[:, :-1, 10:], teacher).gradient
    close(base.grad[:, :-1, 10:], expected)
    assert (base.grad[:, -1] == 0).all() and (base.grad[..., :10] == 0).all()


def test_row19_zero_strides_in_both(backend: str, device: str) -> None:
    student, teacher = (z.expand(5, 40) for z in pair((1, 40), device=device))
    both_close(evaluate(student, teacher, backend=backend), oracle(student, teacher))
    row = logits((5, 1), device=device).expand(5, 40)
    both_close(evaluate(row, teacher, backend=backend), oracle(row, teacher))


# ----------------------------------------------------------- rows 20-23: what autograd may do

GRAD_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "per row": lambda rows: rows,
    "expanded": lambda rows: rows[:1].expand(rows.shape),
    "strided": lambda rows: torch.stack([rows, rows * math.nan], 1)[:, 0],
    "a slice of a cat": lambda rows: torch.cat([rows * 7, rows])[len(rows) :],
    "float64": lambda rows: rows.double().float(),
}


@cases.each_mode
@cases.each_dtype
@pytest.mark.parametrize("kind", GRAD_OUTPUTS)
def test_row20_grad_output_of_every_row_is_honoured(
    backend: str, device: str, kind: str, dtype: torch.dtype, gradient: str
) -> None:
    student, teacher = pair((6, 45), dtype, device=device)
    labels = torch.tensor([1, -100, 3, 4, -100, 6], device=device)
    rows = GRAD_OUTPUTS[kind](torch.tensor([1.0, -2.0, 0.0, 3.5, 1e3, -0.25], device=device))
    options = {"reduction": "none", "temperature": 2.0}
    measured = evaluate(
        student, teacher, labels, backend=backend, gradient=gradient, grad_output=rows, **options
    )
    exact = oracle(student, teacher, labels, grad_output=rows.cpu().double(), **options)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        measured.gradient.cpu().double(),
        exact.gradient,
        rtol=1.1 * eps if gradient == "forward" else 0.6 * eps + 1e-6,
        atol=3e-7 * float(exact.gradient.abs().max()),
    )


@cases.each_mode
def test_row20_nan_and_inf_stay_in_their_row(backend: str, device: str, gradient: str) -> None:
    student, teacher = pair((5, 45), device=device)
    options = {"backend": backend, "gradient": gradient, "reduction": "none"}
    ones = torch.ones(5, device=device)
    clean = evaluate(student, teacher, grad_output=ones, **options).gradient
    rows = torch.tensor([1.0, math.nan, 1.0, INF, 0.0], device=device)
    measured = evaluate(student, teacher, grad_output=rows, **options).gradient
    assert torch.equal(measured[[0, 2]], clean[[0, 2]])
    assert measured[1].isnan().all()
    assert not measured[3].isfinite().any()
    assert (measured[4] == 0).all()


@cases.each_mode
@pytest.mark.parametrize("factor", (0.0, -3.0, 1.0, INF, math.nan))
def test_row20_a_scalar_grad_output(
    backend: str, device: str, gradient: str, factor: float
) -> None:
    student, teacher = pair((5, 45), device=device)
    options = {"backend": backend, "gradient": gradient}
    one = evaluate(student, teacher, **options).gradient
    scaled = evaluate(
        student, teacher, grad_output=torch.tensor(factor, device=device), **options
    ).gradient
    if math.isfinite(factor):
        largest = float(one.abs().max()) * abs(factor)
        torch.testing.assert_close(scaled, one * factor, rtol=1e-6, atol=1e-6 * largest)
    else:
        assert not scaled.isfinite().any()


@cases.each_mode
@REDUCTIONS
@pytest.mark.parametrize("factor", (0.0, INF, -INF, math.nan))
def test_row20_what_takes_no_part_stays_0_whatever_the_grad_output(
    backend: str, device: str, gradient: str, reduction: str, factor: float
) -> None:
    """Ignored rows, rows of weight 0, columns beyond the common vocabulary; 0 times NaN is NaN."""
    student, teacher = pair((6, 45), device=device)
    student[1], student[4] = math.nan, INF
    options = {"backend": backend, "gradient": gradient, "reduction": reduction}
    measured = evaluate(
        student,
        teacher[:, :40],
        torch.tensor([1, -100, 3, 4, 5, 6], device=device),
        token_weights=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 2.0], device=device),
        vocab_policy="truncate",
        grad_output=torch.full((6,) if reduction == "none" else (), factor, device=device),
        **options,
    ).gradient
    assert (measured[[1, 4]] == 0).all() and (measured[:, 40:] == 0).all()
    counted = measured[[0, 2, 3, 5], :40]
    assert (counted == 0).all() if factor == 0 else not counted.isfinite().any()


@cases.each_mode
@pytest.mark.parametrize("per_row", (False, True))
def test_row20_a_grad_output_of_0_gives_0_of_a_row_without_a_distribution(
    backend: str, device: str, gradient: str, per_row: bool
) -> None:
    student, teacher = pair((3, 45), device=device)
    student[1, 7], teacher[2, 7] = math.nan, INF
    options = {"gradient": gradient, "reduction": "none" if per_row else "mean"}
    zero = torch.zeros((3,) if per_row else (), device=device)
    measured = evaluate(student, teacher, backend=backend, grad_output=zero, **options)
    assert (measured.gradient == 0).all()


@cases.each_mode
@pytest.mark.parametrize("leaf", (True, False), ids=("leaf", "non-leaf"))
@pytest.mark.parametrize("factor", (1.0, 2.0))
def test_row21_three_backwards_accumulate_three_gradients(
    backend: str, device: str, gradient: str, leaf: bool, factor: float
) -> None:
    student, teacher = pair((5, 45), device=device)
    expected = evaluate(student, teacher, backend=backend).gradient * factor
    x = student.clone().requires_grad_()
    loss = cases.call(x if leaf else x * 1, teacher, backend=backend, gradient=gradient) * factor
    for _ in range(2):
        loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(x.grad, 3 * expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(x.detach(), student)


@cases.each_mode
def test_row21_a_gradient_taken_stays_what_it_was(backend: str, device: str, gradient: str) -> None:
    """The stored gradient must not be handed out as a buffer that a later backward scales."""
    student, teacher = pair((5, 45), device=device)
    student.requires_grad_()
    loss = cases.call(student, teacher, backend=backend, gradient=gradient)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss * 5, student, retain_graph=True)
    first.zero_()
    (third,) = torch.autograd.grad(loss, student)
    assert torch.equal(third, kept)
    torch.testing.assert_close(second, 5 * kept)


@cases.each_mode
def test_row21_logits_used_by_a_second_loss(backend: str, device: str, gradient: str) -> None:
    student, teacher = pair((5, 45), device=device)
    labels = torch.arange(5, device=device)
    x = student.clone().requires_grad_()
    z = x * 1.0
    loss = cases.call(z, teacher, backend=backend, gradient=gradient)
    (loss + F.cross_entropy(z, labels) + z.square().mean()).backward()
    y = student.clone().requires_grad_()
    (F.cross_entropy(y, labels) + y.square().mean()).backward()
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad + evaluate(student, teacher, backend=backend)[1])


@cases.each_mode
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_row22_double_backward_raises(
    backend: str, device: str, gradient: str, reduction: str
) -> None:
    student, teacher = pair((5, 45), device=device)
    student.requires_grad_()
    options = {"gradient": gradient, "reduction": reduction}
    loss = cases.call(student, teacher, backend=backend, **options).sum()
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    torch.testing.assert_close(
        first.detach(), evaluate(student.detach(), teacher, backend=backend, **options).gradient
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.square().sum().backward()


#: A penalty on the gradient, from wherever it is differentiated.
PENALTIES: dict[str, Callable[[Tensor, Sequence[Tensor]], Any]] = {
    "backward": lambda penalty, inputs: penalty.backward(),
    "backward to inputs": lambda penalty, inputs: penalty.backward(inputs=list(inputs)),
    "grad": lambda penalty, inputs: torch.autograd.grad(penalty, inputs),
    "grad beside another use": lambda penalty, inputs: torch.autograd.grad(
        penalty + sum(one.sum() for one in inputs), inputs
    ),
    "grad of what may be unused": lambda penalty, inputs: torch.autograd.grad(
        penalty, inputs, allow_unused=True, materialize_grads=True
    ),
}


@cases.each_mode
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("penalise", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("through", ("the logits", "a layer", "the loss's factor"))
def test_row22_a_penalty_on_the_gradient_is_refused(
    backend: str, device: str, gradient: str, dtype: torch.dtype, reduction: str, penalise: Any,
    through: str,
) -> None:  # fmt: skip
    """``torch.autograd.grad(penalty, inputs)`` goes only where the inputs are: it was 0 there."""
    student, teacher = pair((5, 45), dtype, device=device)
    student.requires_grad_()
    factor = torch.ones((), device=device, requires_grad=True)
    z = student * 1.5 if through == "a layer" else student
    options = {"gradient": gradient, "reduction": reduction, "backend": backend}
    loss = (cases.call(z, teacher, **options) * factor).sum()
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    inputs = (factor,) if through == "the loss's factor" else (student,)
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalise(first.float().square().sum(), inputs)


@cases.each_mode
def test_row22_what_the_loss_does_not_depend_on_is_not_refused(
    backend: str, device: str, gradient: str
) -> None:
    student, teacher = pair((5, 45), device=device)
    student.requires_grad_()
    other = torch.ones((), device=device, requires_grad=True)
    loss = cases.call(student, teacher, backend=backend, gradient=gradient)
    loss /= 2  # in place: what the refusal hangs on is not the loss itself
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    (of_other,) = torch.autograd.grad(first.square().sum() + other**2, other)
    assert of_other == 2


@pytest.mark.parametrize(
    "product",
    (
        torch.autograd.functional.hessian,
        lambda f, z: torch.autograd.functional.hvp(f, z, torch.ones_like(z)),
        lambda f, z: torch.autograd.functional.vhp(f, z, torch.ones_like(z)),
    ),
    ids=("hessian", "hvp", "vhp"),
)
def test_row22_products_with_the_hessian_are_refused(
    backend: str, device: str, product: Any
) -> None:
    student, teacher = pair((2, 5), device=device)
    with pytest.raises(RuntimeError, match="no second derivative"):
        product(lambda z: cases.call(z, teacher, backend=backend), student)


@cases.each_mode
@pytest.mark.parametrize("who", ("student", "teacher"))
def test_row23_an_input_changed_before_backward_is_an_error_or_harmless(
    backend: str, device: str, gradient: str, who: str
) -> None:
    student, teacher = pair((5, 45), device=device)
    expected = evaluate(student, teacher, backend=backend, gradient=gradient).gradient
    x = student.clone().requires_grad_()
    z = x * 1.0
    loss = cases.call(z, teacher, backend=backend, gradient=gradient)
    with torch.no_grad():
        (z if who == "student" else teacher).mul_(2)
    if gradient == "recompute":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()
        assert x.grad is not None and torch.equal(x.grad, expected)


# ------------------------------------------------------------------ rows 24-28: modes of autograd


@cases.each_mode
def test_row24_the_teacher_gets_no_gradient(backend: str, device: str, gradient: str) -> None:
    student, teacher = pair((5, 45), device=device)
    expected = evaluate(student, teacher, backend=backend, gradient=gradient)
    student.requires_grad_(), teacher.requires_grad_()
    loss = cases.call(student, teacher, backend=backend, gradient=gradient)
    loss.backward()
    assert teacher.grad is None and student.grad is not None
    assert torch.equal(student.grad, expected.gradient)
    alone = cases.call(student.detach(), teacher, backend=backend)
    assert not alone.requires_grad


@cases.each_mode
@cases.each_dtype
@cases.each_spec
def test_row24_a_student_that_is_its_teacher_learns_nothing(
    backend: str, device: str, gradient: str, spec: cases.Spec, dtype: torch.dtype
) -> None:
    z = logits((5, 333), dtype, device=device).requires_grad_()
    options = {"temperature": 2.0, **spec.arguments}
    loss = cases.call(z, z, backend=backend, gradient=gradient, **options)
    loss.backward()
    assert loss == 0
    assert z.grad is not None
    p = torch.softmax(z.detach().double() / 2, -1)
    assert (z.grad.abs() <= 4e-7 * p).all(), "more than the rounding of p - q"


@pytest.mark.parametrize("gradient", ("auto", "forward", "recompute"))
def test_row25_inference_mode_teacher_trains(backend: str, device: str, gradient: str) -> None:
    student, teacher = pair((5, 45), device=device)
    expected = evaluate(student, teacher, backend=backend, gradient=gradient)
    with torch.inference_mode():
        inference = teacher * 1
    measured = evaluate(student, inference, backend=backend, gradient=gradient)
    assert torch.equal(measured.loss, expected.loss)
    assert torch.equal(measured.gradient, expected.gradient)


@pytest.mark.parametrize("gradient", ("auto", "forward", "recompute"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("who", ("teacher", "labels", "token_weights", "num_items"))
def test_row25_an_inference_tensor_may_be_overwritten_before_the_backward(
    backend: str, device: str, gradient: str, dtype: torch.dtype, reduction: str, who: str
) -> None:
    """A buffer for every batch of a teacher, say: such a tensor has no version to be compared."""
    student, teacher = pair((6, 45), dtype, device=device)
    with torch.inference_mode():
        given = {
            "teacher": teacher.clone(),
            "labels": labels_for((6,), 45, device=device),
            "token_weights": torch.linspace(-1, 2, 6, device=device),
            "num_items": torch.tensor(3.0, device=device),
        }
    options = {"backend": backend, "gradient": gradient, "reduction": reduction}
    if reduction == "none":
        del given["num_items"]
        if who == "num_items":
            pytest.skip("rows have no denominator")
    leaf = student.requires_grad_()

    def loss() -> Tensor:
        tensors = dict(given)
        teacher, labels = tensors.pop("teacher"), tensors.pop("labels")
        return cases.call(leaf, teacher, labels, **tensors, **options).sum()

    (expected,) = torch.autograd.grad(loss(), leaf)
    latest = loss()
    with torch.inference_mode():
        given[who].copy_(given[who].flip(0) if who != "num_items" else given[who] * 2)
    (measured,) = torch.autograd.grad(latest, leaf)
    assert torch.equal(measured, expected)


@cases.each_dtype
@REDUCTIONS
@pytest.mark.parametrize("gradient", ("auto", "forward", "recompute"))
def test_row25_row26_the_value_does_not_depend_on_who_wants_a_gradient(
    backend: str, device: str, dtype: torch.dtype, reduction: str, gradient: str
) -> None:
    student, teacher = pair((9, 1031), dtype, device=device)
    labels = labels_for((9,), 1031, device=device)
    options = {"backend": backend, "reduction": reduction, "gradient": gradient}
    value = cases.call(student, teacher, labels, **options)
    with_gradient = cases.call(student.clone().requires_grad_(), teacher, labels, **options)
    with torch.no_grad():
        without = cases.call(student.clone().requires_grad_(), teacher, labels, **options)
    with torch.inference_mode():
        inferred = cases.call(student, teacher, labels, **options)
    assert with_gradient.requires_grad and not value.requires_grad and not without.requires_grad
    for other in (with_gradient.detach(), without, inferred):
        assert torch.equal(value, other)


@cases.each_spec
@pytest.mark.parametrize("temperature", (1.0, 2.0, 3.0))
def test_row26_the_value_does_not_depend_on_what_else_is_wanted(
    backend: str, device: str, spec: cases.Spec, temperature: float
) -> None:
    student, teacher = pair((9, 333), scale=6.0, device=device)
    labels = labels_for((9,), 333, device=device)
    options = {"reduction": "none", "temperature": temperature, **spec.arguments}
    value = cases.call(student, teacher, labels, backend=backend, **options)
    for wanted in ({"gradient": "forward"}, {"gradient": "recompute"}):
        leaf = student.clone().requires_grad_()
        other = cases.call(leaf, teacher, labels, backend=backend, **options, **wanted)
        assert torch.equal(value, other.detach()), wanted
    outputs = cases.call(student, teacher, labels, backend=backend, return_outputs=True, **options)
    # The native reverse KL sweeps otherwise for the entropies: a few ulp, not the same bits.
    torch.testing.assert_close(outputs.loss, value, rtol=1e-6, atol=0)


def test_row27_both_gradient_modes_give_the_same_bits(backend: str, device: str) -> None:
    student, teacher = pair((9, 1031), device=device)
    forward, recompute = (
        evaluate(student, teacher, backend=backend, gradient=mode).gradient
        for mode in ("forward", "recompute")
    )
    assert torch.equal(forward, recompute)


def _float16_gradients(
    backend: str, device: str, grad_outputs: Sequence[float], gradient: str = "auto"
) -> list[Tensor]:
    student, teacher = pair((5, 300), torch.float16, device=device)
    gradients = []
    for grad_output in grad_outputs:
        leaf = student.clone().requires_grad_()
        loss = cases.call(leaf, teacher, backend=backend, gradient=gradient)
        (loss * grad_output).backward()
        gradients.append(leaf.grad)
    return gradients


def test_row27_a_foreseen_grad_output_changes_no_bit(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GradScaler's factor comes, stays, goes bad and changes: as if each were recomputed."""
    monkeypatch.setattr(ops, "GRAD_OUTPUT", ops._GradOutput())
    recomputed = []
    backward = type(BACKENDS[backend]).backward

    def counted(*args: Any, **options: Any) -> Tensor:
        recomputed.append(float(args[3]))
        return backward(*args, **options)

    monkeypatch.setattr(type(BACKENDS[backend]), "backward", counted)
    sequence = [1.0, 1.0, 65536.0, 65536.0, 65536.0, math.nan, math.nan, 3.0, 7.0, 3.0, 7.0]
    got = _float16_gradients(backend, device, sequence)
    if backend == "cpu":
        # What came once or changed; NaN never equals itself.
        assert recomputed[:2] == [65536.0, 65536.0]
        assert len(recomputed) == 2 + 6
    else:
        assert len(recomputed) == len(sequence)
    want = _float16_gradients(backend, device, sequence, "recompute")
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_row27_a_foreseen_gradient_serves_two_backwards(backend: str, device: str) -> None:
    student, teacher = pair((5, 300), torch.float16, device=device)
    (once,) = _float16_gradients(backend, device, [1.0])
    leaf = student.clone().requires_grad_()
    loss = cases.call(leaf, teacher, backend=backend)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 2 * once, rtol=0, atol=0)
    (again,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(again, once, rtol=0, atol=0)


def test_row27_a_checkpoint_saves_twice_the_same(backend: str, device: str) -> None:
    """Whatever grad_output has come between the forward and its repetition."""
    student, teacher = pair((5, 300), torch.float16, device=device)
    leaf = student.clone().requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return cases.call(z, teacher, backend=backend)

    value = checkpoint(loss, leaf, use_reentrant=False)
    _float16_gradients(backend, device, [5.0])
    value.backward()
    (once,) = _float16_gradients(backend, device, [1.0], "recompute")
    torch.testing.assert_close(leaf.grad, once, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_row27_autocast_does_not_touch_the_loss(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    student, teacher = pair((5, 45), device=device)
    expected = evaluate(student, teacher, backend=backend)
    with torch.autocast(device, dtype):
        measured = evaluate(student, teacher, backend=backend)
        weight = logits((45, 45), device=device).requires_grad_()
        loss = cases.call(student @ weight, teacher, backend=backend)
    loss.backward()
    assert measured.loss.dtype == loss.dtype == torch.float32
    assert torch.equal(measured.gradient, expected.gradient)
    assert weight.grad is not None and weight.grad.isfinite().all()


@cases.each_mode
@pytest.mark.parametrize("reentrant", (True, False))
def test_row27_checkpointing_gives_the_same_gradient(
    backend: str, device: str, gradient: str, reentrant: bool
) -> None:
    student, teacher = pair((5, 45), device=device)
    expected = evaluate(student, teacher, backend=backend, gradient=gradient)
    x = student.clone().requires_grad_()

    def block(z: Tensor) -> Tensor:
        return cases.call(z * 1.0, teacher, backend=backend, gradient=gradient)

    loss = checkpoint(block, x, use_reentrant=reentrant)
    loss.backward()
    assert torch.equal(loss.detach(), expected.loss) and torch.equal(x.grad, expected.gradient)


@cases.each_mode
def test_row27_anomaly_mode(backend: str, device: str, gradient: str) -> None:
    student, teacher = pair((5, 45), device=device)
    expected = evaluate(student, teacher, backend=backend)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        measured = evaluate(student, teacher, backend=backend, gradient=gradient)
    assert torch.equal(measured.gradient, expected.gradient)


@cases.each_mode
@pytest.mark.parametrize("transform", ("grad", "vmap", "jvp", "jacrev"))
def test_row28_function_transforms_work_or_say_why_not(
    backend: str, device: str, transform: str, gradient: str
) -> None:
    student, teacher = pair((5, 45), device=device)

    def loss(z: Tensor) -> Tensor:
        return cases.call(
            z, teacher if z.ndim == 2 else teacher[0], backend=backend, gradient=gradient
        )

    try:
        if transform == "grad":
            got, expected = torch.func.grad(loss)(student), evaluate(student, teacher)[1]
        elif transform == "vmap":
            got, expected = torch.func.vmap(loss)(student), torch.stack([loss(z) for z in student])
        elif transform == "jvp":
            _, got = torch.func.jvp(loss, (student,), (torch.ones_like(student),))
            expected = evaluate(student, teacher)[1].sum()
        else:
            got, expected = torch.func.jacrev(loss)(student), evaluate(student, teacher)[1]
    except RuntimeError as error:
        assert "fused_kd_loss" in str(error), error
    else:
        torch.testing.assert_close(got, expected)


# ----------------------------------------------------------- rows 30-31: threads, processes, ranks


def test_row30_eight_python_threads_give_the_same_bits(backend: str, device: str) -> None:
    student, teacher = pair((33, 1031), device=device)
    labels = labels_for((33,), 1031, device=device)
    options = {"backend": backend, "divergence": "jsd"}
    expected = evaluate(student, teacher, labels, **options)
    failures: list[str] = []

    def work() -> None:
        for _ in range(5):
            got = evaluate(student, teacher, labels, **options)
            if not (torch.equal(got.loss, expected.loss) and torch.equal(got[1], expected[1])):
                failures.append("other bits")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("rows", (1, 2, 3, 33, 200))
def test_row30_any_thread_count_gives_the_same_bits(backend: str, device: str, rows: int) -> None:
    student, teacher = pair((rows, 513), device=device)
    labels = labels_for((rows,), 513, device=device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(evaluate(student, teacher, labels, backend=backend))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].loss, other.loss)
        assert torch.equal(results[0].gradient, other.gradient)


def run_python(code: str, *arguments: str, timeout: int = 240) -> str:
    """Run code in a fresh interpreter; its output. A hang is a failure."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_row30_fork_after_use_does_not_hang(backend: str) -> None:
    """A child inherits OpenMP's state without its threads. Eager torch hangs there as well with two
    threads (pytorch#17199), so the child does what PyTorch's DataLoader workers do: one thread."""
    only_cpu_tensors(backend)
    out = run_python(
        """
        import os, sys, torch, kdkernels
        z, t = torch.randn(64, 2000), torch.randn(64, 2000)
        expected = kdkernels.fused_kd_loss(z, t, backend=sys.argv[1])
        child = os.fork()
        torch.set_num_threads(1)
        got = kdkernels.fused_kd_loss(z, t, backend=sys.argv[1])
        assert torch.equal(got, expected)
        if child == 0:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print("both done")
        """,
        backend,
    )
    assert out == "both done\n"


def test_row30_fork_after_use_is_no_worse_than_eager_with_all_threads(backend: str) -> None:
    """Eager torch hangs there; what is made of its operators hangs with it."""
    only_cpu_tensors(backend)
    if backend in ("torch", "reference"):
        pytest.skip("made of eager operators")
    out = run_python(
        """
        import os, signal, sys, time, torch, kdkernels
        z, t = torch.randn(512, 2000), torch.randn(512, 2000)

        def eager():
            return torch.softmax(z, -1).sum()

        def ours():
            return kdkernels.fused_kd_loss(z, t, backend=sys.argv[1])

        def survives(call):
            child = os.fork()
            if child == 0:
                call()
                os._exit(0)
            end = time.time() + 15
            while time.time() < end:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status) == 0
                time.sleep(0.05)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False

        eager(), ours()
        print(survives(ours) or not survives(eager))
        """,
        backend,
    )
    assert out == "True\n", "hangs after fork where eager does not"


def test_row31_a_rank_with_nothing_to_learn_takes_part(tmp_path: Path) -> None:
    """DDP over gloo, two processes: the averaged gradient is half of the busy rank's."""
    out = run_python(
        """
        import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
        from torch.nn.parallel import DistributedDataParallel
        import kdkernels

        def work(rank, file):
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
            torch.manual_seed(0)
            model = DistributedDataParallel(torch.nn.Linear(8, 30))
            x, t = torch.randn(4, 8), torch.randn(4, 30)
            labels = torch.arange(4) if rank == 0 else torch.full((4,), -100)
            for gradient in ("forward", "recompute"):
                model.zero_grad()
                loss = kdkernels.fused_kd_loss(model(x), t, labels, gradient=gradient)
                loss.backward()
                alone = torch.nn.Linear(8, 30)
                alone.load_state_dict(model.module.state_dict())
                kdkernels.fused_kd_loss(alone(x), t, torch.arange(4)).backward()
                torch.testing.assert_close(
                    model.module.weight.grad, alone.weight.grad / 2, rtol=1e-5, atol=1e-7)
            # Not the model's end: torch waits there for gloo's thread with the GIL in its hand, and
            # that thread may be waiting for the GIL.
            dist.barrier()
            os._exit(0)

        if __name__ == "__main__":
            mp.start_processes(work, (sys.argv[1],), 2, start_method="fork")
            print("done")
        """,
        str(tmp_path / "store"),
    )
    assert out == "done\n"


def test_row31_a_dtensor_is_refused_by_name(tmp_path: Path) -> None:
    out = run_python(
        """
        import sys, torch, torch.distributed as dist, kdkernels
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        z = torch.randn(4, 6)
        for placement in (Shard(0), Shard(1), Replicate()):
            d = distribute_tensor(z, mesh, [placement])
            for arguments in ((d, z), (z, d)):
                try:
                    kdkernels.fused_kd_loss(*arguments)
                except TypeError as error:
                    print("logits: a DTensor" in str(error))
        """,
        str(tmp_path / "store"),
    )
    assert out == "True\n" * 6


# ---------------------------------------------------------------- row 32, subclasses, meta, modes


@cases.each_dtype
@pytest.mark.parametrize("beta", (0.1, 0.5, 0.9))
@pytest.mark.parametrize("name", ("jsd", "skew_forward_kl", "skew_reverse_kl"))
def test_row32_a_mixture_of_underflowing_probabilities_is_finite(
    backend: str, device: str, name: str, beta: float, dtype: torch.dtype
) -> None:
    student, teacher = pair((4, 100), dtype, device=device)
    student[:, 10:] -= 200
    teacher[:, 10:] -= 250
    student[1, 50:] = -60000.0
    options = {"divergence": name, "beta": beta}
    measured = evaluate(student, teacher, backend=backend, **options)
    assert measured.loss.isfinite() and measured.gradient.isfinite().all()
    both_close(measured, oracle(student, teacher, **options))


class Tagged(torch.Tensor):
    """A subclass that only rides along."""


def test_subclasses_and_parameters_give_the_same_result(backend: str, device: str) -> None:
    student, teacher = pair((5, 45), device=device)
    expected = evaluate(student, teacher, backend=backend)
    for wrap in (lambda z: z.as_subclass(Tagged), torch.nn.Parameter):
        z = wrap(student.clone()).requires_grad_()
        loss = cases.call(z, teacher, backend=backend)
        loss.backward()
        assert torch.equal(torch.Tensor(loss.detach()), expected.loss)
        assert torch.equal(torch.Tensor(z.grad), expected.gradient)


@REDUCTIONS
def test_meta_tensors_have_shapes_and_no_values(reduction: str) -> None:
    z = torch.empty(3, 4, 50, device="meta", requires_grad=True)
    labels = torch.empty(3, 4, dtype=torch.int64, device="meta")
    loss = fused_kd_loss(z, z.detach(), labels, reduction=reduction)
    assert loss.device.type == "meta" and loss.shape == ((3, 4) if reduction == "none" else ())
    loss.sum().backward()
    assert z.grad is not None and z.grad.shape == z.shape


def test_inputs_are_only_read(backend: str, device: str) -> None:
    student, teacher = pair((5, 45), torch.bfloat16, device=device)
    labels = labels_for((5,), 45, device=device)
    weights = torch.rand(5, device=device)
    tensors = (student, teacher, labels, weights)
    before = [t.clone() for t in tensors]
    versions = [t._version for t in tensors]
    for gradient in ("forward", "recompute"):
        evaluate(
            student, teacher, labels, backend=backend, token_weights=weights, gradient=gradient
        )
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert versions == [t._version for t in tensors]


def test_repeated_runs_give_the_same_bits(backend: str, device: str) -> None:
    student, teacher = pair((65, 1031), torch.bfloat16, device=device)
    first = evaluate(student, teacher, backend=backend)
    for _ in range(5):
        again = evaluate(student, teacher, backend=backend)
        assert torch.equal(first.loss, again.loss) and torch.equal(first.gradient, again.gradient)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@cases.each_spec
def test_no_cpu_backend_refuses_a_built_in_divergence(
    backend: str, dtype: torch.dtype, spec: cases.Spec
) -> None:
    """The skip of a refused problem must not hide that nothing was run."""
    only_cpu_tensors(backend)
    if backend not in ("cpu", "torch", "reference"):
        pytest.skip("a GPU's backend may run less")
    z = logits((2, 5), dtype)
    fused_kd_loss(z, z, backend=backend, **spec.arguments)


# ------------------------------------------------------------------------------------- a GPU only


def on_gpu(backend: str) -> None:
    if cases.device_of(backend) != "cuda":
        pytest.skip(f"{backend} runs on cpu tensors here")


@pytest.mark.gpu
def test_row29_a_stream_of_its_own(backend: str) -> None:
    on_gpu(backend)
    student, teacher = pair((64, 4099), device="cuda")
    expected = evaluate(student, teacher, backend=backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        late = student.zero_().add_(pair((64, 4099), device="cuda")[0])
        measured = evaluate(late, teacher, backend=backend)
    stream.synchronize()
    assert torch.equal(measured.gradient, expected.gradient)


def test_row29_a_capture_that_triton_cannot_join_says_what_to_call_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Launch:
        @staticmethod
        def forward(*_: Any, **__: Any) -> Any:
            raise RuntimeError(
                "Triton Error [CUDA]: operation not permitted when stream is capturing"
            )

    monkeypatch.setattr("kdkernels.backends.triton._load", lambda: Launch)
    problem = Problem(*pair((2, 5)), None, None, None, Options())
    with pytest.raises(RuntimeError, match=r"call the loss .* once .* before the capture"):
        BACKENDS["triton"].forward(problem, want_gradient=True, extras=False)


@pytest.mark.gpu
@cases.each_mode
def test_row29_a_cuda_graph_captures_and_replays(backend: str, gradient: str) -> None:
    on_gpu(backend)
    student, teacher = pair((16, 1031), device="cuda")
    labels = labels_for((16,), 1031, device="cuda")
    items = torch.tensor(7.0, device="cuda")
    x = student.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = cases.call(x, teacher, labels, backend=backend, gradient=gradient, num_items=items)
        return loss, torch.autograd.grad(loss, x)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, captured = step()
    fresh = logits((16, 1031), seed=9, device="cuda")
    with torch.no_grad():
        x.copy_(fresh)
    graph.replay()
    expected = evaluate(fresh, teacher, labels, backend=backend, num_items=items)
    assert torch.equal(loss, expected.loss) and torch.equal(captured, expected.gradient)


@pytest.mark.gpu
def test_row29_another_device_than_the_current_one(backend: str) -> None:
    on_gpu(backend)
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    student, teacher = pair((16, 1031), device="cuda:1")
    expected = evaluate(student.to("cuda:0"), teacher.to("cuda:0"), backend=backend)
    measured = evaluate(student, teacher, backend=backend)
    assert torch.cuda.current_device() == 0 and measured.gradient.device.index == 1
    assert torch.equal(measured.gradient.cpu(), expected.gradient.cpu())


@pytest.mark.gpu
@cases.each_mode
def test_no_host_synchronisation(backend: str, gradient: str) -> None:
    on_gpu(backend)
    student, teacher = pair((16, 1031), device="cuda")
    labels = labels_for((16,), 1031, device="cuda")
    items = torch.tensor(7.0, device="cuda")

    def step(**options: Any) -> None:
        evaluate(student, teacher, labels, backend=backend, gradient=gradient, **options)

    step(), step(num_items=items)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(), step(num_items=items), step(reduction="none"), step(divergence="jsd")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_host_synchronisation_in_the_python_code(backend: str) -> None:
    """On fake tensors ``.item()``, ``bool(tensor)`` and boolean indexing raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        student = torch.randn(4, 9, device="meta", requires_grad=True)
        labels = torch.zeros(4, dtype=torch.int64, device="meta")
        for options in ({}, {"reduction": "none"}, {"num_items": torch.ones((), device="meta")}):
            loss = fused_kd_loss(student, student.detach(), labels, return_outputs=True, **options)
            loss.loss.sum().backward()


@cases.each_mode
def test_a_nan_upstream_stays_one_whatever_its_payload(
    gradient: str, backend: str, device: str
) -> None:
    """Rounding to bfloat16 by adding to the bits carries 0x7fffffff over to minus zero."""
    student, teacher = pair((3, 50), torch.bfloat16, device=device)
    upstream = torch.tensor([1.0, 0.0, 1.0])
    upstream.view(torch.int32)[1] = 0x7FFFFFFF
    measured = evaluate(
        student,
        teacher,
        backend=backend,
        gradient=gradient,
        reduction="none",
        grad_output=upstream.to(device),
    )
    assert measured.gradient.isnan().all(-1).tolist() == [False, True, False]
