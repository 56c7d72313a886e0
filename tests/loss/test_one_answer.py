"""One answer whatever the backend: loss, gradient and every named output of the same call.

How accurate a result is stands in ``test_matrix.py``. Here calls are hostile: NaN and inf in rows
that do not count and in rows that do, weights of 0, mixed dtypes, no rows, no leading dimension,
and any options beside each other. Every backend has to answer as the reference does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import cases
import pytest
import torch
from torch import Tensor

from kdkernels import KDLossOutput, fused_kd_loss, fused_linear_kd_loss
from kdkernels.backends import BACKENDS
from kdkernels.functional import prepare
from kdkernels.losses import features, relations
from kdkernels.problem import STATISTICS, Problem

CALLS = 60
each_call = pytest.mark.parametrize("number", range(CALLS))
LEADING = ((), (1,), (3,), (5,), (2, 3), (0,), (2, 0), (2, 1, 3))


#: Triton's interpreter takes about a second a call.
INTERPRETED_CALLS = 12


def skip_most(number: int, backend: str, device: str) -> None:
    if backend == "triton" and device == "cpu" and number >= INTERPRETED_CALLS:
        pytest.skip("triton: interpreted, so the first calls only")


class Call(NamedTuple):
    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    options: dict[str, Any]
    counts: Tensor  # bool [...]: which rows have a label and a weight
    upstream: float


def call_for(number: int) -> Call:
    chance = random.Random(number)
    generator = cases.generator(number)
    shape, vocab = chance.choice(LEADING), chance.choice((1, 2, 3, 17, 64, 130))
    wider = chance.choice((0, 0, 0, 1, 7))
    student, teacher = (
        (torch.randn(*shape, columns, generator=generator) * chance.choice((0.1, 2.0, 8.0))).to(
            chance.choice(cases.DTYPES)
        )
        for columns in (vocab, vocab + wider)
    )
    options = _options(chance, shape, wider > 0)
    labels, counts = None, torch.ones(shape, dtype=torch.bool)
    if chance.random() < 0.6:
        labels = torch.randint(vocab, shape, generator=generator)
        ignored = torch.rand(shape, generator=generator) < chance.choice((0.0, 0.4, 1.0))
        labels = torch.where(ignored, options["ignore_index"], labels)
        counts = labels != options["ignore_index"]
        options["alpha"] = chance.choice((None, 0.0, 1.0, 0.3, 1.5))
        options["label_smoothing"] = chance.choice((0.0, 0.1, 1.0))
    if chance.random() < 0.5:
        without = torch.rand(shape, generator=generator) < 0.4
        weights = torch.randn(shape, generator=generator).masked_fill(without, 0.0)
        options["token_weights"], counts = weights, counts & ~without
    if options["shift"]:
        counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], 1)
    _spoil(chance, student, teacher, counts)
    return Call(
        student,
        teacher,
        labels,
        options,
        counts,
        chance.choice((1.0, 0.37, 0.0, math.inf, math.nan)),
    )


def _options(chance: random.Random, shape: tuple[int, ...], truncate: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        **chance.choice(cases.FEW).arguments,
        "temperature": chance.choice((0.5, 1.0, 1.7, 2.0, 3.0)),
        "temperature_squared": chance.random() < 0.8,
        "z_loss": chance.choice((0.0, 0.01)),
        "reduction": chance.choice(("mean", "sum", "none")),
        "gradient": chance.choice(("auto", "forward", "recompute")),
        "shift": len(shape) == 2 and chance.random() < 0.5,
        "ignore_index": chance.choice((-100, -1, 1 << 40)),
        "vocab_policy": "truncate" if truncate else "error",
    }
    if options["reduction"] == "mean":
        options["num_items"] = chance.choice((None, 2.5, torch.tensor(7), torch.tensor([0.0])))
    if chance.random() < 0.2:
        options["logit_scale"] = chance.choice((0.5, (2.0, None), -1.0))
    return options


def _spoil(chance: random.Random, student: Tensor, teacher: Tensor, counts: Tensor) -> None:
    """Anything in the rows that do not count, and sometimes in one that does."""
    junk = (math.nan, math.inf, -math.inf)
    for logits in (student, teacher):
        logits[~counts] = chance.choice((*junk, 3.0))
    if counts.any() and chance.random() < 0.5:
        row = counts.nonzero()[chance.randrange(int(counts.sum()))].tolist()
        for logits in chance.choice(((student,), (teacher,), (student, teacher))):
            one = logits[tuple(row)]
            where = slice(None) if chance.random() < 0.3 else chance.randrange(one.shape[-1])
            one[where] = chance.choice(junk)


def answer(call: Call, backend: str, device: str = "cpu") -> tuple[KDLossOutput, Tensor]:
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.options.items()}
    labels = None if call.labels is None else call.labels.to(device)
    leaf = call.student.to(device, copy=True).requires_grad_()
    outputs = cases.call(
        leaf, call.teacher.to(device), labels, backend=backend, return_outputs=True, **options
    )
    upstream = torch.full_like(outputs.loss, call.upstream)
    (gradient,) = torch.autograd.grad(outputs.loss, leaf, upstream)
    return outputs, gradient


def assert_same(one: Tensor | None, other: Tensor | None, tolerance: float, what: str) -> None:
    """Of one shape and dtype, with NaN and inf in the same places, and close elsewhere."""
    if one is None or other is None:
        assert one is other, what
        return
    assert one.dtype == other.dtype, what
    one, other = one.detach().cpu(), other.detach().cpu()
    scale = 1.0 + float(other[other.isfinite()].abs().max()) if other.isfinite().any() else 1.0
    torch.testing.assert_close(
        one,
        other,
        rtol=tolerance,
        atol=tolerance * scale,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


@each_call
def test_every_backend_answers_as_the_reference(number: int, backend: str, device: str) -> None:
    skip_most(number, backend, device)
    call = call_for(number)
    outputs, gradient = answer(call, backend, device)
    want, exact = answer(call, "reference")
    for name, one, other in zip(outputs._fields, outputs, want, strict=True):
        assert_same(one, other, 1e-3, name)
    if math.isfinite(call.upstream):  # else it depends on what is multiplied first
        rounding = 4 * torch.finfo(call.student.dtype).eps
        assert_same(gradient, exact, max(rounding, 2e-4), "gradient")
    assert (gradient[~call.counts] == 0).all()
    assert (gradient[..., call.teacher.shape[-1] :] == 0).all()
    for rows in (outputs.student_lse, outputs.teacher_entropy, outputs.label_lse):
        counts = call.counts[:, :-1] if call.options["shift"] else call.counts
        assert (rows.cpu()[~counts] == 0).all()


@each_call
@pytest.mark.parametrize("given", ("hidden", "student_logits", "teacher_logits"))
def test_the_linear_loss_answers_as_the_plain_one(
    number: int, given: str, backend: str, device: str
) -> None:
    """Hidden states are the logits, and weights the identity, so that a row can be spoilt alone."""
    skip_most(number, backend, device)
    call = call_for(number)
    dtype = torch.float64 if call.student.dtype == torch.float64 else torch.float32
    bad = ~(call.student.isfinite().all(-1) & call.teacher.isfinite().all(-1)) & call.counts
    student, teacher = (
        logits.to(dtype).masked_fill(bad.unsqueeze(-1), 1.0)  # inf times 0 is NaN, in all columns
        for logits in (call.student, call.teacher)
    )
    call = call._replace(student=student, teacher=teacher)
    if call.options["reduction"] == "none" and call.options["gradient"] == "forward":
        call.options["gradient"] = "auto"
    want, exact = answer(call, backend, device)
    leaf = student.to(device, copy=True).requires_grad_()
    inputs: dict[str, Tensor] = {}
    for name, logits in (("student", leaf), ("teacher", teacher.to(device))):
        if given == f"{name}_logits":
            inputs[given] = logits
        else:
            inputs[f"{name}_hidden"] = logits
            inputs[f"{name}_weight"] = torch.eye(logits.shape[-1], dtype=dtype, device=device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.options.items()}
    outputs = fused_linear_kd_loss(
        **inputs,
        labels=None if call.labels is None else call.labels.to(device),
        backend=backend,
        return_outputs=True,
        max_chunk_bytes=1 + 40 * student.shape[-1],
        **options,
    )
    upstream = torch.full_like(outputs.loss, call.upstream)
    (gradient,) = torch.autograd.grad(outputs.loss, leaf, upstream)
    for name, one, other in zip(outputs._fields, outputs, want, strict=True):
        assert_same(one, other, 1e-5, name)
    if math.isfinite(call.upstream):
        assert_same(gradient, exact, 1e-5, "gradient")
    assert (gradient[~call.counts] == 0).all()


@each_call
@pytest.mark.parametrize("step", ("forward", "backward"))
def test_a_gradient_in_the_students_own_memory_has_the_same_bits(
    number: int, step: str, backend: str, device: str
) -> None:
    """A tile of the linear loss is overwritten by its gradient: each row has been read by then."""
    skip_most(number, backend, device)
    call = call_for(number)
    teacher = call.teacher[..., : call.student.shape[-1]]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.options.items()}
    labels = None if call.labels is None else call.labels.to(device)

    def run(in_place: bool) -> tuple[Tensor, ...]:
        student = call.student.to(device, copy=True).contiguous()
        out = student if in_place else torch.empty_like(student)
        problem = _problem(student, teacher.to(device), labels, backend, options)
        result = BACKENDS[backend].forward(
            problem,
            want_gradient=step == "forward",
            extras=True,
            gradient_out=out if step == "forward" else None,
        )
        if step == "backward":
            upstream = torch.full_like(result.loss, call.upstream)
            BACKENDS[backend].backward(problem, result.statistics, upstream, gradient_out=out)
        return out, result.loss, result.statistics[: len(STATISTICS)]

    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def _problem(
    student: Tensor, teacher: Tensor, labels: Tensor | None, backend: str, options: dict[str, Any]
) -> Problem:
    """The checked problem of a call; a backend's declared refusal skips the test."""
    defaults = {**fused_kd_loss.__kwdefaults__, **options, "backend": backend}
    try:
        return prepare(student, teacher, labels, **defaults).problem
    except RuntimeError as error:
        if "cannot run this problem" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_float64_teacher_keeps_its_digits(backend: str, device: str, dtype: torch.dtype) -> None:
    student = cases.logits((8, 500), dtype, scale=4.0, device=device)
    teacher = cases.logits((8, 500), torch.float64, seed=1, scale=4.0, device=device)
    teacher[0, 3] = 1e5  # float16 has no such number
    measured = cases.evaluate(student, teacher, backend=backend)
    exact = cases.oracle(student, teacher)
    assert_same(measured.loss.double(), exact.loss, 1e-6, "loss")
    assert_same(measured.gradient.double(), exact.gradient, torch.finfo(dtype).eps, "gradient")


@pytest.mark.parametrize("vocab", (1, 2))
@pytest.mark.parametrize("ignore_index", (-100, 0, 1, 7))
def test_a_shift_without_labels_needs_no_index_of_the_vocabulary(
    backend: str, device: str, vocab: int, ignore_index: int
) -> None:
    student, teacher = cases.pair((2, 3, vocab), device=device)
    options = {"shift": True, "ignore_index": ignore_index, "backend": backend}
    measured = cases.evaluate(student, teacher, **options)
    exact = cases.oracle(student[:, :-1], teacher[:, :-1])
    assert_same(measured.loss.double(), exact.loss, 1e-6, "loss")
    assert_same(measured.gradient[:, :-1].double(), exact.gradient, 1e-6, "gradient")
    assert (measured.gradient[:, -1] == 0).all()


# --------------------------------------------------------------------------- the default dtype


@pytest.fixture(params=(torch.bfloat16, torch.float16, torch.float64), ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("student_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_no_result_follows_the_default_dtype(
    backend: str,
    device: str,
    student_dtype: torch.dtype,
    reduction: str,
    default_dtype: torch.dtype,
) -> None:
    """1001 rows: bfloat16 has 8 bits for a count of them."""
    rows = 1001 if backend != "triton" else 9
    student, teacher = cases.pair((rows, 7), student_dtype, torch.float32, device=device)
    labels = cases.labels_for((rows,), 7, device=device)
    weights = torch.linspace(-1, 1, rows, device=device)
    options = {"token_weights": weights, "z_loss": 0.01, "label_smoothing": 0.1}
    if reduction == "mean":
        options["num_items"] = 1001.0
    call = Call(student, teacher, labels, options | {"reduction": reduction}, labels != -100, 0.3)
    want, exact = answer(call, backend, device)
    torch.set_default_dtype(default_dtype)
    got, gradient = answer(call, backend, device)
    for name, one, other in zip(got._fields, got, want, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert torch.equal(gradient, exact)


@pytest.mark.parametrize("num_items", (None, 1001, 1001.0, torch.tensor(1001)))
def test_no_other_loss_follows_the_default_dtype(
    num_items: Any, default_dtype: torch.dtype
) -> None:
    student, teacher = torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    mask = torch.rand(2, 30) > 0.3

    def losses() -> list[Tensor]:
        return [
            features.hidden_state_loss(student, teacher, mask, num_items=num_items),
            features.hidden_state_loss(
                student, teacher, mask, distance="cosine", num_items=num_items
            ),
            relations.self_attention_relation_loss(
                student, teacher, mask, heads=2, num_items=num_items
            ),
            relations.rkd_distance_loss(student, teacher, mask),
            relations.gram_loss(student, teacher, mask),
        ]

    want = losses()
    torch.set_default_dtype(default_dtype)
    for one, other in zip(losses(), want, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_shares_of_many_rows_have_float32s_digits(dtype: torch.dtype) -> None:
    """Under float16 more than 65504 rows gave inf or NaN."""
    rows = 100_003
    labels = (torch.arange(rows) % 3 != 0).long()
    logits = torch.tensor([[0.0, 1.0]]).expand(rows, 2)
    weights = torch.ones(rows).index_fill(0, torch.arange(0, rows, 2), 0.0)
    torch.set_default_dtype(dtype)
    try:
        all_rows = fused_kd_loss(logits, logits, labels, return_outputs=True)
        some = fused_kd_loss(logits, -logits, labels, token_weights=weights, return_outputs=True)
    finally:
        torch.set_default_dtype(torch.float32)
    right = labels.double()
    for share, exact in (
        (all_rows.accuracy, right.mean()),
        (all_rows.agreement, 1.0),
        (some.accuracy, right[1::2].mean()),
        (some.agreement, 0.0),
    ):
        assert share.dtype == torch.float32
        assert float(share) == pytest.approx(float(exact), rel=1e-6)
