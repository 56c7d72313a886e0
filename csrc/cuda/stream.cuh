// The streaming kernel: a row's sweeps read global memory, the later ones from the second-level
// cache. Runs on every architecture, for every layout, dtype and option. A block owns a row, or,
// where rows are few, one of several parts of it; the steps are then launches of their own.
#pragma once

#include "kernel.h"
#include "policy.h"
#include "sweep.cuh"

namespace kd::cuda {

constexpr int kStreamWarps = kStreamThreads / 32;

struct StreamScratch {
  Sums sums[kStreamWarps];
  Evaluated evaluated[kStreamWarps];
};

// The sums of `count` <= 32 slots, the same in every thread that asks.
template <class Functor>
KD_DEVICE Sums sum_of_slots(const Task& task, const Sums* slots, int count) {
  const int lane = threadIdx.x % 32;
  Sums s = lane < count ? slots[lane] : nothing();
  warp_reduce<Functor>(task, s, Lanes<32>{});
  return s;
}

KD_DEVICE Evaluated sum_of_slots(const Evaluated* slots, int count) {
  const int lane = threadIdx.x % 32;
  Evaluated e = lane < count ? slots[lane] : Evaluated{};
  warp_reduce(e, Lanes<32>{});
  return e;
}

template <class Functor>
KD_DEVICE Sums block_reduce(const Task& task, Sums s, StreamScratch& scratch) {
  warp_reduce<Functor>(task, s, Lanes<32>{});
  if (threadIdx.x % 32 == 0) scratch.sums[threadIdx.x / 32] = s;
  __syncthreads();
  return sum_of_slots<Functor>(task, scratch.sums, blockDim.x / 32);
}

KD_DEVICE Evaluated block_reduce(Evaluated e, StreamScratch& scratch) {
  warp_reduce(e, Lanes<32>{});
  if (threadIdx.x % 32 == 0) scratch.evaluated[threadIdx.x / 32] = e;
  __syncthreads();
  return sum_of_slots(scratch.evaluated, blockDim.x / 32);
}

template <class Functor, int kWidth>
KD_DEVICE void stream_row(const Task& task, const Functor& functor, const Split& split,
                          const RowPlan& plan, const Span& span, StreamScratch& scratch) {
  const bool last_sweep = split.steps == all_steps && !task.gradient && has_closed_form<Functor>;
  const Keep keep = last_sweep ? Keep::no : Keep::yes;
  using Row = GlobalRow<kWidth>;
  const Row student(task, task.student, plan.row, span, keep);
  const Row teacher(task, task.teacher, plan.row, span, keep);
  const Sweep<Functor, kWidth, Row> sweep{task, functor, span, student, teacher};
  const bool is_first_part = blockIdx.y == 0, is_first_thread = threadIdx.x == 0;
  const int64_t first_slot = static_cast<int64_t>(plan.row) * split.parts;

  Sums sums;
  if (split.steps & observe_step) {
    sums = sweep.observe();
    if (is_first_thread) sums.label_logit = label_logit(task, plan, span, student);
    sums = block_reduce<Functor>(task, sums, scratch);
    if (split.steps == observe_step) {
      if (is_first_thread) split.observed[first_slot + blockIdx.y] = sums;
      return;
    }
  } else {
    sums = sum_of_slots<Functor>(task, split.observed + first_slot, split.parts);
  }
  Totals totals(task, sums);
  const bool spoiled = totals.spoils_row(task);
  const bool wanted = task.alpha != 0.0f || task.extras;
  // A cancelled closed form is summed anew only where that needs no further launch.
  const bool closed = totals.close<Functor>(task) || (has_closed_form<Functor> && split.parts > 1);
  if (wanted && !closed && !spoiled) {
    if (split.steps & evaluate_step) {
      const Evaluated e = block_reduce(sweep.evaluate(totals), scratch);
      if (split.steps == evaluate_step) {
        if (is_first_thread) split.evaluated[first_slot + blockIdx.y] = e;
        return;
      }
      totals.take(task, e);
    } else {
      totals.take(task, sum_of_slots(split.evaluated + first_slot, split.parts));
    }
  }
  if (!(split.steps & differentiate_step)) return;
  if (is_first_part && is_first_thread) {
    if (spoiled && totals.student_is_bad) {
      write_constant(task, plan.row, NAN);
    } else {
      write_statistics(task, plan, totals);
    }
  }
  if (!task.gradient) return;
  if (spoiled) {
    fill_gradient<kWidth>(task, plan.row, span, NAN);
  } else {
    const Row last_student(task, task.student, plan.row, span, Keep::no);
    const Row last_teacher(task, task.teacher, plan.row, span, Keep::no);
    const Sweep<Functor, kWidth, Row> last{task, functor, span, last_student, last_teacher};
    last.differentiate(plan, totals);
  }
  if (is_first_part) clear_beyond_vocabulary(task, plan.row);
}

template <class Functor, int kWidth>
__global__ void __launch_bounds__(kStreamThreads, 2)
    stream_kernel(const __grid_constant__ Task task, const __grid_constant__ Functor functor,
                  const __grid_constant__ Split split) {
  __shared__ StreamScratch scratch;
  const int counted = task.plan->counted;
  for (int64_t i = blockIdx.x; i < task.rows(); i += gridDim.x) {
    const RowPlan plan = load_plan(task.rows_planned + i);
    const char* start = task.row_of(task.student, plan.row);
    const Span span = span_of(start, task.student.dtype, task.vocab, blockIdx.y, split.each);
    if (i >= counted) {
      if (split.steps & differentiate_step) dismiss_row<kWidth>(task, plan, span, blockIdx.y == 0);
      continue;
    }
    stream_row<Functor, kWidth>(task, functor, split, plan, span, scratch);
    // The next row's sums take the scratch that slower warps may still read.
    __syncthreads();
  }
}

template <KernelGroup kGroup>
Kernel stream_kernel_of(const Divergence& divergence, int width) {
  return visit_group<kGroup>(divergence, [&](const auto& given) {
    const auto functor = general(given);
    using Functor = std::remove_const_t<decltype(functor)>;
    // The others spend their time on arithmetic: one width serves every pair of formats.
    if constexpr (has_closed_form<Functor>) {
      if (width == 8) return make_kernel((const void*)stream_kernel<Functor, 8>, functor);
    }
    return make_kernel((const void*)stream_kernel<Functor, 4>, functor);
  });
}

}  // namespace kd::cuda
