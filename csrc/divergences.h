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
  X delta;       // log q - log p; 0 where both are -inf, so that such an entry contributes nothing
  X log_larger;  // the larger of log p and log q
};

template <class X>
struct Term {
  X value;
  X slope;  // d value / d log q
};

KD_INLINE Entry<double> make_entry(double log_p, double log_q) {
  const bool both_absent = log_p == -INFINITY && log_q == -INFINITY;
  return {exp(log_p), exp(log_q), both_absent ? 0.0 : log_q - log_p, maximum(log_p, log_q)};
}

// Both probabilities relative to the larger one: nothing here can overflow, and where the two agree
// `shortfall` and `excess` are exactly zero.
template <class X>
struct Relative {
  X distance;   // |delta|, bounded: exp(-1000) is zero in double and float
  X ratio;      // smaller / larger
  X shortfall;  // ratio - 1
  X excess;     // q - p
};

template <class X>
KD_INLINE Relative<X> relative(const Entry<X>& e) {
  const X distance = minimum(absolute(e.delta), X(1000.0));
  const Growth<X> g = decay(-distance);
  const X gap = maximum(e.p, e.q) * g.expm1;
  return {distance, g.exp, g.expm1, select(e.delta > X(0.0), -gap, gap)};
}

// The mixture m = beta p + (1 - beta) q in log space, relative to the larger of p and q.
template <class X>
struct Mixture {
  Relative<X> r;
  X share;      // m / larger, in (0, 1]
  X log_share;  // log of it
};

template <class X>
KD_INLINE Mixture<X> mix(const Entry<X>& e, double beta) {
  const Relative<X> r = relative(e);
  const auto student_larger = e.delta > X(0.0);
  const X of_smaller = select(student_larger, X(beta), X(1.0 - beta));
  const X of_larger = select(student_larger, X(1.0 - beta), X(beta));
  // The floor keeps 0 * log 0 at 0 when beta = 0 leaves nothing but a vanished q in the mixture.
  const X share = maximum(multiply_add(of_smaller, r.ratio, of_larger), X(1e-37));
  return {r, share, log_of_share(share, of_smaller * r.shortfall)};
}

// 0 * inf is 0: an entry with weight 0 contributes nothing, however infinite its factor.
template <class X>
KD_INLINE X weigh(X weight, X factor) {
  return select(weight == X(0.0), X(0.0), weight * factor);
}

// KL(p || q) = sum p (log p - log q)
struct ForwardKl {
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X excess = relative(e).excess;
    return {excess - weigh(e.p, e.delta), excess};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {relative(e).excess, e.q};
  }
};

// KL(q || p) = sum q (log q - log p)
struct ReverseKl {
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X pull = weigh(e.q, e.delta);
    return {pull - relative(e).excess, pull};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {-relative(e).excess, -e.q};
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1
struct Jsd {
  double beta;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Mixture<X> m = mix(e, beta);
    const auto student_larger = e.delta > X(0.0);
    const X of_smaller = select(student_larger, X(beta), X(1.0 - beta));
    const X of_larger = select(student_larger, X(1.0 - beta), X(beta));
    const X smaller = of_smaller * m.r.ratio * (-m.r.distance - m.log_share);
    const X value = maximum(e.p, e.q) * (smaller - of_larger * m.log_share);
    const X log_q_over_m = -select(student_larger, X(0.0), m.r.distance) - m.log_share;
    return {value, X(1.0 - beta) * e.q * log_q_over_m};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

// sum |p - q| / 2; the slope is 0 where they agree
struct Tvd {
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X difference = e.q - e.p;
    const X pull = select(difference < X(0.0), X(-0.5) * e.q, X(0.5) * e.q);
    return {X(0.5) * absolute(difference), select(difference == X(0.0), X(0.0), pull)};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

// KL(p || m), m = beta p + (1 - beta) q, 0 < beta < 1
struct SkewForwardKl {
  double beta;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Mixture<X> m = mix(e, beta);
    const auto student_larger = e.delta > X(0.0);
    const X log_m_over_p = m.log_share + select(student_larger, m.r.distance, X(0.0));
    const X q_over_m = select(student_larger, X(1.0), m.r.ratio) / m.share;
    return {X(1.0 - beta) * m.r.excess - e.p * log_m_over_p,
            X((1.0 - beta) * (1.0 - beta)) * m.r.excess * q_over_m};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {X(1.0 - beta) * relative(e).excess, X(1.0 - beta) * e.q};
  }
};

// KL(q || m), m = beta p + (1 - beta) q, 0 <= beta < 1
struct SkewReverseKl {
  double beta;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Mixture<X> m = mix(e, beta);
    const auto student_larger = e.delta > X(0.0);
    const X log_q_over_m = -select(student_larger, X(0.0), m.r.distance) - m.log_share;
    const X q_over_m = select(student_larger, X(1.0), m.r.ratio) / m.share;
    const X pull = e.q * log_q_over_m;
    return {pull - X(beta) * m.r.excess, pull - X(beta * (1.0 - beta)) * m.r.excess * q_over_m};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {-X(beta) * relative(e).excess, -X(beta) * e.q};
  }
};

// The family of alpha-beta divergences needs no centring, its summands are of Bregman's kind. A
// summand is never negative, so inf - inf, which exponents of opposite sign can give, stands for
// +inf; entries that agree (or are absent from both) give exactly 0.
template <class X>
KD_INLINE Term<X> settle(const Entry<X>& e, X value, X slope) {
  const auto agree = e.delta == X(0.0);
  const X settled = select(is_nan(value), X(INFINITY), value);
  return {select(agree, X(0.0), settled), select(agree, X(0.0), slope)};
}

// -1/(ab) [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)] with a, b and a + b not zero
struct AlphaBeta {
  double a, b;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const double s = a + b;
    const auto student_larger = e.delta > X(0.0);
    const X distance = absolute(e.delta);
    const X scale = grow(X(s) * e.log_larger).exp;
    const X crossed = weigh(scale, grow(-select(student_larger, X(a), X(b)) * distance).expm1);
    const X smaller = weigh(scale, grow(X(-s) * distance).expm1);
    const X value =
        X(-1.0 / (a * b)) * (crossed - select(student_larger, X(a / s), X(b / s)) * smaller);
    const X slope = X(1.0 / a) * select(student_larger, -crossed, smaller - crossed);
    return settle(e, value, slope);
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

// b = 0: (1/a^2) [p^a ln(p^a/q^a) - p^a + q^a]
struct AlphaOnly {
  double a;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const auto student_larger = e.delta > X(0.0);
    const X distance = X(a) * absolute(e.delta);
    const X scale = grow(X(a) * e.log_larger).exp;
    const Growth<X> g = grow(-distance);
    const X teacher_larger_value = distance + g.expm1;
    const X student_larger_value = -weigh(g.exp, distance) - g.expm1;
    const X value =
        weigh(scale, select(student_larger, student_larger_value, teacher_larger_value));
    const X shortfall = weigh(scale, g.expm1);
    return settle(e, X(1.0 / (a * a)) * value,
                  X(1.0 / a) * select(student_larger, -shortfall, shortfall));
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

// a = 0: (1/b^2) [q^b ln(q^b/p^b) - q^b + p^b]
struct BetaOnly {
  double b;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const auto student_larger = e.delta > X(0.0);
    const X distance = X(b) * absolute(e.delta);
    const X scale = grow(X(b) * e.log_larger).exp;
    const Growth<X> g = grow(-distance);
    const X of_distance = weigh(g.exp, distance);
    const X value =
        weigh(scale, select(student_larger, distance + g.expm1, -of_distance - g.expm1));
    const X slope = weigh(scale, select(student_larger, distance, -of_distance));
    return settle(e, X(1.0 / (b * b)) * value, X(1.0 / b) * slope);
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

// a = -b, not zero: (1/a^2) [ln(q^a/p^a) + (q^a/p^a)^-1 - 1]
struct AlphaOpposite {
  double a;
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X distance = X(a) * e.delta;
    const X shortfall = grow(-distance).expm1;
    return settle(e, X(1.0 / (a * a)) * (distance + shortfall), X(-1.0 / a) * shortfall);
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

// a = b = 0: (ln p - ln q)^2 / 2
struct LogRatio {
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    return settle(e, X(0.5) * e.delta * e.delta, e.delta);
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

}  // namespace kd
