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

// Which ratio of the two probabilities a functor's entries come with.
enum class Ratio { none, smaller_over_larger, student_over_teacher, teacher_over_student };

template <class X>
struct Entry {
  X p;
  X q;
  X delta;       // log2 q - log2 p; NaN where both are absent
  X ratio;       // the one that the functor asks for, at most near the largest power of two
  X shortfall;   // ratio - 1, exact where they agree; with the ratio
  X log_larger;  // of log2 p and log2 q; for functors that say kUsesLog, which read neither p nor q

  template <Ratio kRatio>
  KD_INLINE void set_ratio() {
    if constexpr (kRatio == Ratio::smaller_over_larger) {
      decay(bounded(absolute(delta)), ratio, shortfall);
    } else if constexpr (kRatio == Ratio::student_over_teacher) {
      decay(clamped(-delta), ratio, shortfall);
    } else if constexpr (kRatio == Ratio::teacher_over_student) {
      decay(clamped(delta), ratio, shortfall);
    }
  }
};

// Whether a divergence follows from the first sweep alone, as a mean of the logits' differences and
// the two log-sum-exps: a KL does, KL(p || q) = E_p[(z_t - z_s) / T] - lse_t + lse_s.
enum class ClosedForm { none, teacher_weighs, student_weighs };

// What a functor takes of an entry beside delta (a ratio, and either p and q or a logarithm), and
// its closed form.
template <Ratio kGiven, bool kLog = false, ClosedForm kForm = ClosedForm::none>
struct Uses {
  static constexpr Ratio kRatio = kGiven;
  static constexpr bool kUsesLog = kLog;
  static constexpr ClosedForm kClosedForm = kForm;
};

// In units of the functor's own, unit(): a constant factor is cheaper once a row than once an
// entry.
template <class X>
struct Term {
  X value;
  X slope;  // d value / d log q
};

// From natural logarithms. X = float rounds what the CUDA kernels derive from the logits.
template <class X, class Functor>
KD_INLINE Entry<X> make_entry(const Functor&, double log_p, double log_q) {
  Entry<X> e{};
  e.p = static_cast<X>(exp(log_p));
  e.q = static_cast<X>(exp(log_q));
  e.delta = static_cast<X>((log_q - log_p) * kLog2E);
  e.template set_ratio<Functor::kRatio>();
  e.log_larger = static_cast<X>(maximum(log_p, log_q) * kLog2E);
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

// log(m / q), m a mixture of p and q, log_share = log(m / larger)
template <class X>
KD_INLINE X mixture_over_student(X delta, X distance, X log_share) {
  return select(delta > X(0.0), X(0.0), distance) + log_share;
}

// A weight of the larger that its reciprocal and logarithm allow.
constexpr double kLeastShare = 1e-37;

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
struct ForwardKl : Uses<Ratio::smaller_over_larger, false, ClosedForm::teacher_weighs>,
                   InUnitsOfOne {
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
struct ReverseKl : Uses<Ratio::smaller_over_larger, false, ClosedForm::student_weighs>,
                   InUnitsOfOne {
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
struct Jsd : Uses<Ratio::smaller_over_larger>, Uncentred {
  double beta;
  KD_INLINE explicit Jsd(double given) : beta(given) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const Relative<X> r(e);
    const auto student_larger = e.delta > X(0.0);
    const X of_smaller = select(student_larger, X(beta), X(1.0 - beta));
    // The floor: a share of 0, where q has vanished beside p, has no logarithm.
    const X of_larger = select(student_larger, X(1.0 - beta), X(maximum(beta, kLeastShare)));
    const X part = of_smaller * r.ratio;
    const X share = part + of_larger;  // m / larger, in (0, 1]
    const X log_share = log_of_share(share, of_smaller * r.shortfall);
    const X surprise = multiply_add(share, log_share, part * r.distance);
    return {r.larger * surprise, e.q * mixture_over_student(e.delta, r.distance, log_share)};
  }
  KD_INLINE Term<double> unit() const { return {-1.0, beta - 1.0}; }
};

// The same at beta = 1/2, where the share is at least 1/2.
struct EvenJsd : Uses<Ratio::smaller_over_larger>, Uncentred {
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
struct Tvd : Uses<Ratio::none>, Uncentred {
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X difference = e.q - e.p;
    const X pull = select(difference < X(0.0), -e.q, e.q);
    return {absolute(difference), select(difference == X(0.0), X(0.0), pull)};
  }
  KD_INLINE Term<double> unit() const { return {0.5, 0.5}; }
};

// KL(p || m), m = beta p + (1 - beta) q, 0 < beta < 1
struct SkewForwardKl : Uses<Ratio::student_over_teacher> {
  double beta;
  KD_INLINE explicit SkewForwardKl(double given) : beta(given) {}
  // q - p. The ratio keeps digits where they are close, the difference where they are far apart.
  template <class X>
  static KD_INLINE X excess(const Entry<X>& e) {
    return select(e.delta > X(1.0), e.q - e.p, e.p * e.shortfall);
  }
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X share = multiply_add(X(1.0 - beta), e.ratio, X(maximum(beta, kLeastShare)));  // m / p
    const X log_share = log_of_share(share, X(1.0 - beta) * e.shortfall);
    const X gap = excess(e);
    return {multiply_subtract(X(1.0 - beta), gap, e.p * log_share), gap * (e.ratio / share)};
  }
  KD_INLINE Term<double> unit() const { return {1.0, (1.0 - beta) * (1.0 - beta)}; }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {X(1.0 - beta) * excess(e), X(1.0 - beta) * e.q};
  }
};

// KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1
struct SkewReverseKl : Uses<Ratio::teacher_over_student>, InUnitsOfOne {
  double beta;
  KD_INLINE explicit SkewReverseKl(double given) : beta(given) {}
  // p - q, as above.
  template <class X>
  static KD_INLINE X excess(const Entry<X>& e) {
    return select(e.delta < X(-1.0), e.p - e.q, e.q * e.shortfall);
  }
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X share = multiply_add(X(beta), e.ratio, X(1.0 - beta));  // m / q
    const X log_share = log_of_share(share, X(beta) * e.shortfall);
    const X pull = multiply_subtract(X((1.0 - beta) * beta), e.shortfall / share, log_share);
    return {multiply_subtract(X(beta), excess(e), e.q * log_share), e.q * pull};
  }
  template <class X>
  KD_INLINE Term<X> offset(const Entry<X>& e) const {
    return {X(beta) * excess(e), -X(beta) * e.q};
  }
};

// KL(q || q)
struct Nothing : Uses<Ratio::none>, InUnitsOfOne, Uncentred {
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>&) const {
    return {X(0.0), X(0.0)};
  }
};

// The family of alpha-beta divergences needs no centring, its summands are of Bregman's kind. A
// summand is never negative, so inf - inf, which exponents of opposite sign can give, stands for
// +inf, which is `infinite` in the functor's own units; entries that agree (or are absent from
// both) give exactly 0.
template <class X>
KD_INLINE Term<X> settle(const Entry<X>& e, X value, X slope, double infinite = INFINITY) {
  const auto differ = absolute(e.delta) > X(0.0);
  const X settled = select(is_nan(value), X(infinite), value);
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

// 2^-x and 2^-x - 1
template <class X>
KD_INLINE Decayed<X> lowered(X x) {
  Decayed<X> of;
  grow(-x, of.power, of.less_one);
  return of;
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
struct AlphaBeta : Uses<Ratio::none, true>, Uncentred {
  double a, b;
  KD_INLINE AlphaBeta(double first, double second) : a(first), b(second) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const double s = a + b;
    const auto student_larger = e.delta > X(0.0);
    const X part = select(student_larger, X(a / s), X(b / s));
    // Both powers start from the same rounded exponent: where the two are small they must cancel.
    const X descent = X(s) * absolute(e.delta), part_of_it = part * descent;
    X scale;
    Decayed<X> smaller, crossed;
    if constexpr (kFalls) {
      // Nothing becomes infinite, and entries that agree or are absent give 0 by themselves.
      decay_three(bounded(X(-s) * e.log_larger), bounded(descent), bounded(part_of_it), scale,
                  smaller, crossed);
    } else {
      scale = power_of<false>(s, e.log_larger);
      smaller = lowered(descent);
      crossed = lowered(part_of_it);
    }
    const X value = multiply_subtract(part, smaller.less_one, crossed.less_one);
    // Where the student is small beside the teacher both powers are, and near -1 without their 1.
    const X apart = select(part_of_it > X(1.0), smaller.power - crossed.power,
                           smaller.less_one - crossed.less_one);
    const X slope = select(student_larger, -crossed.less_one, apart);
    if constexpr (kFalls) {
      return {scale * value, scale * slope};
    } else {
      const double infinite = a * b > 0.0 ? INFINITY : -INFINITY;  // in units of 1 / (a b)
      return settle(e, weigh(scale, value), weigh(scale, slope), infinite);
    }
  }
  KD_INLINE Term<double> unit() const { return {1.0 / (a * b), 1.0 / a}; }
};

// b = 0: (1/a^2) [p^a ln(p^a/q^a) - p^a + q^a]; kFalls: a is positive
template <bool kFalls>
struct AlphaOnly : Uses<Ratio::none, true>, Uncentred {
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
    return settle(e, weigh(scale, multiply_add(X(kLn2), pull, shortfall)),
                  scaled<kFalls>(scale, shortfall));
  }
  KD_INLINE Term<double> unit() const { return {1.0 / (a * a), 1.0 / a}; }
};

// a = 0: (1/b^2) [q^b ln(q^b/p^b) - q^b + p^b]; kFalls: b is positive
template <bool kFalls>
struct BetaOnly : Uses<Ratio::none, true>, Uncentred {
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
    return settle(e, weigh(scale, multiply_add(X(kLn2), pull, shortfall)), weigh(scale, pull));
  }
  KD_INLINE Term<double> unit() const { return {1.0 / (b * b), kLn2 / b}; }
};

// a = -b, not zero: (1/a^2) [ln(q^a/p^a) + (q^a/p^a)^-1 - 1]
struct AlphaOpposite : Uses<Ratio::none>, Uncentred {
  double a;
  KD_INLINE explicit AlphaOpposite(double given) : a(given) {}
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    const X shortfall = lowered(X(a) * e.delta).less_one;
    return settle(e, multiply_add(X(a * kLn2), e.delta, shortfall), shortfall);
  }
  KD_INLINE Term<double> unit() const { return {1.0 / (a * a), -1.0 / a}; }
};

// a = b = 0: (ln p - ln q)^2 / 2
struct LogRatio : Uses<Ratio::none>, Uncentred {
  template <class X>
  KD_INLINE Term<X> operator()(const Entry<X>& e) const {
    return settle(e, e.delta * e.delta, e.delta);
  }
  KD_INLINE Term<double> unit() const { return {0.5 * kLn2 * kLn2, kLn2}; }
};

}  // namespace kd
