"""The native module, and what the backends that call it share: addresses in, nothing kept."""

from __future__ import annotations

import functools
import importlib
import warnings
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..entries import TAILS
from ..environment import setting
from ..problem import (
    LOGIT_DTYPES,
    STATISTICS,
    Options,
    Problem,
    RowLayout,
    contiguous,
    row_layout,
)
from .base import Backend, Result, empty_gradient, row_stride

#: ``kdkernels._native``; None where it was not built, and then WHY_NOT says so.
MODULE: Any = None
WHY_NOT: str | None = None
# Asked once: torch.compile traces the choice of a backend, but not into a C++ module.
DIVERGENCES: frozenset[str] = frozenset()
#: Those that follow from the first sweep over a row: the KLs.
CLOSED_FORMS: frozenset[str] = frozenset()
#: What the largest cluster of the CUDA register kernel holds, by the wider logits' bytes.
MOST_REGISTER_COLUMNS: dict[int, int] = {}
#: What the CUDA kernel of sparse teachers has for a bit of every column and for the slots of a row,
#: and the bytes of a slot.
ENTRIES_LIMITS = (0, 0)
try:
    MODULE = importlib.import_module("kdkernels._native")
    DIVERGENCES = frozenset(MODULE.divergence_names())
    CLOSED_FORMS = frozenset(MODULE.closed_form_names())
    MOST_REGISTER_COLUMNS = {size: MODULE.cuda_most_columns(size) for size in (2, 4, 8)}
    ENTRIES_LIMITS = MODULE.cuda_entries_limits()
except ImportError as error:  # a pure Python install, or a build for another Python
    WHY_NOT = f"the native module was not built ({error})"
    if setting("KDKERNELS_CPU_ISA") is not None:
        warnings.warn(f"KDKERNELS_CPU_ISA has no effect: {WHY_NOT}", stacklevel=2)


class NativeBackend(Backend):
    """A backend whose one entry computes loss, statistics and gradient, whichever it is given."""

    #: The simulated tests put another build in its place.
    module: Any = MODULE

    @abstractmethod
    def denominator(self, problem: Problem) -> float:
        """The divisor of the sum over rows; 0.0 lets the kernels count the rows that count."""

    @abstractmethod
    def execute(self, problem: Problem, *native: Any) -> None:
        """Run ``native``: the problem as the module's Logits (student, teacher), Rows, Options and
        Results."""

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
        module, student, teacher = self.module, problem.student, problem.teacher
        if problem.teacher_ids is None and torch.float64 in (student.dtype, teacher.dtype):
            teacher = teacher.to(problem.math_dtype)  # no kernel has float64 beside another dtype
        # Kept: its tensors may be copies. A sparse teacher has no logits, and goes with the rows.
        extent: tuple[int, ...] = ()
        if problem.teacher_rows is not None:
            layout, extent = _mapped(problem, student, teacher)
        elif problem.teacher_ids is None:
            layout = row_layout(student, teacher)
        else:
            layout = row_layout(student)
        if grad_output is not None:
            grad_output = contiguous(grad_output, problem.math_dtype)
        rows = module.Rows(
            layout.outer,
            layout.inner,
            problem.vocab,
            pointer(problem.labels),
            pointer(problem.token_weights),
            pointer(grad_output),
            0 if grad_output is None or grad_output.ndim == 0 else 1,
            self.denominator(problem),
            *sparse_teacher(module, problem, layout.offsets),
        )
        results = module.Results(
            pointer(loss),
            pointer(statistics),
            extras,
            pointer(gradient),
            problem.student.shape[-1],
            0 if gradient is None else row_stride(gradient),
        )
        student, teacher = layout.tensors[0], layout.tensors[-1]
        self.execute(
            problem,
            module.Logits(student.data_ptr(), LOGIT_DTYPES[student.dtype], *layout.strides[0]),
            module.Logits(
                teacher.data_ptr(), LOGIT_DTYPES[teacher.dtype], *layout.strides[-1], *extent
            ),
            rows,
            native_options(module, problem.options),
            results,
        )

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


def _mapped(
    problem: Problem, student: Tensor, teacher: Tensor
) -> tuple[RowLayout, tuple[int, ...]]:
    """The layout where rows are named, and what else the ``Logits`` of a dense teacher take."""
    assert problem.teacher_rows is not None
    if problem.teacher_ids is not None:
        offsets = problem.teacher_rows * problem.teacher_ids.shape[-1]
        return row_layout(student)._replace(offsets=offsets), ()
    layout = row_layout(student, teacher, teacher_rows=problem.teacher_rows)
    teacher = layout.tensors[-1]
    steps = zip(teacher.shape, teacher.stride(), strict=True)
    elements = 1 + sum((size - 1) * step for size, step in steps)
    return layout, (pointer(layout.offsets), elements)


def sparse_teacher(module: Any, problem: Problem, offsets: Tensor | None) -> tuple[Any, ...]:
    """The module's ``SparseTeacher``; nothing for a dense one."""
    ids = problem.teacher_ids
    if ids is None:
        return ()
    # Without rows there is no memory, but the address says that the teacher is sparse.
    address = pointer(ids) or 1
    count, tail = ids.shape[-1], TAILS.index(problem.options.tail)
    log_probs = pointer(problem.teacher)
    return (module.SparseTeacher(address, log_probs, count, tail, pointer(offsets)),)


def pointer(tensor: Tensor | None) -> int:
    """The address of the tensor's memory; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


@functools.lru_cache(maxsize=64)
def native_options(module: Any, options: Options) -> Any:
    """The module's ``Options``, made once for equal ones."""
    return module.Options(options)
