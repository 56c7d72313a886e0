// How functions in headers are declared.
#pragma once

// Everything in the headers is forced inline: a translation unit compiled for AVX-512 must not
// leave behind a copy of a shared function that the linker could choose for every other unit.
#define KD_HOST_INLINE inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE KD_HOST_INLINE
#endif
