"""The two torch ops, ``kdkernels::kd_forward`` and ``kdkernels::kd_backward``.

Both are functional. ``torch.compile`` sees them as opaque, with shapes from the fake rules below.
The autograd rule is a kernel on the Autograd dispatch key: measured on [8, 1000] it costs 32 us a
forward and backward, where ``torch.library.register_autograd`` costs 116 (torch 2.13, Zen 5). An
eager call on the CPU or on CUDA that nothing traces, transforms or observes goes around the
dispatcher, see :func:`kd_loss`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import torch_private
from .backends import BACKENDS
from .backends.base import gradient_strides
from .problem import Options, Problem, loss_dtype

_SCHEMA_TYPES = {
    float: "float",
    bool: "bool",
    int: "int",
    str: "str",
    tuple[float, ...]: "float[]",
}
OPTIONS_SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in typing.get_type_hints(Options).items()
)
_TENSORS_SCHEMA = (
    "Tensor student, Tensor teacher, Tensor? labels, Tensor? token_weights, Tensor? num_items,"
    " Tensor? teacher_ids, Tensor? teacher_rows"
)
_TENSORS = 7
_OPTIONS_END = _TENSORS + len(Options._fields)

_LIBRARY = torch.library.Library("kdkernels", "DEF")

_Results = tuple[Tensor, Tensor, Tensor]  # loss, statistics, gradient

#: Types of tensors that nothing but torch's own code computes with.
PLAIN = (Tensor, nn.Parameter)

_DOUBLE_BACKWARD = (
    "fused_kd_loss has no second derivative: its gradient comes out of a fused kernel. "
    "For double backward compute the loss in eager PyTorch."
)

_TRANSFORMS = (
    "fused_kd_loss supports neither torch.func transforms (grad, vjp, jvp, ...) nor forward-mode "
    "derivatives: use loss.backward() or torch.autograd.grad, and batch dimensions instead of vmap."
)


def define(name: str, schema: str, kernel: Any, autograd: Any, fake: Any) -> Any:
    """Register the op ``kdkernels::name``; ``autograd`` receives the dispatch keys first.

    None: nothing of it is differentiable.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    if autograd is not None:
        _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"kdkernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.kdkernels, name).default


def below_autograd(op: Any, keyset: Any, arguments: Sequence[Any]) -> Any:
    """Call the op's kernel. A redispatch, not a guard: a kernel may use autograd of its own."""
    return op.redispatch(keyset & torch_private.AFTER_AUTOGRAD, *arguments)


def save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """``ctx.save_for_backward``, also for inference tensors (a teacher run under inference_mode).

    Those are copied: they have no version by which autograd would notice, as it does of any other
    tensor, that a teacher's next batch has overwritten them before the backward reads them again.
    """
    ctx.save_for_backward(
        *[t.clone() if t is not None and t.is_inference() else t for t in tensors]
    )


def refuse_transforms(student: Tensor) -> None:
    """RuntimeError where a derivative is wanted that only ``backward`` computes."""
    if torch_private.are_transforms_active() or torch_private.has_tangent(student):
        raise RuntimeError(_TRANSFORMS)


def refuse_second_derivative(
    gradients: Sequence[Tensor], anchor: Tensor, grad_output: Tensor
) -> Sequence[Tensor]:
    """The gradients, made to raise if a graph is being created and somebody differentiates them.

    ``anchor`` is an output of the node whose backward this is, and needs no memory: through it the
    refusal stands between the gradients and whatever the loss was computed from, so that it is met
    from there, too: ``torch.autograd.grad(penalty, inputs)`` follows no other path.
    """
    if not torch.is_grad_enabled():
        return gradients
    refuse = torch_private.delayed_error(_DOUBLE_BACKWARD, len(gradients) + 2)
    refused: Sequence[Tensor] = refuse(*gradients, anchor, grad_output)
    return refused[: len(gradients)]


def refuse_differentiation(arguments: Sequence[Any]) -> None:
    """RuntimeError where autograd would have to record a backward op."""
    if torch.is_grad_enabled() and any(
        isinstance(a, Tensor) and a.requires_grad for a in arguments
    ):
        raise RuntimeError(_DOUBLE_BACKWARD)


def unpack_options(fields: Sequence[Any]) -> Options:
    """The options from an op's arguments, which bring the parameters in a list."""
    options = Options(*fields)
    return options._replace(parameters=tuple(options.parameters))


def _unpack(arguments: tuple[Any, ...]) -> tuple[Problem, str]:
    """The problem and the backend's name from an op's leading arguments."""
    student, teacher, labels, weights, items, ids, teacher_rows = arguments[:_TENSORS]
    options = unpack_options(arguments[_TENSORS:_OPTIONS_END])
    problem = Problem(student, teacher, labels, weights, items, options, ids, teacher_rows)
    return problem, arguments[_OPTIONS_END]


def _forward(*arguments: Any) -> _Results:
    problem, backend = _unpack(arguments)
    return _run(problem, backend, *arguments[_OPTIONS_END + 1 :])


def _run(
    problem: Problem, backend: str, want_gradient: bool, extras: bool, expected: float | None
) -> _Results:
    grad_output = None
    if expected is not None:
        grad_output = torch.tensor(expected, dtype=torch.float64, device="cpu")
    result = BACKENDS[backend].forward(
        problem, want_gradient=want_gradient, extras=extras, grad_output=grad_output
    )
    gradient = result.gradient
    if gradient is None:  # an op has a fixed number of outputs
        gradient = problem.student.new_empty((0,))
    return result.loss, result.statistics, gradient


def _backward(*arguments: Any) -> Tensor:
    problem, backend = _unpack(arguments)
    statistics, grad_output = arguments[_OPTIONS_END + 1 :]
    return BACKENDS[backend].backward(problem, statistics, grad_output)


def _forward_fake(*arguments: Any) -> _Results:
    problem, backend = _unpack(arguments)
    want_gradient = arguments[_OPTIONS_END + 1]
    student, shape = problem.student, problem.leading_shape
    loss_shape = shape if problem.options.reduction == "none" else ()
    dtype = loss_dtype(student)
    return (
        student.new_empty(loss_shape, dtype=dtype),
        student.new_empty((BACKENDS[backend].statistics_rows, *shape), dtype=dtype),
        _gradient_fake(student) if want_gradient else student.new_empty((0,)),
    )


def _backward_fake(*arguments: Any) -> Tensor:
    return _gradient_fake(arguments[0])


def _gradient_fake(student: Tensor) -> Tensor:
    return student.new_empty_strided(student.shape, gradient_strides(student))


class _GradOutput:
    """What the latest gradients on the CPU were multiplied by: a guess at the next grad_output.

    A float16 gradient has to meet it before rounding. It is 1, or a ``GradScaler``'s factor, which
    stays for thousands of steps; then the gradient that was stored for it in the forward is, to the
    bit, what the backward would recompute. A wrong guess costs the time of the stored gradient, so
    none is made until the number has come twice.
    """

    def __init__(self) -> None:
        self._latest = 1.0
        self._steady = True

    def expected(self) -> float | None:
        """None: no guess. Nor is one made under hooks for saved tensors.

        A checkpoint's recomputation, for one, must save what its forward saved.
        """
        hooked = torch_private.has_saved_tensor_hooks()
        return self._latest if self._steady and not hooked else None

    def is_as_expected(self, expected: float | None, grad_output: Tensor) -> bool:
        """Whether the guess was right; remembers what came."""
        if type(grad_output) is not Tensor or grad_output.device.type != "cpu" or grad_output.ndim:
            return False
        got = grad_output.item()
        self._steady = got == self._latest
        self._latest = got
        return got == expected


GRAD_OUTPUT = _GradOutput()


# Autograd of kd_forward: only the loss is differentiable, and only in the student's logits; the
# empty tensor behind it is for refuse_second_derivative. Both functions are handed the computation
# and hand its other results out in a tuple: autograd looks at each tensor that goes in or comes
# out, and the statistics, the gradient and 20 arguments as such would cost 12 us a call.


class _StoredGradient(torch.autograd.Function):
    """A loss whose gradient is computed beside it."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, compute: Callable[[], _Results], backend: str
    ) -> tuple[Tensor, _Results, Tensor]:
        results = compute()
        anchor = results[0].new_empty((0,))
        ctx.save_for_backward(anchor, results[2])
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return results[0], results, anchor

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None, None]:
        return _once(_stored, ctx, grad_output), None, None


class _RecomputedGradient(torch.autograd.Function):
    """A loss whose gradient the backward computes, unless the right one was foreseen."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, compute: Callable[[], _Results], arguments: Sequence[Any]
    ) -> tuple[Tensor, _Results, Tensor]:
        results = compute()
        anchor = results[0].new_empty((0,))
        save(ctx, [anchor, *arguments[:_TENSORS], *results[1:]])
        ctx.scalars = arguments[_TENSORS : _OPTIONS_END + 1]
        ctx.expected = arguments[-1]
        ctx.set_materialize_grads(False)
        return results[0], results, anchor

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None, None]:
        return _once(_recomputed, ctx, grad_output), None, None


def _stored(ctx: Any, kept: Sequence[Tensor], grad_output: Tensor) -> Tensor:
    return scaled(kept[0], grad_output, ctx.backend)


def _recomputed(ctx: Any, kept: Sequence[Tensor], grad_output: Tensor) -> Tensor:
    *inputs, statistics, foreseen = kept
    if GRAD_OUTPUT.is_as_expected(ctx.expected, grad_output):
        return foreseen.clone() if torch_private.keeps_graph() else foreseen
    arguments = (*inputs, *ctx.scalars, statistics, grad_output)
    if _is_observed((*inputs, statistics, grad_output)):
        result: Tensor = kd_backward(*arguments)
        return result
    return _backward(*arguments)


def _once(
    gradient: Callable[[Any, Sequence[Tensor], Tensor], Tensor],
    ctx: Any,
    grad_output: Tensor | None,
) -> Tensor | None:
    """The gradient for this grad_output, made to have no derivative of its own."""
    if grad_output is None:
        return None
    anchor, *kept = ctx.saved_tensors
    if not torch.is_grad_enabled():  # the rule; entering no_grad would take 6 us
        return gradient(ctx, kept, grad_output)
    with torch.no_grad():
        result = gradient(ctx, kept, grad_output)
    return refuse_second_derivative([result], anchor, grad_output)[0]


def scaled(gradient: Tensor, grad_output: Tensor, backend: str) -> Tensor:
    """The stored gradient times grad_output, in place where the stored one is not needed again."""
    if type(gradient) is not torch.Tensor or type(grad_output) is not torch.Tensor:
        # A traced backward (fake or functional tensors): a plain multiplication, left to the
        # compiler.
        factor = grad_output if grad_output.ndim == 0 else grad_output.unsqueeze(-1)
        zero = (gradient == 0) | (factor == 0)  # as scale_gradient says
        return (gradient * factor).to(gradient.dtype).masked_fill(zero, 0.0)
    # Not in place if the backward may be repeated; a leaf would also take the stored gradient for
    # its .grad, and accumulate into it.
    overwrite = not torch_private.keeps_graph()
    return BACKENDS[backend].scale_gradient(gradient, grad_output, overwrite=overwrite)


def _forward_autograd(keyset: Any, *arguments: Any) -> _Results:
    refuse_transforms(arguments[0])
    return _differentiable(arguments, lambda: below_autograd(kd_forward, keyset, arguments))


def _differentiable(arguments: Sequence[Any], compute: Callable[[], _Results]) -> _Results:
    """What ``compute`` returns, its loss with a gradient if the student is to have one."""
    student, backend = arguments[0], arguments[_OPTIONS_END]
    if not (student.requires_grad and torch.is_grad_enabled()):
        return compute()
    want_gradient, _, expected = arguments[_OPTIONS_END + 1 :]
    if want_gradient and expected is None:
        loss, others, _ = _StoredGradient.apply(student, compute, backend)
    else:
        loss, others, _ = _RecomputedGradient.apply(student, compute, arguments)
    return loss, *others[1:]


def _backward_autograd(keyset: Any, *arguments: Any) -> Tensor:
    refuse_differentiation(arguments)
    return below_autograd(kd_backward, keyset, arguments)


kd_forward = define(
    "kd_forward",
    f"({_TENSORS_SCHEMA}, {OPTIONS_SCHEMA}, str backend, bool want_gradient, bool extras,"
    " float? expected_grad_output)"
    " -> (Tensor loss, Tensor statistics, Tensor gradient)",
    _forward,
    _forward_autograd,
    _forward_fake,
)
kd_backward = define(
    "kd_backward",
    f"({_TENSORS_SCHEMA}, {OPTIONS_SCHEMA}, str backend, Tensor statistics, Tensor grad_output)"
    " -> Tensor",
    _backward,
    _backward_autograd,
    _backward_fake,
)


def kd_loss(
    problem: Problem, backend: str, want_gradient: bool, extras: bool, expected: float | None
) -> tuple[Tensor, Tensor]:
    """Loss and statistics, differentiable: ``kd_forward``, or the same without the dispatcher.

    It would pass 25 arguments through twice: on [8, 1000], forward and backward, 215 to 233 us
    instead of 167 to 181, eager PyTorch taking 310 to 333 (Zen 3, best and median of 30 rounds).
    On CUDA, where a call of less than 7e7 logits is bound by this time, the dispatcher would do no
    more: it sets no device for an op that is written in Python (the native module and Triton's
    launcher do), knows nothing of streams, and autocast has no rule for these ops.
    """
    tensors = (
        problem.student,
        problem.teacher,
        problem.labels,
        problem.token_weights,
        problem.num_items,
        problem.teacher_ids,
        problem.teacher_rows,
    )
    settings = (backend, want_gradient, extras, expected)
    arguments = (*tensors, *problem.options, *settings)
    if _is_observed(tensors):
        loss, statistics, _ = kd_forward(*arguments)
    else:
        loss, statistics, _ = _differentiable(arguments, lambda: _run(problem, *settings))
    return loss, statistics


def _is_observed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether something else than autograd of plain CPU or CUDA tensors takes part in a call."""
    if torch.compiler.is_compiling():  # first: Dynamo does not trace the rest
        return True
    for tensor in tensors:
        if tensor is not None and not _is_plain(tensor):
            return True
    return torch_private.is_observed()


def _is_plain(tensor: Tensor) -> bool:
    """Whether the memory at the tensor's address holds its numbers.

    It does not under a negative view (the imaginary part of a conjugate), which only the dispatcher
    resolves.
    """
    return type(tensor) in PLAIN and (tensor.is_cpu or tensor.is_cuda) and not tensor.is_neg()
