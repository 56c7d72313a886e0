// The few operations that the mathematics is written in, for one number of type double. A SIMD
// register offers the same names (cpu/lanes.inc), found by argument-dependent lookup.
#pragma once

#include <math.h>
#include <stdint.h>

// Everything in the headers is forced inline: a translation unit compiled for AVX-512 must not
// leave behind a copy of a shared function that the linker could choose for every other unit.
#if defined(__CUDACC__)
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE inline __attribute__((always_inline))
#endif

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
// At most where 2^-a is nothing beside 1; the bound for a NaN.
KD_INLINE double bounded(double a) { return minimum(a, 1021.0); }
// 2^-a and 2^-a - 1 for a bounded a, not much below 0, where nothing need look after overflow.
KD_INLINE void decay(double a, double& power, double& less_one) { grow(-a, power, less_one); }
// log(u) for 0 < u <= 1, given u - 1 as well, which keeps every digit when u is near 1.
KD_INLINE double log_of_share(double u, double u_minus_one) {
  return u > 0.5 ? log1p(u_minus_one) : log(u);
}
// log((1 + r) / 2) for 0 <= r <= 1, given r - 1.
KD_INLINE double log_of_half_share(double r_minus_one) { return log1p(0.5 * r_minus_one); }

}  // namespace kd
