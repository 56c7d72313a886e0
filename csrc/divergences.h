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
  X ratio;       // the smaller of p and q over the larger; only for functors that say kUsesRatio
  X shortfall;   // ratio - 1, exact where they agree; with the ratio
  X log_larger;  // the larger of log2 p and log2 q; only for functors that say kUsesLog

  KD_INLINE void set_ratio() { decay(bounded(absolute(delta)), ratio, shortfall); }
};

// In units of the functor's own, unit(): a constant factor is cheaper once a row than once an
// entry.
template <class X>
struct Term {
  X value;
  X slope;  // d value / d log q
};

KD_INLINE Entry<double> make_entry(double log_p, double log_q) {
  Entry<double> e{};
  e.p = exp(log_p);
  e.q = exp(log_q);
  e.delta = (log_q - log_p) * kLog2E;
  e.set_ratio();
  e.log_larger = maximum(log_p, log_q) * kLog2E;
  return e;
}

// Both probabilities relative to the larger one: nothing here can overflow, and where the two agree
// `shortfall` and `excess` are exactly zero.
template <class X>
struct Relative {
  X distance;   // |delta| in nats, bounded
  X ratio;      // smaller / larger
  X shortfall;  // ratio - 1
  X larger;

  KD_INLINE explicit Relative(const Entry<X>& e)
      // By the same constant that `shortfall` starts with: where the two agree they must cancel.
      : distance(X(kLn2) * bounded(absolute(e.delta))),
        ratio(e.ratio),
        shortfall(e.shortfall),
        larger(maximum(e.p, e.q)) {}
  // q - p
  KD_INLINE X excess(const Entry<X>& e) const {
    const X gap = larger * shortfall;
    return select(e.delta > X(0.0), -gap, gap);
  }
};

// The mixture m = beta p + (1 - beta) q in log space, relative to the larger of p and q. One flat
// object: GCC 12 copies nested ones through memory.
template <class X>
struct Mixture : Relative<X> {
  X part;       // what the smaller of the two adds to the share
  X share;      // m / larger, in (0, 1]
  X log_share;  // log of it

  KD_INLINE Mixture(const Entry<X>& e, double beta) : Relative<X>(e) {
    const auto student_larger = e.delta > X(0.0);
    const X of_smaller = select(student_larger, X(beta), X(1.0 - beta));
    // The floor: a share of 0, where q has vanished beside p, would be divided by.
    const X of_larger = select(student_larger, X(1.0 - beta), X(maximum(beta, 1e-37)));
    part = of_smaller * this->ratio;
    share = part + of_larger;
    log_share = log_of_share(share, of_smaller * this->shortfall);
  }
};

// log(m / q)
template <class X>
KD_INLINE X mixture_over_student(X delta, X distance, X log_share) {
  return select(delta > X(0.0), X(0.0), distance) + log_share;
}

// 0 * inf is 0: an entry with weight 0 contributes nothing, however infinite its factor.
template <class X>
KD_INLINE X weigh(X weight, X factor) {
  return select(weight == X(0.0), X(0.0), weight * factor);
}

struct InUnitsOfOne {
  KD_INLINE Term<double> unit() const { return {1.0, 1.0}; }
};

// Divergences whose textbook summand is what they compute.
struct Uncentred {
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

// KL(p || q) = sum p (log p - log q)
struct ForwardKl : InUnitsOfOne {
  static constexpr bool kUsesRatio = true;
  static constexpr bool kUsesLog = false;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X excess = Relative<X>(e).excess(e);
    return {excess - weigh(e.p, X(kLn2) * e.delta), excess};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {Relative<X>(e).excess(e), e.q};
  }
};

// KL(q || p) = sum q (log q - log p)
struct ReverseKl : InUnitsOfOne {
  static constexpr bool kUsesRatio = true;
  static constexpr bool kUsesLog = false;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X pull = weigh(e.q, X(kLn2) * e.delta);
    return {pull - Relative<X>(e).excess(e), pull};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {-Relative<X>(e).excess(e), -e.q};
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1
struct Jsd : Uncentred {
  static constexpr bool kUsesRatio = true;
  static constexpr bool kUsesLog = false;
  double beta;
  KD_INLINE explicit Jsd(double given) : beta(given) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Mixture<X> m(e, beta);
    const X surprise = multiply_add(m.share, m.log_share, m.part * m.distance);
    return {m.larger * surprise, e.q * mixture_over_student(e.delta, m.distance, m.log_share)};
  }
  KD_INLINE Term<double> unit() const { return {-1.0, beta - 1.0}; }
};

// The same at beta = 1/2, where the share is at least 1/2.
struct EvenJsd : Uncentred {
  static constexpr bool kUsesRatio = true;
  static constexpr bool kUsesLog = false;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Relative<X> r(e);
    const X log_share = log_of_half_share(r.shortfall);
    const X surprise = multiply_add(X(1.0) + r.ratio, log_share, r.ratio * r.distance);
    return {r.larger * surprise, e.q * mixture_over_student(e.delta, r.distance, log_share)};
  }
  KD_INLINE Term<double> unit() const { return {-0.5, -0.5}; }
};

// sum |p - q| / 2; the slope is 0 where they agree
struct Tvd : Uncentred {
  static constexpr bool kUsesRatio = false;
  static constexpr bool kUsesLog = false;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X difference = e.q - e.p;
    const X pull = select(difference < X(0.0), -e.q, e.q);
    return {absolute(difference), select(difference == X(0.0), X(0.0), pull)};
  }
  KD_INLINE Term<double> unit() const { return {0.5, 0.5}; }
};

// KL(p || m), m = beta p + (1 - beta) q, 0 < beta < 1
struct SkewForwardKl {
  static constexpr bool kUsesRatio = true;
  static constexpr bool kUsesLog = false;
  double beta;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Mixture<X> m(e, beta);
    const auto student_larger = e.delta > X(0.0);
    const X excess = m.excess(e);
    const X log_m_over_p = m.log_share + select(student_larger, m.distance, X(0.0));
    const X q_over_m = select(student_larger, X(1.0), m.ratio) / m.share;
    return {X(1.0 - beta) * excess - e.p * log_m_over_p, excess * q_over_m};
  }
  KD_INLINE Term<double> unit() const { return {1.0, (1.0 - beta) * (1.0 - beta)}; }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {X(1.0 - beta) * Relative<X>(e).excess(e), X(1.0 - beta) * e.q};
  }
};

// KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1
struct SkewReverseKl {
  static constexpr bool kUsesRatio = true;
  static constexpr bool kUsesLog = false;
  double beta;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Mixture<X> m(e, beta);
    const X excess = X(beta) * m.excess(e);
    const X q_over_m = select(e.delta > X(0.0), X(1.0), m.ratio) / m.share;
    const X push = e.q * mixture_over_student(e.delta, m.distance, m.log_share);
    return {push + excess, multiply_add(X(1.0 - beta) * excess, q_over_m, push)};
  }
  KD_INLINE Term<double> unit() const { return {-1.0, -1.0}; }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {-X(beta) * Relative<X>(e).excess(e), -X(beta) * e.q};
  }
};

// KL(q || q)
struct Nothing : InUnitsOfOne, Uncentred {
  static constexpr bool kUsesRatio = false;
  static constexpr bool kUsesLog = false;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

// The family of alpha-beta divergences needs no centring, its summands are of Bregman's kind. A
// summand is never negative, so inf - inf, which exponents of opposite sign can give, stands for
// +inf, which is `infinite` in the functor's own units; entries that agree (or are absent from both)
// give exactly 0. With kFalls nothing becomes infinite.
template <bool kFalls, class X>
KD_INLINE Term<X> settle(const Entry<X>& e, X value, X slope, double infinite = INFINITY) {
  const auto differ = absolute(e.delta) > X(0.0);
  const X settled = kFalls ? value : select(is_nan(value), X(infinite), value);
  return {select(differ, settled, X(0.0)), select(differ, slope, X(0.0))};
}

// 2^-x and 2^-x - 1; kFalls: x is not below 0 but by rounding.
template <bool kFalls, class X>
KD_INLINE void lower(X x, X& power, X& less_one) {
  if (kFalls) {
    decay(bounded(x), power, less_one);
  } else {
    grow(-x, power, less_one);
  }
}

// 2^(exponent x)
template <bool kFalls, class X>
KD_INLINE X power_of(double exponent, X x) {
  X power, less_one;
  lower<kFalls>(X(-exponent) * x, power, less_one);
  return power;
}

// 2^-x - 1
template <bool kFalls, class X>
KD_INLINE X less_one_of(X x) {
  X power, less_one;
  lower<kFalls>(x, power, less_one);
  return less_one;
}

// distance * power, where the power falls to 0 as the distance grows to infinity.
template <bool kFalls, class X>
KD_INLINE X fading(X power, X distance) {
  return kFalls ? power * bounded(distance) : weigh(power, distance);
}

template <bool kFalls, class X>
KD_INLINE X scaled(X scale, X factor) {
  return kFalls ? scale * factor : weigh(scale, factor);
}

// -1/(ab) [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)] with a, b and a + b not zero; kFalls: both
// are positive
template <bool kFalls>
struct AlphaBeta : Uncentred {
  static constexpr bool kUsesRatio = false;
  static constexpr bool kUsesLog = true;
  double a, b;
  KD_INLINE AlphaBeta(double first, double second) : a(first), b(second) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const double s = a + b;
    const auto student_larger = e.delta > X(0.0);
    const X scale = power_of<kFalls>(s, e.log_larger);
    // Both powers start from the same rounded exponent: where the two are small they must cancel.
    const X descent = X(s) * absolute(e.delta);
    const X part = select(student_larger, X(a / s), X(b / s));
    const X smaller = less_one_of<kFalls>(descent);
    const X crossed = less_one_of<kFalls>(part * descent);
    const X value = multiply_subtract(part, smaller, crossed);
    const X slope = select(student_larger, X(0.0), smaller) - crossed;
    const double infinite = a * b > 0.0 ? INFINITY : -INFINITY;  // in units of 1 / (a b)
    return settle<kFalls>(e, scaled<kFalls>(scale, value), scaled<kFalls>(scale, slope), infinite);
  }
  KD_INLINE Term<double> unit() const { return {1.0 / (a * b), 1.0 / a}; }
};

// b = 0: (1/a^2) [p^a ln(p^a/q^a) - p^a + q^a]; kFalls: a is positive
template <bool kFalls>
struct AlphaOnly : Uncentred {
  static constexpr bool kUsesRatio = false;
  static constexpr bool kUsesLog = true;
  double a;
  KD_INLINE explicit AlphaOnly(double given) : a(given) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const auto student_larger = e.delta > X(0.0);
    const X distance = X(a) * absolute(e.delta);
    const X scale = power_of<kFalls>(a, e.log_larger);
    X power, less_one;
    lower<kFalls>(distance, power, less_one);
    const X shortfall = select(student_larger, -less_one, less_one);
    const X pull = select(student_larger, -fading<kFalls>(power, distance), distance);
    return settle<false>(e, weigh(scale, multiply_add(X(kLn2), pull, shortfall)),
                         scaled<kFalls>(scale, shortfall));
  }
  KD_INLINE Term<double> unit() const { return {1.0 / (a * a), 1.0 / a}; }
};

// a = 0: (1/b^2) [q^b ln(q^b/p^b) - q^b + p^b]; kFalls: b is positive
template <bool kFalls>
struct BetaOnly : Uncentred {
  static constexpr bool kUsesRatio = false;
  static constexpr bool kUsesLog = true;
  double b;
  KD_INLINE explicit BetaOnly(double given) : b(given) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const auto student_larger = e.delta > X(0.0);
    const X distance = X(b) * absolute(e.delta);
    const X scale = power_of<kFalls>(b, e.log_larger);
    X power, less_one;
    lower<kFalls>(distance, power, less_one);
    const X pull = select(student_larger, distance, -fading<kFalls>(power, distance));
    const X shortfall = select(student_larger, less_one, -less_one);
    return settle<false>(e, weigh(scale, multiply_add(X(kLn2), pull, shortfall)),
                         weigh(scale, pull));
  }
  KD_INLINE Term<double> unit() const { return {1.0 / (b * b), kLn2 / b}; }
};

// a = -b, not zero: (1/a^2) [ln(q^a/p^a) + (q^a/p^a)^-1 - 1]
struct AlphaOpposite : Uncentred {
  static constexpr bool kUsesRatio = false;
  static constexpr bool kUsesLog = false;
  double a;
  KD_INLINE explicit AlphaOpposite(double given) : a(given) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X shortfall = less_one_of<false>(X(a) * e.delta);
    return settle<false>(e, multiply_add(X(a * kLn2), e.delta, shortfall), shortfall);
  }
  KD_INLINE Term<double> unit() const { return {1.0 / (a * a), -1.0 / a}; }
};

// a = b = 0: (ln p - ln q)^2 / 2
struct LogRatio : Uncentred {
  static constexpr bool kUsesRatio = false;
  static constexpr bool kUsesLog = false;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    return settle<false>(e, e.delta * e.delta, e.delta);
  }
  KD_INLINE Term<double> unit() const { return {0.5 * kLn2 * kLn2, kLn2}; }
};

}  // namespace kd
