"""The native CPU backend: C++ SIMD kernels in ``kdkernels._native``.

One entry computes everything. The gradient comes out of the same sweep as the loss, or, recomputed
in the backward, out of a second run of the same kernel with grad_output folded into each row's
scale: the two modes give the same bits when grad_output is 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..entries import fault
from ..problem import Problem, label_error
from .base import empty_gradient
from .native import DIVERGENCES, WHY_NOT, NativeBackend


class CpuBackend(NativeBackend):
    name = "cpu"
    foresees = True

    def unavailable(self) -> list[str]:
        return [] if WHY_NOT is None else [WHY_NOT]

    def why_not(self, problem: Problem) -> list[str]:
        reasons = []
        if not problem.student.is_cpu:
            reasons.append(f"it runs on cpu tensors, not on {problem.student.device.type}")
        if problem.options.divergence not in DIVERGENCES:
            reasons.append(f"it has no kernel for the divergence {problem.options.divergence!r}")
        return reasons

    def denominator(self, problem: Problem) -> float:
        if problem.options.reduction != "mean":
            return 1.0
        if problem.num_items is None:
            return problem.options.denominator
        return float(problem.num_items) or 1.0

    def execute(self, problem: Problem, *native: Any) -> None:
        bad_row = self.module.kd_loss(*native, torch.get_num_threads())
        if bad_row >= 0:
            assert problem.labels is not None
            raise label_error(problem.labels, problem.vocab, problem.options.ignore_index, bad_row)
        if bad_row < -1:
            error = fault(problem, -2 - bad_row)
            if error is not None:
                raise error

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
