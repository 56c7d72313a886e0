// What the kernels need of the machine: formats, vectors of logits, special functions, sums over a
// warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "task.h"

#define KD_DEVICE __device__ __forceinline__

namespace kd::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
// The reference of a thread that has seen nothing but -inf: below every real one, and finite, so
// that no difference of two references is NaN.
constexpr float kNoReference = -1.2676506e30f;  // -2^100

// 2^x by the special function unit. Results below 2^-126 are 0; whole numbers give exact powers.
KD_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of normal numbers, each by one operation of the special function unit. Subnormal ones are 0.
KD_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

KD_DEVICE float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sum += weight * x where there is weight: elsewhere x may be inf or NaN.
KD_DEVICE void add_weighed(float& sum, float weight, float x) {
  asm("{.reg .pred p; setp.gt.f32 p, %1, 0f00000000; @p fma.rn.f32 %0, %1, %2, %0;}"
      : "+f"(sum)
      : "f"(weight), "f"(x));
}

// product = weight * x where there is weight: elsewhere it stays.
KD_DEVICE void weigh(float& product, float weight, float x) {
  asm("{.reg .pred p; setp.gt.f32 p, %1, 0f00000000; @p mul.rn.f32 %0, %1, %2;}"
      : "+f"(product)
      : "f"(weight), "f"(x));
}

template <int kCount>
struct Lanes {};

// Over each group of kCount lanes, in a fixed order.
template <int kCount>
KD_DEVICE float warp_sum(float x, Lanes<kCount>) {
#pragma unroll
  for (int step = kCount / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

// Four sums over each group of kCount lanes at once: half of the lanes go on with two of them, a
// quarter with one. Ten messages between lanes instead of twenty.
template <int kCount>
KD_DEVICE void warp_sums(float (&x)[4], Lanes<kCount>) {
  constexpr int kHalf = kCount / 2, kQuarter = kCount / 4;
  const bool upper = (threadIdx.x & kHalf) != 0, odd = (threadIdx.x & kQuarter) != 0;
  float first = upper ? x[2] : x[0], second = upper ? x[3] : x[1];
  first += __shfl_xor_sync(kWholeWarp, upper ? x[0] : x[2], kHalf);
  second += __shfl_xor_sync(kWholeWarp, upper ? x[1] : x[3], kHalf);
  float sum = odd ? second : first;
  sum += __shfl_xor_sync(kWholeWarp, odd ? first : second, kQuarter);
#pragma unroll
  for (int step = kCount / 8; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = __shfl_sync(kWholeWarp, sum, i / 2 * kHalf + i % 2 * kQuarter);
  }
}

// Floats in the order of signed integers.
KD_DEVICE int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

KD_DEVICE float warp_max(float x) {
  const int top = __reduce_max_sync(kWholeWarp, ordered(x));
  return __int_as_float(top ^ ((top >> 31) & 0x7fffffff));
}

template <class Word>
KD_DEVICE void unpack_bfloat16(Word word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}

KD_DEVICE void unpack_float16(unsigned word, float& low, float& high) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  low = both.x;
  high = both.y;
}

KD_DEVICE void unpack(DType dtype, unsigned word, float& low, float& high) {
  if (dtype == DType::bfloat16) return unpack_bfloat16(word, low, high);
  unpack_float16(word, low, high);
}

KD_DEVICE unsigned pack(DType dtype, float low, float high) {
  if (dtype == DType::bfloat16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&both);
  }
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

KD_DEVICE float load_one(const char* from, DType dtype) {
  if (dtype == DType::float32) return *reinterpret_cast<const float*>(from);
  const unsigned half = *reinterpret_cast<const unsigned short*>(from);
  float low, high;
  unpack(dtype, half, low, high);
  return low;
}

KD_DEVICE void store_one(char* to, DType dtype, float x) {
  if (dtype == DType::float32) {
    *reinterpret_cast<float*>(to) = x;
  } else {
    *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(pack(dtype, x, 0.0f));
  }
}

// Elements of a vector: 16 bytes of the wider of the two formats.
template <int kWidth>
struct Vector {
  float at[kWidth];
};

template <int kWords>
struct Words {
  unsigned at[kWords];
};

// What the second-level cache is asked to do with a row: keep it for the next sweep, or let it go.
enum class Keep { no, yes };

KD_DEVICE uint64_t cache_policy(Keep keep) {
  uint64_t policy;
  if (keep == Keep::yes) {
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

// Loads of 8 and 16 bytes. Those of global memory pass the first-level cache by; they are not `nc`,
// since the gradient may take the student's own memory.
template <int kWords>
KD_DEVICE Words<kWords> load_global(const char* from, uint64_t policy) {
  Words<kWords> w;
  if constexpr (kWords == 4) {
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
                 : "l"(from), "l"(policy));
  } else {
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v2.u32 {%0,%1}, [%2], %3;"
                 : "=r"(w.at[0]), "=r"(w.at[1])
                 : "l"(from), "l"(policy));
  }
  return w;
}

template <int kWords>
KD_DEVICE Words<kWords> load_words(const char* from) {
  if constexpr (kWords == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    return {{v.x, v.y, v.z, v.w}};
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    return {{v.x, v.y}};
  }
}

// x, which the compiler does not see: what follows from it is computed again where it is needed,
// instead of being kept in registers.
template <class Number>
KD_DEVICE Number opaque(Number x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 16 bytes of shared memory that start `shift` bytes, an even number, behind an aligned address.
KD_DEVICE Words<4> load_shifted(const char* aligned, unsigned shift) {
  const Words<4> low = load_words<4>(aligned), high = load_words<4>(aligned + 16);
  unsigned both[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) both[i] = low.at[i], both[4 + i] = high.at[i];
#pragma unroll
  for (int step = 2; step > 0; step /= 2) {
    const bool moves = (shift / 4 & step) != 0;
#pragma unroll
    for (int i = 0; i + step < 8; ++i) both[i] = moves ? both[i + step] : both[i];
  }
  Words<4> w;
#pragma unroll
  for (int i = 0; i < 4; ++i) w.at[i] = __funnelshift_r(both[i], both[i + 1], 8 * (shift % 4));
  return w;
}

// kWidth elements by a function that loads words.
template <int kWidth, class Load>
KD_DEVICE Vector<kWidth> widen(DType dtype, const Load& load) {
  Vector<kWidth> x;
  if constexpr (kWidth == 4) {
    if (dtype == DType::float32) {
      const Words<4> w = load(Words<4>{});
#pragma unroll
      for (int i = 0; i < 4; ++i) x.at[i] = __uint_as_float(w.at[i]);
      return x;
    }
  }
  const Words<kWidth / 2> w = load(Words<kWidth / 2>{});
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) unpack(dtype, w.at[i], x.at[2 * i], x.at[2 * i + 1]);
  return x;
}

// Streaming stores: nobody on this device reads the gradient before other data have taken its
// place.
KD_DEVICE void store_words(char* to, const Words<4>& w) {
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(w.at[0], w.at[1], w.at[2], w.at[3]));
}

KD_DEVICE void store_words(char* to, const Words<2>& w) {
  __stcs(reinterpret_cast<uint2*>(to), make_uint2(w.at[0], w.at[1]));
}

// The same where `there`, without a branch.
KD_DEVICE void store_words_if(bool there, char* to, const Words<4>& w) {
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.cs.v4.u32 [%1], {%2, %3, %4, %5};}" ::"r"(
          static_cast<int>(there)),
      "l"(to), "r"(w.at[0]), "r"(w.at[1]), "r"(w.at[2]), "r"(w.at[3])
      : "memory");
}

KD_DEVICE void store_words_if(bool there, char* to, const Words<2>& w) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.cs.v2.u32 [%1], {%2, %3};}" ::"r"(
                   static_cast<int>(there)),
               "l"(to), "r"(w.at[0]), "r"(w.at[1])
               : "memory");
}

// Hands a vector's words in this format to a function.
template <int kWidth, class Store>
KD_DEVICE void narrow(DType dtype, const Vector<kWidth>& x, const Store& store) {
  if constexpr (kWidth == 4) {
    if (dtype == DType::float32) {
      Words<4> w;
#pragma unroll
      for (int i = 0; i < 4; ++i) w.at[i] = __float_as_uint(x.at[i]);
      return store(w);
    }
  }
  Words<kWidth / 2> w;
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) w.at[i] = pack(dtype, x.at[2 * i], x.at[2 * i + 1]);
  store(w);
}

template <int kWidth>
KD_DEVICE void store_vector(char* to, DType dtype, const Vector<kWidth>& x) {
  narrow(dtype, x, [&](const auto& words) { store_words(to, words); });
}

template <int kWidth>
KD_DEVICE void store_vector_if(bool there, char* to, DType dtype, const Vector<kWidth>& x) {
  narrow(dtype, x, [&](const auto& words) { store_words_if(there, to, words); });
}

KD_DEVICE bool is_aligned(const char* p, int bytes) {
  return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0;
}

}  // namespace kd::cuda
