"""fused_linear_kd_loss: the loss and gradients of hidden states, weight and bias, tile by tile."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdkernels import (
    FusedLinearKDLoss,
    TopKKDLoss,
    fused_kd_loss,
    fused_linear_kd_loss,
    fused_topk_kd_loss,
    linear,
    linear_op,
    linear_tiles,
    products,
)
from kdkernels.backends import BACKENDS
from kdkernels.entries import NORMALIZED, TAILS
from kdkernels.problem import Options, Problem

ROWS, H_STUDENT, H_TEACHER, VOCAB = 37, 24, 17, 211
ROW_BYTES = 2 * VOCAB * 4  # the two float32 tiles of one row
CHUNKS = pytest.mark.parametrize("chunk_rows", [1, 5, 36, 1000])
OPTIONS_OF_A_TERM: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "T = 1.7": {"temperature": 1.7},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "soft cap of the student": {"logit_softcap": (9.0, None)},
    "jsd": {"divergence": "jsd"},
    "reverse_kl": {"divergence": "reverse_kl"},
}


@pytest.fixture(autouse=True)
def on_the_backends_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test makes is on the device that its backend takes."""
    device = request.getfixturevalue("device") if "backend" in request.fixturenames else "cpu"
    with contextlib.nullcontext() if device == "cpu" else torch.device(device):
        yield


def inputs(
    dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = (ROWS,), vocab: int = VOCAB
) -> dict[str, Tensor]:
    """Student with bias, teacher without, labels of which some are ignored."""
    generator = torch.Generator("cpu").manual_seed(7)
    device = torch.get_default_device()

    def normal(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        return made.to(device, dtype)

    labels = torch.randint(0, vocab, lead, generator=generator, device="cpu").to(device)
    labels.view(-1)[2:7] = -100
    return {
        "student_hidden": normal(*lead, H_STUDENT).requires_grad_(),
        "student_weight": normal(vocab, H_STUDENT).requires_grad_(),
        "student_bias": normal(vocab).requires_grad_(),
        "teacher_hidden": normal(*lead, H_TEACHER),
        "teacher_weight": normal(vocab, H_TEACHER),
        "labels": labels,
    }


STUDENT = ("student_hidden", "student_weight", "student_bias")


def expected(given: dict[str, Tensor], grad: Tensor | None = None, **options: Any) -> list[Tensor]:
    """Loss and gradients in float64 from materialised logits and the oracle."""
    wide = {
        name: tensor.detach().double().requires_grad_(name in STUDENT)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in given.items()
    }
    student = wide["student_hidden"] @ wide["student_weight"].t()
    if "student_bias" in wide:
        student = student + wide["student_bias"]
    teacher = wide["teacher_hidden"] @ wide["teacher_weight"].t()
    if "teacher_bias" in wide:
        teacher = teacher + wide["teacher_bias"]
    options = _moved({**options, "gradient": "auto", "backend": "reference"}, student.device)
    loss = fused_kd_loss(student, teacher, wide["labels"], **options)
    loss.backward(torch.ones_like(loss) if grad is None else grad.double())
    return [loss.detach(), *(wide[name].grad for name in STUDENT if name in wide)]


K = 9


def sparse_inputs(
    tail: str = "bucket", lead: tuple[int, ...] = (ROWS,), **changes: Any
) -> dict[str, Tensor]:
    """:func:`inputs` with the top K of the teacher in its place; samples of it for "none".

    Some slots are empty, and one row has nothing but those.
    """
    given = inputs(lead=lead, **changes)
    hidden, weight = given.pop("teacher_hidden"), given.pop("teacher_weight")
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    if tail == "none":
        sampled = log_p.exp().view(-1, log_p.shape[-1]).multinomial(K, replacement=True)
        ids = sampled.view(*lead, K)
        log_p = torch.full_like(ids, 1 / K, dtype=log_p.dtype).log()
    else:
        log_p, ids = log_p.topk(K, -1)
    ids.view(-1, K)[3::5, K - 3 :] = -1
    ids.view(-1, K)[8] = -7
    return {**given, "teacher_ids": ids.int(), "teacher_log_probs": log_p.float()}


def expected_sparse(
    given: dict[str, Tensor], grad: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """As :func:`expected`, of entries."""
    wide = {name: given[name].detach().double().requires_grad_() for name in STUDENT}
    student = wide["student_hidden"] @ wide["student_weight"].t() + wide["student_bias"]
    options = _moved({**options, "gradient": "auto", "backend": "reference"}, student.device)
    of_teacher = (given["teacher_ids"], given["teacher_log_probs"])
    loss = fused_topk_kd_loss(student, *of_teacher, given.get("labels"), **options)
    loss.backward(torch.ones_like(loss) if grad is None else grad.double())
    return [loss.detach(), *(wide[name].grad for name in STUDENT)]


@pytest.fixture
def sparse_backend(backend: str, device: str) -> str:
    """Each backend that takes entries; the others are skipped with their reasons."""
    entries = torch.zeros(1, 1, dtype=torch.float64, device=device)
    ids, student = entries.long(), torch.zeros(1, 2, device=device)
    options = Options(tail="bucket")
    reasons = BACKENDS[backend].why_not(
        Problem(student, entries, None, None, None, options, teacher_ids=ids)
    )
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    return backend


def _moved(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {n: o.to(device) if isinstance(o, Tensor) else o for n, o in options.items()}


def assert_close(got: list[Tensor], want: list[Tensor], ulp: float) -> None:
    """Relative 2-norm, the gradients' own scale, so that a small gradient is tested as hard."""
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other).norm() / other.norm().clamp(min=1e-30)
        assert error <= ulp, f"relative error {error:.2e}"


def run(given: dict[str, Tensor], grad: Tensor | None = None, **options: Any) -> list[Tensor]:
    for name in STUDENT:
        if name in given:
            given[name].grad = None
    options = _moved(options, given["student_hidden"].device)
    loss = fused_linear_kd_loss(**given, **options)
    loss.backward(torch.ones_like(loss) if grad is None else grad)
    return [loss.detach(), *(given[name].grad for name in STUDENT if name in given)]


@CHUNKS
@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_loss_and_all_gradients_over_chunks(backend: str, chunk_rows: int, mode: str) -> None:
    given = inputs()
    options = {"temperature": 2.0, "alpha": 0.3}
    got = run(
        given, backend=backend, gradient=mode, max_chunk_bytes=chunk_rows * ROW_BYTES, **options
    )
    # Products of 24 float32 terms: a few times 2^-24 relative to their size.
    assert_close(got, expected(given, **options), 2e-6)


@pytest.mark.parametrize("name", cases.BUILT_IN)
def test_every_divergence(backend: str, name: str) -> None:
    given = inputs()
    assert_close(
        run(given, backend=backend, divergence=name, max_chunk_bytes=9 * ROW_BYTES),
        expected(given, divergence=name),
        5e-6,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.0},
        {"alpha": 0.0},
        {"reduction": "sum"},
        {"num_items": 11},
        {"num_items": torch.tensor(11)},
        {"token_weights": torch.linspace(-1, 2, ROWS)},
        {"label_smoothing": 0.1, "z_loss": 1e-3},
        {"logit_softcap": 3.0, "logit_scale": (0.5, 2.0)},
        {"temperature": 3.0, "temperature_squared": False},
    ],
    ids=lambda options: ",".join(options),
)
def test_every_option(backend: str, options: dict[str, Any]) -> None:
    given = inputs()
    got = run(given, backend=backend, max_chunk_bytes=9 * ROW_BYTES, **options)
    assert_close(got, expected(given, **options), 5e-6)


def test_reduction_none_honours_each_rows_grad_output(backend: str) -> None:
    given = inputs()
    grad = torch.linspace(-2, 3, ROWS)
    got = run(given, grad, backend=backend, reduction="none", max_chunk_bytes=9 * ROW_BYTES)
    assert_close(got, expected(given, grad, reduction="none"), 5e-6)


def test_shift_and_leading_shape(backend: str) -> None:
    given = inputs(lead=(3, 11))
    got = run(given, backend=backend, shift=True, max_chunk_bytes=4 * ROW_BYTES)
    assert_close(got, expected(given, shift=True), 5e-6)


@pytest.mark.parametrize("student_vocab, teacher_vocab", [(211, 190), (190, 211)])
def test_truncated_vocabularies(backend: str, student_vocab: int, teacher_vocab: int) -> None:
    given = inputs(vocab=student_vocab)
    given["teacher_weight"] = inputs(vocab=teacher_vocab)["teacher_weight"]
    given["labels"] = given["labels"].clamp(max=180)
    options = {"vocab_policy": "truncate"}
    got = run(given, backend=backend, max_chunk_bytes=4 * ROW_BYTES, **options)
    assert_close(got, expected(given, **options), 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_round_the_gradients_once(backend: str, dtype: torch.dtype) -> None:
    """The tiles of logits are float32: the gradient's error is the rounding of the result alone."""
    given = inputs(dtype)
    got = run(given, backend=backend, temperature=2.0, max_chunk_bytes=9 * ROW_BYTES)
    want = expected(given, temperature=2.0)
    assert [g.dtype for g in got] == [torch.float32, dtype, dtype, dtype]
    assert_close(got[:1], want[:1], 2e-6)
    assert_close(got[1:], want[1:], torch.finfo(dtype).eps / 2)


def test_half_weights_are_converted_in_pieces(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "PIECE_BYTES", 50 * H_STUDENT * 4)
    given = inputs(torch.bfloat16)
    got = run(given, backend=backend)
    assert_close(got[1:], expected(given)[1:], torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("leave_out", STUDENT)
def test_only_wanted_gradients(backend: str, leave_out: str) -> None:
    given = inputs()
    given[leave_out].requires_grad_(False)
    loss = fused_linear_kd_loss(**given, backend=backend)
    loss.backward()
    assert given[leave_out].grad is None
    want = dict(zip(STUDENT, expected(given)[1:], strict=True))
    for name in set(STUDENT) - {leave_out}:
        assert_close([given[name].grad], [want[name]], 5e-6)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("frozen", [(), STUDENT[:1], STUDENT[1:2], STUDENT[:2], STUDENT], ids=str)
@pytest.mark.parametrize("path", ["plain", "device", "pieces", "rounded"])
def test_frozen_inputs_have_no_products(
    path: str,
    frozen: tuple[str, ...],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """On every path: a product each for the hidden states and the weight, if they are trained."""
    if path in ("device", "rounded"):
        request.getfixturevalue("waits" if path == "device" else "wide_products")
    shapes: list[torch.Size] = []
    multiply = products._multiply

    def recorded(left: Tensor, right: Tensor, total: Tensor, **options: bool) -> None:
        shapes.append(total.shape)
        multiply(left, right, total, **options)

    monkeypatch.setattr(products, "_multiply", recorded)
    monkeypatch.setattr(products, "_NATIVE_BFLOAT16", False)
    given = inputs(torch.bfloat16 if path in ("pieces", "rounded") else torch.float32)
    for name in frozen:
        given[name].requires_grad_(False)
    loss = fused_linear_kd_loss(**given, gradient=mode)
    if loss.requires_grad:
        loss.backward()
    rows = ROWS if path in ("device", "rounded") else ROWS - 5
    one_each = {"student_hidden": (rows, H_STUDENT), "student_weight": (VOCAB, H_STUDENT)}
    assert shapes == [shape for name, shape in one_each.items() if name not in frozen]


def test_no_grad_and_grad_have_the_same_loss(backend: str) -> None:
    given = inputs()
    with torch.no_grad():
        plain = fused_linear_kd_loss(**given, backend=backend)
    assert not plain.requires_grad
    assert torch.equal(plain, fused_linear_kd_loss(**given, backend=backend).detach())


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("counted", ["some", "all"])
def test_logits_of_one_model_given(backend: str, which: str, counted: str) -> None:
    given = inputs(lead=(3, 11))
    del given["student_bias"]
    if counted == "all":
        given["labels"].clamp_(min=0)
    want = expected(given, temperature=2.0)
    hidden, weight = given.pop(f"{which}_hidden"), given.pop(f"{which}_weight")
    logits = (hidden @ weight.t()).detach()
    strided = torch.stack([logits, torch.zeros_like(logits)], 2)[:, :, 0]  # a view, no matrix
    given[f"{which}_logits"] = strided.requires_grad_(which == "student")
    loss = fused_linear_kd_loss(
        **given, backend=backend, temperature=2.0, max_chunk_bytes=4 * ROW_BYTES
    )
    loss.backward()
    if which == "teacher":
        got = [given["student_hidden"].grad, given["student_weight"].grad]
        assert_close([loss.detach(), *got], want, 5e-6)
    else:
        flat = strided.detach().double().requires_grad_()
        teacher = given["teacher_hidden"].double() @ given["teacher_weight"].double().t()
        fused_kd_loss(flat, teacher, given["labels"], temperature=2.0).backward()
        assert_close([loss.detach(), given["student_logits"].grad], [want[0], flat.grad], 5e-6)


def test_outputs_are_those_of_the_loss_on_logits(backend: str) -> None:
    given = inputs()
    got = fused_linear_kd_loss(
        **given, backend=backend, return_outputs=True, max_chunk_bytes=9 * ROW_BYTES
    )
    student = given["student_hidden"] @ given["student_weight"].t() + given["student_bias"]
    teacher = given["teacher_hidden"] @ given["teacher_weight"].t()
    want = fused_kd_loss(student, teacher, given["labels"], return_outputs=True)
    for name, one, other in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("options", OPTIONS_OF_A_TERM.values(), ids=OPTIONS_OF_A_TERM)
@pytest.mark.parametrize("columns", [[7], [0, VOCAB - 1], list(range(VOCAB))])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bad_teacher_without_weight_spoils_nothing(
    backend: str, dtype: torch.dtype, value: float, columns: list[int], options: dict[str, Any]
) -> None:
    """A row that is looked at twice, the second time without its teacher, where its gradient is to
    take the student's memory."""
    if dtype == torch.float64:
        cases.needs_float64(backend, str(torch.get_default_device()))
    given = inputs(dtype)
    student = given["student_hidden"] @ given["student_weight"].t() + given["student_bias"]
    teacher = given.pop("teacher_hidden") @ given.pop("teacher_weight").t()
    teacher[10, columns], teacher[20, columns] = value, value
    teacher[11, columns[:1]] = 1e4
    options = {"alpha": 0.0, "return_outputs": True, **options}
    want = fused_kd_loss(student, teacher, given["labels"], **options, backend="reference")
    got = fused_linear_kd_loss(
        **given, teacher_logits=teacher, **options, backend=backend, max_chunk_bytes=9 * ROW_BYTES
    )
    for name, one, other in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, msg=name, rtol=1e-4, atol=1e-5)
    named = [given[name] for name in STUDENT]
    for one, other in zip(
        torch.autograd.grad(got.loss, named), torch.autograd.grad(want.loss, named), strict=True
    ):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["neither", "student", "teacher"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label", [None, 3, -100])
def test_no_leading_dimension(backend: str, which: str, reduction: str, label: int | None) -> None:
    """Hidden states [H], beside logits [V] of the other model."""
    given = inputs(lead=(7,))
    del given["student_bias"]
    given = {name: t.detach()[0] if "hidden" in name else t.detach() for name, t in given.items()}
    given["labels"] = None if label is None else torch.tensor(label)
    student, teacher = (
        given[f"{model}_hidden"] @ given[f"{model}_weight"].t() for model in ("student", "teacher")
    )
    leaf = student.clone().requires_grad_()
    want = fused_kd_loss(leaf, teacher, given["labels"], reduction=reduction, backend=backend)
    want.backward()
    if which == "neither":
        source = given["student_hidden"].requires_grad_()
        gradient = leaf.grad @ given["student_weight"]
    else:
        for name in ("hidden", "weight"):
            del given[f"{which}_{name}"]
        logits = {"student": student, "teacher": teacher}[which]
        source = given[f"{which}_logits"] = logits.clone().requires_grad_(which == "student")
        gradient = leaf.grad
        if which == "teacher":
            source = given["student_hidden"].requires_grad_()
            gradient = leaf.grad @ given["student_weight"]
    got = fused_linear_kd_loss(**given, reduction=reduction, backend=backend)
    assert got.shape == ()
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(source.grad, gradient)


@pytest.mark.parametrize("scale", [65536.0, 2.0**20])
def test_given_float16_logits_meet_a_scalers_factor_before_they_are_rounded(
    backend: str, scale: float
) -> None:
    """As in ``fused_kd_loss``: gradients near 1e-8 are 0 in float16."""
    student, teacher = cases.pair((300, 500), torch.float16, scale=0.5)
    head = {"teacher_hidden": teacher.float(), "teacher_weight": torch.eye(500)}
    exact = cases.oracle(student, teacher).gradient * scale
    leaf = student.requires_grad_()
    loss = fused_linear_kd_loss(**head, student_logits=leaf, backend=backend)
    (loss * scale).backward()
    error = (leaf.grad.double() - exact).abs()
    tiny = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    rounding = 0.51 * torch.finfo(torch.float16).eps * exact.abs()
    assert (error <= rounding + tiny + 1e-6 * exact.abs().max()).all()
    assert (leaf.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("factor", [0.0, torch.inf, torch.nan])
def test_what_takes_no_part_has_a_gradient_of_0_whatever_the_factor(
    backend: str, factor: float, mode: str
) -> None:
    given = inputs()
    given["teacher_weight"] = given["teacher_weight"][: VOCAB - 9]
    given["labels"].clamp_(max=VOCAB - 10)
    weights = torch.ones(ROWS).index_fill(0, torch.tensor([20, 21]), 0.0)
    loss = fused_linear_kd_loss(
        **given, token_weights=weights, vocab_policy="truncate", backend=backend, gradient=mode
    )
    (loss * factor).backward()
    hidden, weight, bias = (given[name].grad for name in STUDENT)
    assert (hidden[[2, 3, 4, 5, 6, 20, 21]] == 0).all()
    assert (weight[VOCAB - 9 :] == 0).all() and (bias[VOCAB - 9 :] == 0).all()


@pytest.mark.parametrize("as_if_on", ["cpu", "device"])
@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("why", ["label", "weight", "both", "weight alone"])
def test_rows_that_do_not_count_touch_nothing(
    backend: str, why: str, value: float, mode: str, as_if_on: str, request: pytest.FixtureRequest
) -> None:
    """NaN in their hidden states: 0 times it would be NaN in the weight's whole gradient."""
    if as_if_on == "device":
        request.getfixturevalue("waits")
    given = inputs()
    options: dict[str, Any] = {"backend": backend, "gradient": mode}
    rows = [2, 3, 4, 5, 6] if why == "label" else [7, 8, 36]
    if why != "label":
        options["token_weights"] = torch.linspace(-1, 2, ROWS).index_fill(
            0, torch.tensor(rows), 0.0
        )
    if why == "weight":
        given["labels"].clamp_(min=0)
    elif why == "both":
        rows += [2, 3]
    elif why == "weight alone":
        del given["labels"]
    options["max_chunk_bytes"] = 9 * ROW_BYTES
    want = run(given, **options)
    with torch.no_grad():
        given["student_hidden"][rows] = value
        given["teacher_hidden"][rows] = value
    got = run(given, **options)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert torch.equal(got[1][rows], torch.zeros(len(rows), H_STUDENT))


@pytest.mark.parametrize("as_if_on", ["cpu", "device"])
def test_outputs_of_rows_of_no_weight(
    backend: str, as_if_on: str, request: pytest.FixtureRequest
) -> None:
    if as_if_on == "device":
        request.getfixturevalue("waits")
    given = inputs()
    student = given["student_hidden"] @ given["student_weight"].t() + given["student_bias"]
    teacher = given["teacher_hidden"] @ given["teacher_weight"].t()
    rows = torch.arange(5, 9)
    weights = torch.linspace(-1, 2, ROWS).index_fill(0, rows, 0.0)
    options = {"token_weights": weights, "return_outputs": True}
    want = fused_kd_loss(student, teacher, given["labels"], **options, backend="reference")
    with torch.no_grad():
        given["student_hidden"][rows] = torch.nan
    got = fused_linear_kd_loss(**given, **options, backend=backend, max_chunk_bytes=9 * ROW_BYTES)
    for name, one, other in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_on_the_cpu_rows_that_do_not_count_are_not_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    projected: list[int] = []
    project = products.project

    def recorded(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        projected.append(hidden.shape[0])
        project(hidden, weight, out)

    monkeypatch.setattr(products, "project", recorded)
    weights = torch.ones(ROWS).index_fill(0, torch.tensor([3, 30]), 0.0)  # row 3 is ignored, too
    run(inputs(), token_weights=weights)
    assert projected == [ROWS - 6] * 2


def test_nothing_counts(backend: str) -> None:
    given = inputs()
    given["labels"].fill_(-100)
    loss, *gradients = run(given, backend=backend)
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_backward_three_times(backend: str, mode: str) -> None:
    given = inputs()
    want = [g.clone() for g in run(given, backend=backend, gradient=mode)[1:]]
    for name in STUDENT:
        given[name].grad = None
    loss = fused_linear_kd_loss(**given, backend=backend, gradient=mode)
    for _ in range(2):
        loss.backward(retain_graph=True)
    loss.backward()
    for name, gradient in zip(STUDENT, want, strict=True):
        torch.testing.assert_close(given[name].grad, 3 * gradient)


@pytest.mark.parametrize("lead", [(0,), (2, 0), ()], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_and_a_single_row(lead: tuple[int, ...], reduction: str) -> None:
    given = inputs(lead=lead)
    got = run(given, reduction=reduction)
    assert_close(got, expected(given, reduction=reduction), 5e-6)
    assert got[0].shape == (lead if reduction == "none" else ())


def test_masked_vocabulary(backend: str) -> None:
    """-inf in both biases: probability 0, and no gradient to those entries."""
    given = inputs()
    for model in ("student", "teacher"):
        bias = torch.zeros(VOCAB)
        bias[200:] = -torch.inf
        given[f"{model}_bias"] = bias.requires_grad_(model == "student")
    given["labels"].clamp_(max=199)
    got = run(given, backend=backend, temperature=2.0, max_chunk_bytes=9 * ROW_BYTES)
    narrow = {
        name: tensor.detach()[:200].requires_grad_(tensor.requires_grad)
        if name.endswith(("weight", "bias"))
        else tensor
        for name, tensor in given.items()
    }
    assert torch.equal(got[2][200:], torch.zeros(11, H_STUDENT))
    assert torch.equal(got[3][200:], torch.zeros(11))
    want = run(narrow, backend=backend, temperature=2.0)
    for one, other in zip([got[0], got[1], got[2][:200], got[3][:200]], want, strict=True):
        torch.testing.assert_close(one, other)


def test_mixed_dtypes_under_autocast(backend: str) -> None:
    """What a model gives there: half hidden states next to float32 weights. No rounding inside."""
    given = inputs()
    for name in ("student_hidden", "teacher_hidden"):
        half = given[name].detach().bfloat16()
        given[name] = half.requires_grad_(name == "student_hidden")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(given, backend=backend, max_chunk_bytes=9 * ROW_BYTES)
    want = expected(given)
    assert [g.dtype for g in got] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert_close([got[0], *got[2:]], [want[0], *want[2:]], 5e-6)
    assert_close(got[1:2], want[1:2], 2**-8)


def test_products_of_half_inputs_are_exact_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(40, 300).bfloat16(), torch.randn(600, 300).bfloat16()
    want = hidden.double() @ weight.double().t()
    for native in {False, products.native_bfloat16()}:
        monkeypatch.setattr(products, "_NATIVE_BFLOAT16", native)
        monkeypatch.setattr(products, "PIECE_BYTES", 100 * 300 * 4)
        wide = torch.full((40, 700), torch.nan)
        products.project(hidden, weight, wide[:, :600])
        assert_close([wide[:, :600]], [want], 2**-18)
        assert wide[:, 600:].isnan().all()
        tile = torch.randn(40, 600)
        to_hidden, to_weight = torch.full((40, 300), torch.nan), torch.full((600, 300), torch.nan)
        products.propagate(tile, hidden, weight, to_hidden, to_weight, add=False)
        want_gradients = [tile.double() @ weight.double(), tile.double().t() @ hidden.double()]
        accuracy = 2**-8 if native else 1e-6
        assert_close([to_hidden, to_weight], want_gradients, accuracy)
        products.propagate(tile, hidden, weight, None, to_weight, add=True)
        assert_close([to_weight], [2 * want_gradients[1]], accuracy)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of devices, on the CPU: nobody looks at a number, all rows are multiplied."""
    monkeypatch.setattr(linear_tiles, "_waits", lambda device: True)


@pytest.fixture
def wide_products(
    request: pytest.FixtureRequest, waits: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """What a GPU has, on the CPU: float32 results of half-precision products. Gives the calls."""
    calls: list[str] = []

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        # CUDA's own conditions.
        assert left.dtype == right.dtype in (torch.bfloat16, torch.float16)
        assert out_dtype == torch.float32
        calls.append(str(left.dtype))
        return left.to(out_dtype) @ right.to(out_dtype)

    def mm_out(left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert out.dtype == out_dtype and out.shape == (left.shape[0], right.shape[1])
        return out.copy_(mm(left, right, out_dtype))

    def addmm_out(
        total: Tensor,
        left: Tensor,
        right: Tensor,
        out_dtype: torch.dtype,
        *,
        beta: float = 1,
        alpha: float = 1,
        out: Tensor,
    ) -> Tensor:
        assert total.data_ptr() == out.data_ptr() and out.dtype == out_dtype
        assert beta == alpha == 1
        return out.add_(mm(left, right, out_dtype))

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", mm, "CPU")
    library.impl("mm.dtype_out", mm_out, "CPU")
    adds = getattr(request, "param", True)
    if adds:
        library.impl("addmm.dtype_out", addmm_out, "CPU")
    monkeypatch.setattr(products, "_ADDS_TO_FLOAT32", adds)
    monkeypatch.setattr(products, "wide_results", lambda device: True)
    monkeypatch.setattr(products, "_NATIVE_BFLOAT16", False)
    yield calls
    library._destroy()


@pytest.mark.parametrize("wide_products", [True, False], indirect=True, ids=["addmm", "mm"])
@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_products_with_float32_results(
    wide_products: list[str], dtype: torch.dtype, mode: str, tiles: int
) -> None:
    """The path of GPUs: exact logits; the tile's gradient is rounded in bfloat16 only."""
    given = inputs(dtype)
    options = {"temperature": 2.0, "alpha": 0.7, "max_chunk_bytes": 46 * ROW_BYTES // tiles}
    got = run(given, gradient=mode, **options)
    want = expected(given, temperature=2.0, alpha=0.7)
    # Without the gradients that bfloat16 products leave in their own dtype: the hidden states', and
    # the weight's if there is one.
    gradients = tiles if dtype == torch.bfloat16 and tiles > 1 else 0
    projections = 2 if mode == "forward" else 4
    assert wide_products == [str(dtype)] * (tiles * projections + gradients)
    assert_close(got[:1], want[:1], 2e-6)
    assert_close(got[1:], want[1:], torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("counted", ["some", "all", "none"])
@pytest.mark.parametrize("teacher", ["hidden", "logits"])
@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_rows_that_count_come_first_in_ragged_products(
    wide_products: list[str],
    mode: str,
    tiles: int,
    teacher: str,
    counted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where only a device knows how many rows count: the others' gradients are not multiplied.

    Only of a single tile: of several, each one's product would be rounded.
    """
    monkeypatch.setattr(products, "GROUPED_PRODUCTS", True)
    monkeypatch.setattr(products, "_has_grouped_products", lambda device: True)
    multiplied: list[int] = []
    grouped_mm = torch._grouped_mm

    def recorded(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        assert all(tensor.data_ptr() % 16 == 0 for tensor in (left, right))
        assert all(min(t.stride()[-2:]) == 1 and max(t.stride()) % 8 == 0 for t in (left, right))
        multiplied.append(int(offs))
        product = grouped_mm(left, right, offs=offs)
        if right.ndim == 3:
            product[int(offs) :] = torch.nan  # undefined there
        return product

    monkeypatch.setattr(torch, "_grouped_mm", recorded)
    given = inputs(torch.bfloat16, lead=(1, ROWS))
    if counted != "some":
        given["labels"].clamp_(min=0).add_(0 if counted == "all" else -1000).clamp_(min=-100)
    options = {"gradient": mode, "token_weights": torch.linspace(2, -1, ROWS).view(1, -1)}
    if counted == "some":
        options["token_weights"][0, 20:] = 0.0
    want = expected(given, **options)
    with torch.no_grad():
        if counted == "some":
            given["student_hidden"][0, 2:7] = torch.nan
            given["student_hidden"][0, 20:] = torch.inf
    if teacher == "logits":
        hidden, weight = given.pop("teacher_hidden"), given.pop("teacher_weight")
        given["teacher_logits"] = (hidden.double() @ weight.double().t()).float()
    got = run(given, **options, max_chunk_bytes=55 * ROW_BYTES // tiles)
    count = {"some": 15, "all": ROWS, "none": 1}[counted]  # of no rows, one whose gradient is 0
    assert multiplied == ([count, count] if tiles == 1 else []), "only of a single tile"
    assert_close(got[:1], want[:1], 2e-6)
    assert_close(got[1:], want[1:], 2**-8)
    dead = got[1][0, 2:7] if counted == "some" else got[1][0, :0]
    assert torch.equal(dead, torch.zeros_like(dead))


@pytest.mark.parametrize("teacher", ["hidden", "logits"])
@pytest.mark.parametrize("vocab", [3, 64, VOCAB])
def test_rounded_gradients_have_aligned_rows(
    wide_products: list[str], teacher: str, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of rows at odd addresses is slow; their memory is the teacher's, if it fits."""
    given = inputs(torch.bfloat16, vocab=vocab)
    want = expected(given)
    if teacher == "logits":
        hidden, weight = given.pop("teacher_hidden"), given.pop("teacher_weight")
        given["teacher_logits"] = hidden.double() @ weight.double().t()
    own: list[bool] = []
    half_tile = linear_tiles._Sweep.half_tile

    def recorded(sweep: Any) -> Tensor:
        made = half_tile(sweep)
        assert made.dtype == torch.bfloat16 and made.shape == (sweep.step, vocab)
        assert made.stride() == (-(-vocab // 64) * 64, 1)
        assert made.storage_offset() % 64 == 0
        own.append(made.untyped_storage().data_ptr() != sweep.memory.untyped_storage().data_ptr())
        return made

    monkeypatch.setattr(linear_tiles._Sweep, "half_tile", recorded)
    got = run(given, max_chunk_bytes=9 * 2 * 4 * vocab)
    assert own == [teacher == "logits" or vocab == 3]
    assert_close(got[1:], want[1:], 2**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1000, 1003])
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("teacher", ["hidden", "logits"])
@pytest.mark.parametrize("ragged", [True, False])
def test_bfloat16_on_a_gpu(
    ragged: bool, teacher: str, mode: str, tiles: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32's accuracy, whatever hidden states of rows that do not count hold; nothing waits."""
    if not products.wide_results(torch.device("cuda")):
        pytest.skip("no float32 results of bfloat16 products")
    if ragged and not products._has_grouped_products(torch.device("cuda")):
        pytest.skip("no grouped products")
    monkeypatch.setattr(products, "GROUPED_PRODUCTS", ragged)
    rows, hidden = 300, 256
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    given = {
        "student_hidden": normal(rows, hidden).requires_grad_(),
        "student_weight": (normal(vocab, hidden) / 8).requires_grad_(),
        "teacher_hidden": normal(rows, hidden),
        "teacher_weight": normal(vocab, hidden) / 8,
        "labels": torch.randint(vocab, (rows,), generator=generator),
    }
    given["labels"][100:180] = -100
    options = {"temperature": 2.0, "token_weights": torch.linspace(0, 2, rows)}
    options["token_weights"][190:] = 0.0
    want = expected(given, **options)
    if teacher == "logits":
        of_teacher = [given.pop(f"teacher_{name}").double() for name in ("hidden", "weight")]
        given["teacher_logits"] = (of_teacher[0] @ of_teacher[1].t()).float()
    with torch.no_grad():
        given["student_hidden"][100:180] = torch.nan
        given["student_hidden"][190:] = torch.inf
    given = {
        name: tensor.detach().cuda().requires_grad_(tensor.requires_grad)
        for name, tensor in given.items()
    }
    options |= {"gradient": mode, "max_chunk_bytes": 12 * rows * vocab // tiles}
    options["token_weights"] = options["token_weights"].cuda()
    first = run(given, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(given, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(got, first, strict=True))
    got = [tensor.cpu() for tensor in got]
    assert_close(got[:1], want[:1], 2e-6)
    assert_close(got[1:], want[1:], torch.finfo(torch.bfloat16).eps / 2)


def test_float32_results_are_asked_of_nvidia_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check = products.wide_results.__wrapped__
    grouped = products._has_grouped_products.__wrapped__
    monkeypatch.setattr(products, "wide_results", check)
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert check(gpu) and not check(torch.device("cpu"))
    assert grouped(gpu) and not grouped(torch.device("cpu"))
    capability = (8, 0)
    assert check(gpu) and not grouped(gpu)
    capability = (7, 5)
    assert not check(gpu)
    capability = (9, 4)  # what ROCm says of an MI300
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not check(gpu)


def test_changed_inputs_are_noticed_where_they_are_read_again() -> None:
    given = inputs()
    loss = fused_linear_kd_loss(**given, gradient="recompute")
    with torch.no_grad():
        given["student_weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    want = run(given)[1:]
    for name in STUDENT:
        given[name].grad = None
    loss = fused_linear_kd_loss(**given)
    with torch.no_grad():
        given["student_weight"].mul_(2)  # the gradients exist already
    loss.backward()
    assert all(torch.equal(given[n].grad, g) for n, g in zip(STUDENT, want, strict=True))


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("who", ["teacher_hidden", "teacher_weight", "labels", "student_weight"])
def test_inference_tensors_may_be_overwritten_before_the_backward(
    backend: str, who: str, mode: str
) -> None:
    given = inputs()
    with torch.inference_mode():
        given[who] = given[who].detach().clone()

    def hidden_gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, given["student_hidden"])[0]

    want = hidden_gradient(fused_linear_kd_loss(**given, backend=backend, gradient=mode))
    loss = fused_linear_kd_loss(**given, backend=backend, gradient=mode)
    with torch.inference_mode():
        given[who].copy_(given[who].flip(0))
    assert torch.equal(hidden_gradient(loss), want)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("of", STUDENT)
@pytest.mark.parametrize("to", STUDENT)
def test_the_second_derivative_is_refused(of: str, to: str, mode: str) -> None:
    """Also along a path that only ``torch.autograd.grad(penalty, inputs)`` goes."""
    given = inputs()
    loss = fused_linear_kd_loss(**given, gradient=mode)
    (gradient,) = torch.autograd.grad(loss, given[of], create_graph=True)
    penalty = gradient.square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(penalty + given[to].sum(), given[to], retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty.backward()


def test_function_transforms_are_refused() -> None:
    given = inputs()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda h: fused_linear_kd_loss(**{**given, "student_hidden": h}))(
            given["student_hidden"].detach()
        )


def test_the_teacher_is_a_constant(backend: str) -> None:
    given = inputs()
    teacher = [given[f"teacher_{name}"].requires_grad_() for name in ("hidden", "weight")]
    given["student_hidden"].requires_grad_(False)
    loss = fused_linear_kd_loss(**given, backend=backend)
    loss.backward()
    assert all(tensor.grad is None for tensor in teacher)
    with torch.inference_mode():
        given |= {"teacher_hidden": teacher[0].clone(), "teacher_weight": teacher[1].clone()}
    assert torch.equal(fused_linear_kd_loss(**given, backend=backend, gradient="recompute"), loss)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_scaled_loss_scales_every_gradient(backend: str, scale: float) -> None:
    given = inputs()
    want = [scale * g for g in expected(given)[1:]]
    assert_close(run(given, torch.tensor(scale), backend=backend)[1:], want, 5e-6)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_opcheck(backend: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake rule, autograd registration and AOT dispatch of both ops."""
    opcheck(inputs(lead=(2, 5), vocab=23), monkeypatch, backend=backend, gradient=mode)


@pytest.mark.parametrize("rows", [4, 1000])
@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_opcheck_of_rounded_gradients(
    wide_products: list[str], mode: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients' dtypes depend on the number of tiles; the fake rule knows them."""
    given = inputs(torch.bfloat16, lead=(2, 5), vocab=23)
    opcheck(given, monkeypatch, gradient=mode, max_chunk_bytes=rows * 2 * 4 * 23)


def opcheck(given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    calls: list[tuple[Any, ...]] = []
    op = linear_op.linear_kd_forward

    def recorded(*arguments: Any) -> Any:
        calls.append(arguments)
        return op(*arguments)

    recorded.redispatch = op.redispatch  # type: ignore[attr-defined]
    monkeypatch.setattr(linear, "linear_kd_forward", recorded)
    fused_linear_kd_loss(**given, **options, return_outputs=True)
    (arguments,) = calls
    monkeypatch.setattr(linear, "linear_kd_forward", op)
    torch.library.opcheck(op, arguments)
    end = linear_op.OPTIONS_END
    detached = [t.detach() if isinstance(t, Tensor) else t for t in arguments[:end]]
    _, statistics, *_ = op(*detached, *arguments[end:])
    rest = (*arguments[end : end + 2], [True, True, True, False], statistics, torch.tensor(2.0))
    torch.library.opcheck(linear_op.linear_kd_backward, (*detached, *rest))


def test_a_sharded_output_layer_in_two_processes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("linear_two_processes.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)


def test_tied_weight_sums_both_uses() -> None:
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 50, (6,))
    teacher = torch.randn(6, 50, dtype=torch.float64)
    hidden = torch.nn.functional.embedding(tokens, weight)
    fused_linear_kd_loss(hidden, weight, labels=tokens, teacher_logits=teacher).backward()
    got, weight.grad = weight.grad, None
    hidden = torch.nn.functional.embedding(tokens, weight)
    fused_kd_loss(hidden @ weight.t(), teacher, tokens).backward()
    torch.testing.assert_close(got, weight.grad)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


def _changed(given: dict[str, Tensor], **changes: Tensor) -> dict[str, Tensor]:
    for name, tensor in changes.items():
        given[name] = tensor.detach().requires_grad_(name in STUDENT)
    return given


def _with_row(value: float) -> Tensor:
    hidden = _normal(ROWS, H_STUDENT)
    hidden[9] = value
    return hidden


#: What models, views and broken training runs give.
UNUSUAL: dict[str, dict[str, Tensor]] = {
    "hidden size 0": {
        "student_hidden": _normal(ROWS, 0),
        "student_weight": _normal(VOCAB, 0),
        "teacher_hidden": _normal(ROWS, 0),
        "teacher_weight": _normal(VOCAB, 0),
    },
    "hidden size 1": {
        "student_hidden": _normal(ROWS, 1),
        "student_weight": _normal(VOCAB, 1),
    },
    "transposed weights": {
        "student_weight": _normal(H_STUDENT, VOCAB).t(),
        "teacher_weight": _normal(H_TEACHER, VOCAB).t(),
    },
    "every other entry": {
        "student_hidden": _normal(ROWS, 2 * H_STUDENT)[:, ::2],
        "student_weight": _normal(2 * VOCAB, 2 * H_STUDENT)[::2, 1::2],
        "student_bias": _normal(2 * VOCAB)[::2],
    },
    "expanded": {
        "student_hidden": _normal(1, H_STUDENT).expand(ROWS, -1),
        "student_bias": _normal(1).expand(VOCAB),
        "teacher_weight": _normal(1, H_TEACHER).expand(VOCAB, -1),
    },
    "bias of the teacher": {"teacher_bias": _normal(VOCAB)},
    "wider than float16's range": {
        "student_hidden": 200 * _normal(ROWS, H_STUDENT).half(),
        "student_weight": 200 * _normal(VOCAB, H_STUDENT).half(),
    },
    "NaN in a row": {"student_hidden": _with_row(torch.nan)},
    "inf in a row": {"student_hidden": _with_row(torch.inf)},
    "NaN in a row of the teacher": {"teacher_hidden": _with_row(torch.nan)[:, :H_TEACHER]},
}


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_inputs(name: str, mode: str) -> None:
    given = _changed(inputs(), **UNUSUAL[name])
    got = run(given, gradient=mode, temperature=2.0, max_chunk_bytes=9 * ROW_BYTES)
    for one, other in zip(got, expected(given, temperature=2.0), strict=True):
        half = one.dtype == torch.float16
        assert torch.equal(one.isnan(), other.isnan())
        finite = ~other.isnan()
        assert_close([one[finite]], [other[finite]], 2**-10 if half else 5e-6)


@pytest.mark.parametrize("vocab", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_vocabularies_and_a_budget_below_one_row(vocab: int, dtype: torch.dtype) -> None:
    given = inputs(dtype, vocab=vocab)
    got = run(given, max_chunk_bytes=1)
    want = expected(given)
    if vocab == 1:
        assert all(torch.equal(g, torch.zeros_like(g)) for g in got)
    else:
        assert_close(got, want, torch.finfo(dtype).eps if dtype == torch.float16 else 5e-6)


def test_hidden_states_that_are_the_weight() -> None:
    weight = torch.randn(VOCAB, H_STUDENT, requires_grad=True)
    teacher, labels = torch.randn(VOCAB, VOCAB), torch.randint(VOCAB, (VOCAB,))
    fused_linear_kd_loss(weight, weight, labels=labels, teacher_logits=teacher).backward()
    wide = weight.detach().double().requires_grad_()
    fused_kd_loss(wide @ wide.t(), teacher, labels, backend="reference").backward()
    assert_close([weight.grad], [wide.grad], 5e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_checkpointed(reentrant: bool, mode: str) -> None:
    given = inputs()

    def loss(*student: Tensor) -> Tensor:
        named = dict(zip(STUDENT, student, strict=True))
        return fused_linear_kd_loss(**{**given, **named}, gradient=mode)

    student = [given[name] for name in STUDENT]
    checkpoint(loss, *student, use_reentrant=reentrant).backward()
    assert_close([tensor.grad for tensor in student], expected(given)[1:], 5e-6)


def recorded_tiles(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Of every sweep from now on: how many tiles of which shape are alive at once."""
    shapes: list[torch.Size] = []

    class Recorded(linear_tiles._Sweep):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            shapes.append(self.memory.shape)

    monkeypatch.setattr(linear_tiles, "_Sweep", Recorded)
    return shapes


def test_the_tiles_keep_to_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory, and what is copied of given logits; they are of one size."""
    shapes = recorded_tiles(monkeypatch)
    monkeypatch.setattr(products, "_NATIVE_BFLOAT16", False)

    def sweep(
        rows: int, row_bytes: int, dtype: torch.dtype = torch.float32, **changed: Any
    ) -> None:
        given = {**inputs(dtype, lead=(rows,)), **changed}
        fused_linear_kd_loss(**given, max_chunk_bytes=16 * row_bytes).backward()

    # Rows picked by index: the student's states, their gradient, the teacher's states.
    picked = ROW_BYTES + 4 * (2 * H_STUDENT + H_TEACHER)
    sweep(65, picked)
    sweep(512, picked)
    sweep(512, ROW_BYTES, labels=None)
    # In float32, too.
    sweep(512, picked + 2 * (H_STUDENT + H_TEACHER), torch.bfloat16)
    without = {"teacher_hidden": None, "teacher_weight": None}
    teacher_logits = torch.randn(512, VOCAB)
    sweep(512, ROW_BYTES + 8 * H_STUDENT, **without, teacher_logits=teacher_logits)
    full = (2, 16, VOCAB)
    assert shapes == [(2, 15, VOCAB), full, full, full, (1, 16, VOCAB)]


def test_the_tiles_of_a_gpu_keep_to_their_budget(
    wide_products: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the logits: rounded gradients where there is no teacher's tile, cleaned states."""
    steps: list[int] = []

    class Recorded(linear_tiles._Sweep):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            steps.append(self.step)

    monkeypatch.setattr(linear_tiles, "_Sweep", Recorded)
    given = inputs(torch.bfloat16, lead=(512,))
    without = {"teacher_hidden": None, "teacher_weight": None}
    without["teacher_logits"] = torch.randn(512, VOCAB)
    for changed, row_bytes in (
        ({}, ROW_BYTES + 2 * H_STUDENT),
        ({"labels": None}, ROW_BYTES),
        (without, ROW_BYTES + 2 * VOCAB + 2 * H_STUDENT),
    ):
        for budget in (16 * row_bytes, 16 * row_bytes - 1):
            fused_linear_kd_loss(**{**given, **changed}, max_chunk_bytes=budget).backward()
    assert steps == [16, 15] * 3


def test_the_default_budget_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    default = linear._default_chunk_bytes
    assert default(torch.device("cpu")) == linear.MAX_CHUNK_BYTES == 256 << 20
    for gigabytes, mebibytes in ((141, 4202), (4, 256)):
        properties = type("Properties", (), {"total_memory": gigabytes * 10**9})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        assert default(torch.device("cuda:0")) >> 20 == mebibytes


def test_compiles_as_one_graph_for_any_number_of_rows() -> None:
    compiled = torch.compile(fused_linear_kd_loss, fullgraph=True, dynamic=True)
    for rows in (ROWS, 12, 50):
        given = inputs(lead=(rows,))
        compiled(**given, temperature=2.0).backward()
        got = [given[name].grad for name in STUDENT]
        want = run(given, temperature=2.0)[1:]
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)


def test_gradcheck_in_float64(backend: str, device: str) -> None:
    cases.needs_float64(backend, device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    student = [normal(3, 4), normal(5, 4), normal(5)]
    teacher, labels = normal(3, 5), torch.tensor([1, -100, 4])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_kd_loss(
            hidden,
            weight,
            labels=labels,
            student_bias=bias,
            teacher_logits=teacher,
            backend=backend,
            temperature=1.7,
        )

    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in student])


# ---- a teacher of a few entries ---------------------------------------------------------------


@CHUNKS
@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("tail", TAILS)
def test_entries_over_chunks(sparse_backend: str, tail: str, mode: str, chunk_rows: int) -> None:
    given = sparse_inputs(tail)
    options = {"tail": tail, "temperature": 2.0, "alpha": 0.3}
    budget = chunk_rows * ROW_BYTES // 2
    got = run(given, backend=sparse_backend, gradient=mode, max_chunk_bytes=budget, **options)
    assert_close(got, expected_sparse(given, **options), 2e-6)


@pytest.mark.parametrize("name", cases.BUILT_IN)
@pytest.mark.parametrize("tail", [tail for tail in TAILS if tail != "none"])
def test_every_divergence_of_entries(sparse_backend: str, tail: str, name: str) -> None:
    given = sparse_inputs(tail)
    options = {"tail": tail, "divergence": name}
    budget = 9 * ROW_BYTES
    got = run(given, backend=sparse_backend, max_chunk_bytes=budget, **options)
    want = expected_sparse(given, **options)
    if (tail, name) == ("renormalize", "reverse_kl"):  # q log (q / 0)
        got, want = [got[0].exp().reciprocal()], [torch.zeros_like(want[0])]
    assert_close(got, want, 5e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.0, "labels": None},
        {"alpha": 0.0},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"num_items": 11},
        {"token_weights": torch.linspace(-1, 2, ROWS)},
        {"label_smoothing": 0.1, "z_loss": 1e-3},
        {"logit_softcap": (3.0, None), "logit_scale": 0.5},
        {"tail": "subset", "teacher_temperature": 1.0, "temperature": 2.0},
        {"tail": "renormalize", "teacher_temperature": 3.0},
        {"temperature": 3.0, "temperature_squared": False},
    ],
    ids=lambda options: ",".join(options),
)
def test_every_option_of_entries(sparse_backend: str, options: dict[str, Any]) -> None:
    given = sparse_inputs(options.get("tail", "bucket"))
    given |= {name: options[name] for name in ("labels",) if name in options}
    options = {name: value for name, value in options.items() if name != "labels"}
    grad = torch.linspace(-2, 3, ROWS) if options.get("reduction") == "none" else None
    got = run(given, grad, backend=sparse_backend, max_chunk_bytes=9 * ROW_BYTES, **options)
    assert_close(got, expected_sparse(given, grad, **options), 5e-6)


@pytest.mark.parametrize("as_if_on", ["cpu", "device"])
@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_entries_of_rows_that_do_not_count_are_not_read(
    sparse_backend: str, mode: str, as_if_on: str, request: pytest.FixtureRequest
) -> None:
    if as_if_on == "device":
        request.getfixturevalue("waits")
    given = sparse_inputs(lead=(3, 11))
    options = {"backend": sparse_backend, "gradient": mode, "max_chunk_bytes": 4 * ROW_BYTES}
    options["token_weights"] = torch.ones(3, 11).index_fill(1, torch.tensor([9]), 0.0)
    rows = given["labels"].eq(-100) | options["token_weights"].eq(0)
    want = run(given, **options)
    with torch.no_grad():
        given["student_hidden"][rows] = torch.nan
        given["teacher_log_probs"][rows] = torch.nan
        given["teacher_ids"][rows] = 10 * VOCAB
    got = run(given, **options)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert not got[1][rows].any()


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_products_beside_entries(
    wide_products: list[str], dtype: torch.dtype, mode: str, tiles: int
) -> None:
    """Where a tile's gradient is rounded there is no teacher's tile whose memory it could take."""
    given = sparse_inputs(dtype=dtype)
    row_bytes = ROW_BYTES // 2 + 2 * VOCAB + 2 * H_STUDENT
    budget = -(-ROWS // tiles) * row_bytes
    got = run(given, gradient=mode, temperature=2.0, backend="torch", max_chunk_bytes=budget)
    want = expected_sparse(given, temperature=2.0)
    assert set(wide_products) == {str(dtype)}
    assert_close(got[:1], want[:1], 2e-6)
    assert_close(got[1:], want[1:], torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("lead", [(0,), (2, 0), ()], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_entries_of_no_rows_and_of_a_single_one(lead: tuple[int, ...], reduction: str) -> None:
    given = inputs(lead=lead)
    del given["teacher_hidden"], given["teacher_weight"]
    shape = (*lead, K)
    given["teacher_ids"] = torch.arange(K).expand(shape)
    given["teacher_log_probs"] = torch.full(shape, 1 / (2 * K)).log()
    got = run(given, reduction=reduction)
    assert_close(got, expected_sparse(given, reduction=reduction), 5e-6)


def test_entries_with_shift_outputs_and_a_shorter_vocabulary(sparse_backend: str) -> None:
    given = sparse_inputs(lead=(3, 11))
    given["teacher_ids"][0, 4, 0] = VOCAB + 5
    options: dict[str, Any] = {"shift": True, "vocab_policy": "truncate", "return_outputs": True}
    student = given["student_hidden"] @ given["student_weight"].t() + given["student_bias"]
    of_teacher = (given["teacher_ids"], given["teacher_log_probs"])
    want = fused_topk_kd_loss(student, *of_teacher, given["labels"], **options)
    got = fused_linear_kd_loss(
        **given, **options, backend=sparse_backend, max_chunk_bytes=4 * ROW_BYTES
    )
    for name, one, other in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_opcheck_of_entries(
    sparse_backend: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = sparse_inputs(lead=(2, 5), vocab=23)
    opcheck(given, monkeypatch, backend=sparse_backend, gradient=mode)


def test_entries_compile_as_one_graph_for_any_number_of_rows() -> None:
    options: dict[str, Any] = {"temperature": 2.0, "tail": "uniform", "backend": "torch"}
    compiled = torch.compile(fused_linear_kd_loss, fullgraph=True, dynamic=True)
    for rows in (ROWS, 12, 50):
        given = sparse_inputs(lead=(rows,))
        compiled(**given, **options).backward()
        got = [given[name].grad for name in STUDENT]
        want = run(given, **options)[1:]
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("who", ["teacher_ids", "teacher_log_probs"])
def test_entries_made_in_inference_mode_may_be_overwritten(who: str) -> None:
    given = sparse_inputs()
    given = {name: given[name].clone() if name == who else t for name, t in given.items()}
    given["teacher_log_probs"] = given["teacher_log_probs"].double()
    given["teacher_ids"] = given["teacher_ids"].long()  # as they are handed on, without a copy
    with torch.inference_mode():
        given[who] = given[who].clone()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, given["student_hidden"])[0]

    want = gradient(fused_linear_kd_loss(**given, gradient="recompute"))
    loss = fused_linear_kd_loss(**given, gradient="recompute")
    with torch.inference_mode():
        given[who].copy_(given[who].flip(0))
    assert torch.equal(gradient(loss), want)


def test_the_tiles_beside_entries_keep_to_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model's logits, and what is copied of the rows that count: entries of 16 bytes."""
    shapes = recorded_tiles(monkeypatch)
    row_bytes = ROW_BYTES // 2 + 2 * 4 * H_STUDENT + 16 * K
    for budget in (16 * row_bytes, 16 * row_bytes - 1):
        fused_linear_kd_loss(**sparse_inputs(lead=(480 + 5,)), max_chunk_bytes=budget).backward()
    assert [shape[0] for shape in shapes] == [1, 1] and shapes[0][1] == 16 > shapes[1][1]


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"teacher_logits": torch.zeros(ROWS, VOCAB)}, ValueError, "ids: .* next to teacher_logi"),
        ({"teacher_hidden": torch.zeros(ROWS, 2)}, ValueError, "ids: given next to teacher_hidd"),
        ({"teacher_ids": None}, ValueError, "teacher_ids, teacher_log_probs: one is given"),
        ({"teacher_log_probs": None}, ValueError, "teacher_ids, teacher_log_probs: one is given"),
        ({"teacher_ids": [1]}, TypeError, "teacher_ids: expected a tensor"),
        ({"teacher_ids": torch.zeros(3, K).long()}, ValueError, "teacher_ids: leading shape"),
        ({"teacher_ids": torch.zeros(ROWS, 2).long()}, ValueError, "teacher_ids: shape"),
        ({"tail": "rest"}, ValueError, "tail: 'rest'"),
        ({"tail": "none", "divergence": "jsd"}, ValueError, "divergence: 'jsd'"),
        ({"teacher_temperature": 2.0}, ValueError, "teacher_temperature: 2.0 is not temperature"),
        ({"logit_scale": (1.0, 2.0)}, ValueError, "logit_scale: .* part for the teacher"),
        ({"teacher_ids": torch.arange(K).expand(ROWS, K) + VOCAB - 8}, IndexError, "at row 0"),
        ({"teacher_log_probs": torch.zeros(ROWS, K)}, ValueError, "add up to 9"),
    ],
)
def test_bad_entries(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fused_linear_kd_loss(**{**sparse_inputs(), **change})


def test_bad_entries_are_named_by_their_row_in_the_call() -> None:
    given = sparse_inputs()
    given["teacher_ids"][30, 0] = VOCAB
    with pytest.raises(IndexError, match=f"teacher_ids: {VOCAB} at row 30"):
        fused_linear_kd_loss(**given, max_chunk_bytes=9 * ROW_BYTES)
    fused_linear_kd_loss(**given, alpha=0.0)
    given = sparse_inputs()
    logits = {"student_logits": torch.zeros(ROWS, VOCAB)}
    of_teacher = {name: given[name] for name in ("teacher_ids", "teacher_log_probs")}
    with pytest.raises(ValueError, match="that is fused_topk_kd_loss"):
        fused_linear_kd_loss(**logits, **of_teacher)
    for option in ({"tail": "subset"}, {"teacher_temperature": 1.0}):
        with pytest.raises(ValueError, match="have no effect without teacher_ids"):
            fused_linear_kd_loss(**inputs(), **option)


def test_modules_of_entries() -> None:
    given = sparse_inputs()
    options = {"temperature": 2.0, "tail": "renormalize", "teacher_temperature": 1.0}
    want = fused_linear_kd_loss(**given, **options)
    assert torch.equal(FusedLinearKDLoss(**options)(**given), want)
    logits = given["student_hidden"] @ given["student_weight"].t() + given["student_bias"]
    of_teacher = [given["teacher_ids"], given["teacher_log_probs"], given["labels"]]
    torch.testing.assert_close(TopKKDLoss(**options)(logits, *of_teacher), want)
    per_batch = {"num_items": torch.tensor(5)}
    got = TopKKDLoss(tail="subset")(logits, *of_teacher, **per_batch)
    assert torch.equal(got, fused_topk_kd_loss(logits, *of_teacher, tail="subset", **per_batch))
    for module in (TopKKDLoss, FusedLinearKDLoss):
        with pytest.raises(ValueError, match="tail: 'rest' is not one of"):
            module(tail="rest")
        with pytest.raises(ValueError, match="divergence: 'jsd' compares distributions"):
            module(tail="none", divergence="jsd")
        for tail in set(TAILS) - set(NORMALIZED):
            with pytest.raises(ValueError, match=r"teacher_temperature: 1\.0 is not"):
                module(tail=tail, teacher_temperature=1.0, temperature=2.0)
    with pytest.raises(ValueError, match=r"logit_softcap: .* part for the teacher"):
        TopKKDLoss(logit_softcap=(None, 3.0))
    FusedLinearKDLoss(logit_softcap=(None, 3.0))  # of a teacher's logits
    with pytest.raises(TypeError, match="TopKKDLoss has no option max_chunk_bytes"):
        TopKKDLoss(max_chunk_bytes=1)


def test_module_and_refusals() -> None:
    given = inputs()
    module = FusedLinearKDLoss(temperature=2.0, max_chunk_bytes=1 << 20)
    assert torch.equal(module(**given), fused_linear_kd_loss(**given, temperature=2.0))
    with pytest.raises(TypeError, match="no option temprature"):
        FusedLinearKDLoss(temprature=2.0)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"student_weight": None}, ValueError, "student_hidden, student_weight: both"),
        ({"student_weight": torch.zeros(VOCAB, 3)}, ValueError, r"student_weight: shape .*3\)"),
        ({"student_bias": torch.zeros(3)}, ValueError, r"student_bias: shape \(3,\)"),
        ({"teacher_weight": torch.zeros(9, H_TEACHER)}, ValueError, "vocabulary 9 differs"),
        ({"teacher_logits": torch.zeros(ROWS, VOCAB)}, ValueError, "teacher_logits: given next"),
        ({"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes: 0"),
        ({"max_chunk_bytes": True}, ValueError, "max_chunk_bytes: True"),
        ({"temprature": 2.0}, TypeError, "no option temprature"),
        ({"reduction": "none", "gradient": "forward"}, ValueError, "gradient: 'forward'"),
        ({"student_hidden": torch.zeros(ROWS, H_STUDENT).long()}, TypeError, "student_hidden: dt"),
        ({"student_weight": torch.zeros(VOCAB, H_STUDENT).to_sparse()}, TypeError, "layout"),
        ({"teacher_weight": torch.zeros(VOCAB, H_TEACHER, device="meta")}, ValueError, "meta dif"),
        ({"labels": torch.arange(ROWS) + VOCAB - 9}, IndexError, f"labels: {VOCAB} at row 9"),
        ({"teacher_hidden": torch.zeros(3, H_TEACHER)}, ValueError, "leading shape"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fused_linear_kd_loss(**{**inputs(), **change})
