"""What the programs that share a row, and the launches of one call, leave in memory.

Partials are float32 [slots, PARTIALS, members]: of each slice of a row its state, in the order of
its fields, and then, from the place of its gap on, the two sums of its evaluation.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton unpacks no tuple into another.
# ruff: noqa: RUF005
import triton
import triton.language as tl

from ...problem import STATISTICS
from .arguments import Kept
from .arithmetic import pair_sum
from .state import LOWEST, Extras, State, Sum, merged

#: Where the fields of a state stand among its numbers, and the sums of an evaluation: a divergence
#: has either these or a gap.
AT_ONE = tl.constexpr(len(Sum._fields))
TEACHER = tl.constexpr(AT_ONE.value + 1)
TOTAL = tl.constexpr(TEACHER.value + len(Sum._fields))
STUDENT_EXTRAS = tl.constexpr(TOTAL.value + 1)
TEACHER_EXTRAS = tl.constexpr(STUDENT_EXTRAS.value + len(Extras._fields))
PEAK = tl.constexpr(TEACHER_EXTRAS.value + len(Extras._fields))
GAP = tl.constexpr(PEAK.value + 1)
SUMS = GAP
#: Numbers that one slice of a row leaves for the others: a power of two, stored without a mask.
PARTIALS = tl.constexpr(triton.next_power_of_2(SUMS.value + 2))
#: Rows of the statistics tensor that the caller sees, and all of them.
SEEN = tl.constexpr(len(STATISTICS))
ROWS = tl.constexpr(len(STATISTICS) + len(Kept._fields))


@triton.jit
def store_numbers(at, stride, numbers, COUNT: tl.constexpr):
    """COUNT scalars, 0 behind the given ones, into every ``stride``-th place, by one store.

    A store each has an address each, which the compiler computes before the loop over rows and
    keeps in two registers of every thread.
    """
    SIZE: tl.constexpr = triton.next_power_of_2(COUNT)
    index = tl.arange(0, SIZE)
    values = tl.zeros([SIZE], tl.float32)
    for i in tl.static_range(len(numbers)):
        values = tl.where(index == i, numbers[i], values)
    if SIZE == COUNT:
        tl.store(at + index * stride, values)
    else:
        tl.store(at + index * stride, values, mask=index < COUNT)


@triton.jit
def publish_state(partials, slot, member, state, P: tl.constexpr):
    """One slice's statistics for the others."""
    numbers = state.student + (state.at_one,) + state.teacher + (state.total,)
    numbers = numbers + state.student_extras + state.teacher_extras + (state.peak, state.gap)
    at = partials + slot * PARTIALS * P.sharing.members + member
    store_numbers(at, P.sharing.members, numbers, PARTIALS)


@triton.jit
def publish_sums(partials, slot, member, sums, P: tl.constexpr):
    """One slice's sums of values and slopes."""
    at = partials + (slot * PARTIALS + SUMS) * P.sharing.members + member
    store_numbers(at, P.sharing.members, sums, len(sums))


@triton.jit
def _number(partials, slot, index, other, P: tl.constexpr):
    """One number of every member, [members rounded up to a power of two]."""
    member = tl.arange(0, P.members_pow2)
    at = partials + (slot * PARTIALS + index) * P.sharing.members + member
    # .cg: the first-level cache may hold what another member has overwritten since.
    return tl.load(at, mask=member < P.sharing.members, other=other, cache_modifier=".cg")


@triton.jit
def _sum(partials, slot, first, P: tl.constexpr):
    low: tl.constexpr = LOWEST
    top = _number(partials, slot, first, low, P)
    return Sum(top=top, sum=_number(partials, slot, first + 1, 0.0, P))


@triton.jit
def _extras(partials, slot, first, P: tl.constexpr):
    low: tl.constexpr = LOWEST
    return Extras(
        entropy=_number(partials, slot, first, 0.0, P),
        best=_number(partials, slot, first + 1, low, P),
        at=_number(partials, slot, first + 2, 0.0, P),
    )


@triton.jit
def collect_state(partials, slot, numbers, P: tl.constexpr):
    """The row's statistics, from those of all slices."""
    state = State(
        student=_sum(partials, slot, 0, P),
        at_one=_number(partials, slot, AT_ONE, 0.0, P),
        teacher=_sum(partials, slot, TEACHER, P),
        total=_number(partials, slot, TOTAL, 0.0, P),
        student_extras=_extras(partials, slot, STUDENT_EXTRAS, P),
        teacher_extras=_extras(partials, slot, TEACHER_EXTRAS, P),
        peak=_number(partials, slot, PEAK, 0.0, P),
        gap=_number(partials, slot, GAP, 0.0, P),
    )
    return merged(state, numbers, P)


@triton.jit
def collect_sums(partials, slot, P: tl.constexpr):
    """The row's sums of values and slopes, from those of all slices."""
    values = _number(partials, slot, SUMS, 0.0, P)
    return pair_sum(values, _number(partials, slot, SUMS + 1, 0.0, P))


@triton.jit
def meet(arrivals, target):
    """Wait until ``target`` members have arrived. Every program of the grid must be resident.

    The release orders this program's partials before its arrival, the acquire the others' after it.
    """
    seen = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") + 1
    while seen < target:
        seen = tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")


@triton.jit
def keep(statistics, rows, seen, state, centre, slopes):
    """A row's column of the statistics tensor, which has ``rows`` columns.

    seen: a :class:`~kdkernels.backends.triton.arguments.Statistics`.
    """
    kept = Kept(
        top_s=state.student.top,
        sum_s=state.student.sum,
        at_one=state.at_one,
        top_t=state.teacher.top,
        sum_t=state.teacher.sum,
        centre=centre,
        slopes=slopes,
    )
    store_numbers(statistics, rows, seen + kept, ROWS)


@triton.jit
def resume(statistics, rows):
    """The state, the centre and the sum of slopes that :func:`keep` has stored."""
    at = statistics + SEEN * rows  # in the order of Kept
    found = Kept(
        top_s=tl.load(at),
        sum_s=tl.load(at + rows),
        at_one=tl.load(at + 2 * rows),
        top_t=tl.load(at + 3 * rows),
        sum_t=tl.load(at + 4 * rows),
        centre=tl.load(at + 5 * rows),
        slopes=tl.load(at + 6 * rows),
    )
    none = Extras(entropy=0.0, best=0.0, at=0.0)
    state = State(
        student=Sum(top=found.top_s, sum=found.sum_s),
        teacher=Sum(top=found.top_t, sum=found.sum_t),
        at_one=found.at_one,
        total=0.0,
        student_extras=none,
        teacher_extras=none,
        peak=0.0,
        gap=0.0,
    )
    return state, found.centre, found.slopes
