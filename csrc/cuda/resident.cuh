// The row-resident kernels: a cluster of blocks owns a row, each block's slice of student and
// teacher lies in its shared memory, and global memory is read once. While one row is worked on the
// next ones arrive in the other stages.
#pragma once

#include "cluster.cuh"
#include "kernel.h"
#include "policy.h"
#include "sweep.cuh"

namespace kd::cuda {

constexpr int kResidentWarps = kResidentThreads / 32;

template <int kWords>
struct ResidentScratch {
  // Double, so that the next exchange may begin while slow warps still read the last one's.
  Mailbox<kWords, kMostClusterBlocks> blocks[2];
  Mailbox<kWords, kResidentWarps> warps[2];
  Barrier arrived[2];
  Barrier full[kMostStages];
  int64_t next_row;   // the producer's; here, because the consumers need every register
  float label_logit;  // the writer's, as above
};

static_assert(sizeof(ResidentScratch<16>) <= kResidentScratchBytes);

// The sums of all threads of the cluster, the same bits in each. A block's sums travel to every
// block of the cluster as a message, whose barrier counts their bytes. A block sends for the
// exchange after next on the same barrier only when it has everybody's next message, and those are
// sent by blocks that have done with this one: two of everything suffice.
template <int kWords>
struct Exchange {
  ResidentScratch<kWords>& scratch;
  int rank, cluster;
  unsigned turn = 0;  // the last bit chooses the buffers, the one before is the barrier's parity

  KD_DEVICE void expect(int buffer) const {
    scratch.arrived[buffer].expect(cluster * 4u * kWords);
  }

  // By one thread, before anybody sends.
  KD_DEVICE void start() const {
    for (int i = 0; i < 2; ++i) {
      scratch.arrived[i].initialise();
      if (cluster > 1) expect(i);
    }
  }

  template <class Record, class Reduce>
  KD_DEVICE Record sum_of(const Mailbox<kWords, 16>& from, int count, const Record& empty,
                          const Reduce& reduce_lanes) const {
    // Both halves of the warp sum the same slots: one step of the butterfly less.
    const int slot = threadIdx.x % 16;
    Record r = slot < count ? from.template get<Record>(slot) : empty;
    reduce_lanes(r, Lanes<16>{});
    return r;
  }

  template <class Record, class Reduce>
  KD_DEVICE Record reduce(Record mine, const Record& empty, const Reduce& reduce_lanes) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, buffer = turn & 1;
    reduce_lanes(mine, Lanes<32>{});
    if (lane == 0) scratch.warps[buffer].put(warp, mine);
    __syncthreads();
    const unsigned parity = turn++ >> 1 & 1;
    if (cluster == 1) return sum_of(scratch.warps[buffer], blockDim.x / 32, empty, reduce_lanes);
    if (warp == 0) {
      const Record block = sum_of(scratch.warps[buffer], blockDim.x / 32, empty, reduce_lanes);
      if (lane < cluster) {
        scratch.blocks[buffer].send(rank, block, scratch.arrived[buffer], lane);
      }
    }
    scratch.arrived[buffer].wait_for_cluster(parity);
    if (threadIdx.x == 0) expect(buffer);
    return sum_of(scratch.blocks[buffer], cluster, empty, reduce_lanes);
  }

  KD_DEVICE Evaluated sum(const Evaluated& mine) {
    return reduce(mine, Evaluated{}, [](Evaluated& e, auto lanes) { warp_reduce(e, lanes); });
  }
};

// The bytes of a slice that a bulk copy fetches: the pieces of 16 bytes that hold some of the row
// and lie inside the tensor.
struct Clip {
  const char *slice, *from, *to;

  KD_DEVICE Clip(const Task& task, const Side& side, int64_t row, const Span& span) {
    const int64_t size = size_of(side.dtype);
    const char* start = task.row_of(side, row);
    const char* end = start + task.vocab * size;
    const char* lowest = start - (reinterpret_cast<uintptr_t>(start) & 15);
    const char* highest = end + (-reinterpret_cast<uintptr_t>(end) & 15);
    if (lowest < side.begin) lowest += 16;
    if (highest > side.end) highest -= 16;
    slice = start + span.first * size;
    const char* past = start + span.past * size;
    from = slice < lowest ? lowest : slice;
    to = past > highest ? highest : past;
    if (to < from) to = from;
  }

  KD_DEVICE unsigned bytes() const { return static_cast<unsigned>(to - from); }
};

// Rows on their way to shared memory. The first thread of each block is the producer: it walks the
// rows ahead of everyone else and skips those that need no reading.
template <int kWords>
struct Pipeline {
  const Task& task;
  const Stages& stages;
  ResidentScratch<kWords>& scratch;
  char* memory;
  int rank;
  float scale;
  int stage = 0;
  unsigned parity = 0;

  KD_DEVICE char* student_slice() const { return memory + stage * stages.bytes; }
  KD_DEVICE char* teacher_slice() const { return student_slice() + stages.teacher_offset; }

  KD_DEVICE Span span(int64_t row) const {
    return span_of(task.row_of(task.student, row), task.student.dtype, task.vocab, rank,
                   stages.each);
  }

  // By the producer: the next row that counts, into a stage that is free.
  KD_DEVICE void request(int free) {
    int64_t row = scratch.next_row;
    while (row < task.rows() &&
           plan_row(task, read_inputs(task, row), scale).fate != Fate::counts) {
      row += stages.clusters;
    }
    scratch.next_row = row + stages.clusters;
    if (row >= task.rows()) return;
    const Span columns = span(row);
    const Clip student(task, task.student, row, columns);
    const Clip teacher(task, task.teacher, row, columns);
    char* to = memory + free * stages.bytes;
    Barrier& full = scratch.full[free];
    const uint64_t policy = cache_policy(Keep::no);
    full.expect(student.bytes() + teacher.bytes());
    if (student.bytes()) {
      bulk_copy(to + (student.from - student.slice), student.from, student.bytes(), full, policy);
    }
    to += stages.teacher_offset;
    if (teacher.bytes()) {
      bulk_copy(to + (teacher.from - teacher.slice), teacher.from, teacher.bytes(), full, policy);
    }
  }

  KD_DEVICE void wait() { scratch.full[stage].wait(parity); }

  KD_DEVICE void advance() {
    if (++stage < stages.count) return;
    stage = 0;
    parity ^= 1;
  }

  // Columns of the slice's first and last unit that lie outside the row become -inf; those inside
  // which no bulk copy may fetch, at the tensor's two ends, are fetched here.
  KD_DEVICE void mend(const Side& side, int64_t row, const Span& columns, char* slice) const {
    const Clip clip(task, side, row, columns);
    const int size = static_cast<int>(size_of(side.dtype));
    const int count = columns.past - columns.first > 8 ? 16 : 8;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int column = i < 8 ? columns.first + i : columns.past - 16 + i;
      const char* at = clip.slice + (column - columns.first) * size;
      const bool inside = column >= 0 && column < task.vocab;
      const bool fetched = at >= clip.from && at < clip.to;
      if (inside && fetched) continue;
      const float x = inside ? load_one(at, side.dtype) : -INFINITY;
      store_one(slice + (column - columns.first) * size, side.dtype, x);
    }
    fence_bulk_copies();
  }

  // True in this block's every thread or none.
  KD_DEVICE bool needs_mending(const Span& columns) const {
    return columns.first < columns.past && (columns.first < 0 || columns.past > task.vocab);
  }

  KD_DEVICE void mend(int64_t row, const Span& columns) const {
    if (!needs_mending(columns)) return;
    mend(task.student, row, columns, student_slice());
    mend(task.teacher, row, columns, teacher_slice());
    __syncthreads();
  }
};

// A slice of a row in shared memory, as Sweep reads it.
template <int kWidth>
struct SharedRow {
  const char* slice;
  int first_column;
  DType dtype;

  KD_DEVICE Vector<kWidth> load(int first) const {
    const char* from = slice + (first - first_column) * static_cast<int>(size_of(dtype));
    return widen<kWidth>(
        dtype, [&](auto words) { return load_words<sizeof(words) / sizeof(unsigned)>(from); });
  }
};

// Sets the barriers up and requests the first rows.
template <int kWords>
KD_DEVICE void start(Pipeline<kWords>& pipeline, const Exchange<kWords>& exchange) {
  const Stages& stages = pipeline.stages;
  if (threadIdx.x == 0) {
    pipeline.scratch.next_row = blockIdx.x / stages.cluster;
    for (int i = 0; i < stages.count; ++i) pipeline.scratch.full[i].initialise();
    exchange.start();
    publish_barriers();
    for (int i = 0; i < stages.count; ++i) pipeline.request(i);
  }
  __syncthreads();
  // Everybody's barriers exist before anybody sends.
  if (stages.cluster > 1) cluster_barrier();
}

// Every row of this cluster; `work(row, plan, span)` does one that counts, which lies in the
// pipeline's stage, and must have passed a barrier of the block after its last read of the stage.
template <int kWidth, int kWords, class Work>
KD_DEVICE void for_each_row(const Task& task, Pipeline<kWords>& pipeline, float scale,
                            const Work& work) {
  const int64_t step = pipeline.stages.clusters;
  const int64_t first = blockIdx.x / pipeline.stages.cluster;
  RowInputs ahead = read_inputs(task, first);
  for (int64_t row = first; row < task.rows(); row += step) {
    const RowPlan plan = plan_row(task, ahead, scale);
    ahead = read_inputs(task, row + step);
    const Span span = pipeline.span(row);
    if (plan.fate != Fate::counts) {
      dismiss_row<kWidth>(task, row, plan, span, pipeline.rank == 0);
      continue;
    }
    pipeline.wait();
    pipeline.mend(row, span);
    work(row, plan, span);
    pipeline.advance();
  }
}

KD_DEVICE void write_outcome(const Task& task, int64_t row, const RowPlan& plan,
                             const Totals& totals) {
  if (totals.spoils_row(task) && totals.student_is_bad) {
    write_constant(task, row, NAN);
  } else {
    write_statistics(task, row, plan, totals);
  }
}

// Every divergence and option: the sweeps run over shared memory.
template <class Functor>
__global__ void __launch_bounds__(kResidentThreads, 1)
    resident_kernel(const __grid_constant__ Task task, const __grid_constant__ Functor functor,
                    const __grid_constant__ Stages stages) {
#if __CUDA_ARCH__ >= 900
  constexpr int kWidth = 4, kWords = sizeof(Sums) / 4;
  extern __shared__ __align__(128) char memory[];
  __shared__ ResidentScratch<kWords> scratch;
  const float scale = gradient_scale(task);
  Pipeline<kWords> pipeline{task, stages, scratch, memory, cluster_rank(), scale};
  Exchange<kWords> exchange{scratch, pipeline.rank, stages.cluster};
  start(pipeline, exchange);
  const auto work = [&](int64_t row, const RowPlan& plan, const Span& span) {
    using Row = SharedRow<kWidth>;
    const Row student{pipeline.student_slice(), span.first, task.student.dtype};
    const Row teacher{pipeline.teacher_slice(), span.first, task.teacher.dtype};
    const Sweep<Functor, kWidth, Row> sweep{task, functor, span, student, teacher};
    const bool is_writer = pipeline.rank == 0 && threadIdx.x == 0;
    Sums sums = sweep.observe();
    if (is_writer) sums.label_logit = label_logit(task, row, plan.label);
    Totals totals(task, exchange.reduce(sums, nothing(), [&](Sums& s, auto lanes) {
      warp_reduce<Functor>(task, s, lanes);
    }));
    const bool spoiled = totals.spoils_row(task);
    const bool closed = totals.close<Functor>();
    if ((task.alpha != 0.0f || task.extras) && !closed && !spoiled) {
      totals.take(task, exchange.sum(sweep.evaluate(totals)));
    }
    if (is_writer) write_outcome(task, row, plan, totals);
    if (task.gradient) {
      if (spoiled) {
        fill_gradient<kWidth>(task, row, span, NAN);
      } else {
        sweep.differentiate(row, plan, totals);
      }
      if (pipeline.rank == 0) clear_beyond_vocabulary(task, row);
    }
    __syncthreads();
    if (threadIdx.x == 0) pipeline.request(pipeline.stage);
  };
  for_each_row<kWidth>(task, pipeline, scale, work);
#endif
}

}  // namespace kd::cuda
