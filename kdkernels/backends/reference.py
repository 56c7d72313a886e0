"""The oracle of :mod:`kdkernels.reference` as a backend."""

from __future__ import annotations

from torch import Tensor

from .. import entries, reference
from ..problem import Problem, check_labels
from .base import Backend, Result, empty_gradient


class ReferenceBackend(Backend):
    name = "reference"

    def unavailable(self) -> list[str]:
        return []

    def why_not(self, problem: Problem) -> list[str]:
        return []

    def forward(
        self,
        problem: Problem,
        *,
        want_gradient: bool,
        extras: bool,
        gradient_out: Tensor | None = None,
        grad_output: Tensor | None = None,
    ) -> Result:
        check_labels(problem)
        entries.check(problem, extras)
        loss, statistics, gradient = reference.forward(
            problem, want_gradient=want_gradient, extras=extras, grad_output=grad_output
        )
        if gradient is not None:
            gradient = _handed_out(problem, gradient, gradient_out)
        dtype = problem.math_dtype
        return Result(loss.to(dtype), statistics.to(dtype), gradient)

    def backward(
        self,
        problem: Problem,
        statistics: Tensor,
        grad_output: Tensor,
        *,
        gradient_out: Tensor | None = None,
    ) -> Tensor:
        *_, gradient = reference.forward(
            problem, want_gradient=True, extras=False, grad_output=grad_output
        )
        assert gradient is not None
        return _handed_out(problem, gradient, gradient_out)


def _handed_out(problem: Problem, gradient: Tensor, out: Tensor | None) -> Tensor:
    """The float64 gradient in the student's dtype, in ``out`` if the caller has memory for it."""
    out = empty_gradient(problem.student) if out is None else out
    return out.copy_(gradient)
