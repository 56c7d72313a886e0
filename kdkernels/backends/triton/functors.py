"""The divergences on the device: ``value`` and ``slope`` of one vocabulary entry.

The twin of ``kdkernels/divergences.py`` and ``csrc/divergences.h``. Log-probabilities come in base
2 (``log_p``, ``log_q``), since the hardware's exponential is ``exp2``; results are in nats. Of the
two KLs between logits ``row.py`` has the sums in closed form.

``P`` is a :class:`~kdkernels.backends.triton.policy.Functor`.

Where a probability is 0 its term is 0, whatever its logarithm; where both are 0 the entry is dead.

Softmax's Jacobian gives the same gradient of all slopes less ``centre * q``: ``row.py`` chooses the
centre, for the digits of the sum of slopes. All slopes but the alpha-beta divergence's and forward
KL's are q times a ratio of moderate size, so the centre is taken from the ratio.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
#: Stands for the logarithm of 0 where a probability of 0 is to make 0 of a product with it.
LOG_0 = tl.constexpr(-1.0e30)

#: Divergences that need a sweep of their own for the sum of values and slopes.
SWEPT = ("jsd", "tvd", "skew_forward_kl", "skew_reverse_kl", "alpha_beta")


def alpha_beta_case(alpha: float, beta: float) -> str:
    """Which of the limits of the alpha-beta divergence applies; fixed at compile time."""
    if alpha == 0 and beta == 0:
        return "both"
    if alpha == 0:
        return "alpha"
    if beta == 0:
        return "beta"
    return "sum" if alpha + beta == 0 else "none"


@triton.jit
def times(weight, x):
    """weight * x with 0 * anything = 0."""
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def expm1(x):
    """exp(x) - 1. Near 0 a polynomial: exp2 minus 1 would lose all digits there."""
    tail = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))
    near = x + x * x * (0.5 + x * (1 / 6 + x * tail))
    return tl.where(tl.abs(x) < 0.35, near, tl.exp2(x * LOG2E) - 1)


@triton.jit
def reciprocal(x, P: tl.constexpr):
    """1 / x for x in [1, inf]: one instruction and 1 ulp instead of a division of ten."""
    if P.nvidia:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1 / x


@triton.jit
def tanh(x, P: tl.constexpr):
    """tanh(x) to a few ulp; the hardware's approximation has 11 bits."""
    s = x * x
    near = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    far = 1 - 2 * reciprocal(tl.exp2(tl.abs(x) * (2 * LOG2E)) + 1, P)
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def _log2(x, P: tl.constexpr):
    """log2 of a number below 1/2: where 22 bits are enough, one instruction instead of 20."""
    if P.nvidia:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def log1p_base2(u, P: tl.constexpr):
    """log2(1 + u) for -1 < u <= 0, with the digits of a small u."""
    s = u * reciprocal(2 + u, P)
    t = s * s
    odd = 1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13)))))
    return tl.where(u > -0.5, (s + s * t * odd) * (2 * LOG2E), _log2(1 + u, P))


@triton.jit
def above_mixture(log_p, log_q, beta, P: tl.constexpr):
    """(log p - log m, log q - log m) in base 2 for m = beta p + (1 - beta) q, 0 < beta < 1.

    Relative to the larger of the two, so that equal probabilities give exactly 0, and with the
    digits of a small difference: the divergence of close distributions is of second order in it.
    Finite, so that 0 times them is 0.
    """
    log_0: tl.constexpr = LOG_0
    log_p, log_q = tl.maximum(log_p, log_0), tl.maximum(log_q, log_0)
    p_is_larger = log_p >= log_q
    below = tl.minimum(log_p, log_q) - tl.maximum(log_p, log_q)
    grow = log1p_base2(tl.where(p_is_larger, 1 - beta, beta) * expm1(below * LN2), P)
    return (
        tl.where(p_is_larger, -grow, below - grow),
        tl.where(p_is_larger, below - grow, -grow),
    )


@triton.jit
def _ratio_shape(own, other, ratio, OWN_IS_0: tl.constexpr, OTHER_IS_0: tl.constexpr, SUM_IS_0):
    """``AlphaBeta._shape``: the entry's value over base^(own + other); ratio <= 0 in nats."""
    if OWN_IS_0 and OTHER_IS_0:
        return ratio * ratio * 0.5
    elif OWN_IS_0:
        power = other * ratio
        finite = tl.where(power == -float("inf"), 0.0, power)  # there x e^x is 0, too
        return (finite * tl.exp2(finite * LOG2E) - expm1(power)) * (1 / (other * other))
    elif OTHER_IS_0:
        return (expm1(own * ratio) - own * ratio) * (1 / (own * own))
    elif SUM_IS_0:
        return (expm1(other * ratio) - other * ratio) * (1 / (own * own))
    else:
        total = own + other
        mixed = expm1(other * ratio) - other / total * expm1(total * ratio)
        return mixed * (-1 / (own * other))


@triton.jit
def _power(log_base, exponent, IS_0: tl.constexpr):
    """base^exponent from the base's logarithm in base 2, with 0^0 = 1."""
    if IS_0:
        return tl.where(log_base == log_base, 1.0, log_base)
    else:
        return tl.exp2(exponent * log_base)


@triton.jit
def _alpha_beta_value(log_p, log_q, alpha, beta, CASE: tl.constexpr):
    A0: tl.constexpr = CASE == "alpha" or CASE == "both"
    B0: tl.constexpr = CASE == "beta" or CASE == "both"
    SUM0: tl.constexpr = CASE == "sum" or CASE == "both"
    dead = (log_p == -float("inf")) & (log_q == -float("inf"))
    log_p = tl.where(dead, 0.0, log_p)
    log_q = tl.where(dead, 0.0, log_q)
    below = tl.minimum(log_q - log_p, 0.0) * LN2
    above = tl.minimum(log_p - log_q, 0.0) * LN2
    total = alpha + beta
    from_p = times(_power(log_p, total, SUM0), _ratio_shape(alpha, beta, below, A0, B0, SUM0))
    from_q = times(_power(log_q, total, SUM0), _ratio_shape(beta, alpha, above, B0, A0, SUM0))
    value = tl.where(log_p >= log_q, from_p, from_q)
    # No entry is negative: inf - inf, which exponents of opposite sign can give, is +inf.
    unknown = (value != value) & (log_p == log_p) & (log_q == log_q)
    return tl.where(dead, 0.0, tl.where(unknown, float("inf"), value))


@triton.jit
def _alpha_beta_slope(log_p, log_q, alpha, beta, CASE: tl.constexpr):
    dead = (log_p == -float("inf")) & (log_q == -float("inf"))
    log_p = tl.where(dead, 0.0, log_p)
    log_q = tl.where(dead, 0.0, log_q)
    ratio = (log_p - log_q) * LN2
    power = _power(log_q, alpha + beta, CASE == "sum" or CASE == "both")
    if CASE == "alpha" or CASE == "both":
        slope = -times(power, ratio)
    else:
        slope = -power * (expm1(alpha * ratio) * (1 / alpha))
        # Where those factors are 0 and inf, the two powers, whose difference does not cancel there.
        crossed = alpha * log_p
        if CASE != "beta":
            crossed += beta * log_q
        direct = (power - tl.exp2(crossed)) * (1 / alpha)
        far = (tl.abs(ratio * alpha) > 1) & (direct == direct)
        slope = tl.where(far, direct, slope)
    return tl.where(dead, 0.0, slope)


@triton.jit
def value(p, q, log_p, log_q, first, second, P: tl.constexpr):
    """The entry's contribution to the divergence. ``first``, ``second``: its parameters."""
    if P.divergence == "forward_kl":
        return times(p, (log_p - log_q) * LN2)
    elif P.divergence == "reverse_kl":
        return times(q, (log_q - log_p) * LN2)
    elif P.divergence == "jsd":
        p_above, q_above = above_mixture(log_p, log_q, first, P)
        return (first * (p * p_above) + (1 - first) * (q * q_above)) * LN2
    elif P.divergence == "tvd":
        return tl.abs(p - q) * 0.5
    elif P.divergence == "skew_forward_kl":
        p_above, _ = above_mixture(log_p, log_q, first, P)
        return p * p_above * LN2
    elif P.divergence == "skew_reverse_kl":
        _, q_above = above_mixture(log_p, log_q, first, P)
        return q * q_above * LN2
    else:
        tl.static_assert(P.divergence == "alpha_beta")
        return _alpha_beta_value(log_p, log_q, first, second, P.case)


@triton.jit
def _ratio(p, q, log_p, log_q, centre, first, P: tl.constexpr):
    """slope / q - centre, for 0 < q."""
    if P.divergence == "reverse_kl":
        return (log_q - log_p) * LN2 + (1 - centre)
    elif P.divergence == "jsd":
        _, q_above = above_mixture(log_p, log_q, first, P)
        return q_above * ((1 - first) * LN2) - centre
    elif P.divergence == "tvd":
        return tl.where(q > p, 0.5 - centre, tl.where(q < p, -0.5 - centre, -centre))
    elif P.divergence == "skew_forward_kl":
        p_above, _ = above_mixture(log_p, log_q, first, P)
        return -(1 - first) * tl.exp2(p_above) - centre
    else:
        tl.static_assert(P.divergence == "skew_reverse_kl")
        p_above, q_above = above_mixture(log_p, log_q, first, P)
        return q_above * LN2 + (first * tl.exp2(p_above) - centre)


@triton.jit
def slope(p, q, log_p, log_q, centre, first, second, P: tl.constexpr):
    """d value / d log q (natural logarithm), less centre * q."""
    if P.divergence == "alpha_beta":
        return _alpha_beta_slope(log_p, log_q, first, second, P.case) - centre * q
    elif P.divergence == "forward_kl":
        return -p - centre * q
    elif P.divergence == "reverse_kl":
        return times(q, _ratio(p, q, log_p, log_q, centre, first, P))
    else:
        return q * _ratio(p, q, log_p, log_q, centre, first, P)


@triton.jit
def slope_over_q(p, q, log_p, log_q, first, second, P: tl.constexpr):
    """The centre that makes 0 of this entry's slope. 0 < q."""
    if P.divergence == "alpha_beta":
        return tl.div_rn(_alpha_beta_slope(log_p, log_q, first, second, P.case), q)
    elif P.divergence == "forward_kl":
        return -tl.div_rn(p, q)
    else:
        return _ratio(p, q, log_p, log_q, 0.0, first, P)
