"""The oracle: the contract in float64, every intermediate materialised, autograd for the gradient.

It uses a divergence's ``value`` only, so ``slope`` and every hand-written gradient are checked by
something that does not contain them. It is slow and meant for tests and for small problems.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import entries
from .divergences import differentiable
from .problem import STATISTICS, Options, Problem, row_scale, rows_that_count


def transformed(logits: Tensor, scale: float, softcap: float) -> Tensor:
    """softcap * tanh(scale * logits / softcap), or scale * logits where softcap is 0."""
    if scale != 1.0:
        logits = logits * scale
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def entropy(log_p: Tensor) -> Tensor:
    """Shannon entropy in nats over the last dimension; entries with probability 0 contribute 0."""
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)


def top_hits(student: Tensor, teacher_top: Tensor, labels: Tensor | None) -> Tensor:
    """Per row: 1 if both have the same top entry, plus 2 if the student's is the label."""
    top = student.argmax(-1)
    hits = (top == teacher_top).to(student.dtype)
    return hits if labels is None else hits + 2.0 * (top == labels)


def spoil(parts: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The parts, with NaN and no hits where a model's logits are no distribution.

    That is where they hold NaN, +inf or nothing but -inf. Without weight in the loss such a teacher
    spoils no more than what is named after it.
    """
    no_teacher = ~parts["teacher_lse"].isfinite()
    spoiled = ~parts["student_lse"].isfinite()
    if alpha != 0:
        spoiled = spoiled | no_teacher
    out = {name: torch.where(spoiled, math.nan, part) for name, part in parts.items()}
    for name in ("kd", "teacher_lse", "teacher_entropy"):
        if name in out:
            out[name] = torch.where(no_teacher, math.nan, out[name])
    if "hits" in parts:
        hits = parts["hits"] - torch.where(no_teacher, parts["hits"] % 2, 0.0)
        out["hits"] = torch.where(spoiled, 0.0, hits)
    return out


def through_softmax(slope: Tensor, log_q: Tensor) -> Tensor:
    """The gradient in z of a sum over the last dimension: ``slope - q * sum(slope)``, where
    ``log_q = log_softmax(z)`` and ``slope`` is the sum's derivative in ``log_q``.

    Where q is near 1 these two are equal but for what the other entries have, which a sum of all
    has lost. Multiples of q that are added to the slopes cancel, so where a q is above 1/4 they are
    first moved to be 0 there, and the sum is that of the others.
    """
    q = log_q.exp()
    top = log_q.argmax(-1, keepdim=True)
    of_top = slope.gather(-1, top)
    level = of_top / q.gather(-1, top)
    # An infinite divergence has no digits to keep.
    sure = (q.gather(-1, top) > 0.25) & level.isfinite()
    slope = slope - q * torch.where(sure, level, 0.0)
    slope = slope.scatter_(-1, top, torch.where(sure, 0.0, of_top))
    return slope - q * slope.sum(-1, keepdim=True)


class _LogSoftmax(torch.autograd.Function):
    """``F.log_softmax`` over the last dimension with the gradient of :func:`through_softmax`."""

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor) -> Tensor:
        log_q = F.log_softmax(z, -1)
        ctx.save_for_backward(log_q)
        return log_q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (log_q,) = ctx.saved_tensors
        return through_softmax(grads[0], log_q)


def _cross_entropy(log_q: Tensor, labels: Tensor, options: Options) -> Tensor:
    """Per row, with label smoothing; 0 where the label is the one to ignore."""
    counted = labels != options.ignore_index
    column = torch.where(counted, labels, 0).clamp(0, log_q.shape[-1] - 1)
    picked = log_q.gather(-1, column.unsqueeze(-1)).squeeze(-1)
    smoothing = options.label_smoothing
    ce = -picked if smoothing == 0 else -smoothing * log_q.mean(-1)
    if 0 < smoothing < 1:
        ce = ce - (1 - smoothing) * picked
    return torch.where(counted, ce, 0.0)


class _Teacher(NamedTuple):
    """What the losses of some rows take of the teacher."""

    log_p: Tensor
    log_q: Tensor  #: the student's, of the same entries or categories
    exists: Tensor | None  #: bool, which of them there are; None: all
    lse: Tensor  #: [rows], not finite where there is no distribution
    entropy: Tensor
    top: Tensor  #: [rows], the likeliest id


def _of_rows(problem: Problem, of_teacher: Tensor) -> Tensor:
    """[rows, ...]: what each row meets of something that the teacher has by rows."""
    flat = of_teacher.reshape(-1, of_teacher.shape[-1])
    return flat if problem.teacher_rows is None else flat[problem.teacher_rows.reshape(-1)]


def _dense_teacher(problem: Problem, log_q: Tensor) -> _Teacher:
    options = problem.options
    teacher = _of_rows(problem, problem.teacher.detach().to(log_q.dtype))
    teacher = transformed(
        teacher[:, : problem.vocab], options.teacher_scale, options.teacher_softcap
    )
    counted = rows_that_count(problem)
    if counted is not None:
        teacher = torch.where(counted[:, None], teacher, 0.0)
    log_p = F.log_softmax(teacher / options.temperature, -1)
    lse = torch.logsumexp(teacher / options.temperature, -1)
    return _Teacher(log_p, log_q, None, lse, entropy(log_p), teacher.argmax(-1))


def _sparse_teacher(problem: Problem, log_q: Tensor) -> _Teacher:
    assert problem.teacher_ids is not None
    tail = problem.options.tail
    ids = _of_rows(problem, problem.teacher_ids)
    counted = rows_that_count(problem)
    if counted is not None:
        ids = torch.where(counted[:, None], ids, -1)
    log_probs = _of_rows(problem, problem.teacher.detach().to(log_q.dtype))
    found = entries.read(log_probs, ids, problem.vocab, tail)
    compared = entries.compared(found, log_q, tail)
    of_entries = entries.entropy(found, tail)
    return _Teacher(
        compared.log_p,
        compared.log_q,
        compared.exists,
        found.lse,
        of_entries,
        entries.likeliest(found),
    )


def row_losses(problem: Problem, student: Tensor, extras: bool) -> dict[str, Tensor]:
    """The unweighted losses and statistics of each row, by name; differentiable in ``student``.

    ``student`` is float64 [rows, vocab], already transformed by scale and softcap. Rows that do not
    count are computed like the others and have to be masked by the caller.
    """
    options = problem.options
    labels = None if problem.labels is None else problem.labels.reshape(-1)
    out: dict[str, Tensor] = {}
    log_q = cast(Tensor, _LogSoftmax.apply(student / options.temperature))
    teacher = (_dense_teacher if problem.teacher_ids is None else _sparse_teacher)(problem, log_q)
    if options.alpha != 0 or extras:
        kd = problem.divergence.value(teacher.log_p, teacher.log_q)
        if teacher.exists is not None:
            kd = torch.where(teacher.exists, kd, 0.0)
        # A row that has no distribution has no divergence, even where 0 * NaN was skipped.
        # A factor and not a choice, which would give that row a gradient of 0.
        broken = ~teacher.lse.isfinite() | log_q.isnan().any(-1)
        kd = kd.sum(-1) * torch.where(broken, math.nan, 1.0)
        out["kd"] = kd * options.kd_scale
    if labels is not None and (options.alpha != 1 or extras):
        out["ce"] = _cross_entropy(cast(Tensor, _LogSoftmax.apply(student)), labels, options)
    out["student_lse"] = torch.logsumexp(student / options.temperature, -1)
    out["teacher_lse"] = teacher.lse
    out["label_lse"] = torch.logsumexp(student, -1)
    out["z"] = options.z_loss * out["label_lse"] ** 2
    loss = torch.zeros_like(out["z"])
    if options.alpha != 0:
        loss = loss + options.alpha * out["kd"]
    if labels is not None and options.alpha != 1:
        loss = loss + options.ce_weight * out["ce"]
    out["loss"] = loss + out["z"] if options.z_loss else loss
    if extras:
        out["student_entropy"] = entropy(log_q)
        out["teacher_entropy"] = teacher.entropy
        out["hits"] = top_hits(student, teacher.top, labels)
    return out


def _soundness(problem: Problem, alive: Tensor) -> Tensor:
    """[rows]: 1, but NaN for a label that is none, where nothing could be raised for it.

    A factor, so that the gradient is NaN, too.
    """
    factor = torch.ones_like(alive, dtype=torch.float64)
    if problem.labels is None:
        return factor
    labels = problem.labels.reshape(-1)
    return factor.masked_fill(alive & ((labels < 0) | (labels >= problem.vocab)), math.nan)


def forward(
    problem: Problem, *, want_gradient: bool, extras: bool, grad_output: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, statistics, gradient) as :class:`~kdkernels.backends.base.Result`, all in float64.

    The gradient is that of the loss times ``grad_output``; rows that do not count and rows of
    weight 0 are cut off before anything is computed from them.
    """
    options = problem.options
    shape = problem.leading_shape
    weight = row_scale(problem)
    if not isinstance(weight, Tensor):
        weight = torch.tensor(weight, dtype=torch.float64, device=problem.student.device)
    weight = weight.double().expand(problem.rows)
    alive = rows_that_count(problem)
    if alive is None:
        alive = torch.ones_like(weight, dtype=torch.bool)
    with differentiable():
        leaf = problem.student.detach().double().requires_grad_()
        student = leaf.reshape(-1, leaf.shape[-1])[:, : problem.vocab]
        student = torch.where(alive[:, None], student, 0.0) * _soundness(problem, alive)[:, None]
        student = transformed(student, options.student_scale, options.student_softcap)
        parts = row_losses(problem, student, extras)
        rows = torch.where(alive, parts["loss"], 0.0) * weight
        loss = rows.reshape(shape) if options.reduction == "none" else rows.sum()
        gradient = None
        if want_gradient:
            seed = torch.ones_like(loss) if grad_output is None else grad_output.double()
            (gradient,) = torch.autograd.grad(loss, leaf, seed)
            # 0 gives 0, also of a row whose gradient is NaN.
            upstream = seed.reshape(-1) * torch.ones_like(weight)
            silent = ~alive | (upstream == 0)
            gradient = gradient.masked_fill(silent.reshape(*shape, 1), 0.0)
    statistics = torch.zeros((len(STATISTICS), problem.rows), dtype=torch.float64)
    statistics = statistics.to(leaf.device)
    token_weights = problem.token_weights
    parts = spoil({name: part.detach() for name, part in parts.items()}, options.alpha)
    for index, name in enumerate(STATISTICS):
        if name not in parts:
            continue
        row = parts[name]
        if name == "loss" and token_weights is not None:
            row = row * token_weights.reshape(-1)
        statistics[index] = torch.where(alive, row, 0.0)
    return loss.detach(), statistics.reshape(len(STATISTICS), *shape), gradient
