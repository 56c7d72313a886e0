// From a divergence chosen at run time to the functor's type. This is the one list of names.
#pragma once

#include "divergences.h"

namespace kd {

enum class DivergenceKind {
  forward_kl,
  reverse_kl,
  jsd,
  tvd,
  skew_forward_kl,
  skew_reverse_kl,
  alpha_beta
};

struct DivergenceName {
  const char* name;
  DivergenceKind kind;
  int parameters;
};

constexpr DivergenceName kDivergences[] = {
    {"forward_kl", DivergenceKind::forward_kl, 0},
    {"reverse_kl", DivergenceKind::reverse_kl, 0},
    {"jsd", DivergenceKind::jsd, 1},
    {"tvd", DivergenceKind::tvd, 0},
    {"skew_forward_kl", DivergenceKind::skew_forward_kl, 1},
    {"skew_reverse_kl", DivergenceKind::skew_reverse_kl, 1},
    {"alpha_beta", DivergenceKind::alpha_beta, 2},
};

struct Divergence {
  DivergenceKind kind = DivergenceKind::forward_kl;
  double first = 0.0;   // beta of the mixtures, or a of alpha_beta
  double second = 0.0;  // b of alpha_beta
};

// A visitor may be one for the host alone, which picks a kernel.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class Visitor>
KD_INLINE auto visit_alpha_beta(double a, double b, Visitor&& visitor) {
  if (a == 0.0 && b == 0.0) return visitor(LogRatio{});
  if (a == 0.0) return b > 0.0 ? visitor(BetaOnly<true>(b)) : visitor(BetaOnly<false>(b));
  if (b == 0.0) return a > 0.0 ? visitor(AlphaOnly<true>(a)) : visitor(AlphaOnly<false>(a));
  if (a + b == 0.0) return visitor(AlphaOpposite(a));
  return a > 0.0 && b > 0.0 ? visitor(AlphaBeta<true>(a, b)) : visitor(AlphaBeta<false>(a, b));
}

#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class Visitor>
KD_INLINE auto visit(const Divergence& divergence, Visitor&& visitor) {
  const double beta = divergence.first;
  switch (divergence.kind) {
    case DivergenceKind::reverse_kl:
      return visitor(ReverseKl{});
    case DivergenceKind::jsd:
      return beta == 0.5 ? visitor(EvenJsd{}) : visitor(Jsd(beta));
    case DivergenceKind::tvd:
      return visitor(Tvd{});
    case DivergenceKind::skew_forward_kl:
      // Without a share of the teacher the mixture is the student.
      return beta == 0.0 ? visitor(ForwardKl{}) : visitor(SkewForwardKl(beta));
    case DivergenceKind::skew_reverse_kl:
      return beta == 0.0 ? visitor(Nothing{}) : visitor(SkewReverseKl(beta));
    case DivergenceKind::alpha_beta:
      return visit_alpha_beta(divergence.first, divergence.second, visitor);
    case DivergenceKind::forward_kl:
      break;
  }
  return visitor(ForwardKl{});
}

}  // namespace kd
