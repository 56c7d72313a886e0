// The polynomials behind float's powers and logarithms, for portable.h (a number, Horner's scheme)
// and cpu/functions.inc (SIMD registers, schemes of their own). Coefficients come from the highest
// power down.
#pragma once

#include "inline.h"

namespace kd {

template <int kCount>
struct Polynomial {
  static constexpr int kSize = kCount;
  float at[kCount];
};

// (2^r - 1) / r for |r| <= 1/2, minimax in the relative error of 2^r - 1: 3.7e-8.
KD_INLINE constexpr Polynomial<6> power_less_one_polynomial() {
  return {{0.00015453163f, 0.0013390863f, 0.009618083f, 0.05550357f, 0.2402265f, 0.6931472f}};
}

// log(1 + f) / f for sqrt(1/2) <= 1 + f < sqrt(2), minimax in the logarithm's relative
// error: 3.4e-8.
KD_INLINE constexpr Polynomial<9> log_polynomial() {
  return {{0.0873484612f, -0.143075243f, 0.149179742f, -0.165705085f, 0.199620724f, -0.250017554f,
           0.333339512f, -0.499999911f, 1.0f}};
}

// log(1 + f / 2) / f for -1 <= f <= 0, minimax in the logarithm's relative error:
// 2.7e-8.
KD_INLINE constexpr Polynomial<9> log_half_polynomial() {
  return {{0.0027627931f, 0.00640466483f, 0.0094431052f, 0.0028274022f, 0.00824035145f,
           -0.0152301611f, 0.0417040139f, -0.124998808f, 0.5f}};
}

}  // namespace kd
