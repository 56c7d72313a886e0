"""What a backend is: reasons why it cannot run a problem, a forward and a backward."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory import GRADIENT_MEMORY
from ..problem import STATISTICS, Problem


class Result(NamedTuple):
    """What a forward leaves behind.

    loss: [] or, for reduction "none", [...]; statistics: [statistics_rows, *leading shape], both in
    the problem's math dtype; gradient: of the reduced loss (for "none" of the sum of the row
    losses) with respect to the student's logits, in their shape and dtype, with
    ``gradient_strides``; None if not asked for.
    """

    loss: Tensor
    statistics: Tensor
    gradient: Tensor | None


class Backend(ABC):
    """One implementation of the contract. Stateless; one instance per process."""

    name: str
    #: Rows that this backend appends to the statistics for its own backward.
    state_rows: int = 0
    #: Whether a gradient may be stored for the ``grad_output`` that is foreseen: where the later,
    #: real one is read at no cost, to be compared.
    foresees: bool = False

    @property
    def statistics_rows(self) -> int:
        return len(STATISTICS) + self.state_rows

    @abstractmethod
    def unavailable(self) -> list[str]:
        """Why this backend cannot run on this machine at all; empty: it can."""

    @abstractmethod
    def why_not(self, problem: Problem) -> list[str]:
        """Why this backend, available as it is, cannot run this problem; empty: it can."""

    def yields(self, problem: Problem, extras: bool) -> tuple[str, str] | None:
        """The backend that is faster for this problem, and why; None: this one is the first choice.

        Asked where the caller leaves the choice open. If that backend cannot run it, this one does.
        """
        return None

    def prepare(self, problem: Problem) -> None:  # noqa: B027
        """Called once this backend is chosen, while a call is checked (or traced)."""

    @abstractmethod
    def forward(
        self,
        problem: Problem,
        *,
        want_gradient: bool,
        extras: bool,
        gradient_out: Tensor | None = None,
        grad_output: Tensor | None = None,
    ) -> Result:
        """Loss, statistics (entropies and hits only if ``extras``) and, if wanted, the gradient.

        The gradient is that of the loss times ``grad_output`` (as in :meth:`backward`), multiplied
        before it is rounded; None: 1.

        ``gradient_out`` is memory for the gradient: in the student's shape and dtype, entries side
        by side and rows ``row_stride`` apart; what is between them is not touched. It may be the
        student's own, which is then overwritten row by row.
        """

    @abstractmethod
    def backward(
        self,
        problem: Problem,
        statistics: Tensor,
        grad_output: Tensor,
        *,
        gradient_out: Tensor | None = None,
    ) -> Tensor:
        """The gradient recomputed from the inputs, times grad_output ([] or, for "none", [...])."""

    def scale_gradient(self, gradient: Tensor, grad_output: Tensor, *, overwrite: bool) -> Tensor:
        """gradient * grad_output, rounded once; ``overwrite`` allows the result in gradient's
        memory.

        One number or one per row. Where either is 0, so is the product, also beside inf or NaN: a
        row that does not count, or an entry beyond the common vocabulary, takes no part whatever
        the factor is. The multiplication is skipped where reading the number costs nothing (on the
        CPU) and it is 1.
        """
        out = gradient if overwrite else gradient.clone()
        if grad_output.ndim == 0 and grad_output.is_cpu:
            factor = grad_output.item()
            if factor == 1.0:
                return out
            if factor != 0.0 and math.isfinite(factor):
                return out.mul_(grad_output)
        factors = grad_output if grad_output.ndim == 0 else grad_output.unsqueeze(-1)
        zero = (gradient == 0) | (factors == 0)
        return out.mul_(factors).masked_fill_(zero, 0.0)


def gradient_strides(student: Tensor) -> tuple[int, ...]:
    """The strides of the student's gradient: contiguous, but for padded rows of the student.

    Rows of a padded vocabulary (50257 columns in rows of 50304) all start at a multiple of 16
    bytes; packed, they would not, and a GPU could not store 16 bytes at once: 13.6 bytes moved an
    element instead of 2. So their gradient's rows are as far apart as they are, where that is what
    aligns them and costs at most an eighth more memory. What is between rows belongs to nobody.
    """
    shape = student.shape
    steps, step = [1], _row_step(student)
    for size in reversed(shape[:-1]):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps[: len(shape)]))


def _row_step(student: Tensor) -> int:
    columns = student.shape[-1]
    if student.is_contiguous() or student.stride(-1) != 1:  # so is any that has one row, or none
        return columns
    step, size = student.stride(-2), student.element_size()
    if not columns < step <= columns + columns // 8:  # an expanded row or another order, mostly
        return columns
    return step if step * size % 16 == 0 and columns * size % 16 != 0 else columns


def empty_gradient(student: Tensor) -> Tensor:
    """Memory for the student's gradient, in its shape and dtype, with ``gradient_strides``."""
    strides = None if student.is_contiguous() else gradient_strides(student)
    if student.is_cpu:
        return GRADIENT_MEMORY.take(student.shape, student.dtype, strides)
    if strides is None:
        return torch.empty(student.shape, dtype=student.dtype, device=student.device)
    return torch.empty_strided(student.shape, strides, dtype=student.dtype, device=student.device)


def row_stride(gradient: Tensor) -> int:
    """Elements from one row of a gradient to the next, whatever the number of its dimensions."""
    if not gradient.is_contiguous():
        for axis in range(gradient.ndim - 2, -1, -1):
            if gradient.shape[axis] != 1:
                return gradient.stride(axis)
    return gradient.shape[-1]


def has_rows(gradient: Tensor) -> bool:
    """Whether a gradient has entries side by side and rows ``row_stride`` apart.

    Ours have; hooks for saved tensors may have put another in its place.
    """
    if gradient.is_contiguous():
        return True
    columns, step = gradient.shape[-1], row_stride(gradient)
    if step < columns or (columns != 1 and gradient.stride(-1) != 1):
        return False
    for axis in range(gradient.ndim - 2, -1, -1):
        if gradient.shape[axis] != 1:
            if gradient.stride(axis) != step:
                return False
            step *= gradient.shape[axis]
    return True
