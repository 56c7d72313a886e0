"""Inputs at the edges of what the CUDA kernels take, against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import cases
import pytest
import simulator
import torch
from torch import Tensor

from kdkernels import label_errors

pytestmark = simulator.needs_simulator

each_kernel = pytest.mark.parametrize("kernel", ("chosen", "shared", "stream"))
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force the parameter ``kernel`` of a test, where it has one."""
    kernel = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kernel")
    if kernel and kernel != "chosen":
        monkeypatch.setenv("KDKERNELS_CUDA_KERNEL", kernel)


def assert_like_reference(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options: Any
) -> cases.Evaluation:
    """Row losses and gradient: the same NaN and infinities, and the same finite numbers."""
    options = {"reduction": "none", **options}
    want = cases.oracle(student, teacher, labels, **options)
    with simulator.simulated():
        got = cases.evaluate(student, teacher, labels, backend="cuda", **options)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-5, atol=2e-6, equal_nan=True)
    rounding = 0.6 * torch.finfo(student.dtype).eps + 2e-5
    largest = want.gradient.nan_to_num(0, 0, 0).abs().amax().item() if want.gradient.numel() else 0
    least = 2.0**-24 if student.dtype == torch.float16 else 0.0  # of its subnormal numbers
    torch.testing.assert_close(
        got.gradient.double(), want.gradient, rtol=rounding, atol=1e-6 * largest + least,
        equal_nan=True,
    )  # fmt: skip
    return got


@each_kernel
@pytest.mark.parametrize("vocab", (1, 2, 7, 8, 9, 17))
@cases.each_dtype
def test_tiny_vocabularies(kernel: str, vocab: int, dtype: torch.dtype) -> None:
    student, teacher = cases.pair((5, vocab), dtype)
    labels = torch.tensor([0, vocab - 1, -100, 0, vocab // 2])
    for temperature in (1.0, 2.0, 3.0):
        assert_like_reference(student, teacher, labels, temperature=temperature, alpha=0.3)
        assert_like_reference(student, teacher, labels, temperature=temperature, divergence="jsd")


@each_kernel
@pytest.mark.parametrize("offsets", ((1, 1), (1, 0), (0, 3), (7, 7)))
@cases.each_dtype
def test_storage_that_starts_anywhere(
    kernel: str, offsets: tuple[int, int], dtype: torch.dtype
) -> None:
    rows, vocab = 3, 1025
    student, teacher = (
        cases.logits((rows * vocab + 8,), dtype, seed=offset)[offset:][: rows * vocab]
        .view(rows, vocab) for offset in offsets
    )  # fmt: skip
    assert_like_reference(student, teacher, torch.tensor([1024, 0, 512]))


@pytest.mark.parametrize("vocab", (256, 259))
@pytest.mark.parametrize("which", ("teacher", "both", "columns"))
def test_expanded_logits(which: str, vocab: int) -> None:
    """Zero strides over rows, and over the vocabulary."""
    student, teacher = cases.pair((6, vocab), torch.bfloat16)
    teacher = teacher[:1].expand(6, vocab)
    if which == "both":
        student = student[:1].expand(6, vocab)
    if which == "columns":
        student, teacher = (
            cases.logits((6, 1), torch.bfloat16, seed=seed).expand(6, vocab) for seed in (1, 2)
        )
    assert_like_reference(student, teacher, cases.labels_for((6,), vocab))


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("rows", (0, 4))
def test_nothing_to_learn(reduction: str, rows: int) -> None:
    """No rows, or all ignored, whatever they hold: 0 with gradient 0."""
    student, teacher = cases.pair((rows, 1000), torch.bfloat16)
    student[:1] = math.nan
    got = assert_like_reference(
        student, teacher, torch.full((rows,), -100), reduction=reduction, gradient="forward"
    )
    assert (got.loss == 0).all() and (got.gradient == 0).all()
    nothing = torch.zeros(()) if reduction == "mean" else None
    assert_like_reference(
        student, teacher, torch.full((rows,), -100), reduction=reduction, num_items=nothing
    )


@each_kernel
@pytest.mark.parametrize("label", (-1, -101, 1000, 2**31 + 5, 2**32 + 3, -(2**63)))
def test_labels_outside_name_their_row(kernel: str, label: int) -> None:
    """Also those whose low 32 bits are a column. Other rows are exact."""
    student, teacher = cases.pair((4, 1000), torch.bfloat16)
    labels = torch.tensor([3, label, 999, -100])
    label_errors("cpu").zero_()
    for gradient in ("forward", "recompute"):
        options = {"alpha": 0.5, "reduction": "none", "gradient": gradient}
        with simulator.simulated():
            got = cases.evaluate(student, teacher, labels, backend="cuda", **options)
        assert label_errors("cpu").item() == 2
        assert got.loss.isnan().tolist() == [False, True, False, False]
        assert got.gradient.isnan().all(-1).tolist() == [False, True, False, False]
        labels_without = labels.clone()
        labels_without[1] = -100
        want = cases.oracle(student, teacher, labels_without, **options)
        keep = torch.tensor([0, 2, 3])
        torch.testing.assert_close(got.loss[keep].double(), want.loss[keep], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(
            got.gradient[keep].double(), want.gradient[keep], rtol=4e-3, atol=1e-6
        )
    label_errors("cpu").zero_()


@each_kernel
@pytest.mark.parametrize("temperature", (1e-3, 0.07, 37.5, 1e3))
@cases.each_dtype
def test_extreme_temperatures(kernel: str, temperature: float, dtype: torch.dtype) -> None:
    student, teacher = cases.pair((3, 1000), dtype)
    spec = cases.Spec("forward_kl")
    for labels in (None, torch.tensor([5, -100, 999])):
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            spec = cases.Spec(divergence, (0.5,) if divergence == "jsd" else ())
            options = {"temperature": temperature, "alpha": 0.5 if labels is not None else 1.0}
            standard = cases.standard(student, teacher, labels, spec, **options)
            with simulator.simulated():
                measured = cases.evaluate(
                    student, teacher, labels, backend="cuda", **options, **spec.arguments
                )
            cases.assert_accurate(measured, standard)


@each_kernel
@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "jsd", "tvd"))
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_rows_that_are_not_finite(kernel: str, divergence: str, dtype: torch.dtype) -> None:
    """+inf, -inf everywhere and NaN, in the middle and at both ends of a row, in either model."""
    vocab, inf = 1003, math.inf
    student, teacher = cases.pair((12, vocab), dtype)
    for row, value in ((0, inf), (1, math.nan)):
        student[row, 500], student[row + 2, 0], student[row + 4, -1] = value, value, value
        teacher[row + 6, 501] = value
    student[8], teacher[9] = -inf, -inf
    student[10], teacher[10] = -inf, -inf
    labels = torch.full((12,), 7)
    options: dict[str, Any] = {"divergence": divergence, "reduction": "none", "alpha": 0.5}
    with simulator.simulated():
        got = cases.evaluate(student, teacher, labels, backend="cuda", **options)
    assert got.loss.isnan().tolist() == [True] * 11 + [False]
    assert got.gradient.isnan().any(-1).tolist() == [True] * 11 + [False]
    want = cases.oracle(student[11:], teacher[11:], labels[11:], **options)
    torch.testing.assert_close(got.loss[11:].double(), want.loss, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_vocabularies_beyond_what_a_cluster_holds(dtype: torch.dtype) -> None:
    vocab = 300_007
    student, teacher = cases.pair((2, vocab), dtype)
    assert_like_reference(student, teacher, torch.tensor([vocab - 1, 17]), temperature=2.0)


@each_kernel
def test_logits_at_the_ends_of_float16(kernel: str) -> None:
    student, teacher = cases.pair((4, 1000), torch.float16)
    student[0, 3], teacher[0, 3] = 65504.0, 65504.0
    student[1], teacher[1] = -65504.0, 65504.0
    student[2, ::2] = -65504.0
    labels = torch.tensor([3, 0, 1, 2])
    for temperature in (0.5, 1.0, 4.0):
        assert_like_reference(student, teacher, labels, temperature=temperature)


@each_kernel
@pytest.mark.parametrize("mode", ("forward", "recompute"))
def test_a_gradient_from_above_stays_in_its_row(kernel: str, mode: str) -> None:
    """Expanded, strided, 0, infinite and NaN."""
    student, teacher = cases.pair((4, 1000), torch.bfloat16)
    labels = torch.tensor([1, 2, 3, 4])
    options = {"alpha": 0.5, "reduction": "none", "gradient": mode, "backend": "cuda"}
    above = torch.tensor([[1.0, 9.0], [0.0, 9.0], [math.nan, 9.0], [-2.0, 9.0]])[:, 0]
    with simulator.simulated():
        got = cases.evaluate(student, teacher, labels, grad_output=above, **options).gradient
        ones = torch.ones(1).expand(4)
        plain = cases.evaluate(student, teacher, labels, grad_output=ones, **options).gradient
    assert (got[1] == 0).all() and got[2].isnan().all()
    assert torch.equal(got[0], plain[0]) and torch.equal(got[3], -2 * plain[3])


@each_kernel
def test_padded_vocabulary_of_a_softcapped_student(kernel: str) -> None:
    """-inf in the padding becomes -cap, as in eager PyTorch: finite, unlike the columns beyond."""
    student, teacher = cases.pair((3, 1003), torch.float32)
    student[:, 1000:], teacher[:, 1000:] = -math.inf, -math.inf
    assert_like_reference(
        student, teacher, torch.tensor([5, 999, -100]), logit_softcap=30.0, temperature=2.0
    )


@each_kernel
def test_a_longer_student_vocabulary(kernel: str) -> None:
    """Columns beyond the common prefix get gradient 0, whatever their alignment."""
    for longer in (1008, 1016) if kernel == "shared" else (1001, 1016):
        student, teacher = (cases.logits((3, v), torch.bfloat16, seed=v) for v in (longer, 1000))
        got = assert_like_reference(
            student, teacher, torch.tensor([5, 999, -100]), vocab_policy="truncate"
        )
        assert (got.gradient[:, 1000:] == 0).all()
