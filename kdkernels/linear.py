"""Fused linear distillation: from hidden states to the loss, the logits only in small tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops, products
from .backends import BACKENDS
from .functional import Call, KDLossOutput, finish, fused_kd_loss, prepare
from .problem import (
    LOGIT_DTYPES,
    Options,
    Problem,
    check_labels,
    loss_dtype,
    sum_rows,
)

#: Default memory for tiles of logits on a CPU. Two tiles in float32 are alive: the student's, whose
#: memory its gradient takes over, and the teacher's. Smaller ones read and write the weight's
#: gradient more often: with 32, 64, 128, 512 and 1024 MiB the CPU time is 1.37, 1.15, 1.06, 1.06
#: and 1.01 times that of 256 (1024 tokens, H = 512, V = 50257, float32; Zen 3, two threads;
#: interleaved, medians of 7 ratios on a busy machine; the last two make the same single tile, so
#: they differ by the error). ``python -m benchmarks --workloads linear_chunk`` measures it again.
MAX_CHUNK_BYTES = 256 << 20

#: The part of a GPU's memory that tiles of logits take by default: 4.4 GiB of an H200's, 2.5 GiB
#: of an 80 GB H100's. Where that holds all rows in one tile, the weight's gradient is one product,
#: and needs no float32 sum of its size. Milliseconds beyond the products' 25.9 on an H200, from the
#: bytes that each step moves at 4.3 TB/s (4096 tokens, H = 4096, V = 128256, bfloat16: the float32
#: tiles of all rows are 2.1 GB each, the weight's float32 gradient is another 2.1 GB):
#:
#: ==================================================  ====  ====  ====  ====
#: tiles                                                  1     2     4    16
#: ==================================================  ====  ====  ====  ====
#: logits written in float32 instead of bfloat16        0.5   0.5   0.5   0.5
#: loss and gradient (measured; the bytes take 1.5)     2.7   2.7   2.7   2.7
#: gradient rounded to bfloat16: 3.2 GB                 0.7   0.7   0.7   0.7
#: weight's gradient added to: 4.2 GB a further tile      0   1.0   2.9  14.7
#: weight's gradient rounded: 3.2 GB                      0   0.7   0.7   0.7
#: sum                                                  3.9   5.6   7.5  19.3
#: measured when it was zeroed and added to in pieces   8.8        15.1  49.6
#: ==================================================  ====  ====  ====  ====
#:
#: Tiles in bfloat16 would take 1.5 in place of the first three lines. There are none: rounded
#: logits cost other fused losses 4 to 23 % of the gradient where the loss looks right
#: (Liger-Kernel#1432), and this function is held to float32's accuracy.
GPU_MEMORY_SHARE = 1 / 32

#: The student's inputs, which have gradients, and the teacher's; in the order of the ops' schema.
_STUDENT = ("student_hidden", "student_weight", "student_bias", "student_logits")
_TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logits")


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
    """Logits that exist: [..., vocab], any strides."""

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
        return self.logits[torch.unravel_index(rows, self.logits.shape[:-1])]


#: A model's hidden states, weight and bias, or else its logits.
_Source = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _LinearProblem(NamedTuple):
    """One call: the leading arguments of both ops."""

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
    problem: _LinearProblem, source: _Source, tile: int, by_index: bool
) -> _Head | _Given:
    """The common vocabulary's part of a model's logits, with memory for ``tile`` rows."""
    hidden, weight, bias, logits = source
    if logits is not None:
        return _Given(logits[..., : problem.vocab])
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


def _is_rounded(problem: _LinearProblem) -> bool:
    """Whether the student's tiles of gradients are rounded before their products."""
    hidden, weight, *_ = problem.student
    if hidden is None or weight is None:
        return False
    return products.rounds(hidden, weight, problem.logits_dtype)


def _gradient_dtype(problem: _LinearProblem, name: str, max_chunk_bytes: int) -> torch.dtype:
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
                dtype=_gradient_dtype(problem, name, sweep.max_chunk_bytes),
                device=tensor.device,
            )
            if tensor is not None and want
            else None
            for name, tensor, want in zip(_STUDENT, problem.student, wanted, strict=True)
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
            self.logits.flatten(0, -2)[rows, : self.vocab] = tile
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


def _alive(problem: _LinearProblem) -> Tensor | None:
    """Bool [rows]: which rows count and have a weight; None: all of them, without a look."""
    alive = None
    if problem.labels is not None:
        alive = problem.labels.reshape(-1) != problem.options.ignore_index
    if problem.token_weights is not None:
        weighs = problem.token_weights.reshape(-1) != 0
        alive = weighs if alive is None else alive & weighs
    return alive


def _orders(problem: _LinearProblem, max_chunk_bytes: int) -> bool:
    """Whether rows that count are brought together, where only a device knows their number."""
    hidden, weight, *_ = problem.student
    if hidden is None or weight is None or problem.labels is None or not _waits(hidden.device):
        return False
    if problem.leading_shape.numel() > _most_rows(problem, True, max_chunk_bytes):
        return False
    return products.ragged(hidden, weight, problem.logits_dtype)


def _with_denominator(problem: _LinearProblem) -> _LinearProblem:
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


def _row_bytes(problem: _LinearProblem, by_index: bool) -> int:
    """What a tile takes a row: logits and copies of hidden states.

    Two of logits, whatever is given: of given ones the rows that count are copied, or the gradient
    needs memory.
    """
    wide = problem.logits_dtype.itemsize
    size = 2 * problem.vocab * wide
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


def _most_rows(problem: _LinearProblem, by_index: bool, max_chunk_bytes: int) -> int:
    """How many rows a tile may have."""
    return max(1, max_chunk_bytes // _row_bytes(problem, by_index))


class _Sweep:
    """The tiles of one call: which rows, and each tile's logits in memory that all share."""

    def __init__(self, problem: _LinearProblem, max_chunk_bytes: int) -> None:
        self.problem, self.max_chunk_bytes = _with_denominator(problem), max_chunk_bytes
        device, rows = problem.student_input.device, problem.leading_shape.numel()
        #: Indices of the rows to read; None: all as they are. On the CPU, where knowing their
        #: number costs no synchronisation with a device, of those alone that count.
        self.counted: Tensor | None = None
        #: Bool [rows, 1]: rows read that do not count; None: none.
        self.dead: Tensor | None = None
        #: int64 []: how many of ``counted`` count, the first ones; None: all.
        self.count: Tensor | None = None
        alive = _alive(problem)
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
        self.teacher = _logits_of(problem, problem.teacher, self.step, by_index)
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


def _run_forward(
    problem: _LinearProblem,
    backend: str,
    max_chunk_bytes: int,
    wanted: Sequence[bool],
    extras: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Loss, statistics and the wanted gradients of the student's inputs."""
    check_labels(problem)
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


def _run_backward(
    problem: _LinearProblem,
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
    for rows, tile, count in sweep:
        gradient = BACKENDS[backend].backward(
            tile,
            statistics[:, rows],
            grad_output if grad_output.ndim == 0 else grad_output.reshape(-1)[rows],
            gradient_out=sweep.own_memory(rows, tile),
        )
        gradients.add(sweep.student, rows, gradient, count)
    return gradients.tensors(statistics)


_TENSORS = len(_LinearProblem._fields) - 1
_OPTIONS_END = _TENSORS + len(Options._fields)
_LEADING_SCHEMA = (
    ", ".join(f"Tensor? {name}" for name in _LinearProblem._fields[:-1])
    + f", {ops.OPTIONS_SCHEMA}, str backend, int max_chunk_bytes, bool[] wanted"
)


def _unpack(arguments: Sequence[Any]) -> tuple[_LinearProblem, Sequence[Any]]:
    """The problem, and the arguments behind it."""
    options = Options(*arguments[_TENSORS:_OPTIONS_END])
    problem = _LinearProblem(*[*arguments[:_TENSORS], options])
    return problem, arguments[_OPTIONS_END:]


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (backend, max_chunk_bytes, wanted, extras) = _unpack(arguments)
    loss, statistics, four = _run_forward(problem, backend, max_chunk_bytes, wanted, extras)
    return loss, statistics, *four


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (backend, max_chunk_bytes, wanted, _) = _unpack(arguments)
    shape, like, dtype = problem.leading_shape, problem.student_input, problem.logits_dtype
    loss_shape = shape if problem.options.reduction == "none" else ()
    statistics = like.new_empty((BACKENDS[backend].statistics_rows, *shape), dtype=dtype)
    four = _fake_gradients(problem, max_chunk_bytes, wanted)
    return (like.new_empty(loss_shape, dtype=dtype), statistics, *four)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (backend, max_chunk_bytes, wanted, statistics, grad_output) = _unpack(arguments)
    return _run_backward(problem, backend, max_chunk_bytes, wanted, statistics, grad_output)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (_, max_chunk_bytes, wanted, *_) = _unpack(arguments)
    return _fake_gradients(problem, max_chunk_bytes, wanted)


def _fake_gradients(
    problem: _LinearProblem, max_chunk_bytes: int, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    like = problem.student_input
    return tuple(
        like.new_empty((0,), dtype=problem.logits_dtype)
        if tensor is None or not want
        else like.new_empty(tensor.shape, dtype=_gradient_dtype(problem, name, max_chunk_bytes))
        for name, tensor, want in zip(_STUDENT, problem.student, wanted, strict=True)
    )


class _LinearKdLoss(torch.autograd.Function):
    """Autograd of linear_kd_forward: the loss, in the student's four inputs."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        outputs = ops.below_autograd(_linear_kd_forward, keyset, arguments)
        _, statistics, *gradients = outputs
        wanted = arguments[_OPTIONS_END + 2]
        ctx.stored = any(wanted)
        ops.save(ctx, gradients if ctx.stored else [*arguments[:_TENSORS], statistics])
        ctx.scalars = arguments[_TENSORS : _OPTIONS_END + 2]
        ctx.wanted = [t is not None and t.requires_grad for t in arguments[:4]]
        ctx.dtypes = [None if t is None else t.dtype for t in arguments[:4]]
        ctx.inputs = len(arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * (1 + ctx.inputs)
        with torch.no_grad():
            tensors = ops.saved(ctx)
            if ctx.stored:
                four = [ops.scaled(g, grad_output, ctx.scalars[-2]) for g in tensors]
            else:
                *inputs, statistics = tensors
                four = _linear_kd_backward(
                    *inputs, *ctx.scalars, ctx.wanted, statistics, grad_output
                )
        results = (
            ops.refuse_second_derivative(gradient.to(dtype)) if want else None
            for gradient, dtype, want in zip(four, ctx.dtypes, ctx.wanted, strict=True)
        )
        return (None, *results, *(None,) * (ctx.inputs - 4))


def _forward_autograd(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    student = [tensor for tensor in arguments[:4] if tensor is not None]
    for tensor in student:
        ops.refuse_transforms(tensor)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in student):
        return _LinearKdLoss.apply(keyset, *arguments)
    return ops.below_autograd(_linear_kd_forward, keyset, arguments)


def _backward_autograd(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    ops.refuse_differentiation(arguments)
    return ops.below_autograd(_linear_kd_backward, keyset, arguments)


_GRADIENTS_SCHEMA = ", ".join(f"Tensor grad_{name}" for name in _STUDENT)
_linear_kd_forward = ops.define(
    "linear_kd_forward",
    f"({_LEADING_SCHEMA}, bool extras) -> (Tensor loss, Tensor statistics, {_GRADIENTS_SCHEMA})",
    _forward,
    _forward_autograd,
    _forward_fake,
)
_linear_kd_backward = ops.define(
    "linear_kd_backward",
    f"({_LEADING_SCHEMA}, Tensor statistics, Tensor grad_output) -> ({_GRADIENTS_SCHEMA})",
    _backward,
    _backward_autograd,
    _backward_fake,
)


def fused_linear_kd_loss(
    student_hidden: Tensor | None = None,
    student_weight: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    max_chunk_bytes: int | None = None,
    return_outputs: bool = False,
    **options: Any,
) -> Tensor | KDLossOutput:
    """:func:`kdkernels.fused_kd_loss` of two output layers, without their logits in memory.

    With ``student_logits = student_hidden @ student_weight.T + student_bias`` and the teacher's
    likewise, the result is that of ``fused_kd_loss(student_logits, teacher_logits, labels,
    **options)``, and the gradients of student hidden states, weight and bias are computed with the
    loss, tile by tile of rows. Rows that do not count, by their label or a token weight of 0, reach
    no gradient, whatever their hidden states hold. On the CPU they are not even multiplied.

    Tiles of logits are float32 (float64 for float64 hidden states) whatever the inputs' dtypes, and
    the gradients are summed in that precision over the tiles and rounded once. Where bfloat16
    products are native (:mod:`kdkernels.products`), a tile's gradient is rounded to it before its
    products, if hidden states and weight are bfloat16.

    Args:
        student_hidden, teacher_hidden: [..., H_s] and [..., H_t], any floating dtype; H may differ.
        student_weight, teacher_weight: [V, H_s] and [V, H_t]. A DTensor (FSDP2) is gathered once a
            call, and its gradient is the mean over the processes of its mesh, scattered back, as
            FSDP2 itself reduces: every process of the mesh has to call this function, and its
            backward. A weight that ZeRO-3 has partitioned needs
            ``deepspeed.zero.GatheredParameters`` around the call. Tied embeddings are an ordinary
            case: autograd sums the gradients of both uses.
        labels: [...], as in ``fused_kd_loss``.
        student_bias, teacher_bias: [V], may hold -inf (entries of the vocabulary that are masked
            in both models).
        student_logits, teacher_logits: [..., V] instead of that model's hidden states and weight
            (logits cached from an earlier run, say). One model at least must have hidden states.
        max_chunk_bytes: memory of the tiles of logits and of copies of their rows' hidden states,
            > 0; half-precision weights need pieces in float32 beside it (16 MiB on a CPU; none
            where their products have float32 results). None: 256 MiB on a CPU, which hold 667 rows
            of a 50k vocabulary and 220 of a 152k one (more was not faster; 32 MiB took 1.37 times
            the CPU time), and a 32nd of a GPU's memory: a weight's gradient that needs several
            tiles is summed in float32, 4.2 GB of traffic each at [128256, 4096].
        return_outputs, options: as ``fused_kd_loss``. ``gradient="recompute"`` multiplies the heads
            again in the backward instead of storing gradients; reduction "none" needs it.

    Returns:
        As ``fused_kd_loss``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``fused_kd_loss``.
    """
    unknown = set(options) - set(fused_kd_loss.__kwdefaults__ or ())
    if unknown:
        raise TypeError(f"fused_linear_kd_loss has no option {', '.join(sorted(unknown))}")
    if max_chunk_bytes is not None and (type(max_chunk_bytes) is not int or max_chunk_bytes <= 0):
        raise ValueError(f"max_chunk_bytes: {max_chunk_bytes!r} is not an int > 0")
    student = (student_hidden, _gathered(student_weight), _gathered(student_bias), student_logits)
    teacher = (teacher_hidden, _gathered(teacher_weight), _gathered(teacher_bias), teacher_logits)
    _check_source(_STUDENT, student)
    _check_source(_TEACHER, teacher)
    if student_logits is not None and teacher_logits is not None:
        raise ValueError("student_logits, teacher_logits: both given; that is fused_kd_loss")
    call = _prepare(student, teacher, labels, options)
    if max_chunk_bytes is None:
        max_chunk_bytes = _default_chunk_bytes(call.problem.student.device)
    grad = torch.is_grad_enabled() and call.gradient == "forward"
    loss, statistics, *_ = _linear_kd_forward(
        *student,
        *(None if tensor is None else tensor.detach() for tensor in teacher),
        call.problem.labels,
        call.problem.token_weights,
        call.problem.num_items,
        *call.problem.options,
        call.backend,
        max_chunk_bytes,
        [grad and tensor is not None and tensor.requires_grad for tensor in student],
        return_outputs,
    )
    return finish(call, loss, statistics, return_outputs)


@torch.compiler.assume_constant_result
def _default_chunk_bytes(device: torch.device) -> int:
    """The default ``max_chunk_bytes``: it depends on the device alone, so that results do."""
    if device.type != "cuda":
        return MAX_CHUNK_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(MAX_CHUNK_BYTES, int(memory * GPU_MEMORY_SHARE))


class _Gather(torch.autograd.Function):
    """A DTensor as a whole. Its gradient is the mean over the mesh, placed as the DTensor is."""

    @staticmethod
    def forward(ctx: Any, sharded: Any) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        return sharded.full_tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        partial = [Partial()] * ctx.mesh.ndim
        summed = DTensor.from_local(gradient, ctx.mesh, partial, run_check=False)
        return summed.redistribute(placements=ctx.placements) / ctx.mesh.size()


def _is_dtensor(tensor: Any) -> bool:
    return type(tensor).__name__ == "DTensor"


def _gathered(tensor: Any) -> Any:
    """A sharded weight or bias as a whole; differentiable."""
    return _Gather.apply(tensor) if _is_dtensor(tensor) else tensor


def _check_source(names: Sequence[str], source: Sequence[Any]) -> None:
    """One model's inputs: either logits alone or hidden states with a weight and maybe a bias."""
    for name, tensor in zip(names, source, strict=True):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if _is_dtensor(tensor):
            raise TypeError(f"{name}: a DTensor; pass its full_tensor() or to_local()")
        if tensor is not None and tensor.dtype not in LOGIT_DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in LOGIT_DTYPES)
            raise TypeError(f"{name}: dtype {tensor.dtype} is not one of {allowed}")
        if tensor is not None and tensor.layout != torch.strided:
            raise TypeError(f"{name}: layout {tensor.layout} is not torch.strided")
    hidden, weight, bias, logits = source
    if logits is not None:
        if any(tensor is not None for tensor in source[:3]):
            raise ValueError(f"{names[3]}: given next to {names[0]}, {names[1]} or {names[2]}")
        return
    if hidden is None or weight is None:
        raise ValueError(f"{names[0]}, {names[1]}: both are needed unless {names[3]} is given")
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"{names[1]}: partitioned by DeepSpeed ZeRO-3; call within "
            "deepspeed.zero.GatheredParameters(weight)"
        )
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[1]}: shape {tuple(weight.shape)} is not [V, H] with H the last size of "
            f"{names[0]} {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]}: shape {tuple(bias.shape)} is not ({weight.shape[0]},)")
    for name, tensor in zip(names[1:3], (weight, bias), strict=True):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: device {tensor.device} differs from {hidden.device}")


def _prepare(
    student: Sequence[Any], teacher: Sequence[Any], labels: Tensor | None, options: dict[str, Any]
) -> Call:
    """Checks and backend of the equivalent ``fused_kd_loss``, whose logits are stand-ins."""
    options = {**(fused_kd_loss.__kwdefaults__ or {}), **options}
    if options["gradient"] == "auto" and options["reduction"] != "none":
        options["gradient"] = "forward"  # float16, too: it is stored in float32
    if options["gradient"] == "forward" and options["reduction"] == "none":
        raise ValueError(
            "gradient: 'forward' is impossible with reduction 'none': the gradient of a weight "
            "depends on every row's grad_output; 'recompute' is possible"
        )
    return prepare(_stand_in(student), _stand_in(teacher), labels, **options)


def _stand_in(source: Sequence[Any]) -> Tensor:
    """The model's logits, or a tensor of one element expanded to their shape."""
    hidden, weight, _, logits = source
    if logits is not None:
        return logits
    one = torch.empty((1,), dtype=loss_dtype(hidden), device=hidden.device)
    return one.expand(*hidden.shape[:-1], weight.shape[0])


class FusedLinearKDLoss(nn.Module):
    """:func:`kdkernels.fused_linear_kd_loss` with its options fixed at construction."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = {*(fused_kd_loss.__kwdefaults__ or ()), "max_chunk_bytes"}
        if unknown := set(options) - known:
            raise TypeError(f"FusedLinearKDLoss has no option {', '.join(sorted(unknown))}")
        self.options = options

    def forward(self, *inputs: Tensor | None, **per_batch: Any) -> Tensor | KDLossOutput:
        return fused_linear_kd_loss(*inputs, **{**self.options, **per_batch})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
