"""The statistics of the columns seen so far: a commutative monoid.

``neutral`` is that of no column, ``moved`` the same relative to other reference points, ``merged``
that of all threads or slices, and ``with_tile`` that of one tile of columns more.

Logarithms and exponents are in base 2 (``x = z log2(e) / T``): ``exp2`` is one instruction of the
hardware. The reference point of a sum (``top``) need not be the exact maximum; it only has to be
the same number wherever the sum is used.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import (
    at_one,
    exponent,
    pair_max,
    pair_sum,
    power,
    product,
    tile_max,
    tile_sum,
)

#: Where running maxima start: finite, so that -inf entries meet no -inf - -inf.
LOWEST = tl.constexpr(-1.0e30)
#: The student is sure of an entry where log2(q) is above: q > 0.71 there, below 0.29 elsewhere.
SURE = tl.constexpr(-0.5)
#: Of none where the sum relative to the largest is this or more.
UNSURE = tl.constexpr(1.5)


class Sum(NamedTuple):
    """The log-sum-exp of one model; per thread, or of the whole row as scalars."""

    top: Any  # the largest logit
    sum: Any  # of e = exp2(x), x the rounded product(z, factor) - product(top, factor)


class Extras(NamedTuple):
    """What only the extra statistics need of one model."""

    entropy: Any  # the moment sum e x
    best: Any  # the largest logit, and its column
    at: Any


class State(NamedTuple):
    """The observed statistics of a row. What few variants have stands last: it is 0 then."""

    student: Sum
    at_one: Any  # the student's sum at temperature 1
    teacher: Sum
    total: Any  # of the student's logits
    student_extras: Extras
    teacher_extras: Extras
    #: The teacher's logit where the student's is largest. Of a whole row whose student is not sure
    #: it is the teacher's largest: an entry that the teacher excludes would take all digits of the
    #: differences from it.
    peak: Any
    #: The moment of a KL: of forward KL the sum of e' (x' - x), of reverse KL that of e times the
    #: difference of the logits less that at the peak.
    gap: Any


@triton.jit
def neutral(SIZE: tl.constexpr):
    """The statistics of no column, for SIZE threads."""
    low = tl.full([SIZE], LOWEST, tl.float32)
    zero = tl.zeros([SIZE], tl.float32)
    none = Sum(top=low, sum=zero)
    extras = Extras(entropy=zero, best=low, at=zero)
    return State(
        student=none,
        at_one=zero,
        teacher=none,
        total=zero,
        student_extras=extras,
        teacher_extras=extras,
        peak=low,
        gap=zero,
    )


@triton.jit
def _shrunk(r, moment):
    """r * moment where r underflowed to 0 and the moment is infinite: 0, not NaN."""
    return tl.where(r > 0, r * moment, 0.0)


@triton.jit
def _repeaked(state, top, peak, P: tl.constexpr):
    """The gap relative to another peak, where the student's logit is ``top``."""
    gap = state.gap
    if P.functor.divergence == "reverse_kl":
        gap += state.student.sum * ((state.student.top - top) - (state.peak - peak))
    return gap


@triton.jit
def extras_moved(extras, own, shrink, step, P: tl.constexpr):
    """own: the :class:`Sum` that the moment belongs to, as it was."""
    entropy = extras.entropy
    if P.terms.extras:
        entropy = _shrunk(shrink, entropy + own.sum * step)
    return Extras(entropy=entropy, best=extras.best, at=extras.at)


@triton.jit
def at_one_moved(sum_1, step, r, numbers, P: tl.constexpr):
    """The sum at temperature 1 where the other one is moved by ``step``, that is times ``r``."""
    if P.terms.power == 0:
        sum_1 = sum_1 * tl.exp2(step * numbers.temperature)
    elif P.terms.power != 1:
        sum_1 = sum_1 * power(r, P)
    return sum_1


@triton.jit
def moved(state, new_s, new_t, peak, numbers, P: tl.constexpr):
    """The same statistics relative to other reference points."""
    student, teacher = state.student, state.teacher
    step_s = product(student.top, numbers.factor) - product(new_s, numbers.factor)
    step_t = product(teacher.top, numbers.factor) - product(new_t, numbers.factor)
    r_s = tl.exp2(step_s)
    r_t = tl.exp2(step_t)
    gap = state.gap
    if P.functor.divergence == "forward_kl":
        gap = _shrunk(r_t, gap + teacher.sum * (step_t - step_s))
    elif P.functor.divergence == "reverse_kl":
        gap = _shrunk(r_s, _repeaked(state, new_s, peak, P))
    return State(
        student=Sum(top=new_s, sum=student.sum * r_s),
        at_one=at_one_moved(state.at_one, step_s, r_s, numbers, P),
        teacher=Sum(top=new_t, sum=teacher.sum * r_t),
        total=state.total,
        student_extras=extras_moved(state.student_extras, student, r_s, step_s, P),
        teacher_extras=extras_moved(state.teacher_extras, teacher, r_t, step_t, P),
        peak=peak,
        gap=gap,
    )


@triton.jit
def _extras_merged(student, teacher, P: tl.constexpr):
    ent_s, ent_t, best_s, at_s, best_t, at_t = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if P.terms.extras:
        ent_s, ent_t = pair_sum(student.entropy, teacher.entropy)
        best_s, best_t = pair_max(student.best, teacher.best)
        # The smallest column that has the largest value.
        at_s = tl.where(student.best == best_s, student.at, 3.0e38)
        at_t = tl.where(teacher.best == best_t, teacher.at, 3.0e38)
        at_s, at_t = pair_max(-at_s, -at_t)
        at_s, at_t = -at_s, -at_t
    return (
        Extras(entropy=ent_s, best=best_s, at=at_s),
        Extras(entropy=ent_t, best=best_t, at=at_t),
    )


@triton.jit
def merged(state, numbers, P: tl.constexpr):
    """The statistics of all threads (or slices) as scalars: one exchange per row."""
    new_s, new_t = pair_max(state.student.top, state.teacher.top)
    around = moved(state, new_s, new_t, state.peak, numbers, P)
    sum_1, gap, peak = around.at_one, 0.0, 0.0
    if P.centred:
        # Of the one that is highest. Where two are it is none, and the student not sure.
        peak = tl.where(state.student.top == new_s, state.peak, 0.0)
        sum_s, sum_t = pair_sum(around.student.sum, around.teacher.sum)
        peak, sum_1 = pair_sum(peak, sum_1)
        peak = tl.where(sum_s < UNSURE, peak, new_t)
        if P.closed:
            gap = tl.sum(moved(state, new_s, new_t, peak, numbers, P).gap, 0)
    else:
        sum_s, sum_t = pair_sum(around.student.sum, around.teacher.sum)
        if P.closed and P.terms.power != 1:
            gap, sum_1 = pair_sum(around.gap, sum_1)
        elif P.closed:
            gap = tl.sum(around.gap, 0)
        elif P.terms.power != 1:
            sum_1 = tl.sum(sum_1, 0)
    if P.terms.power == 1:
        sum_1 = sum_s
    total = 0.0
    if P.terms.smoothing:
        total = tl.sum(state.total, 0)
    student_extras, teacher_extras = _extras_merged(around.student_extras, around.teacher_extras, P)
    return State(
        student=Sum(top=new_s, sum=sum_s),
        at_one=sum_1,
        teacher=Sum(top=new_t, sum=sum_t),
        total=total,
        student_extras=student_extras,
        teacher_extras=teacher_extras,
        peak=peak,
        gap=gap,
    )


@triton.jit
def extras_with_tile(extras, z, x, e, columns, P: tl.constexpr):
    entropy, best, at = extras.entropy, extras.best, extras.at
    if P.terms.extras:
        entropy += tile_sum(tl.where(e > 0, e * x, 0.0))
        # A running (value, column) per thread; columns are exact to 2^24.
        high = tile_max(z)
        where = tl.where(z == high[None, :, None], columns.to(tl.float32), 3.0e38)
        first = tl.min(tl.min(where, 2), 0)
        best, at = tl.maximum(best, high), tl.where(high > best, first, at)
    return Extras(entropy=entropy, best=best, at=at)


@triton.jit
def _peak_with_tile(state, z, t, high, P: tl.constexpr):
    """high: the largest of the student's logits of the tile."""
    peak = state.peak
    if P.centred:
        low: tl.constexpr = LOWEST
        there = tile_max(tl.where(z == high[None, :, None], t, low))
        peak = tl.where(high > state.student.top, tl.maximum(there, low), peak)
    return peak


@triton.jit
def with_tile(state, z, t, columns, inside, numbers, P: tl.constexpr):
    """One tile [K, THREADS, W] of both models into the statistics of its threads.

    inside: which entries the row has; None: all.
    """
    high = tile_max(z)
    peak = _peak_with_tile(state, z, t, high, P)
    new_s = tl.maximum(state.student.top, high)
    new_t = tl.maximum(state.teacher.top, tile_max(t))
    state = moved(state, new_s, new_t, peak, numbers, P)
    factor, temperature = numbers.factor, numbers.temperature
    x_s = exponent(z, factor, new_s[None, :, None], P)
    x_t = exponent(t, factor, new_t[None, :, None], P)
    e_s = tl.exp2(x_s)
    e_t = tl.exp2(x_t)
    sum_s = state.student.sum + tile_sum(e_s)
    sum_t = state.teacher.sum + tile_sum(e_t)
    sum_1, gap, total = state.at_one, state.gap, state.total
    if P.terms.power != 1:
        top_s = product(new_s, factor)[None, :, None]
        sum_1 += tile_sum(at_one(e_s, z, top_s, temperature, P))
    # An excluded entry has x = -inf and weight 0: the product must be 0, the difference may be NaN.
    if P.functor.divergence == "forward_kl":
        gap += tile_sum(tl.where(e_t > 0, e_t * (x_t - x_s), 0.0))
    elif P.functor.divergence == "reverse_kl":
        above = (z - new_s[None, :, None]) - (t - peak[None, :, None])
        gap += tile_sum(tl.where(e_s > 0, e_s * above, 0.0))
    if P.terms.smoothing:
        if inside is None:
            total += tile_sum(z)
        else:
            total += tile_sum(tl.where(inside, z, 0.0))
    return State(
        student=Sum(top=new_s, sum=sum_s),
        at_one=sum_1,
        teacher=Sum(top=new_t, sum=sum_t),
        total=total,
        student_extras=extras_with_tile(state.student_extras, z, x_s, e_s, columns, P),
        teacher_extras=extras_with_tile(state.teacher_extras, t, x_t, e_t, columns, P),
        peak=peak,
        gap=gap,
    )
