// The small kernels around the rows: which rows count, the sum of their losses, and a stored
// gradient times what came from above.
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

// What is given of the rows besides their logits.
struct RowInputs {
  int rows, vocab;
  const int64_t* labels;  // [rows], or null
  int64_t ignore_index;
  const float* row_weights;  // [rows], or null
  const float* grad_output;
  int64_t grad_output_stride;
  const float* denominator;  // on the device, or null: then 1 / scale, or, where that is 0, the
  float scale;               // number of labels that are not ignore_index
  bool backward;             // only the gradient is wanted
  unsigned long long* label_errors;  // 1 + the highest row whose label is out of range; or null
};

// Rows that do not count are not read. A weight of 0 makes a row one of them.
KD_DEVICE bool plan_row(const RowInputs& given, int row, float scale, RowPlan& plan) {
  const int64_t label = given.labels ? given.labels[row] : 0;
  plan.row = row;
  plan.label = kIgnored;
  plan.weight = given.row_weights ? given.row_weights[row] : 1.0f;
  plan.share = plan.weight * scale;
  if (given.grad_output) plan.share *= given.grad_output[row * given.grad_output_stride];
  if (given.labels && label == given.ignore_index) return false;
  if (given.labels && (label < 0 || label >= given.vocab)) {
    plan.label = kSpoiled;
    if (given.label_errors) {
      atomicMax(given.label_errors, static_cast<unsigned long long>(row) + 1);
    }
    return false;
  }
  if (plan.weight == 0.0f || (given.backward && plan.share == 0.0f)) return false;
  if (given.labels) plan.label = static_cast<int>(label);
  return true;
}

constexpr int kPlannedRows = 4;  // of a thread of plan_kernel and turn

// By one warp: puts what stands before each warp's in place of what each has, kPlannedRows of them
// to a lane, on top of `before`. Returns the sum up to the lane's, of the last lane: all.
KD_DEVICE int count_before(int (&counts)[kPlannedRows * kFinishThreads / 32], int before) {
  const int lane = threadIdx.x % 32;
  int sum = 0, own[kPlannedRows];
#pragma unroll
  for (int i = 0; i < kPlannedRows; ++i) own[i] = counts[lane * kPlannedRows + i], sum += own[i];
  int upto = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kWholeWarp, upto, step);
    if (lane >= step) upto += other;
  }
  upto += before - sum;
#pragma unroll
  for (int i = 0; i < kPlannedRows; ++i) counts[lane * kPlannedRows + i] = upto, upto += own[i];
  return upto;
}

// One block: the rows that count, in order, and from the end the others. So a row that counts costs
// the row kernels no decision, and clusters share those alone.
static __global__ void __launch_bounds__(kFinishThreads)
    plan_kernel(const __grid_constant__ RowInputs given, Plan* plan, RowPlan* planned) {
  constexpr int kWarps = kFinishThreads / 32, kRows = kPlannedRows;
  __shared__ unsigned long long slots[kWarps];
  __shared__ int counts[kRows * kWarps];
  float scale = given.scale;
  if (given.denominator) {
    scale = *given.denominator == 0.0f ? 1.0f : 1.0f / *given.denominator;
  } else if (scale == 0.0f) {
    unsigned long long labelled = 0;
    for (int row = threadIdx.x; row < given.rows; row += kFinishThreads) {
      labelled += given.labels[row] != given.ignore_index;
    }
    labelled = block_sum(labelled, slots);
    // No rows count as one, so that nothing is divided by 0.
    const float denominator = labelled ? static_cast<float>(labelled) : 1.0f;
    if (threadIdx.x == 0) plan->denominator = denominator;
    scale = 1.0f / denominator;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;  // rows that count, of earlier turns
  for (int64_t turn = 0; turn < given.rows; turn += kRows * kFinishThreads) {
    RowPlan mine[kRows];
    bool counts_mine[kRows];
    unsigned votes[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = turn + i * kFinishThreads + threadIdx.x;
      counts_mine[i] = row < given.rows && plan_row(given, static_cast<int>(row), scale, mine[i]);
      votes[i] = __ballot_sync(kWholeWarp, counts_mine[i]);
      if (lane == 0) counts[i * kWarps + warp] = __popc(votes[i]);
    }
    __syncthreads();
    if (warp == 0) before = count_before(counts, before);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = turn + i * kFinishThreads + threadIdx.x;
      if (row >= given.rows) continue;
      const int earlier = counts[i * kWarps + warp] + __popc(votes[i] & ((1u << lane) - 1));
      const int64_t others = row - earlier;
      planned[counts_mine[i] ? earlier : given.rows - 1 - others] = mine[i];
    }
    __syncthreads();
    if (warp == 0) before = __shfl_sync(kWholeWarp, before, 31);
  }
  if (threadIdx.x == 0) plan->counted = before, plan->next = 0;
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

// 0 as either factor gives 0: an entry that takes no part stays 0 beside inf or NaN.
KD_DEVICE float scaled_entry(float x, float factor) { return x == 0.0f ? 0.0f : x * factor; }

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
          for (unsigned& word : w.at)
            word = __float_as_uint(scaled_entry(__uint_as_float(word), factor));
        } else {
#pragma unroll
          for (unsigned& word : w.at) {
            float low, high;
            unpack(job.dtype, word, low, high);
            word = pack(job.dtype, scaled_entry(low, factor), scaled_entry(high, factor));
          }
        }
        store_words(job.to + at, w);
        continue;
      }
      for (int64_t i = at < begin ? begin : at; i < at + 16 && i < end; i += size) {
        const float x = factor == 0.0f ? 0.0f : load_one(job.from + i, job.dtype);
        store_one(job.to + i, job.dtype, scaled_entry(x, factor));
      }
    }
  }
}

}  // namespace kd::cuda
