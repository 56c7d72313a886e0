"""Row maps: which rows of the student's logits meet which of the teacher's, without a copy of them.

The pairs are put into the student's order. A row that no pair names then is one that does not
count, whose gradient of 0 every backend writes as it is, and of the maps one number a row is left:
which of the teacher's rows it meets (``Problem.teacher_rows``). Nothing is larger than [rows].
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops import define
from .problem import Problem, check_label_values, contiguous

#: The options of ``fused_kd_loss`` that are row maps.
ROW_MAPS = ("student_rows", "teacher_rows")


class RowMaps(NamedTuple):
    """The two as they are given, one of them at least; None: all rows in order."""

    student: Any
    teacher: Any


class Pairs(NamedTuple):
    """Hands out by pairs what a backend has by the student's rows."""

    shape: torch.Size  #: (pairs,)
    slots: Tensor | None  #: [pairs], which row; ``rows`` for one that there is not. None: in order
    rows: int
    has_missing: bool  #: whether a slot may be ``rows``: elsewhere than on a CPU, which has raised

    def of(self, by_row: Tensor) -> Tensor:
        """[pairs], NaN where there is no such row."""
        flat = by_row.reshape(-1)
        if self.slots is None:
            return flat
        if self.has_missing:
            flat = torch.cat([flat, flat.new_full((1,), math.nan)])
        return flat.index_select(0, self.slots)

    def reduced(self, loss: Tensor) -> Tensor:
        """A sum over the rows, NaN if a pair has no row; what others' gradients are stays."""
        if self.slots is None or not self.has_missing:
            return loss
        missing = (self.slots == self.rows).any()
        return loss + loss.new_zeros(()).masked_fill(missing, math.nan)


def checked_maps(
    maps: RowMaps, student: Tensor, teacher: Tensor, shift: bool
) -> tuple[RowMaps, Pairs]:
    """The maps as contiguous int64; TypeError or ValueError names one that does not fit.

    What is in them is looked at by :func:`placed`.
    """
    if shift:
        raise ValueError(
            "shift: True is not possible beside student_rows or teacher_rows: they name the rows, "
            "and each pair has its label; shift those"
        )
    found = RowMaps(*(_checked_map(*named, student) for named in zip(ROW_MAPS, maps, strict=True)))
    rows, teacher_rows = _count(student), _count(teacher)
    pairs = rows if found.student is None else found.student.shape[0]
    others = teacher_rows if found.teacher is None else found.teacher.shape[0]
    if pairs != others:
        raise ValueError(
            f"student_rows, teacher_rows: {pairs} and {others} rows; one that is not given is all "
            "rows of that model's in order"
        )
    # Not the caller's own, which may be overwritten before the backward, or of inference_mode.
    slots = None if found.student is None else _slots(found.student, rows)
    return found, Pairs(torch.Size((pairs,)), slots, rows, not _can_raise(student))


def _can_raise(tensor: Tensor) -> bool:
    """Whether its numbers may be looked at without a synchronisation."""
    return tensor.is_cpu


def _count(logits: Tensor) -> int:
    return math.prod(logits.shape[:-1])


def _checked_map(name: str, rows: Any, student: Tensor) -> Tensor | None:
    if rows is None:
        return None
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(rows).__name__}")
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: dtype {rows.dtype} is neither int32 nor int64")
    if rows.ndim != 1:
        raise ValueError(f"{name}: shape {tuple(rows.shape)} is not one-dimensional")
    if rows.device != student.device:
        raise ValueError(f"{name}: device {rows.device} differs from the logits' {student.device}")
    return contiguous(rows, torch.int64)


def _slots(student_rows: Tensor, rows: int) -> Tensor:
    """Where a pair stands among ``rows`` and one more, for those that are none of them."""
    return torch.where((student_rows >= 0) & (student_rows < rows), student_rows, rows)


def placed(problem: Problem, maps: RowMaps) -> Problem:
    """The problem, whose labels and weights are those of pairs, by the student's rows.

    Rows that no pair names have the label ``ignore_index``; without labels all others have 0.

    Raises:
        IndexError: on a CPU, a row that there is not, a student's row that comes twice or a label
            outside the vocabulary. Elsewhere such a pair has a label that no kernel takes, which
            makes its row NaN, and what is left of the maps is inside the tensors.
    """
    shape, (student, teacher) = problem.leading_shape, (problem.student, problem.teacher)
    labels, weights, rows = _kd_place(
        *maps, problem.labels, problem.token_weights, problem.rows, _count(teacher), problem.vocab,
        problem.options.ignore_index,
    )  # fmt: skip
    ids = problem.teacher_ids
    if _count(teacher) == 0:  # then no pair is left, but a row of the teacher has to be named
        teacher = student.new_zeros((1, teacher.shape[-1]), dtype=teacher.dtype)
        ids = None if ids is None else ids.new_full((1, ids.shape[-1]), -1)
    return dataclasses.replace(
        problem,
        teacher=teacher,
        labels=labels.reshape(shape),
        token_weights=None if problem.token_weights is None else weights.reshape(shape),
        teacher_ids=ids,
        teacher_rows=rows.reshape(shape),
    )


def _place(
    student_rows: Tensor | None,
    teacher_rows: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    rows: int,
    teacher_count: int,
    vocab: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    one = teacher_rows if student_rows is None else student_rows
    assert one is not None
    if _can_raise(one):
        _refuse_student_rows(student_rows, rows)
        _refuse_outside("teacher_rows", teacher_rows, teacher_count)
        if labels is not None:
            check_label_values(labels, vocab, ignore_index)
    no_label = -1 if ignore_index != -1 else -2
    if labels is None:
        labels = torch.zeros_like(one)
    weights = labels.new_empty(0, dtype=torch.float32) if token_weights is None else token_weights
    if teacher_rows is None:
        teacher_rows = torch.arange(one.shape[0], device=one.device)
    bad = (teacher_rows < 0) | (teacher_rows >= teacher_count)
    teacher_rows = torch.where(bad, 0, teacher_rows)
    labels = torch.where(bad, no_label, labels)
    if student_rows is not None:
        slots = _slots(student_rows, rows)
        labels = _by_row(labels, slots, rows, ignore_index)
        teacher_rows = _by_row(teacher_rows, slots, rows, 0)
        if token_weights is not None:
            weights = _by_row(weights, slots, rows, 0.0)
        # No kernel adds the gradients of two pairs up.
        times = torch.zeros(rows + 1, dtype=torch.int64, device=one.device)
        twice = times.index_add_(0, slots, torch.ones_like(slots))[:rows] > 1
        labels = torch.where(twice, no_label, labels)
    if token_weights is not None:
        # A weight of 0 would hide what is wrong with the row. An output is no view of an input.
        weights = torch.where(labels == no_label, 1.0, weights)
    return labels, weights, teacher_rows


def _by_row(by_pair: Tensor, slots: Tensor, rows: int, default: float) -> Tensor:
    placed = by_pair.new_full((rows + 1,), default)
    placed[slots] = by_pair
    return placed[:rows]


def _place_fake(
    student_rows: Tensor | None,
    teacher_rows: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    rows: int,
    *_: int,
) -> tuple[Tensor, Tensor, Tensor]:
    one = teacher_rows if student_rows is None else student_rows
    assert one is not None
    weights = one.new_empty(0 if token_weights is None else rows, dtype=torch.float32)
    return one.new_empty(rows), weights, one.new_empty(rows)


_kd_place = define(
    "kd_place",
    "(Tensor? student_rows, Tensor? teacher_rows, Tensor? labels, Tensor? token_weights,"
    " SymInt rows, SymInt teacher_count, SymInt vocab, int ignore_index)"
    " -> (Tensor labels, Tensor token_weights, Tensor teacher_rows)",
    _place,
    None,
    _place_fake,
)


def _refuse_outside(name: str, rows: Tensor | None, count: int) -> None:
    if rows is None:
        return
    bad = (rows < 0) | (rows >= count)
    if bool(bad.any()):
        at = int(bad.to(torch.uint8).argmax())
        raise IndexError(f"{name}: {int(rows[at])} at {at} is outside [0, {count})")


def _refuse_student_rows(student_rows: Tensor | None, rows: int) -> None:
    if student_rows is None:
        return
    _refuse_outside("student_rows", student_rows, rows)
    times = torch.bincount(student_rows, minlength=rows)
    if bool((times > 1).any()):
        row = int(times.argmax())
        first, second = (student_rows == row).nonzero()[:2, 0].tolist()
        raise IndexError(
            f"student_rows: {row} comes twice, at {first} and {second}; the gradients of both "
            "would have to add up"
        )
