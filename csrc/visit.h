// From a divergence chosen at run time to the functor's type. This is the one list of divergences:
// a new one is a functor in divergences.h and a line here.
#pragma once

#include <type_traits>

#include "divergences.h"

namespace kd {

// What a divergence's parameters must be.
struct ParameterRule {
  int count;
  bool is_share = false;  // the first is beta, the teacher's share of a mixture: below 1
  bool may_be_zero = true;
};

constexpr ParameterRule kNone{0};
constexpr ParameterRule kShare{1, true};
constexpr ParameterRule kInnerShare{1, true, false};
constexpr ParameterRule kExponents{2};

// Name in Python, parameters, the sources in cuda/ that compile its kernels (resident_*.cu,
// stream_*.cu and entries_*.cu), and which functor serves its parameters.
#define KD_DIVERGENCES(X)                                         \
  X(forward_kl, kNone, kl, only<ForwardKl>)                       \
  X(reverse_kl, kNone, kl, only<ReverseKl>)                       \
  X(jsd, kInnerShare, mixtures, any_jsd)                          \
  X(tvd, kNone, mixtures, only<Tvd>)                              \
  X(skew_forward_kl, kShare, mixtures, with_share<SkewForwardKl>) \
  X(skew_reverse_kl, kShare, mixtures, any_skew_reverse_kl)       \
  X(alpha_beta, kExponents, alpha_beta, any_alpha_beta)

#define KD_KIND(name, rule, group, choose) name,
enum class DivergenceKind { KD_DIVERGENCES(KD_KIND) };
#undef KD_KIND

enum class KernelGroup { kl, mixtures, alpha_beta };

struct DivergenceName {
  const char* name;
  DivergenceKind kind;
  ParameterRule rule;
};

#define KD_NAME(name, rule, group, choose) {#name, DivergenceKind::name, rule},
constexpr DivergenceName kDivergences[] = {KD_DIVERGENCES(KD_NAME)};
#undef KD_NAME

struct Divergence {
  DivergenceKind kind = DivergenceKind::forward_kl;
  double first = 0.0;   // beta of the mixtures, or a of alpha_beta
  double second = 0.0;  // b of alpha_beta
};

// An equal divergence whose functor belongs to its own kind.
KD_HOST_INLINE Divergence simplest(const Divergence& divergence) {
  // Without a share of the teacher the mixture is the student.
  const bool is_forward_kl =
      divergence.kind == DivergenceKind::skew_forward_kl && divergence.first == 0.0;
  return is_forward_kl ? Divergence{DivergenceKind::forward_kl} : divergence;
}

template <class Functor, class Visitor>
KD_HOST_INLINE auto only(const Divergence&, Visitor&& visitor) {
  return visitor(Functor{});
}

template <class Functor, class Visitor>
KD_HOST_INLINE auto with_share(const Divergence& divergence, Visitor&& visitor) {
  return visitor(Functor(divergence.first));
}

template <class Visitor>
KD_HOST_INLINE auto any_jsd(const Divergence& divergence, Visitor&& visitor) {
  return divergence.first == 0.5 ? visitor(EvenJsd{}) : visitor(Jsd(divergence.first));
}

template <class Visitor>
KD_HOST_INLINE auto any_skew_reverse_kl(const Divergence& divergence, Visitor&& visitor) {
  // Without a share of the teacher the mixture is the student.
  return divergence.first == 0.0 ? visitor(Nothing{}) : visitor(SkewReverseKl(divergence.first));
}

template <class Visitor>
KD_HOST_INLINE auto any_alpha_beta(const Divergence& divergence, Visitor&& visitor) {
  const double a = divergence.first, b = divergence.second;
  if (a == 0.0 && b == 0.0) return visitor(LogRatio{});
  if (a == 0.0) return b > 0.0 ? visitor(BetaOnly<true>(b)) : visitor(BetaOnly<false>(b));
  if (b == 0.0) return a > 0.0 ? visitor(AlphaOnly<true>(a)) : visitor(AlphaOnly<false>(a));
  if (a + b == 0.0) return visitor(AlphaOpposite(a));
  return a > 0.0 && b > 0.0 ? visitor(AlphaBeta<true>(a, b)) : visitor(AlphaBeta<false>(a, b));
}

// Calls the visitor with the divergence's functor.
template <class Visitor>
KD_HOST_INLINE auto visit(const Divergence& divergence, Visitor&& visitor) {
  switch (divergence.kind) {
#define KD_CASE(name, rule, group, choose) \
  case DivergenceKind::name:               \
    return choose(divergence, visitor);
    KD_DIVERGENCES(KD_CASE)
#undef KD_CASE
  }
  __builtin_unreachable();
}

// The same for a divergence of this group, without instantiating the visitor for any other.
template <KernelGroup kGroup, class Visitor>
KD_HOST_INLINE auto visit_group(const Divergence& divergence, Visitor&& visitor) {
  switch (divergence.kind) {
#define KD_CASE(name, rule, group, choose)        \
  case DivergenceKind::name:                      \
    if constexpr (KernelGroup::group == kGroup) { \
      return choose(divergence, visitor);         \
    } else {                                      \
      break;                                      \
    }
    KD_DIVERGENCES(KD_CASE)
#undef KD_CASE
  }
  __builtin_unreachable();
}

// Calls the visitor with the divergence's group as a std::integral_constant.
template <class Visitor>
KD_HOST_INLINE auto with_group(const Divergence& divergence, Visitor&& visitor) {
  switch (divergence.kind) {
#define KD_CASE(name, rule, group, choose) \
  case DivergenceKind::name:               \
    return visitor(std::integral_constant<KernelGroup, KernelGroup::group>{});
    KD_DIVERGENCES(KD_CASE)
#undef KD_CASE
  }
  __builtin_unreachable();
}

KD_HOST_INLINE ClosedForm closed_form_of(const Divergence& divergence) {
  return visit(divergence, [](const auto& functor) { return functor.kClosedForm; });
}

}  // namespace kd
