"""The oracle of :mod:`kdkernels.reference` as a backend."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..problem import Problem
from .base import Backend, Result
from .torch_eager import check_labels


class ReferenceBackend(Backend):
    name = "reference"

    def unavailable(self) -> list[str]:
        return []

    def why_not(self, problem: Problem) -> list[str]:
        return []

    def forward(self, problem: Problem, *, want_gradient: bool, extras: bool) -> Result:
        check_labels(problem)
        loss, statistics, gradient = reference.forward(
            problem, want_gradient=want_gradient, extras=extras
        )
        if gradient is not None:
            gradient = gradient.to(problem.student.dtype).contiguous()
        dtype = problem.math_dtype
        return Result(loss.to(dtype), statistics.to(dtype), gradient)

    def backward(self, problem: Problem, statistics: Tensor, grad_output: Tensor) -> Tensor:
        *_, gradient = reference.forward(
            problem, want_gradient=True, extras=False, grad_output=grad_output
        )
        assert gradient is not None
        return gradient.to(problem.student.dtype).contiguous()
