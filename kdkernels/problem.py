"""The contract that every backend receives: tensors and numbers, checked, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import divergences
from .divergences import Divergence

#: Rows of the statistics tensor, in order. Each row of logits leaves one column.
STATISTICS = (
    "loss",  # weighted, unreduced
    "kd",  # T^2 D, without alpha
    "ce",  # cross-entropy with label smoothing, without 1 - alpha
    "z",  # z_loss * label_lse^2
    "student_lse",  # log sum exp(z_s / T)
    "teacher_lse",  # log sum exp(z_t / T)
    "label_lse",  # log sum exp(z_s)
    "student_entropy",  # nats, at temperature T
    "teacher_entropy",
    "hits",  # 1 if the top entries agree, plus 2 if the student's is the label
)

#: Floating types of logits, and their codes in the native module.
LOGIT_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

REDUCTIONS = ("mean", "sum", "none")


class Options(NamedTuple):
    """The scalars of one call, in the order in which the ops' schema lists them."""

    temperature: float = 1.0
    temperature_squared: bool = True
    alpha: float = 1.0
    divergence: str = "forward_kl"  # the key of its class
    parameters: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    student_softcap: float = 0.0  # 0: none
    teacher_softcap: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    denominator: float = 0.0  # of "mean"; 0: the tensor num_items, else the rows that count
    tail: str = ""  # of a teacher that is a few entries; "": it is logits

    @property
    def kd_weight(self) -> float:
        """The factor of D in a row's loss."""
        return self.alpha * self.kd_scale

    @property
    def kd_scale(self) -> float:
        return self.temperature**2 if self.temperature_squared else 1.0

    @property
    def ce_weight(self) -> float:
        return 1.0 - self.alpha


class RowLayout(NamedTuple):
    """Rows of several tensors of shape [..., vocab] as an outer and an inner index.

    ``strides[i]`` are tensor i's element strides (outer row, inner row, column). ``offsets``: of a
    teacher whose rows are in another order, in elements, where each row's begins; sums of multiples
    of its strides.
    """

    outer: int
    inner: int
    tensors: tuple[Tensor, ...]
    strides: tuple[tuple[int, int, int], ...]
    offsets: Tensor | None = None


def row_layout(*tensors: Tensor, teacher_rows: Tensor | None = None) -> RowLayout:
    """Describe the rows of tensors with equal leading shapes by two strides, without a copy.

    Leading dimensions that no pair of strides can describe for every tensor (a permuted view of
    four dimensions, say) are the one case in which a tensor is made contiguous. With
    ``teacher_rows``, as of :class:`Problem`, the second tensor has leading dimensions of its own.
    """
    if teacher_rows is not None:
        student, teacher = tensors
        return _mapped_layout(student, teacher, teacher_rows)
    leading = tensors[0].shape[:-1]
    strides = [t.stride() for t in tensors]
    if len(leading) == 1:  # by far the commonest: spare it the general way
        return RowLayout(1, leading[0], tensors, tuple([(0, s[0], s[1]) for s in strides]))
    groups: list[tuple[int, tuple[int, ...]]] = []
    for axis, size in enumerate(leading):
        if size == 1:
            continue
        steps = tuple([s[axis] for s in strides])
        if groups and all(g == s * size for g, s in zip(groups[-1][1], steps, strict=True)):
            groups[-1] = (groups[-1][0] * size, steps)
        else:
            groups.append((size, steps))
    if len(groups) > 2:
        return row_layout(*(t.reshape(-1, t.shape[-1]) for t in tensors))
    groups = [(1, (0,) * len(tensors))] * (2 - len(groups)) + groups
    (outer, outer_steps), (inner, inner_steps) = groups
    columns = [s[-1] for s in strides]
    return RowLayout(
        outer, inner, tensors, tuple(zip(outer_steps, inner_steps, columns, strict=True))
    )


def _mapped_layout(student: Tensor, teacher: Tensor, teacher_rows: Tensor) -> RowLayout:
    own, other = row_layout(student), row_layout(teacher)
    outer, inner, _ = other.strides[0]
    offsets = teacher_rows * inner
    if other.outer > 1:
        within = teacher_rows % other.inner
        offsets = (teacher_rows - within) // other.inner * outer + within * inner
    return RowLayout(
        own.outer, own.inner, own.tensors + other.tensors, own.strides + other.strides, offsets
    )


@dataclass(frozen=True)
class Problem:
    """One call of the loss.

    Args:
        student, teacher: logits [..., V_s] and [..., V_t] with equal leading shapes, but for
            ``teacher_rows``; only the first ``vocab = min(V_s, V_t)`` entries take part. With
            ``teacher_ids`` the teacher is natural log-probabilities [..., K], contiguous, in
            ``entry_dtype``.
        labels: int64, contiguous, [...]; ``options.ignore_index`` marks rows that do not count.
            Also the mask of rows when no cross-entropy is wanted (``options.alpha == 1``).
        token_weights: float32, contiguous, [...]; None: all 1.
        num_items: one float element, the denominator of ``"mean"``; None: ``options.denominator``.
        teacher_ids: int64, contiguous, [..., K], of which entries; negative: of none. None: the
            teacher is dense.
        teacher_rows: int64, contiguous, in the student's leading shape: which of the teacher's
            rows, by its flat leading shape, each of the student's meets; one that there is also
            where a row does not count. None: the same one.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    token_weights: Tensor | None
    num_items: Tensor | None
    options: Options
    teacher_ids: Tensor | None = None
    teacher_rows: Tensor | None = None

    @property
    def leading_shape(self) -> torch.Size:
        return self.student.shape[:-1]

    @property
    def rows(self) -> int:
        return math.prod(self.leading_shape)

    @property
    def vocab(self) -> int:
        if self.teacher_ids is not None:
            return self.student.shape[-1]
        return min(self.student.shape[-1], self.teacher.shape[-1])

    @property
    def divergence(self) -> Divergence:
        return divergences.by_key(self.options.divergence, self.options.parameters)

    @property
    def math_dtype(self) -> torch.dtype:
        """float64 for a float64 student, else float32; also the dtype of loss and statistics."""
        return loss_dtype(self.student)


class MaskedRows(Protocol):
    """What says which rows of a problem count."""

    @property
    def labels(self) -> Tensor | None: ...
    @property
    def token_weights(self) -> Tensor | None: ...
    @property
    def vocab(self) -> int: ...
    @property
    def options(self) -> Options: ...


def contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself or a copy that is contiguous and of this dtype."""
    # Asking first is cheaper than calling ops that have nothing to do.
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def loss_dtype(student: Tensor) -> torch.dtype:
    """The dtype of the loss for this student."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def entry_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the few log-probabilities of a sparse teacher: 1 minus their sum is a number."""
    return torch.float32 if device.type == "mps" else torch.float64


def counted_rows(problem: MaskedRows) -> Tensor | None:
    """Bool [rows]: which rows' labels count, as the denominator of "mean" does; None: all."""
    if problem.labels is None:
        return None
    return problem.labels.reshape(-1) != problem.options.ignore_index


def rows_that_count(problem: MaskedRows) -> Tensor | None:
    """Bool [rows]: which rows have a label and a weight, so that they are read; None: all of them.

    One of weight 0 is no more than an ignored one, but for the denominator of "mean".
    """
    counted = counted_rows(problem)
    if problem.token_weights is None:
        return counted
    weighs = problem.token_weights.reshape(-1) != 0
    return weighs if counted is None else counted & weighs


def row_scale(problem: Problem) -> Tensor | float:
    """What multiplies each row's unweighted loss under the reduction: weight / denominator.

    A Python float or a tensor of zero or one dimensions. Rows that do not count get 0. A
    denominator of 0 (nothing counts) divides by 1, so that the loss is 0 and stays connected to the
    graph.
    """
    options = problem.options
    counted = counted_rows(problem)
    scale: Tensor | float = 1.0
    if options.reduction == "mean":
        if options.denominator:
            scale = 1.0 / options.denominator
        elif problem.num_items is not None:
            scale = 1.0 / torch.where(problem.num_items == 0, 1.0, problem.num_items)
        elif counted is not None:
            scale = 1.0 / counted.sum().clamp(min=1).to(problem.math_dtype)
        else:
            scale = 1.0 / max(problem.rows, 1)
    if problem.token_weights is not None:
        scale = scale * problem.token_weights.reshape(-1).to(problem.math_dtype)
    if counted is not None:
        # A tensor, since torch.where of two Python numbers would round to float32.
        zero = torch.zeros((), dtype=problem.math_dtype, device=problem.student.device)
        scale = torch.where(counted, scale, zero)
    return scale


def sum_rows(rows: Tensor) -> Tensor:
    """The sum of row losses, in float64 where the device has it, in the dtype of ``rows``."""
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    return rows.sum(dtype=wide).to(rows.dtype)


def check_labels(problem: MaskedRows) -> None:
    """IndexError for a label outside the vocabulary, where looking at labels costs no device sync.

    On other devices such a row is NaN.
    """
    if problem.labels is not None and problem.labels.is_cpu:
        check_label_values(problem.labels, problem.vocab, problem.options.ignore_index)


def check_label_values(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """The same of labels on a CPU."""
    flat = labels.reshape(-1)
    bad = ((flat < 0) | (flat >= vocab)) & (flat != ignore_index)
    if bool(bad.any()):
        raise label_error(labels, vocab, ignore_index, int(bad.to(torch.uint8).argmax()))


def label_error(labels: Tensor, vocab: int, ignore_index: int, row: int) -> IndexError:
    """The error for the label of this row, which is outside the vocabulary."""
    return IndexError(
        f"labels: {int(labels.reshape(-1)[row])} at row {row} is outside [0, {vocab}) "
        f"and is not ignore_index ({ignore_index})"
    )
