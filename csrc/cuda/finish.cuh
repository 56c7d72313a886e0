// The small kernels around the rows: the number of rows that count, the sum of their losses, and a
// stored gradient times what came from above.
#pragma once

#include "device.cuh"

namespace kd::cuda {

constexpr int kFinishThreads = 1024;

template <class Number>
KD_DEVICE Number block_sum(Number x, Number (&slots)[kFinishThreads / 32]) {
  const auto warp = [](Number y) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) y += __shfl_xor_sync(kWholeWarp, y, step);
    return y;
  };
  x = warp(x);
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
  __syncthreads();
  return warp(slots[threadIdx.x % 32]);
}

// One block: 0 rows count as 1, so that nothing is divided by 0.
static __global__ void __launch_bounds__(kFinishThreads)
    count_kernel(const int64_t* labels, int64_t ignore_index, int64_t rows, float* denominator) {
  __shared__ unsigned long long slots[kFinishThreads / 32];
  unsigned long long counted = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kFinishThreads) {
    counted += labels[row] != ignore_index;
  }
  counted = block_sum(counted, slots);
  if (threadIdx.x == 0) *denominator = counted ? static_cast<float>(counted) : 1.0f;
}

// One block, so that the order of the sum depends on nothing.
static __global__ void __launch_bounds__(kFinishThreads)
    sum_kernel(const float* losses, int64_t rows, const float* denominator, float scale,
               float* loss) {
  __shared__ double slots[kFinishThreads / 32];
  double sum = 0.0;
  for (int64_t row = threadIdx.x; row < rows; row += kFinishThreads) sum += losses[row];
  sum = block_sum(sum, slots);
  if (threadIdx.x != 0) return;
  const float divisor = denominator && *denominator != 0.0f ? *denominator : 1.0f;
  *loss = static_cast<float>(denominator ? sum / divisor : sum * scale);
}

struct Scaling {
  const char* from;
  char* to;
  DType dtype;
  int64_t rows, columns, row_stride;  // of both; what is between rows is not touched
  const float* factor;
  int64_t factor_stride;  // 0: one factor for all
};

// In place, rows with the factor 1 are neither read nor written; nor is anything of a row with the
// factor 0 read.
static __global__ void __launch_bounds__(512) scale_kernel(const __grid_constant__ Scaling job) {
  const bool in_place = job.from == job.to;
  if (in_place && job.factor_stride == 0 && *job.factor == 1.0f) return;
  const int64_t size = size_of(job.dtype);
  for (int64_t row = blockIdx.y; row < job.rows; row += gridDim.y) {
    const float factor = job.factor[row * job.factor_stride];
    if (in_place && factor == 1.0f) continue;
    const int64_t begin = row * job.row_stride * size, end = begin + job.columns * size;
    // The memory is aligned to 16 bytes, the row may not be: its vectors are the memory's.
    const int64_t step = int64_t{16} * blockDim.x * gridDim.x;
    for (int64_t at = begin / 16 * 16 + int64_t{16} * (blockIdx.x * blockDim.x + threadIdx.x);
         at < end; at += step) {
      if (at >= begin && at + 16 <= end) {
        Words<4> w{};
        if (factor != 0.0f) w = load_words<4>(job.from + at);
        if (job.dtype == DType::float32) {
#pragma unroll
          for (unsigned& word : w.at) word = __float_as_uint(__uint_as_float(word) * factor);
        } else {
#pragma unroll
          for (unsigned& word : w.at) {
            float low, high;
            unpack(job.dtype, word, low, high);
            word = pack(job.dtype, low * factor, high * factor);
          }
        }
        store_words(job.to + at, w);
        continue;
      }
      for (int64_t i = at < begin ? begin : at; i < at + 16 && i < end; i += size) {
        const float x = factor == 0.0f ? 0.0f : load_one(job.from + i, job.dtype);
        store_one(job.to + i, job.dtype, x * factor);
      }
    }
  }
}

}  // namespace kd::cuda
