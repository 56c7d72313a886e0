"""The two torch ops of the linear loss, ``linear_kd_forward`` and ``linear_kd_backward``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import BACKENDS
from .linear_tiles import STUDENT, LinearProblem, gradient_dtype, run_backward, run_forward
from .problem import Options

_TENSORS = len(LinearProblem._fields) - 1
OPTIONS_END = _TENSORS + len(Options._fields)
_LEADING_SCHEMA = (
    ", ".join(f"Tensor? {name}" for name in LinearProblem._fields[:-1])
    + f", {ops.OPTIONS_SCHEMA}, str backend, int max_chunk_bytes, bool[] wanted"
)


def _unpack(arguments: Sequence[Any]) -> tuple[LinearProblem, Sequence[Any]]:
    """The problem, and the arguments behind it."""
    options = ops.unpack_options(arguments[_TENSORS:OPTIONS_END])
    problem = LinearProblem(*[*arguments[:_TENSORS], options])
    return problem, arguments[OPTIONS_END:]


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (backend, max_chunk_bytes, wanted, extras) = _unpack(arguments)
    loss, statistics, four = run_forward(problem, backend, max_chunk_bytes, wanted, extras)
    return loss, statistics, *four


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (backend, max_chunk_bytes, wanted, _) = _unpack(arguments)
    shape, like, dtype = problem.leading_shape, problem.student_input, problem.logits_dtype
    loss_shape = shape if problem.options.reduction == "none" else ()
    statistics = like.new_empty((BACKENDS[backend].statistics_rows, *shape), dtype=dtype)
    four = _fake_gradients(problem, max_chunk_bytes, wanted)
    return (like.new_empty(loss_shape, dtype=dtype), statistics, *four)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (backend, max_chunk_bytes, wanted, statistics, grad_output) = _unpack(arguments)
    return run_backward(problem, backend, max_chunk_bytes, wanted, statistics, grad_output)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (_, max_chunk_bytes, wanted, *_) = _unpack(arguments)
    return _fake_gradients(problem, max_chunk_bytes, wanted)


def _fake_gradients(
    problem: LinearProblem, max_chunk_bytes: int, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    like = problem.student_input
    return tuple(
        like.new_empty((0,), dtype=problem.logits_dtype)
        if tensor is None or not want
        else like.new_empty(tensor.shape, dtype=gradient_dtype(problem, name, max_chunk_bytes))
        for name, tensor, want in zip(STUDENT, problem.student, wanted, strict=True)
    )


class _LinearKdLoss(torch.autograd.Function):
    """Autograd of linear_kd_forward: the loss, in the student's four inputs.

    Its last output is for :func:`~kdkernels.ops.refuse_second_derivative`.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        outputs = ops.below_autograd(linear_kd_forward, keyset, arguments)
        loss, statistics, *gradients = outputs
        anchor = loss.new_empty((0,))
        wanted = arguments[OPTIONS_END + 2]
        ctx.stored = any(wanted)
        kept = gradients if ctx.stored else [*arguments[:_TENSORS], statistics]
        ops.save(ctx, [anchor, *kept])
        ctx.scalars = arguments[_TENSORS : OPTIONS_END + 2]
        ctx.wanted = [t is not None and t.requires_grad for t in arguments[:4]]
        ctx.dtypes = [None if t is None else t.dtype for t in arguments[:4]]
        ctx.inputs = len(arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        return (*outputs, anchor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * (1 + ctx.inputs)
        with torch.no_grad():
            anchor, *tensors = ctx.saved_tensors
            if ctx.stored:
                four = [ops.scaled(g, grad_output, ctx.scalars[-2]) for g in tensors]
            else:
                *inputs, statistics = tensors
                four = linear_kd_backward(
                    *inputs, *ctx.scalars, ctx.wanted, statistics, grad_output
                )
            pairs = zip(four, ctx.dtypes, strict=True)
            four = [one if to is None else one.to(to) for one, to in pairs]
        refused = ops.refuse_second_derivative(four, anchor, grad_output)
        results = (one if want else None for one, want in zip(refused, ctx.wanted, strict=True))
        return (None, *results, *(None,) * (ctx.inputs - 4))


def _forward_autograd(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    student = [tensor for tensor in arguments[:4] if tensor is not None]
    for tensor in student:
        ops.refuse_transforms(tensor)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in student):
        return _LinearKdLoss.apply(keyset, *arguments)[:-1]
    return ops.below_autograd(linear_kd_forward, keyset, arguments)


def _backward_autograd(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    ops.refuse_differentiation(arguments)
    return ops.below_autograd(linear_kd_backward, keyset, arguments)


_GRADIENTS_SCHEMA = ", ".join(f"Tensor grad_{name}" for name in STUDENT)
linear_kd_forward = ops.define(
    "linear_kd_forward",
    f"({_LEADING_SCHEMA}, bool extras) -> (Tensor loss, Tensor statistics, {_GRADIENTS_SCHEMA})",
    _forward,
    _forward_autograd,
    _forward_fake,
)
linear_kd_backward = ops.define(
    "linear_kd_backward",
    f"({_LEADING_SCHEMA}, Tensor statistics, Tensor grad_output) -> ({_GRADIENTS_SCHEMA})",
    _backward,
    _backward_autograd,
    _backward_fake,
)
