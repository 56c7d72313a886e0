"""A teacher of which each row has a few entries: every tail, on every backend that has it.

``plain`` states what a tail means once more, in float64 and without code of the package: it makes
the categories, or the distribution over the vocabulary, of every row by hand.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import Spec
from torch import Tensor

import kdkernels
from kdkernels import fused_kd_loss, fused_topk_kd_loss

TAILS = ("bucket", "uniform", "renormalize", "subset", "none")
each_tail = pytest.mark.parametrize("tail", TAILS)
FORWARD_KL = Spec("forward_kl")
#: Stands for a probability of 0, whose logarithm times 0 is no number in PyTorch's own losses.
NOTHING = 1e-300


class Teacher(NamedTuple):
    ids: Tensor
    log_probs: Tensor


def teacher_of(
    shape: tuple[int, ...], vocab: int, count: int, *, seed: int = 0, empty: float = 0.0
) -> Teacher:
    """The log-probabilities of ``count`` entries a row, in any order; some slots are empty."""
    log_p = cases.logits((*shape, vocab), seed=seed + 50).double().log_softmax(-1)
    chance = cases.generator(seed)
    ids = torch.rand(*shape, vocab, generator=chance).argsort(-1)[..., :count]
    log_probs = log_p.gather(-1, ids)
    gone = torch.rand(ids.shape, generator=chance) < empty
    return Teacher(ids.masked_fill(gone, -1), log_probs.masked_fill(gone, math.nan))


def plain_row(
    z: Tensor, ids: Tensor, log_probs: Tensor, tail: str, spec: Spec, temperature: float
) -> Tensor:
    """D of one row."""
    log_q = F.log_softmax(z / temperature, -1)
    known = [(int(i), float(x)) for i, x in zip(ids, log_probs, strict=True) if i >= 0]
    if not known:
        return log_q.sum() * 0
    columns = torch.tensor([i for i, _ in known])
    p = torch.tensor([x for _, x in known], dtype=torch.float64).exp()
    others = [v for v in range(len(z)) if v not in columns]
    if tail == "none":
        unique = columns.unique()
        weights = torch.stack([p[columns == i].sum() for i in unique])
        return (weights * (weights.log() - log_q[unique])).sum()
    rest = max(0.0, 1 - float(p.sum()))
    if tail == "subset":
        q = F.log_softmax(z[columns] / temperature, -1)
        return cases.plain_divergence(spec, (p / p.sum()).log()[None], q[None])[0]
    if tail == "bucket":
        if not others:
            return cases.plain_divergence(spec, (p / p.sum()).log()[None], log_q[columns][None])[0]
        categories = torch.cat([p, torch.tensor([rest], dtype=torch.float64)])
        q = torch.cat([log_q[columns], log_q[others].logsumexp(-1, keepdim=True)])
        log_p = categories.clamp(min=NOTHING).log()
        return cases.plain_divergence(spec, log_p[None], q[None])[0]
    dense = torch.zeros(len(z), dtype=torch.float64)
    if tail == "uniform":
        dense[others] = rest / max(len(others), 1)
    dense[columns] = p
    log_p = (dense / dense.sum()).clamp(min=NOTHING).log()
    return cases.plain_divergence(spec, log_p[None], log_q[None])[0]


def plain(
    student: Tensor, teacher: Teacher, tail: str, spec: Spec, temperature: float
) -> tuple[Tensor, Tensor]:
    """The mean of T^2 D over the rows, and its gradient, in float64."""
    leaf = student.detach().cpu().double().requires_grad_()
    rows = zip(leaf.flatten(0, -2), *(t.flatten(0, -2) for t in teacher), strict=True)
    values = [plain_row(z, i, x, tail, spec, temperature) for z, i, x in rows]
    loss = temperature**2 * torch.stack(values).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def is_interpreted(backend: str, device: str) -> bool:
    """Triton's interpreter takes up to a second a call: it gets fewer cases."""
    return backend == "triton" and device == "cpu"


def call(student: Tensor, teacher: Teacher, labels: Tensor | None = None, **options: Any) -> Any:
    """``fused_topk_kd_loss``; a backend's declared refusal skips the test."""
    ids, log_probs = (t.to(student.device) for t in teacher)
    try:
        return fused_topk_kd_loss(student, ids, log_probs, labels, **options)
    except RuntimeError as error:
        if "cannot run this problem" in str(error):
            pytest.skip(str(error))
        raise


def evaluate(student: Tensor, teacher: Teacher, *args: Any, **options: Any) -> cases.Evaluation:
    leaf = student.detach().requires_grad_()
    loss = call(leaf, teacher, *args, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return cases.Evaluation(loss.detach().cpu(), gradient.cpu())


def assert_near(got: cases.Evaluation, loss: Tensor, gradient: Tensor) -> None:
    """To 16 ulp of a float, and of the gradient's own format, of each row's largest."""
    for what, x, right in (("loss", got.loss, loss), ("gradient", got.gradient, gradient)):
        unit = 16 * torch.finfo(torch.float32 if what == "loss" else x.dtype).eps
        size = right.abs() if what == "loss" else right.abs().amax(-1, keepdim=True)
        assert ((x.double() - right).abs() <= unit * (size + 0.1)).all(), what


SPECS = [spec for spec in cases.SPECS if spec.name != "alpha_beta"]
SPECS += [Spec("alpha_beta", pair) for pair in ((0.2, 0.7), (0.5, 0.5), (0.5, 0.0), (0.0, 0.6))]


@each_tail
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_tail_is_what_is_written_by_hand(
    spec: Spec, tail: str, backend: str, device: str
) -> None:
    if tail == "none" and spec != FORWARD_KL:
        pytest.skip("a forward KL only")
    infinite = spec.name == "reverse_kl" or spec.parameters in ((1.0,), (0.0, 0.6))
    if tail == "renormalize" and infinite:
        pytest.skip("infinite: the student has mass where the teacher has none")
    if is_interpreted(backend, device) and spec not in cases.FEW:
        pytest.skip("triton: interpreted, so one of each name")
    student = cases.logits((6, 67), device=device)
    teacher = teacher_of((6,), 67, 9, empty=0.2)
    loss, gradient = plain(student, teacher, tail, spec, 2.0)
    got = evaluate(student, teacher, tail=tail, temperature=2.0, backend=backend, **spec.arguments)
    assert_near(got, loss, gradient)


@each_tail
@cases.each_dtype
def test_shapes_formats_and_slots(dtype: torch.dtype, tail: str, backend: str, device: str) -> None:
    """One entry, more slots than columns, one column, rows with no entry at all; a row of 3000."""
    shapes = (((3,), 5, 1), ((2, 2), 5, 5), ((2,), 1, 1), ((2, 3), 3000, 40))
    for shape, vocab, count in shapes[: 2 if is_interpreted(backend, device) else None]:
        student = cases.logits((*shape, vocab), dtype, device=device, seed=count)
        teacher = teacher_of(shape, vocab, count, empty=0.3, seed=vocab)
        teacher.ids[0] = -1  # the first row, or all of the first rows
        more = torch.full((*shape, 3), -7)
        wide = Teacher(
            torch.cat([more, teacher.ids], -1), torch.cat([more * math.inf, teacher.log_probs], -1)
        )
        loss, gradient = plain(student, wide, tail, FORWARD_KL, 1.0)
        got = evaluate(student, wide, tail=tail, backend=backend)
        assert got.gradient.dtype == dtype
        assert_near(got, loss, gradient)


@each_tail
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_streamed(dtype: torch.dtype, tail: str) -> None:
    """Of more than 4 MiB, with rows that begin anywhere; the blocks' last entries and the label."""
    rows, vocab = (36, 30001) if dtype == torch.float32 else (72, 30001)
    student = cases.logits((rows, vocab), dtype)
    teacher = teacher_of((rows,), vocab, 24)
    teacher.ids[:, 0], teacher.ids[:, 1:3] = vocab - 1, torch.tensor([-1, -1])
    teacher.ids[:, 3] = torch.where((teacher.ids[:, 4:] == 1023).any(-1), -1, 1023)
    teacher.ids[:, 5:][teacher.ids[:, 5:] == vocab - 1] = -1
    labels = cases.labels_for((rows,), vocab, ignored=0.1)
    labels[:3] = teacher.ids[:3, 6].clamp(min=0)
    options: dict[str, Any] = {"tail": tail, "temperature": 2.0}
    got = evaluate(student, teacher, labels, backend="cpu", **options)
    exact = evaluate(student.double(), teacher, labels, backend="reference", **options)
    assert_near(got, exact.loss, exact.gradient)


@each_tail
def test_all_entries_are_the_teacher_itself(tail: str, backend: str, device: str) -> None:
    student, logits = cases.pair((4, 33), device=device)
    log_probs, ids = logits.double().log_softmax(-1).sort(-1)
    labels = cases.labels_for((4,), 33, ignored=0.0, device=device)
    got = evaluate(student, Teacher(ids, log_probs), labels, tail=tail, backend=backend)
    whole = cases.evaluate(student, logits, labels, backend="torch")
    assert_near(got, whole.loss.cpu().double(), whole.gradient.cpu().double())


OPTIONS: list[dict[str, Any]] = [
    {"alpha": 0.3, "temperature": 3.0},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 1.7},
    {"logit_softcap": 5.0, "logit_scale": 0.7, "temperature_squared": False},
    {"reduction": "sum", "label_smoothing": 1.0},
    {"reduction": "none", "z_loss": 1e-2, "gradient": "recompute"},
    {"num_items": 7.0, "shift": True, "temperature": 2.0},
    {"alpha": 0.0},
    {"alpha": 1.0, "divergence": "jsd"},
]


@each_tail
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_options_are_those_of_the_dense_loss(
    options: dict[str, Any], tail: str, backend: str, device: str
) -> None:
    """Against the oracle, whose student's terms are the dense loss's. A label may be an entry."""
    if tail == "none" and "divergence" in options:
        pytest.skip("a forward KL only")
    student = cases.logits((2, 4, 67), device=device)
    teacher = teacher_of((2, 4), 67, 9, empty=0.2)
    labels = cases.labels_for((2, 4), 67, device=device)
    labels[0, :2] = teacher.ids[0, :2, 0].clamp(min=0).to(device)
    weights = torch.tensor([[1.0, 0.5, 0.0, 2.0], [1.0, -1.0, 1.0, 3.0]], device=device)
    options = {**options, "tail": tail, "token_weights": weights, "backend": backend}
    got = evaluate(student, teacher, labels, **options)
    oracles = {"backend": "reference", "token_weights": weights.cpu(), "gradient": "forward"}
    exact = evaluate(student.cpu().double(), teacher, labels.cpu(), **{**options, **oracles})
    assert_near(got, exact.loss.double(), exact.gradient)
    if options.get("alpha") == 0:
        bad = Teacher(teacher.ids * 0 + 1000, teacher.log_probs)
        same = evaluate(student, bad, labels, **options)
        torch.testing.assert_close(same.loss, got.loss, msg="a teacher without weight is not read")


@each_tail
def test_every_output(tail: str, backend: str, device: str) -> None:
    student = cases.logits((5, 67), device=device)
    teacher = teacher_of((5,), 67, 9, empty=0.2)
    teacher.ids[1] = -1
    top = student[2].argmax().cpu()
    teacher.ids[2] = torch.tensor([top, *[(int(top) + k) % 67 for k in range(1, 9)]])
    teacher.log_probs[2] = torch.tensor([0.5, *[0.01] * 8]).log()
    labels = cases.labels_for((5,), 67, ignored=0.2, device=device)
    got = call(student, teacher, labels, tail=tail, backend=backend, return_outputs=True)
    exact = call(
        student.cpu().double(), teacher, labels.cpu(), tail=tail, backend="reference",
        return_outputs=True,
    )  # fmt: skip
    for name, right in exact._asdict().items():
        found = getattr(got, name).cpu().double()
        torch.testing.assert_close(found, right.double(), rtol=2e-6, atol=2e-6, msg=name)
    p = teacher.log_probs[2].exp()
    norm = {"bucket": 0.0, "uniform": 0.0, "none": 0.0}.get(tail, float(p.sum().log()))
    assert got.teacher_lse[2].item() == pytest.approx(norm, abs=1e-6)
    assert got.teacher_entropy[1].item() == 0.0
    assert got.agreement.item() >= 1 / 5


def test_weights_of_one_id_add_up(backend: str, device: str) -> None:
    student = cases.logits((1, 9), device=device)
    weights = torch.tensor([[0.25, 0.5, 0.125, 0.25]])
    many = evaluate(
        student, Teacher(torch.tensor([[3, 5, 3, 3]]), weights.log()), tail="none", backend=backend
    )
    once = Teacher(torch.tensor([[5, 3]]), torch.tensor([[0.5, 0.625]]).log())
    few = evaluate(student, once, tail="none", backend=backend)
    torch.testing.assert_close(many.loss, few.loss)
    torch.testing.assert_close(many.gradient, few.gradient)


def test_a_sum_of_rounded_probabilities_above_one(backend: str, device: str) -> None:
    """As of log-probabilities in bfloat16: there is no rest, and never a NaN or a negative loss."""
    student = cases.logits((1, 9), device=device)
    given = Teacher(torch.tensor([[0, 4, 2]]), torch.tensor([[0.5, 0.3, 0.21]]).log())
    for tail in ("bucket", "uniform"):
        loss, gradient = evaluate(student, given, tail=tail, backend=backend)
        exact = Teacher(given.ids, given.log_probs.double().log_softmax(-1))
        want = plain(student, exact, tail, FORWARD_KL, 1.0)
        assert loss.item() >= 0
        assert_near(cases.Evaluation(loss, gradient), *want)


@each_tail
def test_all_entries_and_not_all_of_the_mass(tail: str, backend: str, device: str) -> None:
    """There is nothing else that could have the rest of it."""
    student = cases.logits((2, 5), device=device)
    given = teacher_of((2,), 5, 5)
    given = Teacher(given.ids, given.log_probs - 0.5)
    got = evaluate(student, given, tail=tail, backend=backend)
    assert_near(got, *plain(student, given, tail, FORWARD_KL, 1.0))


def test_no_slots_at_all(backend: str, device: str) -> None:
    student = cases.logits((3, 7), device=device)
    labels = torch.tensor([1, 2, 3], device=device)
    none = Teacher(torch.zeros(3, 0).long(), torch.zeros(3, 0))
    loss, gradient = evaluate(student, none, labels, alpha=0.5, backend=backend)
    leaf = student.detach().cpu().requires_grad_()
    want = F.cross_entropy(leaf, labels.cpu()) / 2
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(want, leaf)[0])


@pytest.mark.parametrize("spec", [s for s in cases.FEW if s.name != "alpha_beta"], ids=str)
@pytest.mark.parametrize("sure_of", ["an entry", "another", "none of them"])
@pytest.mark.parametrize("gap", [15.0, 30.0, 85.0])
def test_digits_where_the_student_is_sure(
    gap: float, sure_of: str, spec: Spec, backend: str, device: str
) -> None:
    """1 minus the entries' probabilities has none, and others that have e^-90 share a gradient."""
    if backend in ("triton", "cuda"):
        pytest.skip("as good as a float's probability near 1")
    if gap > 80 and spec != FORWARD_KL:
        pytest.skip("all of the gradient is e^-85, near the least that a float holds")
    student = cases.logits((1, 2000), device=device)
    teacher = teacher_of((1,), 2000, 8)
    teacher = Teacher(teacher.ids, (teacher.log_probs.exp() * 0.8).log_softmax(-1) - 0.2)
    at = int(teacher.ids[0, 3]) if sure_of == "an entry" else int(teacher.ids[0, 3]) ^ 1
    if sure_of == "none of them":  # the entries have it all between them
        student[0, teacher.ids[0]] += gap
    else:
        student[0, at] += gap
    labels = torch.tensor([at], device=device)
    # At 1/2 the total variation and the label would cancel.
    options: dict[str, Any] = {"alpha": 0.3, "backend": backend, **spec.arguments}
    got = evaluate(student, teacher, labels, **options)
    exact = evaluate(
        student.cpu().double(), teacher, labels.cpu(), **{**options, "backend": "reference"}
    )
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-6, atol=1e-6)
    error = (got.gradient.double() - exact.gradient).abs().max() / exact.gradient.abs().max()
    assert error <= (4e-6 if backend in ("cpu", "reference") else 2e-5)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tail": "top"}, ValueError, "tail: 'top' is not one of"),
    ({"tail": "none", "divergence": "jsd"}, ValueError, "divergence: 'jsd' .* tail='none'"),
    ({"teacher_temperature": 2.0}, ValueError, "teacher_temperature: 2.0 is not temperature"),
    ({"teacher_temperature": 0.0, "tail": "subset"}, ValueError, "teacher_temperature: 0.0"),
    ({"teacher_temperature": "1", "tail": "subset"}, TypeError, "teacher_temperature: .* str"),
    ({"logit_scale": (1.0, 2.0)}, ValueError, r"logit_scale: \(1.0, 2.0\) has a part for the"),
    ({"logit_softcap": (None, 30.0)}, ValueError, "logit_softcap: .* the teacher"),
    ({"vocabulary": 3}, TypeError, "has no option vocabulary"),
    ({"teacher_ids": torch.zeros(2, 3)}, TypeError, "teacher_ids: dtype torch.float32"),
    ({"teacher_ids": torch.zeros(2, 4).long()}, ValueError, r"teacher_ids: shape \(2, 4\)"),
    ({"teacher_ids": torch.zeros(3, 3).long()}, ValueError, r"teacher_ids: leading shape \(3,\)"),
    ({"teacher_ids": None}, TypeError, "teacher_ids: expected a tensor .* NoneType"),
    ({"teacher_log_probs": torch.zeros(2, 3).long()}, TypeError, "teacher_log_probs: dtype"),
    ({"teacher_ids": torch.tensor([[1, 2, 7], [1, 2, 3]])}, IndexError, "teacher_ids: 7 at row 0"),
    ({"teacher_ids": torch.tensor([[1, 2, 3], [1, 4, 1]])}, IndexError, "1 comes twice at row 1"),
    ({"teacher_log_probs": torch.ones(2, 3)}, ValueError, "row 0 add up to 8.15"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD)
def test_bad_arguments_are_named(
    changes: dict[str, Any], kind: type[Exception], message: str, backend: str, device: str
) -> None:
    if device != "cpu" or backend == "triton":
        pytest.skip("a GPU's entries are not looked at")
    given: dict[str, Any] = {
        "teacher_ids": torch.tensor([[0, 1, 2], [2, 3, -1]]),
        "teacher_log_probs": torch.full((2, 3), math.log(0.2)),
        "backend": backend,
    } | changes
    student = cases.logits((2, 7)).requires_grad_()
    with pytest.raises(kind, match=message):
        fused_topk_kd_loss(student, **given)


def test_what_is_not_read(backend: str, device: str) -> None:
    """Rows that do not count may hold anything, and so may empty slots."""
    student = cases.logits((4, 7), device=device)
    teacher = teacher_of((4,), 7, 3)
    labels = torch.tensor([3, -100, 2, 5], device=device)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0], device=device)
    spoilt = Teacher(teacher.ids.clone(), teacher.log_probs.clone())
    spoilt.ids[1:3], spoilt.log_probs[1:3] = 99, math.inf
    options: dict[str, Any] = {"token_weights": weights, "backend": backend}
    got, want = (evaluate(student, t, labels, **options) for t in (spoilt, teacher))
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.gradient, want.gradient)
    assert not got.gradient[1:3].any()


@each_tail
def test_an_entry_that_is_no_number_spoils_its_row(tail: str, backend: str, device: str) -> None:
    student = cases.logits((3, 7), device=device)
    teacher = teacher_of((3,), 7, 3)
    clean = evaluate(student, teacher, tail=tail, backend=backend, reduction="none")
    teacher.log_probs[1, 2] = math.nan
    loss, gradient = evaluate(student, teacher, tail=tail, backend=backend, reduction="none")
    assert loss[1].isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(loss[[0, 2]], clean.loss[[0, 2]])
    assert torch.equal(gradient[[0, 2]], clean.gradient[[0, 2]])


@pytest.mark.parametrize("tail", ["renormalize", "subset"])
def test_another_temperature_of_the_teacher(tail: str, backend: str, device: str) -> None:
    """p^(T0 / T), divided by its sum."""
    student, logits = cases.pair((3, 17), device=device)
    ids = logits.topk(5).indices
    options: dict[str, Any] = {"tail": tail, "temperature": 4.0, "backend": backend}
    given = Teacher(ids, (logits.double() / 2).log_softmax(-1).gather(-1, ids))
    got = evaluate(student, given, teacher_temperature=2.0, **options)
    at_four = Teacher(ids, (logits.double() / 4).log_softmax(-1).gather(-1, ids))
    want = evaluate(student, at_four, **options)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.gradient, want.gradient)


@pytest.mark.parametrize("temperature", [1e-10, 1e-4, 1e4])
def test_extreme_temperatures(temperature: float, backend: str, device: str) -> None:
    if backend in ("triton", "cuda") and temperature < 1e-6:
        pytest.skip("differences of the logits over T have no square in float32")
    student = cases.logits((3, 67), device=device)
    teacher = teacher_of((3,), 67, 9)
    options: dict[str, Any] = {"temperature": temperature, "temperature_squared": False}
    got = evaluate(student, teacher, backend=backend, **options)
    exact = evaluate(student.cpu().double(), teacher, backend="reference", **options)
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=2e-6, atol=1e-6)
    error = (got.gradient.double() - exact.gradient).abs().max() / exact.gradient.abs().max()
    assert error <= 4e-6


def test_ids_beyond_a_shorter_vocabulary(backend: str, device: str) -> None:
    student = cases.logits((2, 7), device=device)
    ids = torch.tensor([[1, 9, 3], [8, 7, -1]])
    log_probs = torch.full((2, 3), math.log(0.25))
    cut = Teacher(torch.tensor([[1, -1, 3], [-1, -1, -1]]), log_probs)
    got = evaluate(student, Teacher(ids, log_probs), vocab_policy="truncate", backend=backend)
    want = evaluate(student, cut, backend=backend)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.gradient, want.gradient)


@each_tail
def test_derivatives(tail: str, backend: str, device: str) -> None:
    cases.needs_float64(backend, device)
    student = cases.logits((2, 7), torch.float64, device=device).requires_grad_()
    teacher = teacher_of((2,), 7, 3)
    options = {"tail": tail, "temperature": 1.5, "z_loss": 0.1, "backend": backend}
    labels = torch.tensor([1, 4], device=device)
    assert torch.autograd.gradcheck(lambda z: call(z, teacher, labels, **options), (student,))


@pytest.mark.parametrize("how", ["whole", "traced", "inference", "strided"])
def test_ways_to_call(how: str, backend: str, device: str) -> None:
    """Compiled, with a teacher of inference mode, and with strides, ids of 32 bits and half
    log-probabilities: the same bits.
    """
    student = cases.logits((2, 3, 67), device=device)
    teacher = teacher_of((2, 3), 67, 9)
    teacher = Teacher(teacher.ids, teacher.log_probs.bfloat16())
    labels = cases.labels_for((2, 3), 67, device=device)
    options: dict[str, Any] = {"backend": backend, "reduction": "sum"}
    want = evaluate(student, teacher, labels, **options)
    if how == "traced":
        call(student, teacher, labels, **options)  # a refusal skips
        step = torch.compile(fused_topk_kd_loss, backend="aot_eager", fullgraph=True)
        leaf = student.clone().requires_grad_()
        moved = [t.to(device) for t in teacher]
        loss = step(leaf, *moved, labels, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
        got = cases.Evaluation(loss.detach().cpu(), gradient.cpu())
    elif how == "inference":
        with torch.inference_mode():
            teacher = Teacher(*(t.clone() for t in teacher))
        got = evaluate(student, teacher, labels, gradient="recompute", **options)
    else:
        wide = Teacher(*(t.repeat_interleave(2, -1)[..., ::2] for t in teacher))
        ids = wide.ids.int() if how == "strided" else wide.ids
        columns = student.transpose(0, 2).contiguous().transpose(0, 2)
        got = evaluate(columns, Teacher(ids, wide.log_probs), labels, **options)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.gradient, want.gradient, rtol=1e-6, atol=1e-9)


def test_a_divergence_of_ones_own() -> None:
    class Squares(kdkernels.Divergence):
        name = "squares_of_topk"

        def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
            return (log_p.exp() - log_q.exp()) ** 2

    student = cases.logits((3, 17)).requires_grad_()
    teacher = teacher_of((3,), 17, 4)
    loss = fused_topk_kd_loss(student, *teacher, divergence=Squares())
    q = student.detach().double().softmax(-1)
    q_k, p_k = q.gather(-1, teacher.ids), teacher.log_probs.exp()
    rest = ((1 - q_k.sum(-1)) - (1 - p_k.sum(-1))) ** 2
    want = (((q_k - p_k) ** 2).sum(-1) + rest).mean()
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=0)


def test_the_coarser_the_view_the_smaller_the_divergence() -> None:
    student, logits = cases.pair((4, 33))
    log_p = logits.double().log_softmax(-1)
    whole = float(fused_kd_loss(student, logits))
    last = 0.0
    for count in (1, 4, 16, 32):
        log_probs, ids = log_p.topk(count)
        now = float(fused_topk_kd_loss(student, ids, log_probs))
        assert last <= now <= whole * (1 + 1e-6)
        last = now
