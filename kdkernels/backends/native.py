"""The native module, and what the backends that call it share: addresses in, nothing kept."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any

from torch import Tensor

from ..problem import STATISTICS, Problem
from .base import Backend, Result, empty_gradient

#: ``kdkernels._native``; None where it was not built, and then WHY_NOT says so.
MODULE: Any = None
WHY_NOT: str | None = None
# Asked once: torch.compile traces the choice of a backend, but not into a C++ module.
DIVERGENCES: frozenset[str] = frozenset()
try:
    MODULE = importlib.import_module("kdkernels._native")
    DIVERGENCES = frozenset(MODULE.divergence_names())
except ImportError as error:  # a pure Python install, or a build for another Python
    WHY_NOT = f"the native module was not built ({error})"


class NativeBackend(Backend):
    """A backend whose one entry computes loss, statistics and gradient, whichever it is given."""

    @abstractmethod
    def run(
        self,
        problem: Problem,
        loss: Tensor | None,
        statistics: Tensor | None,
        gradient: Tensor | None,
        grad_output: Tensor | None,
        extras: bool,
    ) -> None:
        """Compute the whole problem into the outputs that are given."""

    def forward(
        self,
        problem: Problem,
        *,
        want_gradient: bool,
        extras: bool,
        gradient_out: Tensor | None = None,
        grad_output: Tensor | None = None,
    ) -> Result:
        student, shape, dtype = problem.student, problem.leading_shape, problem.math_dtype
        loss = student.new_empty(() if problem.options.reduction != "none" else shape, dtype=dtype)
        statistics = student.new_empty(len(STATISTICS), *shape, dtype=dtype)
        gradient = gradient_out
        if gradient is None and want_gradient:
            gradient = empty_gradient(problem.student)
        self.run(problem, loss, statistics, gradient, grad_output, extras)
        return Result(loss, statistics, gradient)


def pointer(tensor: Tensor | None) -> int:
    """The address of the tensor's memory; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
