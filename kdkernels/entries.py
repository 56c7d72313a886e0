"""A teacher of which a row has K entries of the vocabulary: what each tail makes of the others.

The divergence compares either distributions over the vocabulary, as of a dense teacher (the tails
``uniform``, ``renormalize`` and ``none``), or *categories*: the K entries and, for ``bucket``, all
others together. Categories need no formula of their own: a divergence is a sum of ``value(log p,
log q)``, and with its slopes s and the categories' probabilities q ::

    dD / dz_v = s_v - q_v sum(s)                      v is one of the K entries
    dD / dz_v = (s_rest / q_rest - sum(s)) q_v        v is none of them
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem, rows_that_count

#: What is known of the entries that are not given.
TAILS = ("bucket", "uniform", "renormalize", "subset", "none")
#: Those that compare distributions over the vocabulary.
SPREAD = ("uniform", "renormalize", "none")
#: Those that divide by the mass of the entries, which may be of another temperature.
NORMALIZED = ("renormalize", "subset")

#: Rounded to bfloat16, the probabilities of a row may add up to 1.02. More is no distribution.
MOST_MASS = 1.1


class Entries(NamedTuple):
    """The entries of some rows, as a tail takes them. An empty slot has column 0, and is not known.

    In float64 where the device has it: 1 minus the mass of the entries is all that is known of the
    rest.
    """

    column: Tensor  #: int64 [..., K]
    known: Tensor  #: bool [..., K]
    log_p: Tensor  #: [..., K], after the tail's normalisation; -inf where not known
    log_norm: Tensor  #: [...], what that has subtracted: the logarithm of a mass
    log_rest: Tensor  #: [...], of all that is not among the entries; -inf: nothing
    others: Tensor  #: [...], how many entries that is
    sound: (
        Tensor  #: bool [...]: ids are of the vocabulary, and none twice; the masses are a teacher's
    )

    @property
    def lse(self) -> Tensor:
        """[...]: what stands for the log-sum-exp of logits; NaN where there is no distribution."""
        return torch.where(self.sound, self.log_norm, math.nan)

    @property
    def any(self) -> Tensor:
        """Bool [...]: whether anything is known, without which a row has no divergence."""
        return self.known.any(-1)


def read(log_probs: Tensor, ids: Tensor, vocab: int, tail: str) -> Entries:
    """The entries of rows [..., K] under a tail."""
    if tail == "none":
        log_probs, ids = _merged(log_probs, ids)
    known = ids >= 0
    inside = ids < vocab
    column = torch.where(known & inside, ids, 0)
    log_p = log_probs.masked_fill(~known, -math.inf)
    mass = log_p.exp().sum(-1)
    # Comparisons that NaN fails.
    sound = (inside | ~known).all(-1) & ~_comes_twice(ids) & (mass < math.inf)
    log_norm = torch.zeros_like(mass)
    log_rest = torch.full_like(mass, -math.inf)
    others = vocab - known.sum(-1)
    if tail != "none":
        log_norm = torch.where(known.any(-1), log_p.logsumexp(-1), 0.0)
        if tail not in NORMALIZED:
            sound &= mass <= MOST_MASS
            # Of a part of the vocabulary only what rounding has added to 1 is taken off again.
            log_norm = torch.where(others > 0, log_norm.clamp(min=0), log_norm)
            log_rest = torch.where(others > 0, (1 - mass).clamp(min=0), 0.0).log()
        sound &= log_norm.isfinite()
        log_p = log_p - log_norm.unsqueeze(-1)
    return Entries(column, known, log_p, log_norm, log_rest, others, sound)


def _ordered(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids in ascending order, empty slots last, and where each was."""
    last = torch.iinfo(ids.dtype).max
    return torch.sort(torch.where(ids >= 0, ids, last), dim=-1, stable=True)


def _comes_twice(ids: Tensor) -> Tensor:
    """Bool [...]: whether a row has an id in two slots."""
    ordered, _ = _ordered(ids)
    again = ordered[..., 1:] == ordered[..., :-1]
    return (again & (ordered[..., 1:] != torch.iinfo(ids.dtype).max)).any(-1)


def _merged(log_probs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The entries with one slot for an id, in which its weights add up."""
    ordered, was_at = _ordered(ids)
    empty = ordered == torch.iinfo(ids.dtype).max
    weights = log_probs.gather(-1, was_at).exp().masked_fill(empty, 0.0)
    starts = torch.ones_like(empty)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    slot = starts.cumsum(-1) - 1
    sums = torch.zeros_like(weights).scatter_add_(-1, slot, weights)
    unique = torch.full_like(ids, -1).scatter_(-1, slot, ordered.masked_fill(empty, -1))
    return sums.log(), unique


def spread(entries: Entries, vocab: int, dtype: torch.dtype) -> Tensor:
    """Log-probabilities [..., V]: the entries', and the rest evenly among all others."""
    share = entries.log_rest - entries.others.clamp(min=1).to(entries.log_rest.dtype).log()
    dense = share.to(dtype).unsqueeze(-1).expand(*entries.column.shape[:-1], vocab)
    return _placed(dense, entries, entries.log_p.to(dtype))


def _placed(dense: Tensor, entries: Entries, values: Tensor | float) -> Tensor:
    """A copy of ``dense`` [..., V] with ``values`` at the entries."""
    # One column more, into which empty slots write.
    column = torch.where(entries.known, entries.column, dense.shape[-1])
    padded = torch.nn.functional.pad(dense, (0, 1))
    return padded.scatter_(-1, column, values)[..., :-1]


class Compared(NamedTuple):
    """What a divergence compares: the vocabulary's entries, or categories, of which the rest is
    last.
    """

    entries: Entries
    log_p: Tensor  #: [..., C]
    log_q: Tensor
    exists: Tensor  #: bool, of [..., C]; what does not exist has log p = log q = 0
    is_spread: bool
    log_q_rest: Tensor | None = None  #: [...], of all others, where they are a category

    def in_columns(self, gradient: Tensor, log_q: Tensor) -> Tensor:
        """The gradient [..., V] in the student's log-odds, from that in those of what is compared.

        ``log_q``: the student's log-probabilities [..., V].
        """
        gradient = gradient.to(log_q.dtype)
        if self.is_spread:
            return gradient
        count = self.entries.column.shape[-1]
        dense = torch.zeros_like(log_q)
        if self.log_q_rest is not None:
            share = (log_q - self.log_q_rest.to(log_q.dtype).unsqueeze(-1)).exp()
            dense = torch.where(self.exists[..., count:], gradient[..., count:] * share, dense)
        return _placed(dense, self.entries, gradient[..., :count])


def compared(entries: Entries, log_q: Tensor, tail: str) -> Compared:
    """What a student with these log-probabilities [..., V] is compared in.

    A row without an entry is compared in nothing.
    """
    if tail in SPREAD:
        some = entries.any.unsqueeze(-1)
        log_p = spread(entries, log_q.shape[-1], log_q.dtype)
        log_p, log_q = (torch.where(some, x, 0.0) for x in (log_p, log_q))
        return Compared(entries, log_p, log_q, some, True)
    wide = entries.log_p.dtype
    own = log_q.gather(-1, entries.column).to(wide)
    own = own.masked_fill(~entries.known, -math.inf)
    if tail == "subset":
        norm = own.logsumexp(-1, keepdim=True)
        own = own - norm.masked_fill(~entries.any.unsqueeze(-1), 0.0)
        return _masked(entries, entries.log_p, own, entries.known)
    rest = _placed(log_q, entries, -math.inf).to(wide).logsumexp(-1)
    log_p = torch.cat([entries.log_p, entries.log_rest.unsqueeze(-1)], -1)
    log_q = torch.cat([own, rest.unsqueeze(-1)], -1)
    exists = torch.cat([entries.known, (entries.others > 0).unsqueeze(-1)], -1)
    found = _masked(entries, log_p, log_q, exists & entries.any.unsqueeze(-1))
    return found._replace(log_q_rest=rest)


def _masked(entries: Entries, log_p: Tensor, log_q: Tensor, exists: Tensor) -> Compared:
    log_p, log_q = (x.masked_fill(~exists, 0.0) for x in (log_p, log_q))
    return Compared(entries, log_p, log_q, exists, False)


def entropy(entries: Entries, tail: str) -> Tensor:
    """Shannon entropy in nats of what a tail makes of the entries, [...]; 0 of nothing."""
    log_p = entries.log_p
    total = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    if tail in ("bucket", "uniform"):
        each = entries.log_rest
        if tail == "uniform":
            each = each - entries.others.clamp(min=1).to(each.dtype).log()
        rest = entries.log_rest.exp()
        total = total - rest * each.masked_fill(rest == 0, 0.0)
    return torch.where(entries.any, total, 0.0)


def likeliest(entries: Entries) -> Tensor:
    """The id of the largest entry, [...], the lowest of equals; -1 where nothing is known."""
    log_p = entries.log_p
    top = log_p.amax(-1, keepdim=True)
    is_top = entries.known & (log_p == top)
    ids = torch.where(is_top, entries.column, torch.iinfo(torch.int64).max).amin(-1)
    return torch.where(is_top.any(-1), ids, -1)


def check(problem: Problem, extras: bool) -> None:
    """IndexError or ValueError for entries that are none, where looking costs no device sync.

    Only where they are read: they have a weight, or ``extras`` are wanted.
    """
    is_read = problem.options.alpha != 0 or extras
    if problem.teacher_ids is None or not is_read or problem.student.device.type != "cpu":
        return
    found = read(problem.teacher, problem.teacher_ids, problem.vocab, problem.options.tail)
    bad = ~found.sound.reshape(-1)
    if problem.teacher_rows is not None:
        bad = bad[problem.teacher_rows.reshape(-1)]
    alive = rows_that_count(problem)
    if alive is not None:
        bad &= alive
    if bool(bad.any()):
        error = fault(problem, int(bad.to(torch.uint8).argmax()))
        if error is not None:
            raise error


def fault(problem: Problem, row: int) -> Exception | None:
    """What is wrong with the entries that this row meets; None: they hold NaN, as logits might."""
    assert problem.teacher_ids is not None
    if problem.teacher_rows is not None:
        row = int(problem.teacher_rows.reshape(-1)[row])
    ids = problem.teacher_ids.reshape(-1, problem.teacher_ids.shape[-1])[row]
    log_probs = problem.teacher.reshape(-1, problem.teacher.shape[-1])[row]
    known = ids >= 0
    outside = ids >= problem.vocab
    if bool(outside.any()):
        return IndexError(
            f"teacher_ids: {int(ids[outside][0])} at row {row} is outside [0, {problem.vocab}), "
            "and not negative as an empty slot is"
        )
    ordered = ids[known].sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if problem.options.tail != "none" and twice.numel():
        return IndexError(
            f"teacher_ids: {int(twice[0])} comes twice at row {row}, which only tail='none' adds up"
        )
    mass = float(log_probs[known].exp().sum())
    if mass > MOST_MASS and problem.options.tail in ("bucket", "uniform"):
        return ValueError(
            f"teacher_log_probs: the probabilities at row {row} add up to {mass:.6g}; natural "
            "logarithms of probabilities are expected, as of log_softmax"
        )
    return None
