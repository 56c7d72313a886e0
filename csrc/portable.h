// The few operations that the mathematics is written in, for one number of type double or, in CUDA
// kernels, float. A SIMD register offers the same names (cpu/lanes.inc), found by
// argument-dependent lookup.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

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
// log2(u) for 0 < u <= 1, given u - 1 as well, which keeps every digit when u is near 1.
KD_INLINE double log2_of_share(double u, double u_minus_one) {
  return u > 0.5 ? log1p(u_minus_one) * kLog2E : log2(u);
}
// log2((1 + r) / 2) for 0 <= r <= 1, given r - 1.
KD_INLINE double log2_of_half_share(double r_minus_one) {
  return log1p(0.5 * r_minus_one) * kLog2E;
}

KD_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
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

// 2^n (1 + r tail(r)), with n in the low bits of `shifted`; this and the rest as in cpu/lanes.inc.
KD_INLINE void assemble(float shifted, float r, float& power, float& less_one) {
  float tail = multiply_add(0.00015453163f, r, 0.0013390863f);
  tail = multiply_add(tail, r, 0.009618083f);
  tail = multiply_add(tail, r, 0.05550357f);
  tail = multiply_add(tail, r, 0.2402265f);
  tail = multiply_add(tail, r, 0.6931472f) * r;
  const float scale = float_of(bits_of(shifted) << 23);
  power = multiply_add(scale, tail, scale);
  less_one = multiply_add(scale, tail, scale - 1.0f);
}

// Adding 1.5 * 2^23 + 127 rounds to an integer and leaves it in the low bits of the sum, biased as
// an exponent.
constexpr float kIntegerMagic = 12582912.0f + 127.0f;

KD_INLINE float bounded(float a) { return minimum(a, 126.0f); }

KD_INLINE void decay(float a, float& power, float& less_one) {
  const float shifted = kIntegerMagic - a;
  assemble(shifted, (kIntegerMagic - shifted) - a, power, less_one);
}

KD_INLINE void grow(float a, float& power, float& less_one) {
  const bool overflows = a > 127.4f, vanishes = a < -126.0f;
  const float y = maximum(-126.0f, minimum(127.4f, a));
  const float shifted = y + kIntegerMagic;
  assemble(shifted, y - (shifted - kIntegerMagic), power, less_one);
  power = overflows ? INFINITY : vanishes ? 0.0f : power;
  less_one = overflows ? INFINITY : less_one;
}

KD_INLINE float log2_of_half_share(float f) {
  float p = multiply_add(0.00406070193f, f, 0.00955679361f);
  p = multiply_add(p, f, 0.0141752595f);
  p = multiply_add(p, f, 0.00458818814f);
  p = multiply_add(p, f, 0.0121552739f);
  p = multiply_add(p, f, -0.0218933579f);
  p = multiply_add(p, f, 0.0601785257f);
  p = multiply_add(p, f, -0.1803343f);
  p = multiply_add(p, f, 0.721347511f);
  return f * p;
}

KD_INLINE float log2_of_share(float u, float u_minus_one) {
  const uint32_t exponent = (bits_of(u) - 0x3f3504f3u) & 0xff800000u;
  const float f = exponent == 0 ? u_minus_one : float_of(bits_of(u) - exponent) - 1.0f;
  const float n = static_cast<float>(static_cast<int32_t>(exponent));
  float p = multiply_add(0.125837058f, f, -0.207269818f);
  p = multiply_add(p, f, 0.215715617f);
  p = multiply_add(p, f, -0.238944814f);
  p = multiply_add(p, f, 0.287916243f);
  p = multiply_add(p, f, -0.360703677f);
  p = multiply_add(p, f, 0.480910629f);
  p = multiply_add(p, f, -0.721347332f);
  p = multiply_add(p, f, 1.44269502f);
  return multiply_add(n, 0x1p-23f, f * p);
}

}  // namespace kd
