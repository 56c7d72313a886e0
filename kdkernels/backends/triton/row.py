"""The row kernel: observe, evaluate and differentiate a row of logits.

``kd_rows`` does a constexpr choice of three sweeps over the columns of a row:

* observe: the softmax statistics of both models, per thread, relative to a running maximum;
* evaluate: the sums of a divergence's value and slope, for those that have no closed form;
* differentiate: the gradient.

``P`` is a :class:`~kdkernels.backends.triton.policy.Variant`: what is fixed at compile time.
"""

# mypy: disable-error-code="no-untyped-def"
# A condition on P is decided when the kernel is compiled: it does not merge with one on a tensor.
# ruff: noqa: SIM102
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Numbers, Sizes, Tensors
from .arithmetic import finite, pair_sum, power, rounded
from .bodies import (
    Coefficients,
    Softmaxes,
    Sums,
    cap_slope,
    differentiate,
    evaluate,
    gradient,
    log_probability,
    observe,
)
from .exchange import collect_state, collect_sums, meet, publish_state, publish_sums, resume
from .functors import LN2, LOG2E, slope_over_q
from .outcome import (
    Teacher,
    checked,
    entropy_of,
    finish,
    label_logit,
    lse_of,
    residue,
    row_of,
    student_logs,
    uncounted,
)
from .sparse import counted_sparse
from .state import SURE, merged, neutral
from .sweep import Each, Logits, Place, column, owns, slice_of, sweep, transformed


class Shared(NamedTuple):
    """Where the members that share a row meet. (Triton 3.5 returns no None in a tuple.)"""

    group: Any
    slot: Any  # of the partials
    met: Any  # times that they have met before this row


@triton.jit
def _place(row, member, tensors, sizes, numbers, P: tl.constexpr):
    outer, within = row // sizes.inner, row % sizes.inner
    of_student = outer * sizes.student_outer + within * sizes.student_inner
    if P.given.offsets:
        of_teacher = tl.load(tensors.offsets + row)
    else:
        of_teacher = outer * sizes.teacher_outer + within * sizes.teacher_inner
    starts = Each(student=of_student, teacher=of_teacher, gradient=row * sizes.gradient_row)
    student = tensors.student + starts.student
    teacher = tensors.teacher + starts.teacher
    if P.stages.differentiate:
        base = tensors.gradient
        gradient = base + starts.gradient
    else:
        base = tensors.student
        gradient = student
    return Place(
        row=row,
        bases=Each(student=tensors.student, teacher=tensors.teacher, gradient=base),
        starts=starts,
        rows=Each(student=student, teacher=teacher, gradient=gradient),
        student=Logits(
            stride=sizes.student_column,
            scale=numbers.student_scale,
            softcap=numbers.student_softcap,
        ),
        teacher=Logits(
            stride=sizes.teacher_column,
            scale=numbers.teacher_scale,
            softcap=numbers.teacher_softcap,
        ),
        part=slice_of(student, sizes.vocab, member, P),
    )


@triton.jit
def _observed(place, shared, tensors, sizes, numbers, P: tl.constexpr):
    """The row's state: observed, collected from other launches, or as the forward kept it.

    Returns it with the centre and the sum of slopes, which only the last of them knows.
    """
    centre, slopes = 0.0, 0.0
    if P.stages.observe:
        state = neutral(P.tile.THREADS)
        state = sweep(observe, 2, P.first_policy, state, place, numbers, P)
        state = merged(state, numbers, P)
        if P.sharing.exchange != "none":
            publish_state(tensors.partials, shared.slot, place.part.member, state, P)
        if P.sharing.exchange == "spin":
            meet(tensors.arrivals + shared.group, (shared.met + 1) * P.sharing.members)
            state = collect_state(tensors.partials, shared.slot, numbers, P)
    elif P.resumes:
        state, centre, slopes = resume(tensors.statistics + place.row, sizes.rows.to(tl.int64))
    else:
        state = collect_state(tensors.partials, shared.slot, numbers, P)
    return state, centre, slopes


@triton.jit
def _at_peak(state, log_s, log_t, numbers, P: tl.constexpr):
    """The logarithms of p and q there, with the bits that the sweeps give that entry."""
    top = state.student.top
    log_p = log_probability(state.peak, numbers.factor, state.teacher.top, log_t, P)
    return log_p, log_probability(top, numbers.factor, top, log_s, P)


@triton.jit
def _softmaxes(state, centre, numbers, P: tl.constexpr):
    log_s, log_1 = student_logs(state, numbers, P)
    log_t = tl.log2(state.teacher.sum) - residue(state.teacher.top, numbers.factor, P)
    if P.single:
        log_t = log_t * 0.0
    if P.centred and not P.resumes:
        log_p, log_q = _at_peak(state, log_s, log_t, numbers, P)
        # That of equal probabilities where the student is not sure.
        log_p = tl.where(log_q > SURE, log_p, log_q)
        p, q = tl.exp2(log_p), tl.exp2(log_q)
        centre = slope_over_q(p, q, log_p, log_q, numbers.first, numbers.second, P.functor)
    return Softmaxes(
        state=state, log_s=log_s, log_t=log_t, log_1=log_1, centre=centre, numbers=numbers
    )


@triton.jit
def _closed_form(softmaxes, P: tl.constexpr):
    """The divergence in nats, unclamped, of the two KLs, and the sum of centred slopes."""
    state, log_s, log_t = softmaxes.state, softmaxes.log_s, softmaxes.log_t
    factor = softmaxes.numbers.factor
    slopes = 0.0
    if P.functor.divergence == "forward_kl":
        log_s += residue(state.student.top, factor, P)
        log_t += residue(state.teacher.top, factor, P)
        divergence = LN2 * (state.gap / state.teacher.sum - log_t + log_s)
    else:
        log_p, log_q = _at_peak(state, log_s, log_t, softmaxes.numbers, P)
        above_peak = factor * (state.gap / state.student.sum)
        divergence = LN2 * (above_peak + (log_q - log_p))
        slopes = tl.where(log_q > SURE, LN2 * above_peak, divergence)
    if P.single:
        divergence = divergence * 0.0
    return divergence, slopes


@triton.jit
def _evaluated(softmaxes, slopes, place, shared, tensors, P: tl.constexpr):
    """The sums of the divergence's values and slopes."""
    values = 0.0
    if P.closed and not P.resumes:
        values, slopes = _closed_form(softmaxes, P)
    if P.stages.evaluate:
        zero = tl.zeros([P.tile.THREADS], tl.float32)
        sums = sweep(evaluate, 2, P.middle_policy, Sums(zero, zero), place, softmaxes, P)
        values, slopes = pair_sum(sums.value, sums.slope)
        if P.sharing.exchange != "none":
            member = place.part.member
            publish_sums(tensors.partials, shared.slot, member, (values, slopes), P)
        if P.sharing.exchange == "spin":
            meet(tensors.arrivals + shared.group, (shared.met + 2) * P.sharing.members)
    if P.collects_sums:
        values, slopes = collect_sums(tensors.partials, shared.slot, P)
    return Sums(value=values, slope=slopes)


@triton.jit
def _teacher(softmaxes, P: tl.constexpr):
    state, factor, log_t = softmaxes.state, softmaxes.numbers.factor, softmaxes.log_t
    entropy, at = 0.0, 0.0
    if P.terms.extras:
        entropy = entropy_of(state.teacher, state.teacher_extras, factor, log_t, P)
        at = state.teacher_extras.at
    return Teacher(lse=lse_of(state.teacher.top, factor, log_t, P), entropy=entropy, at=at)


@triton.jit
def _coefficients(softmaxes, slopes, upstream, vocab, P: tl.constexpr):
    state, numbers = softmaxes.state, softmaxes.numbers
    kd, ce, label, balance = 0.0, 0.0, 0.0, 1.0
    if P.terms.kd_in_loss:
        kd = numbers.alpha * numbers.kd_scale / numbers.temperature
    if P.terms.ce_in_loss:
        ce = 1 - numbers.alpha
        label += ce
    if P.terms.z_loss:
        label_lse = lse_of(state.student.top, LOG2E, softmaxes.log_1, P)
        label += (2 * numbers.z_loss) * label_lse
    label = label / state.at_one
    if P.terms.kd_in_loss:
        if P.functor.divergence == "forward_kl":
            kd = kd / state.teacher.sum
            balance = state.teacher.sum / state.student.sum
            if P.label_term and P.terms.power == 1:
                balance += label / kd
        else:
            # A row without a distribution: comparisons with NaN would give slopes of 0.
            known = finite(softmaxes.log_s) & finite(softmaxes.log_t)
            kd = tl.where(known, kd, float("nan"))
            if P.terms.power != 0:
                label = label * power(state.student.sum, P)
    # The upstream factor last, and never divided by: it may be 0, inf or NaN.
    return Coefficients(
        kd=kd * upstream,
        label=label * upstream,
        balance=balance,
        slopes=slopes,
        uniform=ce * (numbers.smoothing / vocab) * upstream,
        own=ce * (1 - numbers.smoothing) * upstream,
    )


@triton.jit
def _patch_label(place, label, z, softmaxes, coefficients, P: tl.constexpr):
    """Store the label's entry again, with its own term: cheaper than a comparison per entry."""
    t = z
    if P.gradient_reads == 2:
        t = tl.load(column(place.rows.teacher, label, place.teacher.stride, P.teacher.unit))
        t = transformed(t, place.teacher, P.teacher, P)
    out = gradient(z, t, softmaxes, coefficients, P)
    own = coefficients.own
    if P.student.softcap:
        own = own * cap_slope(z, place.student.softcap)
    # Another thread has stored this entry without the term.
    tl.debug_barrier()
    target = place.rows.gradient + label
    tl.store(target, rounded(out - own, target.dtype.element_ty, P.interpreted))


@triton.jit
def _differentiated(row, place, softmaxes, slopes, z_label, vocab, P: tl.constexpr):
    """Store this program's slice of the gradient."""
    if not P.stages.observe:
        # No reduction has brought the warps together since they read the label's logit, which the
        # gradient may overwrite.
        tl.debug_barrier()
    upstream = row.upstream
    if P.student.scale:
        upstream = upstream * place.student.scale
    coefficients = _coefficients(softmaxes, slopes, upstream, vocab, P)
    given = (softmaxes, coefficients)
    sweep(differentiate, P.gradient_reads, P.last_policy, place.row, place, given, P)
    if P.terms.ce_in_loss:
        if owns(place.part, row.column, P):
            _patch_label(place, row.column, z_label, softmaxes, coefficients, P)


@triton.jit
def _clear_rest(gradient, vocab, width, P: tl.constexpr):
    """Zeros in the columns behind a truncated vocabulary."""
    offset = tl.arange(0, P.tile.THREADS)
    zero = tl.zeros([P.tile.THREADS], tl.float32).to(gradient.dtype.element_ty)
    for first in range(vocab, width, P.tile.THREADS):
        tl.store(gradient + first + offset, zero, mask=first + offset < width)


@triton.jit
def _shared(row, group, turn, P: tl.constexpr):
    """turn: rows that the group has shared before; two of them have slots of their own."""
    slot = row
    if P.sharing.exchange == "spin":
        slot = row * 0 + group * 2 + turn % 2
    return Shared(group=group, slot=slot, met=turn * P.meetings)


@triton.jit
def _counted(row, place, group, turn, tensors, sizes, numbers, P: tl.constexpr):
    """A row that counts: this program's part of all that the variant does."""
    row = checked(row, place.row, place.part.member, tensors.errors, sizes.vocab, P)
    z_label = 0.0
    if P.with_ce:
        z_label = label_logit(place, row.column, P)
    shared = _shared(place.row, group, turn, P)
    state, centre, slopes = _observed(place, shared, tensors, sizes, numbers, P)
    softmaxes = _softmaxes(state, centre, numbers, P)
    sums = _evaluated(softmaxes, slopes, place, shared, tensors, P)
    if P.stages.finish:
        if place.part.member == 0:
            teacher = _teacher(softmaxes, P)
            finish(row, place.row, teacher, softmaxes, sums, z_label, tensors, sizes, P)
    if P.stages.differentiate:
        _differentiated(row, place, softmaxes, sums.slope, z_label, sizes.vocab, P)


@triton.jit
def _rows(tensors, sizes, numbers, P: tl.constexpr):
    """Persistent: groups of ``split`` programs take rows in turn, each member a slice."""
    program = tl.program_id(0)
    member = program % P.sharing.split
    group = program // P.sharing.split
    groups = tl.num_programs(0) // P.sharing.split
    turn = group * 0
    for index in range(group, sizes.rows, groups):
        at = index + sizes.rows.to(tl.int64) * 0
        place = _place(at, member, tensors, sizes, numbers, P)
        row = row_of(at, tensors, sizes, numbers, P)
        counts = row.scale != 0
        if not P.stages.finish:
            counts = counts & (row.upstream != 0)
        if counts:
            if P.sparse:
                counted_sparse(row, place, tensors, sizes, numbers, P)
            else:
                _counted(row, place, group, turn, tensors, sizes, numbers, P)
            if P.sharing.exchange == "spin":
                turn += 1
        else:
            uncounted(place, tensors, sizes, P)
        if P.stages.differentiate:
            if P.truncated:
                if member == 0:
                    _clear_rest(place.rows.gradient, sizes.vocab, sizes.width, P)


@triton.jit(do_not_specialize=Sizes._fields)
def kd_rows(  # noqa: PLR0913
    student_ptr, teacher_ptr, labels_ptr, weights_ptr, items_ptr, upstream_ptr, loss_ptr,
    statistics_ptr, gradient_ptr, partials_ptr, arrivals_ptr, errors_ptr, columns_ptr, facts_ptr,
    offsets_ptr, rows, inner, vocab, width, gradient_row, student_outer, student_inner,
    student_column, teacher_outer, teacher_inner, teacher_column, upstream_stride, ignore_index,
    entries, row_factor, factor, temperature, kd_scale, alpha, smoothing, z_loss, student_scale,
    teacher_scale, student_softcap, teacher_softcap, first, second, P: tl.constexpr,
):  # fmt: skip
    """The row kernel's entry: names for the fields of Tensors, Sizes and Numbers, in order.

    They arrive one by one because Triton (3.5 to 3.9) does not extend ``do_not_specialize`` to the
    members of a tuple: it would compile a variant for every size that is 1 or a multiple of 16.
    """
    tensors = Tensors(
        student_ptr, teacher_ptr, labels_ptr, weights_ptr, items_ptr, upstream_ptr, loss_ptr,
        statistics_ptr, gradient_ptr, partials_ptr, arrivals_ptr, errors_ptr, columns_ptr,
        facts_ptr, offsets_ptr,
    )  # fmt: skip
    sizes = Sizes(
        rows, inner, vocab, width, gradient_row, student_outer, student_inner, student_column,
        teacher_outer, teacher_inner, teacher_column, upstream_stride, ignore_index,
        entries,
    )  # fmt: skip
    numbers = Numbers(
        row_factor, factor, temperature, kd_scale, alpha, smoothing, z_loss, student_scale,
        teacher_scale, student_softcap, teacher_softcap, first, second,
    )  # fmt: skip
    _rows(tensors, sizes, numbers, P)
