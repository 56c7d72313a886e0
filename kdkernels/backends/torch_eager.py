"""The portable backend: eager PyTorch on chunks of rows, on any device, in bounded memory.

It evaluates a divergence's Python ``value`` and ``slope``, so it runs every divergence, the user's
own included. Speed is not its point: it is what runs where no kernel does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import entries
from ..problem import (
    STATISTICS,
    Problem,
    RowLayout,
    check_labels,
    row_layout,
    row_scale,
    rows_that_count,
    sum_rows,
)
from ..reference import entropy, spoil, through_softmax, top_hits, transformed
from .base import Backend, Result, empty_gradient

#: Bytes of one [rows, vocab] temporary in the math dtype. About ten are alive at once: 16 MiB keeps
#: the working set near 160 MiB, while a chunk of a 128k vocabulary still has 32 rows.
CHUNK_BYTES = 16 << 20


class TorchBackend(Backend):
    name = "torch"

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
        if gradient_out is None and want_gradient:
            gradient_out = empty_gradient(problem.student)
        return _run(problem, gradient_out, extras, grad_output)

    def backward(
        self,
        problem: Problem,
        statistics: Tensor,
        grad_output: Tensor,
        *,
        gradient_out: Tensor | None = None,
    ) -> Tensor:
        gradient = empty_gradient(problem.student) if gradient_out is None else gradient_out
        _run(problem, gradient, False, grad_output)
        return gradient


class _Teacher:
    """The teacher's logits or entries, chunk by chunk of the student's rows."""

    def __init__(self, problem: Problem, layout: RowLayout) -> None:
        """``layout``: of both models' rows, or with ``teacher_rows`` of the student's."""
        self.rows: Tensor | None = None
        if problem.teacher_rows is not None:
            self.rows = problem.teacher_rows.reshape(layout.outer, layout.inner)
            layout = row_layout(problem.teacher)
        grid, teacher = (layout.outer, layout.inner), layout.tensors[-1]
        self.inner = layout.inner
        self.logits = teacher.as_strided((*grid, teacher.shape[-1]), layout.strides[-1])
        self.ids: Tensor | None = None
        if problem.teacher_ids is None:
            self.logits = self.logits[..., : problem.vocab]
        else:
            self.ids = problem.teacher_ids.reshape(*grid, teacher.shape[-1])

    def at(self, chunk: tuple[slice, slice]) -> tuple[Tensor, Tensor | None]:
        """Logits, or log-probabilities and their ids; copies where the rows are mapped."""
        place: tuple[slice | Tensor, ...] = chunk
        if self.rows is not None:
            rows = self.rows[chunk]
            place = (rows // self.inner, rows % self.inner)
        return self.logits[place], None if self.ids is None else self.ids[place]


class _Chunk:
    """A few rows in the math dtype; those that do not count are zeroed before any arithmetic."""

    def __init__(
        self,
        problem: Problem,
        student: Tensor,
        teacher: Tensor,
        ids: Tensor | None,
        labels: Tensor | None,
        alive: Tensor,
    ) -> None:
        options, dtype = problem.options, problem.math_dtype
        self.options, self.divergence = options, problem.divergence
        self.alive = alive.unsqueeze(-1)
        self.labels, sound = None, alive
        if labels is not None:
            sound = alive & (labels >= 0) & (labels < problem.vocab)
            self.labels = torch.where(sound, labels, 0)
        # NaN for a label that is none, where nothing could be raised for it.
        filling = torch.zeros_like(alive, dtype=dtype).masked_fill(alive, math.nan).unsqueeze(-1)
        # Contiguous: how torch sums a row depends on the strides that it lies in.
        student = torch.where(sound.unsqueeze(-1), student.to(dtype), filling).contiguous()
        self.student = transformed(student, options.student_scale, options.student_softcap)
        self.log_q, self.student_lse = log_softmax(self.student / options.temperature)
        self.label_lse = torch.logsumexp(self.student, -1)
        self.found: entries.Compared | None = None
        if ids is None:
            self._read_logits(torch.where(self.alive, teacher.to(dtype), 0.0).contiguous())
        else:
            self._read_entries(teacher, torch.where(self.alive, ids, -1))
        # A row that is all -inf or holds NaN or +inf has no distribution.
        self.broken = ~(self.student_lse.isfinite() & self.teacher_lse.isfinite())

    def _read_logits(self, teacher: Tensor) -> None:
        options = self.options
        # Of the logits: of logarithms of probabilities more are equal, once rounded.
        teacher = transformed(teacher, options.teacher_scale, options.teacher_softcap)
        self.teacher_top = teacher.argmax(-1)
        self.log_p, self.teacher_lse = log_softmax(teacher / options.temperature)
        self.compared_log_q = self.log_q

    def _read_entries(self, log_probs: Tensor, ids: Tensor) -> None:
        tail = self.options.tail
        found = entries.read(log_probs, ids, self.log_q.shape[-1], tail)
        self.teacher_top = entries.likeliest(found)
        self.teacher_lse = found.lse.to(self.log_q.dtype)
        self.found = entries.compared(found, self.log_q, tail)
        self.log_p, self.compared_log_q = self.found.log_p, self.found.log_q

    def _divergence(self) -> Tensor:
        """Per row, in the math dtype."""
        value = self.divergence.value(self.log_p, self.compared_log_q)
        if self.found is not None:
            value = torch.where(self.found.exists, value, 0.0)
        kd = value.sum(-1)
        if self.divergence.nonnegative and self.options.tail != "none":
            kd = kd.clamp(min=0)
        return torch.where(self.broken, math.nan, kd).to(self.log_q.dtype)

    def _divergence_gradient(self) -> Tensor:
        """In the logits over the temperature."""
        slope = self.divergence.slope(self.log_p, self.compared_log_q)
        if self.found is None:
            gradient = through_softmax(slope, self.log_q)
        else:
            there, log_q = self.found.exists, self.compared_log_q
            slope, log_q = slope.masked_fill(~there, 0.0), log_q.masked_fill(~there, -math.inf)
            gradient = self.found.in_columns(through_softmax(slope, log_q), self.log_q)
        return torch.where(self.broken.unsqueeze(-1), math.nan, gradient)

    def _teacher_entropy(self) -> Tensor:
        if self.found is None:
            return entropy(self.log_p)
        return entries.entropy(self.found.entries, self.options.tail).to(self.log_q.dtype)

    def losses(self, extras: bool) -> dict[str, Tensor]:
        """Unweighted losses and statistics by name, each of the chunk's leading shape."""
        options = self.options
        out = {
            "student_lse": self.student_lse,
            "teacher_lse": self.teacher_lse,
            "label_lse": self.label_lse,
            "z": torch.zeros_like(self.label_lse),
        }
        loss = torch.zeros_like(self.label_lse)
        if options.alpha != 0 or extras:
            out["kd"] = self._divergence() * options.kd_scale
            loss = loss + options.alpha * out["kd"] if options.alpha else loss
        if self.labels is not None and (options.alpha != 1 or extras):
            out["ce"] = self._cross_entropy(self.labels)
            loss = loss + options.ce_weight * out["ce"] if options.alpha != 1 else loss
        if options.z_loss:
            out["z"] = options.z_loss * self.label_lse**2
            loss = loss + out["z"]
        out["loss"] = loss
        if extras:
            out["student_entropy"] = entropy(self.log_q)
            out["teacher_entropy"] = self._teacher_entropy()
            out["hits"] = top_hits(self.student, self.teacher_top, self.labels)
        out = spoil(out, options.alpha)
        alive = self.alive.squeeze(-1)
        return {name: torch.where(alive, part, 0.0) for name, part in out.items()}

    def _cross_entropy(self, labels: Tensor) -> Tensor:
        smoothing = self.options.label_smoothing
        of_label = self.student.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        ce = self.label_lse - of_label
        if smoothing:
            hard = (1 - smoothing) * ce if smoothing != 1 else 0.0  # which 0 * inf is not
            ce = hard + smoothing * (self.label_lse - self.student.mean(-1))
        return torch.where(self.label_lse.isfinite(), ce, math.nan)

    def gradient(self, upstream: Tensor) -> Tensor:
        """The gradient of sum(upstream * loss) in the raw logits, in the math dtype."""
        options = self.options
        total = torch.zeros_like(self.student)
        if options.alpha:
            total += self._divergence_gradient() * (options.kd_weight / options.temperature)
        if self.labels is not None and options.alpha != 1:
            smoothing = options.ce_weight * options.label_smoothing
            slope = torch.full_like(total, -smoothing / total.shape[-1])
            of_label = torch.full_like(total[..., :1], smoothing - options.ce_weight)
            slope.scatter_add_(-1, self.labels.unsqueeze(-1), of_label)
            total += through_softmax(slope, log_softmax(self.student)[0])
        if options.z_loss:
            weight = 2 * options.z_loss * self.label_lse
            total += torch.softmax(self.student, -1) * weight.unsqueeze(-1)
        if options.student_softcap:
            total *= 1 - (self.student / options.student_softcap) ** 2
        total *= (options.student_scale * upstream).unsqueeze(-1)
        # 0 gives 0, also of a row whose gradient is NaN.
        return torch.where(self.alive & (upstream != 0).unsqueeze(-1), total, 0.0)


def log_softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the log-sum-exp of each row, with pairwise sums.

    ``torch.log_softmax`` on AVX2 sums a row in eight float32 lanes, which at 262,208 entries costs
    4e-6 of a loss.
    """
    top = z.amax(-1, keepdim=True)
    below_top = z - top
    rest = torch.logsumexp(below_top, -1, keepdim=True)
    return below_top - rest, (top + rest).squeeze(-1)


def _run(
    problem: Problem, gradient: Tensor | None, extras: bool, grad_output: Tensor | None
) -> Result:
    check_labels(problem)
    entries.check(problem, extras)
    device, dtype, vocab = problem.student.device, problem.math_dtype, problem.vocab
    mapped = problem.teacher_rows is not None
    layout = row_layout(problem.student) if mapped else row_layout(problem.student, problem.teacher)
    grid = (layout.outer, layout.inner)
    student = layout.tensors[0].as_strided((*grid, problem.student.shape[-1]), layout.strides[0])
    student, teacher = student[..., :vocab], _Teacher(problem, layout)
    scale = torch.as_tensor(row_scale(problem), dtype=dtype, device=device)
    scale = scale.expand(problem.rows).reshape(grid)
    alive = rows_that_count(problem)
    if alive is None:
        alive = torch.ones(problem.rows, dtype=torch.bool, device=device)
    alive = alive.reshape(grid)
    upstream = scale
    if grad_output is not None:
        upstream = scale * grad_output.to(dtype).expand(problem.leading_shape).reshape(grid)
    labels = None if problem.labels is None else problem.labels.reshape(grid)
    weights = None if problem.token_weights is None else problem.token_weights.reshape(grid)
    statistics = torch.zeros((len(STATISTICS), *grid), dtype=dtype, device=device)
    rows = torch.zeros(grid, dtype=dtype, device=device)
    grad_rows = None if gradient is None else gradient.view(*grid, gradient.shape[-1])
    if grad_rows is not None:
        grad_rows[..., vocab:] = 0
    for at in _tiles(grid, vocab * torch.finfo(dtype).bits // 8):
        chunk_labels = None if labels is None else labels[at]
        chunk = _Chunk(problem, student[at], *teacher.at(at), chunk_labels, alive[at])
        parts = chunk.losses(extras)
        rows[at] = parts["loss"] * scale[at]
        if weights is not None:
            parts["loss"] = torch.where(alive[at], parts["loss"] * weights[at], 0.0)
        for index, name in enumerate(STATISTICS):
            if name in parts:
                statistics[(index, *at)] = parts[name]
        if grad_rows is not None:
            grad_rows[(*at, slice(0, vocab))] = chunk.gradient(upstream[at])
    shape = problem.leading_shape
    loss = rows.reshape(shape) if problem.options.reduction == "none" else sum_rows(rows)
    return Result(loss, statistics.reshape(len(STATISTICS), *shape), gradient)


def _tiles(grid: tuple[int, int], row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the grid of rows whose temporaries stay within CHUNK_BYTES."""
    outer, inner = grid
    at_once = max(1, CHUNK_BYTES // row_bytes)
    inner_step = max(1, min(inner, at_once))
    outer_step = max(1, at_once // inner_step)
    for i in range(0, outer, outer_step):
        for j in range(0, inner, inner_step):
            yield slice(i, i + outer_step), slice(j, j + inner_step)
