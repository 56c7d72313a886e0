"""What a row's caller says of it, and the loss and the statistics that it leaves: the same for a
teacher of logits (``row.py``) and one of a few entries (``sparse.py``).
"""

# mypy: disable-error-code="no-untyped-def"
# A condition on P is decided when the kernel is compiled: it does not merge with one on a tensor.
# ruff: noqa: SIM102
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Statistics
from .arithmetic import exponent, finite, product, scaled
from .bodies import clear, log_probability
from .exchange import ROWS, keep, store_numbers
from .functors import LN2, LOG2E
from .sweep import column, owns, sweep, transformed


class Row(NamedTuple):
    """What the caller says of a row."""

    label: Any
    column: Any  # the label, or a column that may be read where it is none
    weight: Any
    scale: Any  # weight / denominator; 0: the row does not count
    upstream: Any  # scale * grad_output


class Teacher(NamedTuple):
    """What a row's outcome says of the teacher alone."""

    lse: Any  # NaN: it is no distribution
    entropy: Any
    at: Any  # the column of its largest entry


@triton.jit
def row_of(row, tensors, sizes, numbers, P: tl.constexpr):
    weight, scale, label = 1.0, numbers.row_factor, 0
    if P.given.items:
        items = tl.load(tensors.items)
        scale = tl.div_rn(1.0, tl.where(items == 0, 1.0, items))
    if P.given.weights:
        weight = tl.load(tensors.weights + row)
        scale = scale * weight
    if P.given.labels:
        label = tl.load(tensors.labels + row)
        scale = tl.where(label == sizes.ignore_index, 0.0, scale)
    upstream = scale
    if P.given.upstream:
        given = tl.load(tensors.upstream + row * sizes.upstream_stride)
        upstream = scale * given.to(tl.float32)
    return Row(label=label, column=label, weight=weight, scale=scale, upstream=upstream)


@triton.jit
def checked(row, at, member, errors, vocab, P: tl.constexpr):
    """The row with a column that may be read; NaN is what a label outside the vocabulary gives."""
    safe, upstream = row.label, row.upstream
    if P.given.labels:
        valid = (row.label >= 0) & (row.label < vocab)
        safe = tl.where(valid, row.label, 0)
        upstream = tl.where(valid, upstream, float("nan"))
        if P.stages.finish:
            if member == 0:
                if not valid:
                    tl.atomic_max(errors, at + 1)
    return Row(label=row.label, column=safe, weight=row.weight, scale=row.scale, upstream=upstream)


@triton.jit
def label_logit(place, label, P: tl.constexpr):
    """Before anything of the row is written: the gradient may overwrite the student."""
    # By those who need it only: another member's slice may be overwritten by now.
    needed = owns(place.part, label, P) | ((place.part.member == 0) & P.stages.finish)
    at = column(place.rows.student, label, place.student.stride, P.student.unit)
    return transformed(tl.load(at, mask=needed, other=0.0), place.student, P.student, P)


@triton.jit
def residue(top, factor, P: tl.constexpr):
    """What the rounded product, which the sums are relative to, misses."""
    return exponent(top, factor, top, P)


@triton.jit
def student_logs(state, numbers, P: tl.constexpr):
    """log2 of the student's sums at T and at 1, relative to its top logit."""
    top, factor = state.student.top, numbers.factor
    log_s = tl.log2(state.student.sum) - residue(top, factor, P)
    log_1 = log_s
    if P.terms.power != 1:
        at_one = product(top, factor) * numbers.temperature
        log_1 = tl.log2(state.at_one) - scaled(top, LOG2E, at_one, P)
    if P.single:
        # One column: all log-probabilities are 0, which log2(exp2(x)) misses by an ulp.
        log_s, log_1 = log_s * 0.0, log_1 * 0.0
    return log_s, log_1


@triton.jit
def lse_of(top, factor, log_sum, P: tl.constexpr):
    return scaled(top, factor, -log_sum, P) * LN2


@triton.jit
def entropy_of(own, extras, factor, log_sum, P: tl.constexpr):
    return LN2 * (log_sum + residue(own.top, factor, P) - extras.entropy / own.sum)


@triton.jit
def finish(row, at, teacher, softmaxes, sums, z_label, tensors, sizes, P: tl.constexpr):
    """Row ``at``'s loss and statistics. teacher: a :class:`Teacher`."""
    state, numbers = softmaxes.state, softmaxes.numbers
    log_s, log_1 = softmaxes.log_s, softmaxes.log_1
    top, teacher_lse = state.student.top, teacher.lse
    student_lse = lse_of(top, numbers.factor, log_s, P)
    label_lse = lse_of(top, LOG2E, log_1, P)
    kd, ce, z = 0.0, 0.0, 0.0
    loss = 0.0
    if P.with_kd:
        kd = numbers.kd_scale * sums.value
        if P.nonnegative:
            kd = tl.where(kd < 0, 0.0, kd)
        kd = tl.where(finite(student_lse) & finite(teacher_lse), kd, float("nan"))
        if P.terms.kd_in_loss:
            loss += numbers.alpha * kd
    if P.with_ce:
        ce = -log_probability(z_label, LOG2E, top, log_1, P) * LN2
        if P.terms.smoothing:
            smoothing = numbers.smoothing
            hard = tl.where(smoothing == 1, 0.0, (1 - smoothing) * ce)  # 0 * inf is not 0
            ce = hard + smoothing * (label_lse - state.total / sizes.vocab)
        if P.terms.ce_in_loss:
            loss += (1 - numbers.alpha) * ce
    if P.terms.z_loss:
        z = numbers.z_loss * label_lse * label_lse
        loss += z
    if P.given.labels:
        loss = tl.where((row.label >= 0) & (row.label < sizes.vocab), loss, float("nan"))
    tl.store(tensors.loss + at, loss * row.scale)
    # NaN where a model's logits are no distribution; 0 otherwise.
    no_teacher = tl.where(finite(teacher_lse), 0.0, float("nan"))
    spoiled = tl.where(finite(student_lse), 0.0, float("nan"))
    if P.terms.kd_in_loss:
        spoiled += no_teacher
    no_teacher += spoiled
    hits, student_entropy, teacher_entropy = 0.0, 0.0, 0.0
    if P.terms.extras:
        student_entropy = entropy_of(state.student, state.student_extras, numbers.factor, log_s, P)
        teacher_entropy = teacher.entropy
        at_s = state.student_extras.at
        hits = tl.where(at_s == teacher.at, 1.0, 0.0)
        hits = tl.where(no_teacher == 0, hits, 0.0)
        if P.given.labels:
            hits += tl.where(at_s == row.label.to(tl.float32), 2.0, 0.0)
        hits = tl.where(spoiled == 0, hits, 0.0)
    seen = Statistics(
        loss=loss * row.weight,
        kd=kd + no_teacher,
        ce=ce + spoiled,
        z=z + spoiled,
        student_lse=student_lse + spoiled,
        teacher_lse=teacher_lse + no_teacher,
        label_lse=label_lse + spoiled,
        student_entropy=student_entropy + spoiled,
        teacher_entropy=teacher_entropy + no_teacher,
        hits=hits,
    )
    rows = sizes.rows.to(tl.int64)
    keep(tensors.statistics + at, rows, seen, state, softmaxes.centre, sums.slope)


@triton.jit
def uncounted(place, tensors, sizes, P: tl.constexpr):
    """Zeros for a row that does not count. It is not read: it may hold anything."""
    if P.stages.finish:
        if place.part.member == 0:
            tl.store(tensors.loss + place.row, 0.0)
            store_numbers(tensors.statistics + place.row, sizes.rows.to(tl.int64), (0.0,), ROWS)
    if P.stages.differentiate:
        sweep(clear, 0, "", place.row, place, 0, P)
