"""The native CPU backend: C++ SIMD kernels in ``kdkernels._native``.

One entry computes everything. The gradient comes out of the same sweep as the loss, or, recomputed
in the backward, out of a second run of the same kernel with grad_output folded into each row's
scale: the two modes give the same bits when grad_output is 1.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..problem import LOGIT_DTYPES, Problem, contiguous, label_error, row_layout
from .base import empty_gradient, row_stride
from .native import DIVERGENCES, WHY_NOT, NativeBackend
from .native import MODULE as _native
from .native import pointer as _pointer

# Asked once, as the divergences are.
_ISAS: tuple[str, ...] = () if _native is None else tuple(_native.cpu_isas())


class CpuBackend(NativeBackend):
    name = "cpu"
    foresees = True

    def unavailable(self) -> list[str]:
        if WHY_NOT is not None:
            return [WHY_NOT]
        forced = os.environ.get("KDKERNELS_CPU_ISA")
        if forced and forced not in _ISAS:
            return [f"KDKERNELS_CPU_ISA={forced} is not one of {', '.join(_ISAS)} (this CPU's)"]
        return []

    def why_not(self, problem: Problem) -> list[str]:
        reasons = []
        if not problem.student.is_cpu:
            reasons.append(f"it runs on cpu tensors, not on {problem.student.device.type}")
        if problem.options.divergence not in DIVERGENCES:
            reasons.append(f"it has no kernel for the divergence {problem.options.divergence!r}")
        return reasons

    def run(
        self,
        problem: Problem,
        loss: Tensor | None,
        statistics: Tensor | None,
        gradient: Tensor | None,
        grad_output: Tensor | None,
        extras: bool,
    ) -> None:
        options = problem.options
        student, teacher = problem.student, problem.teacher
        if torch.float64 in (student.dtype, teacher.dtype) and student.dtype != teacher.dtype:
            teacher = teacher.to(student.dtype)
        layout = row_layout(student, teacher)
        student, teacher = layout.tensors
        if grad_output is not None:
            grad_output = contiguous(grad_output, problem.math_dtype)
        bad_row = _native.kd_loss(
            student.data_ptr(),
            LOGIT_DTYPES[student.dtype],
            layout.strides[0],
            teacher.data_ptr(),
            LOGIT_DTYPES[teacher.dtype],
            layout.strides[1],
            layout.outer,
            layout.inner,
            problem.vocab,
            _pointer(problem.labels),
            options.ignore_index,
            _pointer(problem.token_weights),
            _pointer(grad_output),
            0 if grad_output is None or grad_output.ndim == 0 else 1,
            _denominator(problem),
            options.temperature,
            options.temperature_squared,
            options.alpha,
            options.label_smoothing,
            options.z_loss,
            options.student_scale,
            options.teacher_scale,
            options.student_softcap,
            options.teacher_softcap,
            options.divergence,
            tuple(options.parameters),
            _pointer(loss),
            options.reduction != "none",
            _pointer(statistics),
            extras,
            _pointer(gradient),
            problem.student.shape[-1],
            0 if gradient is None else row_stride(gradient),
            torch.get_num_threads(),
        )
        if bad_row >= 0:
            raise label_error(problem, bad_row)

    def backward(
        self,
        problem: Problem,
        statistics: Tensor,
        grad_output: Tensor,
        *,
        gradient_out: Tensor | None = None,
    ) -> Tensor:
        loss = torch.empty(grad_output.shape, dtype=problem.math_dtype)
        gradient = empty_gradient(problem.student) if gradient_out is None else gradient_out
        self.run(problem, loss, None, gradient, grad_output, extras=False)
        return gradient


def _denominator(problem: Problem) -> float:
    """The divisor of the sum over rows; 0.0 lets the kernel count the rows that count."""
    if problem.options.reduction != "mean":
        return 1.0
    if problem.num_items is None:
        return problem.options.denominator
    return float(problem.num_items) or 1.0
