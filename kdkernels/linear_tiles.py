"""Tiles of the linear loss: rows of both models' logits, and the gradients made of them.

A call is a :class:`LinearProblem`; :class:`_Sweep` cuts it into tiles, each of which is a
:class:`~kdkernels.problem.Problem` for any backend, and :class:`_Gradients` sums what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import entries, products
from .backends import BACKENDS
from .problem import Options, Problem, check_labels, loss_dtype, rows_that_count, sum_rows

#: The student's inputs, which have gradients, and the teacher's; in the order of the ops' schema.
STUDENT = ("student_hidden", "student_weight", "student_bias", "student_logits")
TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logits")


class _Head(NamedTuple):
    """A model's output layer and what goes into it: logits = hidden @ weight^T + bias."""

    hidden: Tensor  # [rows, H]
    weight: Tensor  # [vocab, H]
    bias: Tensor | None  # [vocab]
    picked: Tensor | None  # [rows of a tile, H]: memory for those of rows given by index
    widened: Tensor | None  # [rows of a tile, H]: memory for them in the products' dtype

    def states(self, rows: Tensor | slice) -> Tensor:
        """The rows' hidden states in the products' dtype."""
        if isinstance(rows, slice):
            hidden = self.hidden[rows]
        else:
            assert self.picked is not None
            hidden = torch.index_select(self.hidden, 0, rows, out=self.picked[: rows.numel()])
        return hidden if self.widened is None else self.widened[: hidden.shape[0]].copy_(hidden)

    def tile(self, rows: Tensor | slice, memory: Tensor) -> Tensor:
        """The rows' logits in the dtype of ``memory`` [>= rows, vocab]: never rounded to less."""
        hidden = self.states(rows)
        out = memory[: hidden.shape[0]]
        products.project(hidden, self.weight, out)
        return out if self.bias is None else out.add_(self.bias)


class _Given(NamedTuple):
    """Logits that exist: [..., vocab] with one leading dimension at least, any strides."""

    logits: Tensor

    def copies(self, rows: Tensor | slice) -> bool:
        """Whether a tile is memory of its own: a slice of a matrix is a view."""
        return not (isinstance(rows, slice) and self.logits.ndim == 2)

    def tile(self, rows: Tensor | slice, memory: Tensor) -> Tensor:
        """The rows as they are."""
        if not self.copies(rows):
            return self.logits[rows]
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.logits.device)
        # torch.unravel_index waits for the device: it copies the shape there.
        places: list[Tensor] = []
        for size in reversed(self.logits.shape[:-1]):
            places.insert(0, rows % size)
            rows = rows // size
        return self.logits[tuple(places)]


#: A model's hidden states, weight and bias, or else its logits.
_Source = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class LinearProblem(NamedTuple):
    """One call: the leading arguments of both ops.

    With ``teacher_ids`` [..., K] the teacher's logits are log-probabilities [..., K], both as
    :class:`~kdkernels.problem.Problem` has them.
    """

    student_hidden: Tensor | None
    student_weight: Tensor | None
    student_bias: Tensor | None
    student_logits: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None
    labels: Tensor | None
    token_weights: Tensor | None
    num_items: Tensor | None
    teacher_ids: Tensor | None
    options: Options

    @property
    def student(self) -> _Source:
        return self.student_hidden, self.student_weight, self.student_bias, self.student_logits

    @property
    def teacher(self) -> _Source:
        return self.teacher_hidden, self.teacher_weight, self.teacher_bias, self.teacher_logits

    @property
    def student_input(self) -> Tensor:
        tensor = self.student_logits if self.student_hidden is None else self.student_hidden
        assert tensor is not None
        return tensor

    @property
    def leading_shape(self) -> torch.Size:
        return self.student_input.shape[:-1]

    @property
    def vocab(self) -> int:
        if self.teacher_ids is not None:
            return _vocab(self.student)
        return min(_vocab(self.student), _vocab(self.teacher))

    @property
    def logits_dtype(self) -> torch.dtype:
        """Of a tile that is computed here."""
        return loss_dtype(self.student_input)


def _vocab(source: _Source) -> int:
    _, weight, _, logits = source
    if logits is not None:
        return logits.shape[-1]
    assert weight is not None
    return weight.shape[0]


def _logits_of(
    problem: LinearProblem, source: _Source, tile: int, by_index: bool
) -> _Head | _Given:
    """The common vocabulary's part of a model's logits, with memory for ``tile`` rows."""
    hidden, weight, bias, logits = source
    if logits is not None:
        return _Given(torch.atleast_2d(logits)[..., : problem.vocab])
    assert hidden is not None and weight is not None
    # Not -1: of no elements it could be anything.
    hidden = hidden.reshape(problem.leading_shape.numel(), hidden.shape[-1])
    dtype = products.factor_dtype(hidden, weight, problem.logits_dtype)
    shape = (tile, hidden.shape[-1])
    return _Head(
        hidden,
        weight[: problem.vocab],
        None if bias is None else bias[: problem.vocab],
        hidden.new_empty(shape) if by_index else None,
        None if hidden.dtype == dtype else hidden.new_empty(shape, dtype=dtype),
    )


def _entries_of(problem: LinearProblem) -> tuple[_Given, _Given]:
    """Log-probabilities and ids of a sparse teacher: contiguous, so that a tile of them is."""
    assert problem.teacher_logits is not None and problem.teacher_ids is not None
    log_probs, ids = (
        _Given(torch.atleast_2d(one).flatten(0, -2))
        for one in (problem.teacher_logits, problem.teacher_ids)
    )
    return log_probs, ids


def _is_rounded(problem: LinearProblem) -> bool:
    """Whether the student's tiles of gradients are rounded before their products."""
    hidden, weight, *_ = problem.student
    if hidden is None or weight is None:
        return False
    return products.rounds(hidden, weight, problem.logits_dtype)


def gradient_dtype(problem: LinearProblem, name: str, max_chunk_bytes: int) -> torch.dtype:
    """Of the gradient of one of the student's inputs, as the ops return it.

    That of the logits' math, unless each entry is one product's, which rounds it like a cast would.
    """
    if name == "student_logits":
        return problem.student_input.dtype
    if name != "student_bias" and _is_rounded(problem):
        most = _most_rows(problem, _orders(problem, max_chunk_bytes), max_chunk_bytes)
        if name == "student_hidden" or problem.leading_shape.numel() <= most:
            return problem.student_input.dtype
    return problem.logits_dtype


class _Gradients:
    """Gradients of the student's inputs, summed over tiles in the math dtype; None: not wanted.

    Tiles share what memory they need: glibc's heap grows with every aligned block that is freed
    and taken again (by 0.4 chunk budgets over 65536 tokens of 50k logits).
    """

    def __init__(self, sweep: _Sweep, wanted: Sequence[bool]) -> None:
        problem = sweep.problem
        self.vocab, self.dead = problem.vocab, sweep.dead
        self.hidden, self.weight, self.bias, self.logits = (
            torch.empty(
                tensor.shape,
                dtype=gradient_dtype(problem, name, sweep.max_chunk_bytes),
                device=tensor.device,
            )
            if tensor is not None and want
            else None
            for name, tensor, want in zip(STUDENT, problem.student, wanted, strict=True)
        )
        # What no tile writes, and what every tile adds to.
        if self.weight is not None:
            self.weight[self.vocab if sweep.total else 0 :].zero_()
        if self.hidden is not None and sweep.counted is not None:
            if sweep.count is None:
                self.hidden.zero_()
            self.picked = self.hidden.new_empty((sweep.step, self.hidden.shape[-1]))
        for gradient in (self.bias, self.logits):
            if gradient is not None:
                gradient.zero_()
        self.rounded = None
        if _is_rounded(problem) and not (self.hidden is None and self.weight is None):
            self.rounded = sweep.half_tile()
        self.first = True

    def add(
        self, source: _Head | _Given, rows: Tensor | slice, tile: Tensor, count: Tensor | None
    ) -> None:
        """Propagate the gradient of a tile of logits, of which the first ``count`` rows count."""
        if isinstance(source, _Given):
            assert self.logits is not None
            torch.atleast_2d(self.logits).flatten(0, -2)[rows, : self.vocab] = tile
            return
        by_row = None if self.hidden is None else self.hidden.view(source.hidden.shape)
        to_weight = None if self.weight is None else self.weight[: self.vocab]
        if by_row is None:
            to_hidden = None
        elif isinstance(rows, slice):
            to_hidden = by_row[rows]
        else:
            to_hidden = self.picked[: rows.numel()]
        states = source.states(rows)
        dead = None if self.dead is None else self.dead[rows]
        if dead is not None and to_weight is not None:
            states = states.masked_fill(dead, 0)  # 0 times NaN is NaN
        products.propagate(
            tile,
            states,
            source.weight,
            to_hidden,
            to_weight,
            add=not self.first,
            rounded=None if self.rounded is None else self.rounded[: tile.shape[0]],
            count=count,
        )
        if by_row is not None and to_hidden is not None and isinstance(rows, Tensor):
            if dead is not None:
                to_hidden.masked_fill_(dead, 0)
            by_row.index_copy_(0, rows, to_hidden)
        if self.bias is not None:
            self.bias[: self.vocab] += tile.sum(0)
        self.first = False

    def tensors(self, like: Tensor) -> tuple[Tensor, ...]:
        """The four gradients; an empty tensor for one that is not there."""
        four = (self.hidden, self.weight, self.bias, self.logits)
        return tuple(like.new_empty((0,)) if one is None else one for one in four)


def _waits(device: torch.device) -> bool:
    """Whether looking at a number there makes the host wait for a device."""
    return device.type != "cpu"


def _orders(problem: LinearProblem, max_chunk_bytes: int) -> bool:
    """Whether rows that count are brought together, where only a device knows their number."""
    hidden, weight, *_ = problem.student
    if hidden is None or weight is None or problem.labels is None or not _waits(hidden.device):
        return False
    if problem.leading_shape.numel() > _most_rows(problem, True, max_chunk_bytes):
        return False
    return products.ragged(hidden, weight, problem.logits_dtype)


def _with_denominator(problem: LinearProblem) -> LinearProblem:
    """The problem with the denominator of "mean" fixed: a tile cannot count the others' rows."""
    options = problem.options
    if options.reduction != "mean" or options.denominator or problem.num_items is not None:
        return problem
    if problem.labels is None:
        count: int | Tensor = problem.leading_shape.numel()
    else:
        count = (problem.labels != options.ignore_index).sum()
        if _waits(count.device):
            return problem._replace(num_items=count.clamp(min=1).to(problem.logits_dtype))
    return problem._replace(options=options._replace(denominator=float(max(int(count), 1))))


def _row_bytes(problem: LinearProblem, by_index: bool) -> int:
    """What a tile takes a row: logits and copies of hidden states.

    Two of logits, whatever is given: of given ones the rows that count are copied, or the gradient
    needs memory. One beside a sparse teacher, whose rows that count are copied.
    """
    wide = problem.logits_dtype.itemsize
    size = 2 * problem.vocab * wide
    if problem.teacher_ids is not None and problem.teacher_logits is not None:
        entry = problem.teacher_ids.itemsize + problem.teacher_logits.itemsize
        size = problem.vocab * wide + by_index * problem.teacher_ids.shape[-1] * entry
    for hidden, weight, *_ in (problem.student, problem.teacher):
        if hidden is not None and weight is not None:
            factor = products.factor_dtype(hidden, weight, problem.logits_dtype)
            widened = 0 if hidden.dtype == factor else factor.itemsize
            size += hidden.shape[-1] * (by_index * hidden.itemsize + widened)
    if problem.student_hidden is not None:
        # Their gradient, or them without the rows that do not count.
        columns, narrow = problem.student_hidden.shape[-1], problem.student_hidden.itemsize
        masked = problem.labels is not None or problem.token_weights is not None
        if by_index:
            size += columns * wide
        elif masked and _waits(problem.student_hidden.device):
            size += columns * narrow
        if _is_rounded(problem) and problem.teacher_hidden is None:
            size += problem.vocab * narrow
    return size


def _most_rows(problem: LinearProblem, by_index: bool, max_chunk_bytes: int) -> int:
    """How many rows a tile may have."""
    return max(1, max_chunk_bytes // _row_bytes(problem, by_index))


class _Sweep:
    """The tiles of one call: which rows, and each tile's logits in memory that all share."""

    def __init__(self, problem: LinearProblem, max_chunk_bytes: int) -> None:
        self.problem, self.max_chunk_bytes = _with_denominator(problem), max_chunk_bytes
        device, rows = problem.student_input.device, problem.leading_shape.numel()
        #: Indices of the rows to read; None: all as they are. On the CPU, where knowing their
        #: number costs no synchronisation with a device, of those alone that count.
        self.counted: Tensor | None = None
        #: Bool [rows, 1]: rows read that do not count; None: none.
        self.dead: Tensor | None = None
        #: int64 []: how many of ``counted`` count, the first ones; None: all.
        self.count: Tensor | None = None
        alive = rows_that_count(problem)
        if alive is not None and _waits(device):
            self.dead = ~alive.unsqueeze(-1)
            if problem.labels is not None and problem.token_weights is not None:
                # Rows of no weight are ignored like the others: not read, and not in the outputs.
                ignored = problem.labels.masked_fill(
                    self.dead.view(problem.labels.shape), problem.options.ignore_index
                )
                self.problem = self.problem._replace(labels=ignored)
            if _orders(problem, max_chunk_bytes):
                self.counted = self.dead.view(-1).to(torch.uint8).argsort(stable=True)
                self.count = alive.sum()
        elif alive is not None and not bool(alive.all()):
            self.counted = alive.nonzero().squeeze(-1)
        by_index = self.counted is not None
        self.total = rows if self.counted is None else self.counted.numel()
        most = _most_rows(problem, by_index, max_chunk_bytes)
        tiles = max(1, math.ceil(self.total / most))
        self.step = max(1, math.ceil(self.total / tiles))  # tiles of one size: a short one is slow
        self.student = _logits_of(problem, problem.student, self.step, by_index)
        self.teacher: _Head | _Given
        self.ids: _Given | None = None
        if problem.teacher_ids is None:
            self.teacher = _logits_of(problem, problem.teacher, self.step, by_index)
        else:
            self.teacher, self.ids = _entries_of(problem)
        heads = isinstance(self.student, _Head) + isinstance(self.teacher, _Head)
        # Freed with the call: keeping it for the next one would save 1.3 %, and raise the peak of
        # what else a training step does.
        shape = (heads, self.step, problem.vocab)
        self.memory = torch.empty(shape, dtype=problem.logits_dtype, device=device)

    def __iter__(self) -> Iterator[tuple[Tensor | slice, Problem, Tensor | None]]:
        """Each tile's rows (of the flattened leading shape), its problem, and its rows that count:
        their number, as grouped products take it."""
        for start in range(0, self.total, self.step):
            stop = min(start + self.step, self.total)
            rows = slice(start, stop) if self.counted is None else self.counted[start:stop]
            count = None
            if self.count is not None:
                # One at least, whose gradient is 0 if it does not count: of no rows the weight's
                # gradient could be left undefined.
                count = (self.count - start).clamp(1, stop - start).to(torch.int32).view(1)
            yield (
                rows,
                Problem(
                    self.student.tile(rows, self.memory[0]),
                    self.teacher.tile(rows, self.memory[-1]),
                    _picked(self.problem.labels, rows),
                    _picked(self.problem.token_weights, rows),
                    self.problem.num_items,
                    self.problem.options,
                    None if self.ids is None else self.ids.tile(rows, self.memory),
                ),
                count,
            )

    def half_tile(self) -> Tensor:
        """Memory for a tile in the student's dtype, which lives while its gradient is propagated.

        Its rows start at multiples of 16 bytes: matrix products of others are slow. It is the
        teacher's tile, whose logits have been read then, if there is one and it is large enough.
        """
        dtype, vocab = self.problem.student_input.dtype, self.problem.vocab
        stride = -(-vocab // 64) * 64
        needed = self.step * stride
        memory = self.memory[-1].flatten().view(dtype)
        start = -memory.storage_offset() % 64
        if len(self.memory) < 2 or memory.numel() - start < needed:
            memory, start = memory.new_empty((needed,)), 0
        return memory[start : start + needed].view(self.step, stride)[:, :vocab]

    def own_memory(self, rows: Tensor | slice, tile: Problem) -> Tensor | None:
        """The tile's student logits if they are ours to be overwritten by their gradient."""
        if isinstance(self.student, _Given) and not self.student.copies(rows):
            return None
        return tile.student


def _picked(tensor: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)[rows]


def _check(problem: LinearProblem, extras: bool) -> None:
    """IndexError or ValueError for bad labels or entries, by their row in the call."""
    check_labels(problem)
    log_probs, ids = problem.teacher_logits, problem.teacher_ids
    if ids is None or log_probs is None:
        return
    student = log_probs.new_empty((1,)).expand(*problem.leading_shape, problem.vocab)
    labels, weights = problem.labels, problem.token_weights
    entries.check(Problem(student, log_probs, labels, weights, None, problem.options, ids), extras)


def run_forward(
    problem: LinearProblem,
    backend: str,
    max_chunk_bytes: int,
    wanted: Sequence[bool],
    extras: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Loss, statistics and the wanted gradients of the student's inputs."""
    _check(problem, extras)
    dtype, device, shape = problem.logits_dtype, problem.student_input.device, problem.leading_shape
    sweep = _Sweep(problem, max_chunk_bytes)
    gradients = _Gradients(sweep, wanted)
    height = BACKENDS[backend].statistics_rows
    statistics = torch.zeros((height, shape.numel()), dtype=dtype, device=device)
    per_row = problem.options.reduction == "none"
    losses = torch.zeros(shape.numel() if per_row else 0, dtype=dtype, device=device)
    sums = []
    for rows, tile, count in sweep:
        result = BACKENDS[backend].forward(
            tile,
            want_gradient=any(wanted),
            extras=extras,
            gradient_out=sweep.own_memory(rows, tile) if any(wanted) else None,
        )
        statistics[:, rows] = result.statistics
        if per_row:
            losses[rows] = result.loss
        else:
            sums.append(result.loss)
        if result.gradient is not None:
            gradients.add(sweep.student, rows, result.gradient, count)
    loss = losses.reshape(shape) if per_row else sum_rows(torch.stack(sums) if sums else losses)
    return loss, statistics.reshape(height, *shape), gradients.tensors(loss)


def run_backward(
    problem: LinearProblem,
    backend: str,
    max_chunk_bytes: int,
    wanted: Sequence[bool],
    statistics: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, ...]:
    """The wanted gradients, recomputed from the inputs, times grad_output."""
    sweep = _Sweep(problem, max_chunk_bytes)
    gradients = _Gradients(sweep, wanted)
    # Not -1: with no rows it could be anything.
    total = problem.leading_shape.numel()
    statistics = statistics.reshape(BACKENDS[backend].statistics_rows, total)
    per_row = problem.options.reduction == "none"
    for rows, tile, count in sweep:
        gradient = BACKENDS[backend].backward(
            tile,
            statistics[:, rows],
            grad_output.reshape(-1)[rows] if per_row else grad_output,
            gradient_out=sweep.own_memory(rows, tile),
        )
        gradients.add(sweep.student, rows, gradient, count)
    return gradients.tensors(statistics)
