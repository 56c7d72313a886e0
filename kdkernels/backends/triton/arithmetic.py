"""Exponentials in base 2, rounding, and two numbers in one reduction.

``P`` is a Variant (:mod:`~kdkernels.backends.triton.policy`): what is fixed at compile time. A
condition on it is decided when the kernel is compiled, so it does not merge with one on a tensor.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM300
import triton
import triton.language as tl

from .functors import LOG2E


@triton.jit
def scaled(z, factor, top, P: tl.constexpr):
    """z * factor - top, rounded once."""
    if P.interpreted:
        # A number of the call is a Python float here until a function has taken it.
        factor = tl.cast(factor, tl.float32)
        return (z.to(tl.float64) * factor - top).to(tl.float32)
    else:
        return tl.fma(z, factor, -top)


@triton.jit
def product(x, factor):
    """x * factor, rounded: no compiler makes one operation of it and a sum that it is a term of."""
    return tl.fma(x, factor, 0.0)


@triton.jit
def exponent(z, factor, top, P: tl.constexpr):
    """Of the exponential that the sums are made of: z * factor less the rounded top * factor."""
    if P.single:
        # The only exponential is 1, whatever a product's rounding would make of it.
        return (z - top) * factor
    else:
        return scaled(z, factor, product(top, factor), P)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in the gradient's dtype, rounded to nearest even; the interpreter's bfloat16 truncates."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def power(e, P: tl.constexpr):
    """e^T for the T that get their exponentials at temperature 1 by multiplication."""
    if P.terms.power == 1:
        return e
    elif P.terms.power == 2:
        return e * e
    elif P.terms.power == 3:
        return e * e * e
    else:
        tl.static_assert(P.terms.power == 4)
        return (e * e) * (e * e)


@triton.jit
def at_one(e, z, top, temperature, P: tl.constexpr):
    """exp2(z log2(e) - top * T): the exponential at temperature 1 from e, that at T."""
    if P.terms.power == 0:
        # A thread that has seen no column: LOWEST * T must not become -inf.
        return tl.exp2(scaled(z, LOG2E, tl.maximum(top * temperature, -3.0e38), P))
    else:
        return power(e, P)


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


# Several numbers in one reduction: the warps meet once for all of them. And Triton before 3.7 holds
# a register through the whole row for each reduction, whose second half only some lanes load.


@triton.jit
def pair_max(a, b):
    return tl.split(tl.max(tl.join(a, b), 0))


@triton.jit
def pair_sum(a, b):
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def tile_sum(x):
    """The sum of a tile [K, THREADS, W] in every thread."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def tile_max(x):
    return tl.max(tl.max(x, 2), 0)
