// The few operations that the mathematics is written in, for one number of type double or, in CUDA
// kernels, float. A SIMD register offers the same names (cpu/lanes.inc), found by
// argument-dependent lookup.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "polynomials.h"

namespace kd {

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLog2E = 1.44269504088896340736;

KD_INLINE double select(bool condition, double yes, double no) { return condition ? yes : no; }
KD_INLINE double maximum(double a, double b) { return a > b ? a : b; }
KD_INLINE double minimum(double a, double b) { return a < b ? a : b; }
KD_INLINE double absolute(double a) { return fabs(a); }
KD_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }
KD_INLINE bool is_nan(double a) { return a != a; }
KD_INLINE double multiply_subtract(double a, double b, double c) { return a * b - c; }
// 2^a, and 2^a - 1 without the cancellation near zero, for any a: +inf beyond the range. Results go
// through references because GCC 12 would copy an object that holds both through memory.
KD_INLINE void grow(double a, double& power, double& less_one) {
  power = exp2(a);
  less_one = expm1(a * kLn2);
}
// At most where 2^-a is exactly 0, and that for a NaN.
KD_INLINE double bounded(double a) { return minimum(a, 1100.0); }
// The same, and 2^-a is finite.
KD_INLINE double clamped(double a) { return maximum(-1021.0, bounded(a)); }
// 2^-a and 2^-a - 1 for a bounded or clamped a, where nothing need look after overflow.
KD_INLINE void decay(double a, double& power, double& less_one) { grow(-a, power, less_one); }
// log(u) for u > 0, given u - 1 as well, which keeps every digit when u is near 1.
KD_INLINE double log_of_share(double u, double u_minus_one) {
  return u > 0.5 ? log1p(u_minus_one) : log(u);
}
// log((1 + r) / 2) for 0 <= r <= 1, given r - 1.
KD_INLINE double log_of_half_share(double r_minus_one) { return log1p(0.5 * r_minus_one); }

// float as CUDA kernels use it: the steps are those of cpu/functions.inc, the polynomials in
// Horner's scheme, which takes the fewest instructions.
KD_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
// A NaN in `a` is dropped, one in `b` is returned: maximum(bound, x) keeps the NaN of x.
KD_INLINE float maximum(float a, float b) { return a > b ? a : b; }
KD_INLINE float minimum(float a, float b) { return a < b ? a : b; }
KD_INLINE float absolute(float a) { return fabsf(a); }
KD_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
KD_INLINE float multiply_subtract(float a, float b, float c) { return fmaf(a, b, -c); }
KD_INLINE bool is_nan(float a) { return a != a; }

KD_INLINE uint32_t bits_of(float a) {
  uint32_t bits;
  memcpy(&bits, &a, sizeof(bits));
  return bits;
}

KD_INLINE float float_of(uint32_t bits) {
  float a;
  memcpy(&a, &bits, sizeof(a));
  return a;
}

// Adding 1.5 * 2^23 + 127 rounds to an integer and leaves it in the low bits of the sum, biased as
// an exponent.
constexpr float kBiasedMagic = 12582912.0f + 127.0f;

// The first kTerms terms. By recursion, which nvcc compiles as if it were written out; a loop that
// it unrolls is scheduled otherwise.
template <int kTerms, int kCount>
KD_INLINE float horner(const Polynomial<kCount>& polynomial, float x) {
  if constexpr (kTerms == 1) {
    return polynomial.at[0];
  } else {
    return multiply_add(horner<kTerms - 1>(polynomial, x), x, polynomial.at[kTerms - 1]);
  }
}

// 2^n (1 + r tail(r)), with n in the low bits of `shifted`.
KD_INLINE void assemble(float shifted, float r, float& power, float& less_one) {
  constexpr auto polynomial = power_less_one_polynomial();
  const float tail = horner<polynomial.kSize>(polynomial, r) * r;
  const float scale = float_of(bits_of(shifted) << 23);
  power = multiply_add(scale, tail, scale);
  less_one = multiply_add(scale, tail, scale - 1.0f);
}

// A NaN becomes the bound, whose power is exactly 0: the bits of 2^-127 are none.
KD_INLINE float bounded(float a) { return fminf(a, 127.0f); }
KD_INLINE float clamped(float a) { return fmaxf(-127.0f, bounded(a)); }

KD_INLINE void decay(float a, float& power, float& less_one) {
  const float shifted = kBiasedMagic - a;
  assemble(shifted, (kBiasedMagic - shifted) - a, power, less_one);
}

KD_INLINE void grow(float a, float& power, float& less_one) {
  const bool overflows = a > 127.4f;
  const float y = maximum(-127.0f, minimum(127.4f, a));
  const float shifted = y + kBiasedMagic;
  assemble(shifted, y - (shifted - kBiasedMagic), power, less_one);
  power = overflows ? INFINITY : power;
  less_one = overflows ? INFINITY : less_one;
}

KD_INLINE float log_of_half_share(float f) {
  constexpr auto polynomial = log_half_polynomial();
  return f * horner<polynomial.kSize>(polynomial, f);
}

KD_INLINE float log_of_share(float u, float u_minus_one) {
  // The exponent of u / sqrt(1/2), in place.
  const uint32_t exponent = (bits_of(u) - 0x3f3504f3u) & 0xff800000u;
  const float f = exponent == 0 ? u_minus_one : float_of(bits_of(u) - exponent) - 1.0f;
  const float n = static_cast<float>(static_cast<int32_t>(exponent));
  constexpr auto polynomial = log_polynomial();
  return multiply_add(n, static_cast<float>(kLn2 * 0x1p-23),
                      f * horner<polynomial.kSize>(polynomial, f));
}

// 2^-a and 2^-a - 1.
template <class X>
struct Decayed {
  X power, less_one;
};

// Those of a, b and c, for which a SIMD register has a faster way.
template <class X>
KD_INLINE void decay_three(X a, X b, X c, X& of_a, Decayed<X>& of_b, Decayed<X>& of_c) {
  X unused;
  decay(a, of_a, unused);
  decay(b, of_b.power, of_b.less_one);
  decay(c, of_c.power, of_c.less_one);
}

}  // namespace kd
