"""What the sweeps do with a tile: observe, evaluate, differentiate it, or clear the gradient.

Parameters are those of ``BODY`` in :func:`~kdkernels.backends.triton.sweep.sweep`.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Numbers
from .arithmetic import at_one, power, rounded, scaled, tile_sum
from .functors import slope, value
from .state import State, with_tile
from .sweep import by_thread


class Softmaxes(NamedTuple):
    """Both models' softmaxes of a row, and the options."""

    state: State
    log_s: Any  # log2 of the sums in the state
    log_t: Any
    log_1: Any
    numbers: Numbers


class Coefficients(NamedTuple):
    """The numbers of a row's gradient."""

    kd: Any  # the factor of the teacher's exponential
    label: Any  # that of the exponential at temperature 1
    #: That of the student's exponential relative to the teacher's: 1 where both models are equal,
    #: so that the difference is exactly 0.
    balance: Any
    slopes: Any  # the sum of the divergence's slopes
    uniform: Any  # what label smoothing takes from every entry
    own: Any  # the factor of the label's own term


class Sums(NamedTuple):
    """Of a divergence's value and slope."""

    value: Any
    slope: Any


@triton.jit
def observe(state, z, t, columns, mask, target, numbers, P: tl.constexpr):
    """The tile into the statistics."""
    inside = None
    if mask is not None:
        inside = by_thread(mask, P)
    columns = by_thread(columns, P)
    return with_tile(state, z, t, columns, inside, numbers.factor, numbers.temperature, P)


@triton.jit
def log_probability(z, factor, top, log_sum, P: tl.constexpr):
    """In base 2. Two roundings near 0 instead of one near the logit's size."""
    return scaled(z, factor, top, P) - log_sum


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
    s = slope(p, q, log_p, log_q, numbers.first, numbers.second, P.functor)
    return Sums(value=sums.value + tile_sum(v), slope=sums.slope + tile_sum(s))


@triton.jit
def gradient(z, t, softmaxes, given, P: tl.constexpr):
    """The gradient in the raw logits of one entry of any shape, but for the label's own term.

    given: :class:`Coefficients`.
    """
    state, numbers = softmaxes.state, softmaxes.numbers
    factor, temperature, top_s = numbers.factor, numbers.temperature, state.student.top
    x_s = scaled(z, factor, top_s, P)
    if not P.terms.kd_in_loss:
        e_s = tl.exp2(x_s)
        out = given.label * at_one(e_s, z, top_s, temperature, P)
    elif P.functor.divergence == "forward_kl":
        e_s = tl.exp2(x_s)
        e_t = tl.exp2(scaled(t, factor, state.teacher.top, P))
        out = (e_s * given.balance - e_t) * given.kd
        if P.label_term and P.terms.power != 1:
            out += given.label * at_one(e_s, z, top_s, temperature, P)
    else:
        log_q = x_s - softmaxes.log_s
        log_p = log_probability(t, factor, state.teacher.top, softmaxes.log_t, P)
        p, q = tl.exp2(log_p), tl.exp2(log_q)
        s = slope(p, q, log_p, log_q, numbers.first, numbers.second, P.functor)
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
