"""What the sweeps do with a tile: observe, evaluate, differentiate it, or clear the gradient.

Parameters are those of ``BODY`` in :func:`~kdkernels.backends.triton.sweep.sweep`.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Numbers
from .arithmetic import at_one, exponent, power, product, rounded, scaled, tile_sum
from .functors import slope, value
from .state import SURE, State, with_tile
from .sweep import by_thread


class Softmaxes(NamedTuple):
    """Both models' softmaxes of a row, and the options."""

    state: State
    log_s: Any  # log2 of the sums relative to the top logits, where the state's are to products
    log_t: Any
    log_1: Any
    centre: Any  # what every slope is taken less, times q
    numbers: Numbers


class Coefficients(NamedTuple):
    """The numbers of a row's gradient."""

    kd: Any  # the factor of the teacher's exponential
    label: Any  # that of the exponential at temperature 1
    #: That of the student's exponential relative to the teacher's: 1 where both models are equal,
    #: so that the difference is exactly 0.
    balance: Any
    slopes: Any  # the sum of the divergence's centred slopes
    uniform: Any  # what label smoothing takes from every entry
    own: Any  # the factor of the label's own term


class Sums(NamedTuple):
    """Of a divergence's value and centred slope."""

    value: Any
    slope: Any


@triton.jit
def observe(state, z, t, columns, mask, target, numbers, P: tl.constexpr):
    """The tile into the statistics."""
    inside = None
    if mask is not None:
        inside = by_thread(mask, P)
    columns = by_thread(columns, P)
    return with_tile(state, z, t, columns, inside, numbers, P)


@triton.jit
def log_probability(z, factor, top, log_sum, P: tl.constexpr):
    """In base 2. The difference of logits is exact or nearly so, whatever their size."""
    return scaled(z - top, factor, log_sum, P)


@triton.jit
def centred_slope(p, q, log_p, log_q, softmaxes, P: tl.constexpr):
    """The slope less centre * q, which is 0 for an entry that the student is sure of.

    There slope - q * sum(slope) would be a difference of two numbers of order 1, and the gradient
    is of the order of 1 - q.
    """
    numbers = softmaxes.numbers
    first, second = numbers.first, numbers.second
    s = slope(p, q, log_p, log_q, softmaxes.centre, first, second, P.functor)
    return tl.where(log_q > SURE, 0.0, s)


@triton.jit
def evaluate(sums, z, t, columns, mask, target, softmaxes, P: tl.constexpr):
    """The tile into the sums of value and slope."""
    state, numbers = softmaxes.state, softmaxes.numbers
    log_q = log_probability(z, numbers.factor, state.student.top, softmaxes.log_s, P)
    log_p = log_probability(t, numbers.factor, state.teacher.top, softmaxes.log_t, P)
    # From the logarithm, not a sum's reciprocal: equal logits give equal bits, whatever the
    # compiler contracts.
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    v = value(p, q, log_p, log_q, numbers.first, numbers.second, P.functor)
    s = centred_slope(p, q, log_p, log_q, softmaxes, P)
    return Sums(value=sums.value + tile_sum(v), slope=sums.slope + tile_sum(s))


@triton.jit
def gradient(z, t, softmaxes, given, P: tl.constexpr):
    """The gradient in the raw logits of one entry of any shape, but for the label's own term.

    given: :class:`Coefficients`.
    """
    state, numbers = softmaxes.state, softmaxes.numbers
    factor, temperature = numbers.factor, numbers.temperature
    top_s = product(state.student.top, factor)
    if not P.terms.kd_in_loss:
        e_s = tl.exp2(exponent(z, factor, state.student.top, P))
        out = given.label * at_one(e_s, z, top_s, temperature, P)
    elif P.functor.divergence == "forward_kl":
        e_s = tl.exp2(exponent(z, factor, state.student.top, P))
        e_t = tl.exp2(exponent(t, factor, state.teacher.top, P))
        out = (e_s * given.balance - e_t) * given.kd
        if P.label_term and P.terms.power != 1:
            out += given.label * at_one(e_s, z, top_s, temperature, P)
    else:
        log_q = log_probability(z, factor, state.student.top, softmaxes.log_s, P)
        log_p = log_probability(t, factor, state.teacher.top, softmaxes.log_t, P)
        p, q = tl.exp2(log_p), tl.exp2(log_q)
        s = centred_slope(p, q, log_p, log_q, softmaxes, P)
        out = (s - q * given.slopes) * given.kd
        if P.label_term:
            if P.terms.power == 0:
                out += given.label * at_one(q, z, top_s, temperature, P)
            else:
                out += given.label * power(q, P)
    if P.terms.smoothing:
        out -= given.uniform
    if P.student.softcap:
        out *= cap_slope(z, numbers.student_softcap)
    return out


@triton.jit
def cap_slope(z, softcap):
    """The derivative of softcap * tanh(raw / softcap), from its value z."""
    return 1 - (z * (1 / softcap)) * (z * (1 / softcap))


@triton.jit
def differentiate(state, z, t, columns, mask, target, given, P: tl.constexpr):
    """The tile of the gradient. given: (:class:`Softmaxes`, :class:`Coefficients`)."""
    softmaxes, coefficients = given
    out = gradient(z, t, softmaxes, coefficients, P)
    out = rounded(out, target.dtype.element_ty, P.interpreted)
    tl.store(target, tl.reshape(out, target.shape), mask=mask, eviction_policy=P.store_policy)
    return state


@triton.jit
def clear(state, z, t, columns, mask, target, given, P: tl.constexpr):
    """A tile of a gradient that is 0; reads nothing."""
    zero = tl.zeros([target.shape[0], target.shape[1]], tl.float32)
    tl.store(target, zero.to(target.dtype.element_ty), mask=mask)
    return state
