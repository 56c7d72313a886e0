"""The Triton kernels: observe, evaluate and differentiate a row of logits.

``kd_rows`` does a constexpr choice of three sweeps over the columns of a row:

* observe: the softmax statistics of both models, per thread, relative to a running maximum;
* evaluate: the sums of a divergence's value and slope, for those that have no closed form;
* differentiate: the gradient.

A tile is [K, THREADS, W]: W neighbouring columns are the 16 bytes that a thread loads, and both
reductions of a tile, over W and K, stay in the thread. So the loops hold no barrier and no shuffle;
threads are combined once per row. Logarithms and exponents are in base 2 (``x = z log2(e) / T``):
``exp2`` is one instruction of the hardware. The reference point of a sum (``top``) need not be the
exact maximum; it only has to be the same number wherever the sum is used.

``P`` is a :class:`~kdkernels.backends.triton.policy.Variant`: what is fixed at compile time.
"""

# mypy: disable-error-code="no-untyped-def"
# A condition on P is decided when the kernel is compiled: it does not merge with one on a tensor.
# ruff: noqa: SIM102, SIM108, SIM300
import triton
import triton.language as tl

from .functors import LN2, LOG2E, slope, tanh, value

#: Where running maxima start: finite, so that -inf entries meet no -inf - -inf.
LOWEST = tl.constexpr(-1.0e30)
#: Numbers that one slice of a row leaves for the others: the fields of the observed state, and the
#: two sums of an evaluation.
OBSERVED = tl.constexpr(13)
PARTIALS = tl.constexpr(16)


@triton.jit
def _scaled(z, factor, top, P: tl.constexpr):
    """z * factor - top, rounded once."""
    if P.interpreted:
        return (z.to(tl.float64) * factor - top).to(tl.float32)
    else:
        return tl.fma(z, factor, -top)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in the gradient's dtype, rounded to nearest even; the interpreter's bfloat16 truncates."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def _power(e, P: tl.constexpr):
    """e^T for the T that get their exponentials at temperature 1 by multiplication."""
    if P.power == 1:
        return e
    elif P.power == 2:
        return e * e
    elif P.power == 3:
        return e * e * e
    else:
        tl.static_assert(P.power == 4)
        return (e * e) * (e * e)


@triton.jit
def _at_one(e, z, top, temperature, P: tl.constexpr):
    """exp2(z log2(e) - top * T): the exponential at temperature 1 from e, that at T."""
    if P.power == 0:
        # A thread that has seen no column: LOWEST * T must not become -inf.
        return tl.exp2(_scaled(z, LOG2E, tl.maximum(top * temperature, -3.0e38), P))
    else:
        return _power(e, P)


@triton.jit
def _read(pointers, mask, scale, softcap, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, POLICY, P):
    """A tile of transformed logits; -inf where masked."""
    if mask is None:
        z = tl.load(pointers, eviction_policy=POLICY)
        return _transformed(z, scale, softcap, SCALE, SOFTCAP, P)
    else:
        z = tl.load(pointers, mask=mask, other=-float("inf"), eviction_policy=POLICY)
        z = _transformed(z, scale, softcap, SCALE, SOFTCAP, P)
        if SCALE or SOFTCAP:
            z = tl.where(mask, z, -float("inf"))
        return z


@triton.jit
def _transformed(z, scale, softcap, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, P: tl.constexpr):
    z = z.to(tl.float32)
    if SCALE:
        z = z * scale
    if SOFTCAP:
        z = softcap * tanh(z * (1 / softcap), P)
    return z


# ---------------------------------------------------------------- the statistics and their monoid


@triton.jit
def _neutral(SIZE: tl.constexpr):
    """The statistics of no column, for SIZE threads."""
    low = tl.full([SIZE], LOWEST, tl.float32)
    zero = tl.zeros([SIZE], tl.float32)
    # top and sum exp of the student, its sum at T = 1, top and sum of the teacher, the moment
    # sum w (x - x'), sum of z, moments sum e x of both, best value and its column of both.
    return (low, zero, zero, low, zero, zero, zero, zero, zero, low, zero, low, zero)


@triton.jit
def _shrunk(r, moment):
    """r * moment where r underflowed to 0 and the moment is infinite: 0, not NaN."""
    return tl.where(r > 0, r * moment, 0.0)


@triton.jit
def _moved(state, new_s, new_t, temperature, P: tl.constexpr):
    """The same statistics relative to other reference points."""
    (
        top_s, sum_s, sum_1, top_t, sum_t, gap, total, ent_s, ent_t, best_s, at_s, best_t, at_t
    ) = state  # fmt: skip
    r_s = tl.exp2(top_s - new_s)
    r_t = tl.exp2(top_t - new_t)
    step_s = top_s - new_s
    step_t = top_t - new_t
    if P.divergence == "forward_kl":
        gap = _shrunk(r_t, gap + sum_t * (step_t - step_s))
    elif P.divergence == "reverse_kl":
        gap = _shrunk(r_s, gap + sum_s * (step_s - step_t))
    if P.extras:
        ent_s = _shrunk(r_s, ent_s + sum_s * step_s)
        ent_t = _shrunk(r_t, ent_t + sum_t * step_t)
    if P.power != 1:
        if P.power == 0:
            sum_1 = sum_1 * tl.exp2(step_s * temperature)
        else:
            sum_1 = sum_1 * _power(r_s, P)
    return (
        new_s, sum_s * r_s, sum_1, new_t, sum_t * r_t, gap, total, ent_s, ent_t,
        best_s, at_s, best_t, at_t,
    )  # fmt: skip


@triton.jit
def _merged(state, temperature, P: tl.constexpr):
    """The statistics of all threads (or slices) as scalars: one exchange per row."""
    new_s, new_t = _pair_max(state[0], state[3])
    state = _moved(state, new_s, new_t, temperature, P)
    (
        top_s, sum_s, sum_1, top_t, sum_t, gap, total, ent_s, ent_t, best_s, at_s, best_t, at_t
    ) = state  # fmt: skip
    sum_s, sum_t = _pair_sum(sum_s, sum_t)
    if P.divergence != "forward_kl" and P.divergence != "reverse_kl":
        gap = 0.0
        if P.power != 1:
            sum_1 = tl.sum(sum_1, 0)
    elif P.power != 1:
        gap, sum_1 = _pair_sum(gap, sum_1)
    else:
        gap = tl.sum(gap, 0)
    if P.power == 1:
        sum_1 = sum_s
    if P.smoothing:
        total = tl.sum(total, 0)
    else:
        total = 0.0
    if P.extras:
        ent_s, ent_t = _pair_sum(ent_s, ent_t)
        high_s, high_t = _pair_max(best_s, best_t)
        # The smallest column that has the largest value.
        at_s = tl.where(best_s == high_s, at_s, 3.0e38)
        at_t = tl.where(best_t == high_t, at_t, 3.0e38)
        at_s, at_t = _pair_max(-at_s, -at_t)
        best_s, at_s, best_t, at_t = high_s, -at_s, high_t, -at_t
    else:
        ent_s, ent_t, best_s, at_s, best_t, at_t = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    return (
        top_s, sum_s, sum_1, top_t, sum_t, gap, total, ent_s, ent_t, best_s, at_s, best_t, at_t
    )  # fmt: skip


# Several numbers in one reduction: the warps meet once for all of them. And Triton before 3.7 holds
# a register through the whole row for each reduction, whose second half only some lanes load.


@triton.jit
def _pair_max(a, b):
    return tl.split(tl.max(tl.join(a, b), 0))


@triton.jit
def _pair_sum(a, b):
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def _vector_best(best, at, z, columns):
    """A running (value, column) per thread with one tile more; columns are exact to 2^24."""
    high = tl.max(tl.max(z, 2), 0)
    where = tl.where(z == high[None, :, None], columns.to(tl.float32), 3.0e38)
    first = tl.min(tl.min(where, 2), 0)
    return tl.maximum(best, high), tl.where(high > best, first, at)


@triton.jit
def _observe(state, z, t, columns, mask, target, numbers, P: tl.constexpr):
    """One tile into the statistics. A body of :func:`_sweep`."""
    factor, temperature = numbers
    new_s = tl.maximum(state[0], tl.max(tl.max(z, 2), 0) * factor)
    new_t = tl.maximum(state[3], tl.max(tl.max(t, 2), 0) * factor)
    (
        top_s, sum_s, sum_1, top_t, sum_t, gap, total, ent_s, ent_t, best_s, at_s, best_t, at_t
    ) = _moved(state, new_s, new_t, temperature, P)  # fmt: skip
    x_s = _scaled(z, factor, top_s[None, :, None], P)
    x_t = _scaled(t, factor, top_t[None, :, None], P)
    e_s = tl.exp2(x_s)
    e_t = tl.exp2(x_t)
    sum_s += tl.sum(tl.sum(e_s, 2), 0)
    sum_t += tl.sum(tl.sum(e_t, 2), 0)
    if P.power != 1:
        e_1 = _at_one(e_s, z, top_s[None, :, None], temperature, P)
        sum_1 += tl.sum(tl.sum(e_1, 2), 0)
    # An excluded entry has x = -inf and weight 0: the product must be 0, the difference may be NaN.
    if P.divergence == "forward_kl":
        gap += tl.sum(tl.sum(tl.where(e_t > 0, e_t * (x_t - x_s), 0.0), 2), 0)
    elif P.divergence == "reverse_kl":
        gap += tl.sum(tl.sum(tl.where(e_s > 0, e_s * (x_s - x_t), 0.0), 2), 0)
    if P.smoothing:
        if mask is None:
            total += tl.sum(tl.sum(z, 2), 0)
        else:
            total += tl.sum(tl.sum(tl.where(_by_thread(mask, P), z, 0.0), 2), 0)
    if P.extras:
        ent_s += tl.sum(tl.sum(tl.where(e_s > 0, e_s * x_s, 0.0), 2), 0)
        ent_t += tl.sum(tl.sum(tl.where(e_t > 0, e_t * x_t, 0.0), 2), 0)
        columns = _by_thread(columns, P)
        best_s, at_s = _vector_best(best_s, at_s, z, columns)
        best_t, at_t = _vector_best(best_t, at_t, t, columns)
    return (
        top_s, sum_s, sum_1, top_t, sum_t, gap, total, ent_s, ent_t, best_s, at_s, best_t, at_t
    )  # fmt: skip


# ------------------------------------------------------------------------- values and gradients


@triton.jit
def _log_probability(z, factor, top, log_sum, P: tl.constexpr):
    """In base 2. Two roundings near 0 instead of one near the logit's size."""
    return _scaled(z, factor, top, P) - log_sum


@triton.jit
def _evaluate(state, z, t, columns, mask, target, numbers, P: tl.constexpr):
    """One tile into the sums of value and slope. A body of :func:`_sweep`."""
    values, slopes = state
    factor, top_s, log_s, top_t, log_t, first, second = numbers
    log_q = _log_probability(z, factor, top_s, log_s, P)
    log_p = _log_probability(t, factor, top_t, log_t, P)
    # From the logarithm, not a sum's reciprocal: equal logits give equal bits, whatever the
    # compiler contracts.
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    v = value(p, q, log_p, log_q, first, second, P)
    s = slope(p, q, log_p, log_q, first, second, P)
    return values + tl.sum(tl.sum(v, 2), 0), slopes + tl.sum(tl.sum(s, 2), 0)


@triton.jit
def _gradient(z, t, numbers, P: tl.constexpr):
    """The gradient in the raw logits of one entry of any shape, but for the label's own term.

    numbers: ``kd`` and ``label`` are the factors of the teacher's and of the label's exponential,
    ``balance`` the student's relative to the teacher's (1 where both models are equal, so that
    the difference is exactly 0).
    """
    (
        factor, temperature, top_s, log_s, top_t, log_t, balance, kd, label, slopes, uniform,
        softcap, first, second,
    ) = numbers  # fmt: skip
    x_s = _scaled(z, factor, top_s, P)
    if not P.kd_in_loss:
        e_s = tl.exp2(x_s)
        out = label * _at_one(e_s, z, top_s, temperature, P)
    elif P.divergence == "forward_kl":
        e_s = tl.exp2(x_s)
        e_t = tl.exp2(_scaled(t, factor, top_t, P))
        out = (e_s * balance - e_t) * kd
        if P.label_term and P.power != 1:
            out += label * _at_one(e_s, z, top_s, temperature, P)
    else:
        log_q = x_s - log_s
        log_p = _log_probability(t, factor, top_t, log_t, P)
        p, q = tl.exp2(log_p), tl.exp2(log_q)
        s = slope(p, q, log_p, log_q, first, second, P)
        out = (s - q * slopes) * kd
        if P.label_term:
            if P.power == 0:
                out += label * _at_one(q, z, top_s, temperature, P)
            else:
                out += label * _power(q, P)
    if P.smoothing:
        out -= uniform
    if P.student_softcap:
        out *= 1 - (z * (1 / softcap)) * (z * (1 / softcap))
    return out


@triton.jit
def _differentiate(state, z, t, columns, mask, target, numbers, P: tl.constexpr):
    """One tile of the gradient. A body of :func:`_sweep`."""
    out = _rounded(_gradient(z, t, numbers, P), target.dtype.element_ty, P.interpreted)
    tl.store(target, tl.reshape(out, target.shape), mask=mask, eviction_policy=P.store_policy)
    return state


@triton.jit
def _clear(state, z, t, columns, mask, target, numbers, P: tl.constexpr):
    """One tile of a gradient that is 0; reads nothing. A body of :func:`_sweep`."""
    zero = tl.zeros([target.shape[0], target.shape[1]], tl.float32)
    tl.store(target, zero.to(target.dtype.element_ty), mask=mask)
    return state


# ---------------------------------------------------------------------- a row and its three parts


@triton.jit
def _pointers(base, columns, stride, UNIT: tl.constexpr):
    if UNIT:
        return base + columns
    else:
        return base + columns.to(tl.int64) * stride


@triton.jit
def _by_thread(x, P: tl.constexpr):
    """A tile as it is loaded, [K * THREADS, W], in the shape of a body's reductions.

    Only the two-dimensional one leaves the compiler no choice: of [K, THREADS, W], whose first two
    axes are equally far from neighbours, Triton before 3.7 lays the first one across lanes, and
    reductions over it are shuffles.
    """
    return tl.reshape(x, [x.shape[0] // P.THREADS, P.THREADS, x.shape[1]])


@triton.jit
def _tile(
    BODY: tl.constexpr, READS: tl.constexpr, POLICY: tl.constexpr,
    state, bases, first, columns, mask, layout, numbers, P: tl.constexpr,
):  # fmt: skip
    """Load a tile, transform it, hand it to BODY. ``columns`` count from column ``first``."""
    student, teacher, gradient = bases
    student_column, teacher_column, scales = layout
    z, t = None, None
    if READS > 0:
        at = _pointers(student, columns, student_column, P.unit_student)
        z = _read(at, mask, scales[0], scales[2], P.student_scale, P.student_softcap, POLICY, P)
    if READS == 2:
        at = _pointers(teacher, columns, teacher_column, P.unit_teacher)
        t = _read(at, mask, scales[1], scales[3], P.teacher_scale, P.teacher_softcap, POLICY, P)
    if READS > 0:
        z = _by_thread(z, P)
    if READS == 2:
        t = _by_thread(t, P)
    return BODY(state, z, t, first + columns, mask, gradient + columns, numbers, P)


@triton.jit
def _sweep(
    BODY: tl.constexpr, READS: tl.constexpr, POLICY: tl.constexpr,
    state, bases, layout, geometry, numbers, P: tl.constexpr,
):  # fmt: skip
    """Run BODY over this program's columns: whole tiles, a tile of whole vectors, the edges.

    READS: 0 nothing, 1 the student, 2 both models.
    """
    student, teacher, gradient, starts = bases
    student_column, teacher_column, _ = layout
    head, vectors, first, last, edges, _ = geometry
    thread = tl.arange(0, P.THREADS)[:, None]
    index = tl.arange(0, P.K * P.THREADS)[:, None]
    offset = index * P.W + tl.arange(0, P.W)[None, :]
    # Hints have to stand beside the additions whose attributes they are: one on the offset, which
    # AMD's compiler keeps, and one on the pointer, which holds for a base of any alignment.
    student_start, teacher_start, gradient_start = starts
    if P.align_student:
        at = student_start + head
        if P.base_aligned:
            at = tl.multiple_of(at, P.W)
        student_main = tl.multiple_of(student + at, 16)
    else:
        student_main = _pointers(student + student_start, head, student_column, P.unit_student)
    if P.align_teacher:
        at = teacher_start + head
        if P.base_aligned:
            at = tl.multiple_of(at, P.W)
        teacher_main = tl.multiple_of(teacher + at, 16)
    else:
        teacher_main = _pointers(teacher + teacher_start, head, teacher_column, P.unit_teacher)
    if P.align_gradient:
        at = gradient_start + head
        if P.base_aligned:
            at = tl.multiple_of(at, P.W)
        gradient_main = tl.multiple_of(gradient + at, 16)
    else:
        gradient_main = gradient + gradient_start + head
    mains = (student_main, teacher_main, gradient_main)
    step: tl.constexpr = P.K * P.THREADS
    whole = first + (last - first) // step * step
    for vector in range(first, whole, step):
        columns = vector * P.W + offset
        state = _tile(BODY, READS, POLICY, state, mains, head, columns, None, layout, numbers, P)
    if whole < last:
        columns = whole * P.W + offset
        # One bit per vector, so that the masked accesses stay as wide as the others.
        mask = (whole + index) < last
        state = _tile(BODY, READS, POLICY, state, mains, head, columns, mask, layout, numbers, P)
    if edges > 0:
        columns = tl.where(thread < head, thread, thread + vectors * P.W)
        mask = thread < edges
        rows = (student + student_start, teacher + teacher_start, gradient + gradient_start)
        state = _tile(BODY, READS, POLICY, state, rows, 0, columns, mask, layout, numbers, P)
    return state


@triton.jit
def _geometry(student, vocab, member, P: tl.constexpr):
    """(head, vectors, first, last, edges, vocab) of this program's slice of a row.

    Columns before the first 16-byte boundary (head) and behind the last whole vector are the edges;
    member 0 does them. The vectors in between are shared out; their accesses are 16 bytes wide,
    whatever the vocabulary.
    """
    if P.align_student:
        address = student.to(tl.int64)
        width: tl.constexpr = P.itemsize * P.W
        head = tl.minimum(((width - address % width) % width) // P.itemsize, vocab).to(tl.int32)
    else:
        head = vocab * 0
    vectors = (vocab - head) // P.W
    share = tl.cdiv(vectors, P.split)
    first = tl.minimum(member * share, vectors)
    last = tl.minimum(first + share, vectors)
    edges = tl.where(member == 0, vocab - vectors * P.W, 0)
    return head, vectors, first, last, edges, vocab


@triton.jit
def _owns(column, member, geometry, P: tl.constexpr):
    """Whether this program's slice has the column."""
    head, vectors, first, last, _, _ = geometry
    at = column - head
    edge = (at < 0) | (at >= vectors * P.W)
    return (edge & (member == 0)) | ((at >= first * P.W) & (at < last * P.W))


# ----------------------------------------------------------------- exchange between the members


@triton.jit
def _store_fields(at, stride, fields, GIVEN: tl.constexpr, COUNT: tl.constexpr):
    """COUNT scalars, of which GIVEN are not 0, into every ``stride``-th place, by one store.

    A store each has an address each, which the compiler computes before the loop over rows and
    keeps in two registers of every thread.
    """
    SIZE: tl.constexpr = triton.next_power_of_2(COUNT)
    index = tl.arange(0, SIZE)
    values = tl.zeros([SIZE], tl.float32)
    for i in tl.static_range(GIVEN):
        values = tl.where(index == i, fields[i], values)
    if SIZE == COUNT:
        tl.store(at + index * stride, values)
    else:
        tl.store(at + index * stride, values, mask=index < COUNT)


@triton.jit
def _publish(
    partials, slot, member, fields, FIRST: tl.constexpr, GIVEN: tl.constexpr,
    COUNT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    at = partials + (slot * PARTIALS + FIRST) * P.members + member
    _store_fields(at, P.members, fields, GIVEN, COUNT)


@triton.jit
def _field(partials, slot, index, other, P: tl.constexpr):
    """One number of every member, [members rounded up to a power of two]."""
    member = tl.arange(0, P.members_pow2)
    at = partials + (slot * PARTIALS + index) * P.members + member
    # .cg: the first-level cache may hold what another member has overwritten since.
    return tl.load(at, mask=member < P.members, other=other, cache_modifier=".cg")


@triton.jit
def _collected(partials, slot, temperature, P: tl.constexpr):
    low: tl.constexpr = LOWEST
    state = (
        _field(partials, slot, 0, low, P), _field(partials, slot, 1, 0.0, P),
        _field(partials, slot, 2, 0.0, P), _field(partials, slot, 3, low, P),
        _field(partials, slot, 4, 0.0, P), _field(partials, slot, 5, 0.0, P),
        _field(partials, slot, 6, 0.0, P), _field(partials, slot, 7, 0.0, P),
        _field(partials, slot, 8, 0.0, P), _field(partials, slot, 9, low, P),
        _field(partials, slot, 10, 0.0, P), _field(partials, slot, 11, low, P),
        _field(partials, slot, 12, 0.0, P),
    )  # fmt: skip
    return _merged(state, temperature, P)


@triton.jit
def _meet(arrivals, target):
    """Wait until ``target`` members have arrived. Every program of the grid must be resident.

    The release orders this program's partials before its arrival, the acquire the others' after it.
    """
    seen = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") + 1
    while seen < target:
        seen = tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")


# -------------------------------------------------------------------------------------- one row


@triton.jit
def _label_logit(student, label, needed, stride, scales, P: tl.constexpr):
    z = tl.load(_pointers(student, label, stride, P.unit_student), mask=needed, other=0.0)
    return _transformed(z, scales[0], scales[2], P.student_scale, P.student_softcap, P)


@triton.jit
def _known(statistics, at, rows):
    """A row's state, and the sum of slopes, as the forward kept them."""
    at = statistics + at + 10 * rows
    return (
        tl.load(at), tl.load(at + rows), tl.load(at + 2 * rows), tl.load(at + 3 * rows),
        tl.load(at + 4 * rows), tl.load(at + 5 * rows), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
    ), tl.load(at + 6 * rows)  # fmt: skip


@triton.jit
def _closed_form(state, log_s, log_t, P: tl.constexpr):
    """The divergence in nats, unclamped, of the two KLs."""
    _, sum_s, _, _, sum_t, gap, _, _, _, _, _, _, _ = state
    if P.divergence == "forward_kl":
        return LN2 * (gap / sum_t - log_t + log_s)
    else:
        return LN2 * (gap / sum_s - log_s + log_t)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _finish(
    state, logs, divergence, slopes, z_label, label, weight, scale, at, rows, vocab,
    loss, statistics, alpha, temperature, kd_scale, smoothing, z_loss, P: tl.constexpr,
):  # fmt: skip
    """A row's loss and statistics, in the order of ``problem.STATISTICS``."""
    top_s, sum_s, _, top_t, sum_t, _, total, ent_s, ent_t, _, at_s, _, at_t = state
    log_s, log_t, log_1 = logs
    student_lse = (top_s + log_s) * LN2
    teacher_lse = (top_t + log_t) * LN2
    label_lse = (top_s * temperature + log_1) * LN2
    kd, ce, z = 0.0, 0.0, 0.0
    row_loss = 0.0
    if P.with_kd:
        kd = kd_scale * tl.where(divergence < 0, 0.0, divergence)
        kd = tl.where(_finite(student_lse) & _finite(teacher_lse), kd, float("nan"))
        if P.kd_in_loss:
            row_loss += alpha * kd
    if P.with_ce:
        ce = (log_1 - _scaled(z_label, LOG2E, top_s * temperature, P)) * LN2
        if P.smoothing:
            ce = (1 - smoothing) * ce + smoothing * (label_lse - total / vocab)
        if P.ce_in_loss:
            row_loss += (1 - alpha) * ce
    if P.z_loss:
        z = z_loss * label_lse * label_lse
        row_loss += z
    if P.with_labels:
        row_loss = tl.where((label >= 0) & (label < vocab), row_loss, float("nan"))
    tl.store(loss + at, row_loss * scale)
    hits, student_entropy, teacher_entropy = 0.0, 0.0, 0.0
    if P.extras:
        student_entropy = LN2 * (log_s - ent_s / sum_s)
        teacher_entropy = LN2 * (log_t - ent_t / sum_t)
        hits = tl.where(at_s == at_t, 1.0, 0.0)
        if P.with_labels:
            hits += tl.where(at_s == label.to(tl.float32), 2.0, 0.0)
    # The last seven are what :func:`_known` reads: the gradient then has the same bits in either
    # launch.
    _store_fields(
        statistics + at, rows,
        (
            row_loss * weight, kd, ce, z, student_lse, teacher_lse, label_lse, student_entropy,
            teacher_entropy, hits, state[0], state[1], state[2], state[3], state[4], state[5],
            slopes,
        ),
        17, 17,
    )  # fmt: skip


@triton.jit
def _coefficients(
    state, logs, slopes, upstream, vocab, factor, softcap, alpha, temperature, kd_scale, smoothing,
    z_loss, first, second, P: tl.constexpr,
):  # fmt: skip
    """The numbers of :func:`_gradient` for one row, and the factor of the label's own term."""
    top_s, sum_s, sum_1, top_t, sum_t, _, _, _, _, _, _, _, _ = state
    log_s, log_t, log_1 = logs
    kd, ce, label, balance = 0.0, 0.0, 0.0, 1.0
    if P.kd_in_loss:
        kd = alpha * kd_scale / temperature
    if P.ce_in_loss:
        ce = 1 - alpha
        label += ce
    if P.z_loss:
        label += (2 * z_loss) * ((top_s * temperature + log_1) * LN2)
    label = label / sum_1
    if P.kd_in_loss:
        if P.divergence == "forward_kl":
            kd = kd / sum_t
            balance = sum_t / sum_s
            if P.label_term and P.power == 1:
                balance += label / kd
        else:
            # A row without a distribution: comparisons with NaN would give slopes of 0.
            kd = tl.where(_finite(log_s) & _finite(log_t), kd, float("nan"))
            if P.power != 0:
                label = label * _power(sum_s, P)
    # The upstream factor last, and never divided by: it may be 0, inf or NaN.
    return (
        factor, temperature, top_s, log_s, top_t, log_t, balance, kd * upstream, label * upstream,
        slopes, ce * (smoothing / vocab) * upstream, softcap, first, second,
    ), ce * (1 - smoothing) * upstream  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "rows",
        "inner",
        "vocab",
        "width",
        "gradient_row",
        "student_outer",
        "student_inner",
        "student_column",
        "teacher_outer",
        "teacher_inner",
        "teacher_column",
        "upstream_stride",
        "ignore_index",
    ]
)
def kd_rows(
    student_ptr,  # [rows of (outer, inner) strides, vocab]
    teacher_ptr,
    labels_ptr,  # int64 [rows]
    weights_ptr,  # float32 [rows]
    items_ptr,  # float32 []: the denominator of the mean
    upstream_ptr,  # [] or [rows]: grad_output
    loss_ptr,  # float32 [rows]
    statistics_ptr,  # float32 [10 + 7, rows]
    gradient_ptr,  # [rows, width], rows gradient_row apart, dtype of the student
    partials_ptr,  # float32 [slots, PARTIALS, members]
    arrivals_ptr,  # int32 [groups], zero
    errors_ptr,  # int64 []: 1 + the highest row with a label outside the vocabulary
    rows,
    inner,
    vocab,
    width,
    gradient_row,
    student_outer,
    student_inner,
    student_column,
    teacher_outer,
    teacher_inner,
    teacher_column,
    upstream_stride,
    ignore_index,
    row_factor,
    factor,  # log2(e) / T
    temperature,
    kd_scale,
    alpha,
    smoothing,
    z_loss,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    first_parameter,
    second_parameter,
    P: tl.constexpr,
):
    """Persistent: groups of ``P.split`` programs take rows in turn, each member a slice."""
    program = tl.program_id(0)
    member = program % P.split
    group = program // P.split
    groups = tl.num_programs(0) // P.split
    scales = (student_scale, teacher_scale, student_softcap, teacher_softcap)
    layout = (student_column, teacher_column, scales)
    rows64 = rows.to(tl.int64)
    visits = group * 0
    for index in range(group, rows, groups):
        row = index + rows64 * 0  # 64 bits: every offset of a row is computed from it
        outer, within = row // inner, row % inner
        starts = (
            outer * student_outer + within * student_inner,
            outer * teacher_outer + within * teacher_inner,
            row * gradient_row,
        )
        student = student_ptr + starts[0]
        teacher = teacher_ptr + starts[1]
        geometry = _geometry(student, vocab, member, P)
        if P.differentiate:
            bases = (student_ptr, teacher_ptr, gradient_ptr, starts)
            gradient = gradient_ptr + starts[2]
        else:
            bases = (student_ptr, teacher_ptr, student_ptr, starts)
            gradient = student
        pointers = (student, teacher, gradient)
        weight, scale, label = 1.0, row_factor, 0
        if P.with_items:
            items = tl.load(items_ptr)
            scale = tl.div_rn(1.0, tl.where(items == 0, 1.0, items))
        if P.with_weights:
            weight = tl.load(weights_ptr + row)
            scale = scale * weight
        if P.with_labels:
            label = tl.load(labels_ptr + row)
            scale = tl.where(label == ignore_index, 0.0, scale)
        upstream = scale
        if P.with_upstream:
            given = tl.load(upstream_ptr + row * upstream_stride)
            upstream = scale * given.to(tl.float32)
        # Rows that do not count are not read: they may hold anything.
        alive = scale != 0
        if not P.finish:
            alive = alive & (upstream != 0)
        if alive:
            safe = label
            if P.with_labels:
                valid = (label >= 0) & (label < vocab)
                safe = tl.where(valid, label, 0)
                upstream = tl.where(valid, upstream, float("nan"))
                if P.finish:
                    if member == 0:
                        if not valid:
                            tl.atomic_max(errors_ptr, row + 1)
            # Before anything of the row is written: the gradient may overwrite the student.
            z_label = 0.0
            if P.with_ce:
                # By those who need it only: another member's slice may be overwritten by now.
                needed = _owns(safe, member, geometry, P) | ((member == 0) & P.finish)
                z_label = _label_logit(student, safe, needed, student_column, scales, P)
            slot = row
            if P.exchange == "spin":
                slot = row * 0 + group * 2 + (visits // P.meetings) % 2
            if P.observe:
                state = _neutral(P.THREADS)
                state = _sweep(
                    _observe, 2, P.first_policy, state, bases, layout, geometry,
                    (factor, temperature), P,
                )  # fmt: skip
                state = _merged(state, temperature, P)
                if P.exchange != "none":
                    _publish(partials_ptr, slot, member, state, 0, 13, 16, P)
                if P.exchange == "spin":
                    visits += 1
                    _meet(arrivals_ptr + group, visits * P.members)
                    state = _collected(partials_ptr, slot, temperature, P)
            elif P.source == "partials":
                state = _collected(partials_ptr, slot, temperature, P)
            else:
                state, kept_slopes = _known(statistics_ptr, row, rows64)
            log_s, log_t = tl.log2(state[1]), tl.log2(state[4])
            log_1 = log_s
            if P.power != 1:
                log_1 = tl.log2(state[2])
            if P.single:
                # One column: all log-probabilities are 0, which log2(exp2(x)) misses by an ulp.
                only = _transformed(
                    tl.load(student), scales[0], scales[2], P.student_scale, P.student_softcap, P
                )
                log_s = _scaled(only, factor, state[0], P)
                log_1 = _scaled(only, LOG2E, state[0] * temperature, P)
                only = _transformed(
                    tl.load(teacher), scales[1], scales[3], P.teacher_scale, P.teacher_softcap, P
                )
                log_t = _scaled(only, factor, state[3], P)
            logs = (log_s, log_t, log_1)
            divergence, slopes = 0.0, 0.0
            if P.closed:
                divergence = _closed_form(state, log_s, log_t, P)
                if P.single:
                    divergence = divergence * 0.0
                slopes = divergence + 1
            if P.source == "statistics":
                slopes = kept_slopes
            if P.evaluate:
                zero = tl.zeros([P.THREADS], tl.float32)
                numbers = (
                    factor, state[0], log_s, state[3], log_t, first_parameter, second_parameter
                )  # fmt: skip
                values, slope_sums = _sweep(
                    _evaluate, 2, P.middle_policy, (zero, zero), bases, layout, geometry, numbers, P
                )
                divergence, slopes = _pair_sum(values, slope_sums)
                if P.exchange != "none":
                    _publish(partials_ptr, slot, member, (divergence, slopes), 13, 2, 2, P)
                if P.exchange == "spin":
                    visits += 1
                    _meet(arrivals_ptr + group, visits * P.members)
            if P.collect_sums:
                divergence, slopes = _pair_sum(
                    _field(partials_ptr, slot, 13, 0.0, P), _field(partials_ptr, slot, 14, 0.0, P)
                )
            if P.finish:
                if member == 0:
                    _finish(
                        state, logs, divergence, slopes, z_label, label, weight, scale, row, rows64,
                        vocab, loss_ptr, statistics_ptr, alpha, temperature, kd_scale, smoothing,
                        z_loss, P,
                    )  # fmt: skip
            if P.differentiate:
                if not P.observe:
                    # No reduction has brought the warps together since they read the label's logit,
                    # which the gradient may overwrite.
                    tl.debug_barrier()
                if P.student_scale:
                    upstream = upstream * student_scale
                numbers, of_label = _coefficients(
                    state, logs, slopes, upstream, vocab, factor, student_softcap, alpha,
                    temperature, kd_scale, smoothing, z_loss, first_parameter, second_parameter, P,
                )  # fmt: skip
                _sweep(
                    _differentiate, P.gradient_reads, P.last_policy, row, bases, layout, geometry,
                    numbers, P,
                )  # fmt: skip
                if P.ce_in_loss:
                    if _owns(safe, member, geometry, P):
                        _patch_label(pointers, safe, z_label, of_label, layout, numbers, P)
        else:
            if P.finish:
                if member == 0:
                    tl.store(loss_ptr + row, 0.0)
                    _store_fields(statistics_ptr + row, rows64, (0.0,), 1, 17)
            if P.differentiate:
                _sweep(_clear, 0, "", row, bases, layout, geometry, 0, P)
        if P.differentiate:
            if P.truncated:
                if member == 0:
                    _clear_rest(gradient, vocab, width, P)


@triton.jit
def _patch_label(pointers, label, z, of_label, layout, numbers, P: tl.constexpr):
    """Store the label's entry again, with its own term: cheaper than a comparison per entry."""
    _, teacher, gradient = pointers
    _, teacher_column, scales = layout
    t = z
    if P.gradient_reads == 2:
        t = tl.load(_pointers(teacher, label, teacher_column, P.unit_teacher))
        t = _transformed(t, scales[1], scales[3], P.teacher_scale, P.teacher_softcap, P)
    out = _gradient(z, t, numbers, P)
    own = of_label
    if P.student_softcap:
        softcap = numbers[11]
        own = own * (1 - (z * (1 / softcap)) * (z * (1 / softcap)))
    # Another thread has stored this entry without the term.
    tl.debug_barrier()
    tl.store(gradient + label, _rounded(out - own, gradient.dtype.element_ty, P.interpreted))


@triton.jit
def _clear_rest(gradient, vocab, width, P: tl.constexpr):
    """Zeros in the columns behind a truncated vocabulary."""
    offset = tl.arange(0, P.THREADS)
    zero = tl.zeros([P.THREADS], tl.float32).to(gradient.dtype.element_ty)
    for first in range(vocab, width, P.THREADS):
        tl.store(gradient + first + offset, zero, mask=first + offset < width)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def count_rows(labels_ptr, items_ptr, rows, ignore_index, SIZE: tl.constexpr):
    """items = the number of rows that count, at least 1. One program."""
    offset = tl.arange(0, SIZE)
    count = tl.zeros([SIZE], tl.int32)
    for first in range(0, rows, SIZE):
        inside = first + offset < rows
        label = tl.load(labels_ptr + first + offset, mask=inside, other=ignore_index)
        count += tl.where(label == ignore_index, 0, 1)
    tl.store(items_ptr, tl.maximum(tl.sum(count, 0), 1).to(tl.float32))


@triton.jit(do_not_specialize=["rows"])
def sum_rows(rows_ptr, sum_ptr, rows, SIZE: tl.constexpr):
    """The sum of the rows' losses in float64, in a fixed order. One program."""
    offset = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float64)
    for first in range(0, rows, SIZE):
        inside = first + offset < rows
        total += tl.load(rows_ptr + first + offset, mask=inside, other=0.0).to(tl.float64)
    tl.store(sum_ptr, tl.sum(total, 0).to(tl.float32))


@triton.jit
def scale_rows(
    source_ptr, out_ptr, upstream_ptr, rows, width, source_row, out_row, upstream_stride,
    BLOCK: tl.constexpr, PER_ROW: tl.constexpr, IN_PLACE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = source * upstream, rounded once; in place, what is multiplied by 1 is not touched.

    Persistent: the grid does not grow with the work, so that a launch with none costs the same for
    any size.
    """
    offset = tl.arange(0, BLOCK)
    chunks = tl.cdiv(width, BLOCK)
    units = chunks * (rows + tl.program_id(0).to(tl.int64) * 0)
    factor = tl.load(upstream_ptr).to(tl.float32)
    if not PER_ROW:
        if IN_PLACE:
            units = tl.where(factor == 1, 0, units)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row = units * 0 + unit // chunks
        if PER_ROW:
            factor = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
        column = unit % chunks * BLOCK + offset
        if IN_PLACE:
            inside = column < tl.where(factor == 1, 0, width)
        else:
            inside = column < width
        source = tl.load(source_ptr + row * source_row + column, mask=inside, other=0.0)
        out = _rounded(source.to(tl.float32) * factor, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + row * out_row + column, out, mask=inside)
