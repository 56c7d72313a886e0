"""The torch ops: opcheck, torch.compile, gradcheck."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kdkernels import Divergence, KDLoss, fused_kd_loss, ops
from kdkernels.functional import prepare
from kdkernels.topk import TopK


@pytest.fixture
def plain_memory() -> Iterator[None]:
    """The compiler checks that strides and aliases are those it predicted; NaN would not help."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


OP_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "labels": {"labels": True},
    "none": {"reduction": "none", "labels": True},
    "half": {"dtype": torch.float16},
    "mixed": {"dtype": torch.bfloat16, "divergence": "jsd", "beta": 0.1},
    "double": {"dtype": torch.float64, "divergence": "tvd"},
    "extras": {"extras": True, "labels": True, "z_loss": 0.1, "label_smoothing": 0.1},
    "items": {"labels": True, "items": True, "weights": True},
    "strided": {"strided": True},
    "padded": {"padded": True, "dtype": torch.bfloat16},
    "empty": {"rows": 0, "labels": True},
    "transforms": {"logit_softcap": 5.0, "logit_scale": (0.5, 2.0)},
    "sparse": {"count": 3, "labels": True},
    "mapped": {"student_rows": torch.tensor([3, 0, 2, 1]), "labels": True, "weights": True},
}


def op_arguments(backend: str, device: str, given: dict[str, Any], grad: bool) -> tuple[Any, ...]:
    given = dict(given)
    rows, dtype = given.pop("rows", 4), given.pop("dtype", torch.float32)
    is_padded = given.pop("padded", False)
    vocab = cases.PADDED[0] if is_padded else 12
    student, teacher = cases.pair((rows, vocab), dtype, torch.float32, device=device)
    if is_padded:
        student = cases.padded(student)
    if given.pop("strided", False):
        student = student.T.contiguous().T
    labels = cases.labels_for((rows,), vocab, device=device) if given.pop("labels", False) else None
    items = torch.tensor(3.0, device=device) if given.pop("items", False) else None
    weights = torch.rand(rows, device=device) if given.pop("weights", False) else None
    given.pop("extras", None)
    count = given.pop("count", None)
    if count:
        log_probs, ids = teacher.log_softmax(-1).topk(count)
        teacher = TopK(ids, log_probs)
    defaults = dict(fused_kd_loss.__kwdefaults__ or {})
    call = prepare(
        student.requires_grad_(grad),
        teacher,
        labels,
        **defaults | given | {"backend": backend, "num_items": items, "token_weights": weights},
    )
    problem = call.problem
    return (
        problem.student,
        problem.teacher,
        problem.labels,
        problem.token_weights,
        problem.num_items,
        problem.teacher_ids,
        problem.teacher_rows,
        *problem.options,
        backend,
    )


@pytest.mark.parametrize("option", OP_OPTIONS)
@pytest.mark.parametrize("want_gradient", (True, False))
def test_opcheck_of_the_forward(
    backend: str, device: str, option: str, want_gradient: bool, plain_memory: None
) -> None:
    given = OP_OPTIONS[option]
    arguments = op_arguments(backend, device, given, True)
    torch.library.opcheck(
        ops.kd_forward, (*arguments, want_gradient, given.get("extras", False), None)
    )


@pytest.mark.parametrize("option", OP_OPTIONS)
def test_opcheck_of_the_backward(
    backend: str, device: str, option: str, plain_memory: None
) -> None:
    arguments = op_arguments(backend, device, OP_OPTIONS[option], False)
    loss, statistics, _ = ops.kd_forward(*arguments, False, False, None)
    torch.library.opcheck(ops.kd_backward, (*arguments, statistics, torch.ones_like(loss)))


@pytest.mark.parametrize("option", [o for o in OP_OPTIONS if o != "double"])
def test_fake_tensors_have_the_real_ones_shapes(backend: str, device: str, option: str) -> None:
    for want in (True, False):
        arguments = op_arguments(backend, device, OP_OPTIONS[option], False)
        real = ops.kd_forward(*arguments, want, False, None)
        meta = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
            if isinstance(a, Tensor)
            else a
            for a in arguments
        ]
        for one, other in zip(real, ops.kd_forward(*meta, want, False, None), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            assert one.stride() == other.stride()


# ------------------------------------------------------------------------------- torch.compile


def loss_and_gradient(function: Any, z: Tensor, *tensors: Any) -> tuple[Tensor, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    loss = function(leaf, *tensors)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dynamic", (None, True, False))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "divergence": "jsd", "beta": 0.1},
        {"gradient": "recompute", "temperature": 2.0, "alpha": 0.3},
        {"shift": True, "z_loss": 0.01, "label_smoothing": 0.1},
    ],
    ids=lambda o: ",".join(o) or "default",
)
def test_compiled_fullgraph_equals_eager(
    backend: str, device: str, dynamic: bool | None, options: dict[str, Any], plain_memory: None
) -> None:
    def function(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return fused_kd_loss(z, t, y, backend=backend, **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        student, teacher = cases.pair((2, rows, 20), device=device)
        labels = cases.labels_for((2, rows), 20, device=device)
        expected = loss_and_gradient(function, student, teacher, labels)
        measured = loss_and_gradient(compiled, student, teacher, labels)
        assert torch.equal(measured[0], expected[0])
        torch.testing.assert_close(measured[1], expected[1], rtol=1e-6, atol=1e-8)


@cases.each_mode
def test_a_padded_student_compiles(
    backend: str, device: str, gradient: str, plain_memory: None
) -> None:
    def function(wide: Tensor, t: Tensor) -> Tensor:
        logits = (wide * 2)[..., : cases.PADDED[0]]
        return fused_kd_loss(logits, t, backend=backend, gradient=gradient)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        wide = cases.logits((2, rows, cases.PADDED[1]), device=device)
        teacher = cases.logits((2, rows, cases.PADDED[0]), seed=1, device=device)
        expected = loss_and_gradient(function, wide, teacher)
        measured = loss_and_gradient(compiled, wide, teacher)
        assert torch.equal(measured[0], expected[0])
        torch.testing.assert_close(measured[1], expected[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_inductor_compiles_a_training_step(
    backend: str, device: str, dtype: torch.dtype, plain_memory: None
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 30).to(device)
    teacher = cases.logits((8, 30), dtype, device=device)
    labels = cases.labels_for((8,), 30, device=device)
    inputs = cases.logits((8, 6), seed=3, device=device)
    criterion = KDLoss(temperature=2.0, backend=backend)

    def step() -> Tensor:
        return criterion(model(inputs).to(dtype), teacher, labels)

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        model.zero_grad()
        loss = run()
        loss.backward()
        assert model.weight.grad is not None
        results.append((loss.detach(), model.weight.grad.clone()))
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2 * rounding, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=8 * rounding, atol=4 * rounding)


def test_a_changing_number_of_rows_compiles_at_most_twice(
    backend: str, device: str, plain_memory: None
) -> None:
    def function(z: Tensor, t: Tensor) -> Tensor:
        return fused_kd_loss(z, t, backend=backend)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in range(4, 16):
        loss_and_gradient(compiled, *cases.pair((rows, 20), device=device))
    assert counter.frame_count <= 2


def test_outputs_under_compile(backend: str, device: str, plain_memory: None) -> None:
    def function(z: Tensor, t: Tensor, y: Tensor) -> Any:
        return fused_kd_loss(z, t, y, backend=backend, return_outputs=True)

    student, teacher = cases.pair((5, 20), device=device)
    labels = cases.labels_for((5,), 20, device=device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        compiled(student, teacher, labels), function(student, teacher, labels), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("factor", (0.0, math.inf, math.nan))
@cases.each_mode
def test_what_takes_no_part_stays_0_under_compile(
    gradient: str, factor: float, plain_memory: None
) -> None:
    student, teacher = cases.pair((4, 9))
    student[1] = math.nan
    labels = torch.tensor([0, -100, 2, -100])

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def loss(z: Tensor) -> Tensor:
        return fused_kd_loss(z, teacher, labels, gradient=gradient)

    leaf = student.requires_grad_()
    (measured,) = torch.autograd.grad(loss(leaf), leaf, torch.tensor(factor))
    assert (measured[[1, 3]] == 0).all()
    assert (measured == 0).all() if factor == 0 else not measured[[0, 2]].isfinite().any()


@pytest.mark.parametrize("compiler", ("eager", "aot_eager"))
@cases.each_mode
def test_the_second_derivative_is_refused_under_compile(
    gradient: str, compiler: str, plain_memory: None
) -> None:
    """By the op where autograd records it, by torch where it has traced the backward."""
    student, teacher = cases.pair((4, 9))
    loss = torch.compile(
        lambda z: fused_kd_loss(z, teacher, gradient=gradient), fullgraph=True, backend=compiler
    )
    leaf = student.requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative|double backward"):
        first.square().sum().backward()


@cases.each_mode
@pytest.mark.parametrize("how", ("hooks", "checkpoint", "on the CPU"))
def test_the_second_derivative_is_refused_of_tensors_that_were_put_away(
    backend: str, device: str, gradient: str, how: str
) -> None:
    student, teacher = cases.pair((4, 9), device=device)
    leaf = student.requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return cases.call(z, teacher, backend=backend, gradient=gradient)

    if how == "checkpoint":
        value = checkpoint(loss, leaf, use_reentrant=False)
    elif how == "hooks":
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            value = loss(leaf)
    else:
        with torch.autograd.graph.save_on_cpu():
            value = loss(leaf)
    (first,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), leaf)


@dataclass(frozen=True)
class WithoutSlope(Divergence):
    """Its slope is autograd's, inside an op that runs below autograd."""

    name = "half_squared_difference"

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()) ** 2 / 2


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
@cases.each_mode
def test_a_divergence_without_a_slope_keeps_its_gradient_under_compile(
    compiler: str, gradient: str, plain_memory: None
) -> None:
    def function(z: Tensor, t: Tensor) -> Tensor:
        return fused_kd_loss(z, t, divergence=WithoutSlope(), backend="torch", gradient=gradient)

    student, teacher = cases.pair((4, 9))
    expected = loss_and_gradient(function, student, teacher)
    measured = loss_and_gradient(
        torch.compile(function, fullgraph=True, backend=compiler), student, teacher
    )
    assert expected[1].abs().max() > 0
    torch.testing.assert_close(measured[1], expected[1])


def test_a_bad_argument_is_reported_under_compile(plain_memory: None) -> None:
    compiled = torch.compile(lambda z: fused_kd_loss(z, z, temperature=-1.0), backend="aot_eager")
    with pytest.raises(Exception, match="temperature"):
        compiled(torch.zeros(2, 3))


# ---------------------------------------------------------------------------- who sees the op


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_an_observed_call_is_the_op_and_gives_the_same_bits(backend: str, device: str) -> None:
    """A plain call goes around the dispatcher; not where somebody would miss it."""
    student, teacher = cases.pair((3, 7), device=device)
    labels = torch.tensor([1, -100, 6], device=device)

    def gradient(student: Tensor) -> Tensor:
        leaf = student.detach().requires_grad_()
        cases.call(leaf, teacher, labels, backend=backend).backward()
        return leaf.grad

    want = gradient(student)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.testing.assert_close(gradient(student), want, rtol=0, atol=0)
    assert "kdkernels::kd_forward" in {event.key for event in profiled.key_averages()}
    with _Seen() as seen:
        torch.testing.assert_close(gradient(student), want, rtol=0, atol=0)
    assert "kdkernels.kd_forward.default" in seen.names
    with torch.inference_mode():
        cases.call(student, teacher, labels, backend=backend)


@cases.each_mode
def test_a_plain_call_goes_around_the_dispatcher(
    backend: str, device: str, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = cases.pair((3, 7), device=device)
    labels = torch.tensor([1, -100, 6], device=device)
    want = cases.evaluate(student, teacher, labels, backend=backend, gradient=gradient)
    monkeypatch.setattr(ops, "kd_forward", None)
    monkeypatch.setattr(ops, "kd_backward", None)
    got = cases.evaluate(student, teacher, labels, backend=backend, gradient=gradient)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.gradient, want.gradient)


@cases.each_mode
def test_negative_views_are_resolved(backend: str, device: str, gradient: str) -> None:
    """The imaginary part of a conjugate holds the negated numbers; the dispatcher knows."""
    pair = [
        torch.complex(*cases.pair((3, 7), seed=seed, device=device)).conj().imag for seed in (1, 2)
    ]
    assert all(one.is_neg() for one in pair)
    got, want = (
        cases.evaluate(*logits, None, backend=backend, gradient=gradient)
        for logits in (pair, [one.clone() for one in pair])
    )
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.gradient, want.gradient)


# --------------------------------------------------------------------------------- gradcheck


@cases.each_spec
@cases.each_mode
def test_gradcheck_in_float64(backend: str, device: str, spec: cases.Spec, gradient: str) -> None:
    cases.needs_float64(backend, device)
    student, teacher = cases.pair((3, 7), torch.float64, scale=1.0, device=device)
    labels = torch.tensor([1, -100, 6], device=device)

    def function(z: Tensor) -> Tensor:
        return cases.call(
            z,
            teacher,
            labels,
            backend=backend,
            gradient=gradient,
            temperature=2.0,
            z_loss=0.01,
            label_smoothing=0.1,
            logit_softcap=6.0,
            logit_scale=0.8,
            **spec.arguments,
        )

    assert torch.autograd.gradcheck(function, student.requires_grad_(), atol=1e-7)


def test_gradcheck_of_unreduced_rows(backend: str, device: str) -> None:
    cases.needs_float64(backend, device)
    student, teacher = cases.pair((3, 7), torch.float64, device=device)

    def function(z: Tensor) -> Tensor:
        return cases.call(z, teacher, backend=backend, reduction="none")

    assert torch.autograd.gradcheck(function, student.requires_grad_())
