"""A row whose teacher is a few entries: the student's columns are read as of any row, and what the
teacher says is a handful of numbers, in the registers of whoever computes it.

Of the columns that are none of the entries only sums are needed, and no column is compared with the
entries: the sum of all exponentials is kept so that the entries' can be taken off again
(:func:`parts`), and the gradient of all columns is written before that of the entries.
``kdkernels/entries.py`` says what is compared under each tail.

One program does a row: there is no exchange.
"""

# mypy: disable-error-code="no-untyped-def"
# A condition on P is decided when the kernel is compiled: it does not merge with one on a tensor.
# ruff: noqa: SIM102
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import at_one, exponent, finite, power, product, rounded, tile_max, tile_sum
from .bodies import Softmaxes, Sums, cap_slope, log_probability
from .entries import FACTS
from .exchange import resume
from .functors import LN2, LOG2E, slope, slope_over_q, value
from .outcome import Teacher, checked, finish, label_logit, lse_of, student_logs
from .state import LOWEST, Extras, State, Sum, at_one_moved, extras_moved, extras_with_tile
from .sweep import by_thread, column, sweep, transformed

#: An exponential is at most 1 relative to the largest entry, unless another column is larger. Added
#: to this and taken off again it is a multiple of 2^-19, of which 2^24 add up without rounding.
GRAIN = tl.constexpr(16.0)
#: The others' share of a sum that has too few digits left for them.
FEW = tl.constexpr(2.0**-24)
#: What bounds the error of that share.
UNCERTAIN = tl.constexpr(2.0**-28)
#: A category with less than this of the student's probability does not cancel with all others.
LIKELY = tl.constexpr(0.25)


class Entries(NamedTuple):
    """The slots of a row, [P.slots]."""

    slot: Any
    known: Any
    column: Any  # 0 where nothing is known
    log_p: Any  # of the teacher in base 2, as the tail has it; -inf where nothing is known
    z: Any  # of the student, transformed; -inf where nothing is known


class Rest(NamedTuple):
    """The columns that are none of the entries, and what is known of the row's teacher."""

    count: Any
    log_p: Any  # of all of them together, in base 2
    some: Any  # whether there is an entry


class Parts(NamedTuple):
    """A sum of exponentials per thread, relative to a running maximum, in two parts."""

    top: Any
    coarse: Any  # multiples of 2^-19, exact
    fine: Any


class Seen(NamedTuple):
    """What the observing sweep has of the student, per thread."""

    sum: Parts
    at_one: Any
    total: Any  # of the logits that are not -inf
    excluded: Any  # how many are
    extras: Extras


class Whole(NamedTuple):
    """The same of a row, where it is wanted with more digits than a State has."""

    coarse: Any
    fine: Any
    total: Any
    excluded: Any


class Slopes(NamedTuple):
    """A divergence's derivatives in the logarithms of the student's probabilities, centred."""

    entries: Any  # [P.slots]
    q: Any  # the entries' probabilities
    rest: Any  # of the rest as one category
    sum: Any
    centre: Any


class Columns(NamedTuple):
    """The gradient of a column that is none of the entries."""

    top: Any  # what its exponential is relative to
    factor: Any  # of the exponential
    label: Any  # of the exponential at temperature 1
    uniform: Any  # what every one of them is taken less


@triton.jit
def _read(place, tensors, sizes, P: tl.constexpr):
    """The row's entries, what they leave to the others, and what the outcome says of the teacher.

    Before anything of the row is written: the gradient may overwrite the student.
    """
    slot = tl.arange(0, P.slots)
    there = slot < sizes.entries
    own = tl.load(tensors.columns + place.starts.teacher + slot, mask=there, other=-1)
    known = own >= 0
    log_p = tl.load(place.rows.teacher + slot, mask=known, other=-float("inf"))
    own = tl.where(known, own, 0)
    at = column(place.rows.student, own, place.student.stride, P.student.unit)
    z = transformed(tl.load(at, mask=known, other=0.0), place.student, P.student, P)
    facts = tensors.facts + place.row * FACTS  # in the order of Facts
    others = tl.load(facts + 4)
    entries = Entries(
        slot=slot, known=known, column=own, log_p=log_p, z=tl.where(known, z, -float("inf"))
    )
    rest = Rest(count=others, log_p=tl.load(facts + 3), some=others < sizes.vocab)
    teacher = Teacher(lse=tl.load(facts), entropy=tl.load(facts + 1), at=tl.load(facts + 2))
    return entries, rest, teacher


@triton.jit
def parts(e):
    """An exponential as a multiple of 2^-19 and what is left of it, both exact.

    Sums of the first kind are exact, and those of the second round relative to 2^-20 at most. So
    what remains when the entries' exponentials, the same bits, are taken off has an error of about
    1e-13 of the largest, where a plain sum has lost all below 1e-7.
    """
    coarse = (e + GRAIN) - GRAIN
    return coarse, e - coarse


@triton.jit
def _with_parts(sum, z, top, numbers, P: tl.constexpr):
    """A tile into a sum that is relative to ``top`` by now. Returns its exponentials, too."""
    x = exponent(z, numbers.factor, top[None, :, None], P)
    e = tl.exp2(x)
    coarse, fine = parts(e)
    added = Parts(top=top, coarse=sum.coarse + tile_sum(coarse), fine=sum.fine + tile_sum(fine))
    return added, x, e


@triton.jit
def _parts_moved(sum, top, r):
    return Parts(top=top, coarse=sum.coarse * r, fine=sum.fine * r)


@triton.jit
def _shrinking(old, new, numbers):
    """By which factor exponentials become smaller relative to a new top, and its logarithm."""
    step = product(old, numbers.factor) - product(new, numbers.factor)
    return tl.exp2(step), step


@triton.jit
def _moved(seen, top, numbers, P: tl.constexpr):
    r, step = _shrinking(seen.sum.top, top, numbers)
    own = Sum(top=seen.sum.top, sum=seen.sum.coarse + seen.sum.fine)
    return Seen(
        sum=_parts_moved(seen.sum, top, r),
        at_one=at_one_moved(seen.at_one, step, r, numbers, P),
        total=seen.total,
        excluded=seen.excluded,
        extras=extras_moved(seen.extras, own, r, step, P),
    )


@triton.jit
def _observe(seen, z, t, columns, mask, target, numbers, P: tl.constexpr):
    """The tile of the student into the statistics of its threads."""
    top = tl.maximum(seen.sum.top, tile_max(z))
    seen = _moved(seen, top, numbers, P)
    sum, x, e = _with_parts(seen.sum, z, top, numbers, P)
    sum_1, total, excluded = seen.at_one, seen.total, seen.excluded
    if P.terms.power != 1:
        top_s = product(top, numbers.factor)[None, :, None]
        sum_1 += tile_sum(at_one(e, z, top_s, numbers.temperature, P))
    if P.terms.smoothing or P.tail == "uniform":
        out = z == -float("inf")
        total += tile_sum(tl.where(out, 0.0, z))
        if mask is not None:
            out = out & by_thread(mask, P)
        excluded += tile_sum(out.to(tl.float32))
    extras = extras_with_tile(seen.extras, z, x, e, by_thread(columns, P), P)
    return Seen(sum=sum, at_one=sum_1, total=total, excluded=excluded, extras=extras)


@triton.jit
def _started(top, P: tl.constexpr):
    """The statistics of no column, relative to ``top``."""
    zero = tl.zeros([P.tile.THREADS], tl.float32)
    low: tl.constexpr = LOWEST
    return Seen(
        sum=Parts(top=zero + tl.maximum(top, low), coarse=zero, fine=zero),
        at_one=zero,
        total=zero,
        excluded=zero,
        extras=Extras(entropy=zero, best=zero + low, at=zero),
    )


@triton.jit
def _row_parts(sum, numbers):
    """The threads' sums as one, in float64, relative to the largest of their tops."""
    top = tl.max(sum.top, 0)
    r, _ = _shrinking(sum.top, top, numbers)
    sum = _parts_moved(sum, top, r)
    return top, tl.sum(sum.coarse.to(tl.float64), 0), tl.sum(sum.fine.to(tl.float64), 0)


@triton.jit
def _merged(seen, numbers, P: tl.constexpr):
    """The statistics of all threads: the state, without the rest, and what has more digits."""
    top, coarse, fine = _row_parts(seen.sum, numbers)
    seen = _moved(seen, top, numbers, P)
    sum_s = (coarse + fine).to(tl.float32)
    sum_1 = sum_s
    if P.terms.power != 1:
        sum_1 = tl.sum(seen.at_one, 0)
    total, excluded = coarse * 0.0, 0.0
    if P.terms.smoothing or P.tail == "uniform":
        total = tl.sum(seen.total.to(tl.float64), 0)
        excluded = tl.sum(seen.excluded, 0)
    entropy, best, at = 0.0, 0.0, 0.0
    if P.terms.extras:
        entropy = tl.sum(seen.extras.entropy, 0)
        best = tl.max(seen.extras.best, 0)
        # The smallest column that has the largest value.
        at = tl.min(tl.where(seen.extras.best == best, seen.extras.at, 3.0e38), 0)
    none = Extras(entropy=0.0, best=0.0, at=0.0)
    state = State(
        student=Sum(top=top, sum=sum_s),
        at_one=sum_1,
        teacher=Sum(top=top, sum=0.0),
        total=tl.where(excluded > 0, -float("inf"), total.to(tl.float32)),
        student_extras=Extras(entropy=entropy, best=best, at=at),
        teacher_extras=none,
        peak=0.0,
        gap=0.0,
    )
    return state, Whole(coarse=coarse, fine=fine, total=total, excluded=excluded)


@triton.jit
def _without(coarse, fine, entries, among, top, numbers, P: tl.constexpr):
    """What remains of a sum, in float64, when those of its entries that are ``among`` it are taken
    off."""
    e = tl.exp2(exponent(entries.z, numbers.factor, top, P))
    own_coarse, own_fine = parts(tl.where(among, e, 0.0))
    left = coarse - tl.sum(own_coarse.to(tl.float64), 0)
    left += fine - tl.sum(own_fine.to(tl.float64), 0)
    return tl.where(left < 0, 0.0, left)


@triton.jit
def _observe_below(sum, z, t, columns, mask, target, given, P: tl.constexpr):
    """The tile's logits below a top, whose exponents relative to it are up to a limit."""
    below, limit, numbers = given
    x = exponent(z, numbers.factor, below, P)
    z = tl.where((z < below) & (x <= limit), z, -float("inf"))
    top = tl.maximum(sum.top, tile_max(z))
    r, _ = _shrinking(sum.top, top, numbers)
    sum, _, _ = _with_parts(_parts_moved(sum, top, r), z, top, numbers, P)
    return sum


@triton.jit
def _summed_rest(state, whole, entries, rest, place, numbers, P: tl.constexpr):
    """The sum of the others' exponentials, where the entries have nearly all relative to a top of
    its own.

    Then no digit of the others may be left. But they are below a limit, since none of them has more
    than all of them, and another sweep sums what is: the entries above it need no search. A sweep
    leaves out the largest entry at least, and 28 bits as a rule.
    """
    top = state.student.top
    covered = whole.coarse + whole.fine
    left = _without(whole.coarse, whole.fine, entries, entries.known, top, numbers, P)
    if P.tail == "bucket":
        while (rest.count > 0) & (covered > 0) & (left < covered * FEW):
            limit = tl.log2((left + covered * UNCERTAIN).to(tl.float32)) + 1
            x = exponent(entries.z, numbers.factor, top, P)
            among = entries.known & (entries.z < top) & (x <= limit)
            low: tl.constexpr = LOWEST
            highest = tl.maximum(tl.max(tl.where(among, entries.z, low), 0), low)
            zero = tl.zeros([P.tile.THREADS], tl.float32)
            sum = Parts(top=zero + highest, coarse=zero, fine=zero)
            given = (top, limit, numbers)
            sum = sweep(_observe_below, 1, P.middle_policy, sum, place, given, P)
            top, coarse, fine = _row_parts(sum, numbers)
            covered = coarse + fine
            left = _without(coarse, fine, entries, among, top, numbers, P)
    top = tl.where(left > 0, top, state.student.top)
    return Sum(top=top, sum=left.to(tl.float32))


@triton.jit
def _observed(place, entries, rest, tensors, sizes, numbers, P: tl.constexpr):
    """The row's state, whose teacher is the rest's sum."""
    if P.stages.observe:
        seen = sweep(
            _observe, 1, P.first_policy, _started(tl.max(entries.z, 0), P), place, numbers, P
        )
        state, whole = _merged(seen, numbers, P)
        of_rest = state.teacher
        if P.with_kd:
            if P.tail != "subset":
                of_rest = _summed_rest(state, whole, entries, rest, place, numbers, P)
        state = State(
            student=state.student,
            at_one=state.at_one,
            teacher=of_rest,
            total=state.total,
            student_extras=state.student_extras,
            teacher_extras=state.teacher_extras,
            peak=state.peak,
            gap=state.gap,
        )
    else:
        state, _, _ = resume(tensors.statistics + place.row, sizes.rows.to(tl.int64))
        zero = state.at_one.to(tl.float64) * 0.0
        whole = Whole(coarse=zero, fine=zero, total=zero, excluded=0.0)
    return state, whole


@triton.jit
def _log_q(entries, state, log_s, numbers, P: tl.constexpr):
    """The student's probabilities of the entries, as the tail has them, in base 2."""
    if P.tail == "subset":
        low: tl.constexpr = LOWEST
        top = tl.maximum(tl.max(entries.z, 0), low)
        # Of the largest exactly 1: a row of one entry has no divergence at all.
        e = tl.exp2((entries.z - top) * numbers.factor)
        log_q = log_probability(entries.z, numbers.factor, top, tl.log2(tl.sum(e, 0)), P)
    else:
        log_q = log_probability(entries.z, numbers.factor, state.student.top, log_s, P)
    return tl.where(entries.known, log_q, -float("inf"))


@triton.jit
def _even_value(entries, rest, whole, softmaxes, P: tl.constexpr):
    """The forward KL of the others, among which the rest is spread evenly, in nats."""
    numbers = softmaxes.numbers
    out = entries.known & (entries.z == -float("inf"))
    z = tl.where(entries.known & ~out, entries.z, 0.0)
    total = (whole.total - tl.sum(z.to(tl.float64), 0)).to(tl.float32)
    student_lse = lse_of(softmaxes.state.student.top, numbers.factor, softmaxes.log_s, P)
    count = tl.maximum(rest.count, 1.0)
    mean = total / count * (numbers.factor * LN2) - student_lse
    excluded = whole.excluded - tl.sum(out.to(tl.float32), 0)
    mean = tl.where(excluded > 0, -float("inf"), mean)
    p = tl.exp2(rest.log_p)
    return tl.where(p > 0, p * ((rest.log_p - tl.log2(count)) * LN2 - mean), 0.0)


@triton.jit
def _compared(entries, rest, whole, softmaxes, P: tl.constexpr):
    """The divergence in nats, unclamped, and its slopes.

    They are counted from that of the category that has most of the student, as in ``bodies.py``.
    """
    state, numbers = softmaxes.state, softmaxes.numbers
    first, second = numbers.first, numbers.second
    log_p, log_q = entries.log_p, _log_q(entries, state, softmaxes.log_s, numbers, P)
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    none = -float("inf")
    rest_log_q = state.student.sum * 0.0 + none
    if P.tail != "subset":
        _, step = _shrinking(state.teacher.top, state.student.top, numbers)
        rest_log_q = tl.log2(tl.div_rn(state.teacher.sum, state.student.sum)) + step
    rest_p, rest_q = tl.exp2(rest.log_p), tl.exp2(rest_log_q)
    there = (rest.count > 0) & rest.some
    highest = tl.max(q, 0)
    is_rest = rest_q > highest
    at_top = tl.min(tl.where(q == highest, entries.slot, P.slots), 0)
    is_top = entries.slot == tl.where(is_rest, P.slots, at_top)
    top_log_p = tl.where(is_rest, rest.log_p, tl.sum(tl.where(is_top, log_p, 0.0), 0))
    top_log_q = tl.where(is_rest, rest_log_q, tl.sum(tl.where(is_top, log_q, 0.0), 0))
    top_p, top_q = tl.exp2(top_log_p), tl.exp2(top_log_q)
    centre = slope_over_q(top_p, top_q, top_log_p, top_log_q, first, second, P.functor)
    # An infinite divergence has no digits to keep.
    sure = (top_q > LIKELY) & finite(centre)
    centre = tl.where(sure, centre, 0.0)
    slopes = slope(p, q, log_p, log_q, centre, first, second, P.functor)
    centred = tl.where(sure & ~is_rest, at_top, P.slots)
    slopes = tl.where(entries.known & (entries.slot != centred), slopes, 0.0)
    values = tl.where(entries.known, value(p, q, log_p, log_q, first, second, P.functor), 0.0)
    of_rest, rest_value = 0.0, 0.0
    if P.tail != "subset":
        of_rest = slope(rest_p, rest_q, rest.log_p, rest_log_q, centre, first, second, P.functor)
        of_rest = tl.where(there & ~(is_rest & sure), of_rest, 0.0)
        if P.tail == "uniform":
            rest_value = _even_value(entries, rest, whole, softmaxes, P)
        else:
            rest_value = value(rest_p, rest_q, rest.log_p, rest_log_q, first, second, P.functor)
        rest_value = tl.where(there, rest_value, 0.0)
    all_slopes = (tl.sum(slopes.to(tl.float64), 0) + of_rest).to(tl.float32)
    all_values = (tl.sum(values.to(tl.float64), 0) + rest_value).to(tl.float32)
    slopes = Slopes(entries=slopes, q=q, rest=of_rest, sum=all_slopes, centre=centre)
    return all_values, slopes


@triton.jit
def _label_factor(softmaxes, P: tl.constexpr):
    """Of the exponential at temperature 1, in the gradient of the loss's other terms."""
    state, numbers = softmaxes.state, softmaxes.numbers
    label = 0.0
    if P.terms.ce_in_loss:
        label += 1 - numbers.alpha
    if P.terms.z_loss:
        label += (2 * numbers.z_loss) * lse_of(state.student.top, LOG2E, softmaxes.log_1, P)
    return label / state.at_one


@triton.jit
def _columns(rest, softmaxes, slopes, kd, label, uniform, P: tl.constexpr):
    """kd: the factor of the divergence's gradient; label, uniform: of every column."""
    state, numbers = softmaxes.state, softmaxes.numbers
    top, factor = state.student.top, 0.0
    if P.terms.kd_in_loss:
        # The largest of the others may be far below: their exponentials must not be 0.
        top = state.teacher.top
    shrink, _ = _shrinking(top, state.student.top, numbers)
    if P.terms.kd_in_loss:
        each = tl.div_rn(shrink, state.student.sum)
        if P.tail == "uniform":
            factor = -(slopes.centre + slopes.sum) * each
            share = tl.exp2(rest.log_p) / tl.maximum(rest.count, 1.0)
            uniform += kd * tl.where(rest.some, share, 0.0)
        elif P.tail != "subset":
            factor = tl.where(state.teacher.sum > 0, slopes.rest / state.teacher.sum, 0.0)
            factor -= slopes.sum * each
        factor = tl.where(rest.some, factor, 0.0) * kd
    if P.terms.power == 1:
        factor += label * shrink
    elif P.terms.power != 0:
        label = label * power(shrink, P)
    return Columns(top=top, factor=factor, label=label, uniform=uniform)


@triton.jit
def _gradient(z, columns, softmaxes, P: tl.constexpr):
    """Of a column that is none of the entries, of any shape, but for the label's own term."""
    numbers = softmaxes.numbers
    e = tl.exp2(exponent(z, numbers.factor, columns.top, P))
    out = e * columns.factor
    if P.label_term:
        if P.terms.power != 1:
            top_s = product(softmaxes.state.student.top, numbers.factor)
            out += columns.label * at_one(e, z, top_s, numbers.temperature, P)
    if P.terms.smoothing or P.tail == "uniform":
        out -= columns.uniform
    if P.student.softcap:
        out *= cap_slope(z, numbers.student_softcap)
    return out


@triton.jit
def _differentiate(state, z, t, columns, mask, target, given, P: tl.constexpr):
    """The tile of the gradient, as if none of its columns were an entry."""
    of_columns, softmaxes = given
    out = _gradient(z, of_columns, softmaxes, P)
    out = rounded(out, target.dtype.element_ty, P.interpreted)
    tl.store(target, tl.reshape(out, target.shape), mask=mask, eviction_policy=P.store_policy)
    return state


@triton.jit
def _patch_entries(
    place, entries, slopes, label_column, kd, label, uniform, own, softmaxes, P: tl.constexpr
):
    state, numbers = softmaxes.state, softmaxes.numbers
    out = kd * (slopes.entries - slopes.q * slopes.sum)
    if P.label_term:
        e = tl.exp2(exponent(entries.z, numbers.factor, state.student.top, P))
        top_s = product(state.student.top, numbers.factor)
        out += label * at_one(e, entries.z, top_s, numbers.temperature, P)
    if P.terms.smoothing:
        out -= uniform
    if P.terms.ce_in_loss:
        out -= tl.where(entries.column == label_column, own, 0.0)
    if P.student.softcap:
        out *= cap_slope(entries.z, numbers.student_softcap)
    target = place.rows.gradient + entries.column
    tl.store(target, rounded(out, target.dtype.element_ty, P.interpreted), mask=entries.known)


@triton.jit
def _differentiated(
    row, place, entries, rest, teacher, softmaxes, slopes, z_label, vocab, P: tl.constexpr
):
    """Store the gradient: of all columns as if they were none of the entries, then of those."""
    numbers = softmaxes.numbers
    upstream = row.upstream
    if P.student.scale:
        upstream = upstream * place.student.scale
    kd, ce = 0.0, 0.0
    if P.terms.kd_in_loss:
        kd = numbers.alpha * numbers.kd_scale / numbers.temperature
        # A row without a distribution: comparisons with NaN would give slopes of 0.
        known = finite(softmaxes.log_s) & finite(teacher.lse)
        kd = tl.where(known, kd, float("nan")) * upstream
    if P.terms.ce_in_loss:
        ce = 1 - numbers.alpha
    label = _label_factor(softmaxes, P) * upstream
    uniform = ce * (numbers.smoothing / vocab) * upstream
    own = ce * (1 - numbers.smoothing) * upstream
    columns = _columns(rest, softmaxes, slopes, kd, label, uniform, P)
    # The gradient may overwrite what the warps read of the student before.
    tl.debug_barrier()
    given = (columns, softmaxes)
    sweep(_differentiate, 1, P.last_policy, place.row, place, given, P)
    # Other threads have stored these columns as well.
    tl.debug_barrier()
    if P.terms.ce_in_loss:
        out = _gradient(z_label, columns, softmaxes, P)
        own_term = own
        if P.student.softcap:
            own_term = own * cap_slope(z_label, place.student.softcap)
        other = row.column >= 0
        if P.terms.kd_in_loss:
            other = tl.sum((entries.known & (entries.column == row.column)).to(tl.int32), 0) == 0
        target = place.rows.gradient + row.column
        out = rounded(out - own_term, target.dtype.element_ty, P.interpreted)
        tl.store(target, out, mask=other)
    if P.terms.kd_in_loss:
        _patch_entries(place, entries, slopes, row.column, kd, label, uniform, own, softmaxes, P)


@triton.jit
def counted_sparse(row, place, tensors, sizes, numbers, P: tl.constexpr):
    """A row that counts: all that the variant does."""
    row = checked(row, place.row, place.part.member, tensors.errors, sizes.vocab, P)
    z_label = 0.0
    if P.with_ce:
        z_label = label_logit(place, row.column, P)
    entries, rest, teacher = _read(place, tensors, sizes, P)
    state, whole = _observed(place, entries, rest, tensors, sizes, numbers, P)
    log_s, log_1 = student_logs(state, numbers, P)
    softmaxes = Softmaxes(
        state=state, log_s=log_s, log_t=0.0, log_1=log_1, centre=0.0, numbers=numbers
    )
    zero = tl.zeros([P.slots], tl.float32)
    slopes, divergence = Slopes(entries=zero, q=zero, rest=0.0, sum=0.0, centre=0.0), 0.0
    if P.with_kd:
        divergence, slopes = _compared(entries, rest, whole, softmaxes, P)
    if P.stages.finish:
        sums = Sums(value=divergence, slope=slopes.sum)
        finish(row, place.row, teacher, softmaxes, sums, z_label, tensors, sizes, P)
    if P.stages.differentiate:
        _differentiated(
            row, place, entries, rest, teacher, softmaxes, slopes, z_label, sizes.vocab, P
        )
