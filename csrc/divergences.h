// Value and slope of each divergence at one vocabulary entry. p is the teacher's probability, q the
// student's, delta = log q - log p. X is double, or a SIMD register of float.
//
// Every functor computes the *centred* form: the textbook summand plus terms whose sum over the
// vocabulary is zero because p and q both sum to 1 (KL: + q - p, which makes the summand Bregman's,
// p (exp(delta) - 1 - delta)). The sums and gradients are the same, but errors in the two
// log-sum-exps then enter squared, so high temperatures keep their digits. `offset` is what was
// added: value = centred.value - offset.value is the textbook summand.
#pragma once

#include "portable.h"

namespace kd {

template <class X>
struct Entry {
  X p;
  X q;
  X delta;       // log2 q - log2 p; NaN where both are absent
  X log_larger;  // the larger of log2 p and log2 q; only for functors that say kUsesLog
};

template <class X>
struct Term {
  X value;
  X slope;  // d value / d log q
};

KD_INLINE Entry<double> make_entry(double log_p, double log_q) {
  return {exp(log_p), exp(log_q), (log_q - log_p) * kLog2E, maximum(log_p, log_q) * kLog2E};
}

// Both probabilities relative to the larger one: nothing here can overflow, and where the two agree
// `shortfall` and `excess` are exactly zero.
template <class X>
struct Relative {
  X distance;   // |delta|, bounded
  X ratio;      // smaller / larger
  X shortfall;  // ratio - 1
  X larger;
};

template <class X>
KD_INLINE Relative<X> relative(const Entry<X>& e) {
  const X distance = bounded(absolute(e.delta));
  const Growth<X> g = decay(distance);
  return {distance, g.power, g.less_one, maximum(e.p, e.q)};
}

// q - p
template <class X>
KD_INLINE X excess_of(const Entry<X>& e, const Relative<X>& r) {
  const X gap = r.larger * r.shortfall;
  return select(e.delta > X(0.0), -gap, gap);
}

// The mixture m = beta p + (1 - beta) q in log space, relative to the larger of p and q.
template <class X>
struct Mixture {
  Relative<X> r;
  X part;       // what the smaller of the two adds to the share
  X share;      // m / larger, in (0, 1]
  X log_share;  // log2 of it
};

template <class X>
KD_INLINE Mixture<X> mix(const Entry<X>& e, double beta) {
  const Relative<X> r = relative(e);
  const auto student_larger = e.delta > X(0.0);
  const X of_smaller = select(student_larger, X(beta), X(1.0 - beta));
  const X of_larger = select(student_larger, X(1.0 - beta), X(beta));
  const X part = of_smaller * r.ratio;
  const X share = part + of_larger;
  return {r, part, share, log2_of_share(share, of_smaller * r.shortfall)};
}

// log2(q / m)
template <class X>
KD_INLINE X student_over_mixture(const Entry<X>& e, const Mixture<X>& m) {
  return -select(e.delta > X(0.0), X(0.0), m.r.distance) - m.log_share;
}

// 0 * inf is 0: an entry with weight 0 contributes nothing, however infinite its factor.
template <class X>
KD_INLINE X weigh(X weight, X factor) {
  return select(weight == X(0.0), X(0.0), weight * factor);
}

// Divergences whose textbook summand is what they compute.
struct Uncentred {
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

// KL(p || q) = sum p (log p - log q)
struct ForwardKl {
  static constexpr bool kUsesLog = false;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X excess = excess_of(e, relative(e));
    return {excess - weigh(e.p, X(kLn2) * e.delta), excess};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {excess_of(e, relative(e)), e.q};
  }
};

// KL(q || p) = sum q (log q - log p)
struct ReverseKl {
  static constexpr bool kUsesLog = false;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X pull = weigh(e.q, X(kLn2) * e.delta);
    return {pull - excess_of(e, relative(e)), pull};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {-excess_of(e, relative(e)), -e.q};
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1
struct Jsd : Uncentred {
  static constexpr bool kUsesLog = false;
  double beta;
  KD_INLINE explicit Jsd(double given) : beta(given) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Mixture<X> m = mix(e, beta);
    const X surprise = multiply_add(m.share, m.log_share, m.part * m.r.distance);
    return {X(-kLn2) * m.r.larger * surprise,
            X(kLn2 * (1.0 - beta)) * e.q * student_over_mixture(e, m)};
  }
};

// sum |p - q| / 2; the slope is 0 where they agree
struct Tvd : Uncentred {
  static constexpr bool kUsesLog = false;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X difference = e.q - e.p;
    const X pull = select(difference < X(0.0), X(-0.5) * e.q, X(0.5) * e.q);
    return {X(0.5) * absolute(difference), select(difference == X(0.0), X(0.0), pull)};
  }
};

// KL(p || m), m = beta p + (1 - beta) q, 0 < beta < 1
struct SkewForwardKl {
  static constexpr bool kUsesLog = false;
  double beta;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Mixture<X> m = mix(e, beta);
    const auto student_larger = e.delta > X(0.0);
    const X excess = excess_of(e, m.r);
    const X log_m_over_p = m.log_share + select(student_larger, m.r.distance, X(0.0));
    const X q_over_m = select(student_larger, X(1.0), m.r.ratio) / m.share;
    return {X(1.0 - beta) * excess - X(kLn2) * e.p * log_m_over_p,
            X((1.0 - beta) * (1.0 - beta)) * excess * q_over_m};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {X(1.0 - beta) * excess_of(e, relative(e)), X(1.0 - beta) * e.q};
  }
};

// KL(q || m), m = beta p + (1 - beta) q, 0 <= beta < 1
struct SkewReverseKl {
  static constexpr bool kUsesLog = false;
  double beta;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Mixture<X> m = mix(e, beta);
    const X excess = X(beta) * excess_of(e, m.r);
    const X q_over_m = select(e.delta > X(0.0), X(1.0), m.r.ratio) / m.share;
    const X pull = X(kLn2) * e.q * student_over_mixture(e, m);
    return {pull - excess, pull - X(1.0 - beta) * excess * q_over_m};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {-X(beta) * excess_of(e, relative(e)), -X(beta) * e.q};
  }
};

// The family of alpha-beta divergences needs no centring, its summands are of Bregman's kind. A
// summand is never negative, so inf - inf, which exponents of opposite sign can give, stands for
// +inf; entries that agree (or are absent from both) give exactly 0.
template <class X>
KD_INLINE Term<X> settle(const Entry<X>& e, X value, X slope) {
  const auto differ = absolute(e.delta) > X(0.0);
  const X settled = select(is_nan(value), X(INFINITY), value);
  return {select(differ, settled, X(0.0)), select(differ, slope, X(0.0))};
}

// 2^(exponent x) for a logarithm x <= 0, and for -x >= 0: with a positive exponent, kFalls, neither
// can overflow.
template <bool kFalls, class X>
KD_INLINE X power_of(double exponent, X x) {
  return kFalls ? decay(bounded(X(-exponent) * x)).power : grow(X(exponent) * x).power;
}

template <bool kFalls, class X>
KD_INLINE Growth<X> falling(X exponent, X distance) {
  return kFalls ? decay(bounded(exponent * distance)) : grow(-exponent * distance);
}

// distance * power in nats, where the power falls to 0 as the distance grows to infinity.
template <bool kFalls, class X>
KD_INLINE X fading(X power, X distance) {
  return kFalls ? power * X(kLn2) * bounded(distance) : weigh(power, X(kLn2) * distance);
}

// -1/(ab) [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)] with a, b and a + b not zero; kFalls: both
// are positive
template <bool kFalls>
struct AlphaBeta : Uncentred {
  static constexpr bool kUsesLog = true;
  double a, b;
  KD_INLINE AlphaBeta(double first, double second) : a(first), b(second) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const double s = a + b;
    const auto student_larger = e.delta > X(0.0);
    const X distance = absolute(e.delta);
    const X scale = power_of<kFalls>(s, e.log_larger);
    const X cross = select(student_larger, X(a), X(b));
    const X crossed = weigh(scale, falling<kFalls>(cross, distance).less_one);
    const X smaller = weigh(scale, falling<kFalls>(X(s), distance).less_one);
    const X value = X(-1.0 / (a * b)) * (crossed - cross * X(1.0 / s) * smaller);
    const X slope = X(1.0 / a) * select(student_larger, -crossed, smaller - crossed);
    return settle(e, value, slope);
  }
};

// b = 0: (1/a^2) [p^a ln(p^a/q^a) - p^a + q^a]; kFalls: a is positive
template <bool kFalls>
struct AlphaOnly : Uncentred {
  static constexpr bool kUsesLog = true;
  double a;
  KD_INLINE explicit AlphaOnly(double given) : a(given) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const auto student_larger = e.delta > X(0.0);
    const X distance = X(a) * absolute(e.delta);
    const X scale = power_of<kFalls>(a, e.log_larger);
    const Growth<X> g = falling<kFalls>(X(1.0), distance);
    const X teacher_larger_value = X(kLn2) * distance + g.less_one;
    const X student_larger_value = -fading<kFalls>(g.power, distance) - g.less_one;
    const X value =
        weigh(scale, select(student_larger, student_larger_value, teacher_larger_value));
    const X shortfall = weigh(scale, g.less_one);
    return settle(e, X(1.0 / (a * a)) * value,
                  X(1.0 / a) * select(student_larger, -shortfall, shortfall));
  }
};

// a = 0: (1/b^2) [q^b ln(q^b/p^b) - q^b + p^b]; kFalls: b is positive
template <bool kFalls>
struct BetaOnly : Uncentred {
  static constexpr bool kUsesLog = true;
  double b;
  KD_INLINE explicit BetaOnly(double given) : b(given) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const auto student_larger = e.delta > X(0.0);
    const X distance = X(b) * absolute(e.delta);
    const X scale = power_of<kFalls>(b, e.log_larger);
    const Growth<X> g = falling<kFalls>(X(1.0), distance);
    const X pull = select(student_larger, X(kLn2) * distance, -fading<kFalls>(g.power, distance));
    const X value = weigh(scale, pull + select(student_larger, g.less_one, -g.less_one));
    const X slope = weigh(scale, pull);
    return settle(e, X(1.0 / (b * b)) * value, X(1.0 / b) * slope);
  }
};

// a = -b, not zero: (1/a^2) [ln(q^a/p^a) + (q^a/p^a)^-1 - 1]
struct AlphaOpposite : Uncentred {
  static constexpr bool kUsesLog = false;
  double a;
  KD_INLINE explicit AlphaOpposite(double given) : a(given) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X distance = X(a * kLn2) * e.delta;
    const X shortfall = grow(X(-a) * e.delta).less_one;
    return settle(e, X(1.0 / (a * a)) * (distance + shortfall), X(-1.0 / a) * shortfall);
  }
};

// a = b = 0: (ln p - ln q)^2 / 2
struct LogRatio : Uncentred {
  static constexpr bool kUsesLog = false;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X delta = X(kLn2) * e.delta;
    return settle(e, X(0.5) * delta * delta, delta);
  }
};

}  // namespace kd
