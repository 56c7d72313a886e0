// Launch numbers, each with the arithmetic behind it.
#pragma once

#include <stdint.h>

namespace kd::cuda {

struct DeviceLimits {
  int processors = 0;
  int architecture = 0;  // 90 for sm_90
  int shared_bytes = 0;  // a block's, after opting in
  int cache_bytes = 0;   // second level
};

struct RowShape {
  int64_t rows;
  int64_t vocab;
  int bytes;       // student and teacher, one element of each
  bool aligned;    // every row of the student starts at a multiple of 16 bytes
  bool congruent;  // and vectors that start at such places do so in the teacher's rows
};

// The Plan, and space to the next aligned slot; the rows' plans are behind it.
constexpr int64_t kWorkspaceHead = 64;
// Rows are split where there are at most this many: with more, one block per row fills the device.
constexpr int64_t kSplitRows = 64;
// A row's memory beside the tensors stays below 1 KB: a part has a slot in the workspace (Sums and
// Evaluated, 80 bytes). A warp sums the parts, one a lane.
constexpr int kMostParts = 12;
// Columns that are worth a block of their own: at 256 threads one vector of 8 each.
constexpr int64_t kLeastColumns = 2048;

constexpr int kStreamThreads = 256;

// Of a sparse teacher's rows: a warp has one vector on its way while it works on another.
constexpr int kEntriesThreads = 512;
// What such a block has of shared memory for a bit of every column and for its row's slots: less
// than the 99 KB that every architecture gives a block.
constexpr int64_t kEntriesBytes = 80 * 1024;
constexpr int64_t kSlotBytes = 32;  // checked in entries.cuh
// A row that does not start aligned starts up to 7 columns into its first unit.
constexpr int64_t mask_words(int64_t vocab) { return (vocab + 14) / 32 + 1; }
constexpr int64_t entries_bytes(int64_t vocab, int64_t count) {
  return kSlotBytes * count + 4 * mask_words(vocab);
}

constexpr int kResidentThreads = 512;
constexpr int kMostStages = 3;
constexpr int kMostClusterBlocks = 16;
// A thread keeps this many exponentials of each model in registers: 64 of its 128.
constexpr int kColumnsPerThread = 32;
// Or this many, 112 of 168 registers: then 8 blocks hold 172032 columns instead of 131072. A
// scheduler has 16384 registers, so its warps have more than 128 each where it has three, not four.
constexpr int kWideColumnsPerThread = 56;
constexpr int kWideThreads = 384;
// On sm_120, whose code needs a few registers more: three warps and two of a scheduler. A stage of
// the former is 48 KB in bfloat16, of the 94 that a block can have.
constexpr int kResidentThreadsOfSm120 = 384;
constexpr int kWideThreadsOfSm120 = 256;
// What the row-resident kernels have of shared memory besides the stages; checked there.
constexpr int kResidentScratchBytes = 12288;

// The longest row that the largest cluster of register kernels holds, by the bytes of a logit of
// the wider format: two of them have a wide form. 0: no kernel takes such logits.
constexpr int64_t most_register_columns(int bytes) {
  if (bytes == 2) return kMostClusterBlocks * kWideThreads * int64_t{kWideColumnsPerThread};
  if (bytes == 4) return kMostClusterBlocks * kResidentThreads * int64_t{kColumnsPerThread};
  return 0;
}

struct StreamPolicy {
  int64_t blocks;
  int parts;
};

// Few rows: as many parts as give every processor two blocks. Otherwise a persistent grid, whose
// rows in flight fit in 40 % of the second-level cache (each of its two partitions may hold a copy)
// so that the second sweep finds them there; but never fewer blocks than processors, since idle
// ones cost more than what a miss re-reads.
inline StreamPolicy stream_policy(const RowShape& shape, const DeviceLimits& limits,
                                  int blocks_per_processor) {
  const int64_t processors = limits.processors;
  if (shape.rows <= kSplitRows && 2 * shape.rows < processors) {
    int64_t parts = (2 * processors + shape.rows - 1) / shape.rows;
    const int64_t useful = shape.vocab / kLeastColumns;
    if (parts > useful) parts = useful;
    if (parts > kMostParts) parts = kMostParts;
    if (parts > 1) return {shape.rows, static_cast<int>(parts)};
  }
  const int64_t resident = processors * (blocks_per_processor > 0 ? blocks_per_processor : 1);
  const int64_t cached = limits.cache_bytes * int64_t{2} / 5 / (shape.vocab * shape.bytes);
  int64_t blocks = cached > processors ? cached : processors;
  if (blocks > resident) blocks = resident;
  return {blocks < shape.rows ? blocks : shape.rows, 1};
}

struct ResidentPolicy {
  int cluster = 0;  // blocks a row; 0: the row does not fit
  int threads = 0;
  int columns_per_thread = kColumnsPerThread;
  int stages = 0;
  int64_t slice_columns = 0;  // a block's share, in whole units of 8
  int64_t stage_columns = 0;  // those that its threads can have
};

// A row that does not start aligned starts up to 7 columns into its first unit.
inline int64_t slice_columns(const RowShape& shape, int cluster) {
  const int64_t units = (shape.vocab + (shape.aligned ? 7 : 14)) / 8;
  return (units + cluster - 1) / cluster * 8;
}

// A teacher's slice that does not start at 16 bytes reaches into 16 more.
inline int64_t stage_bytes(const RowShape& shape, int64_t columns) {
  return columns * shape.bytes + (shape.congruent ? 0 : 16);
}

// One cluster size. A thread has up to 32 columns, so small slices take small blocks, of which
// several share a processor: hence the share of shared memory by threads. `reserved` is the
// kernel's static shared memory.
inline ResidentPolicy resident_policy(const RowShape& shape, const DeviceLimits& limits,
                                      int cluster, int columns_per_thread, int reserved) {
  ResidentPolicy policy;
  policy.columns_per_thread = columns_per_thread;
  const int64_t columns = slice_columns(shape, cluster);
  const bool wide = columns_per_thread != kColumnsPerThread;
  const int64_t most_threads = limits.architecture >= 120
                                   ? (wide ? kWideThreadsOfSm120 : kResidentThreadsOfSm120)
                                   : (wide ? kWideThreads : kResidentThreads);
  const int64_t warp_columns = columns_per_thread * int64_t{32};
  const int64_t threads = (columns + warp_columns - 1) / warp_columns * 32;
  if (threads > most_threads) return policy;
  const int64_t available = limits.shared_bytes - reserved;
  const int64_t stage_columns = threads * columns_per_thread;
  const int64_t stage = stage_bytes(shape, stage_columns);
  if (stage > available) return policy;
  const int64_t share = available * threads / most_threads;
  int64_t stages = share / stage;
  // Never less than two where the processor has room for them: a single stage loads nothing ahead.
  if (stages < 2) stages = available / stage < 2 ? 1 : 2;
  policy.cluster = cluster;
  policy.threads = static_cast<int>(threads);
  policy.stages = static_cast<int>(stages < kMostStages ? stages : kMostStages);
  policy.slice_columns = columns;
  policy.stage_columns = stage_columns;
  return policy;
}

// The smallest cluster with three stages; failing that, the one with the most. In bfloat16: 1 block
// to V = 16k (64 KB a stage), 2 to 32k, 4 to 64k, 8 to 128k, 16 to 256k. float32 has half of that
// with three stages; 256k takes 16 blocks of one stage of 128 KB. With few rows larger clusters
// spread them over idle processors, as long as a block keeps kLeastColumns.
//
// Where the kernel has a wide form, 8 blocks of it come before 16: of 16 an H200 runs 7 clusters at
// once, on 112 of its 132 processors, and of 8 15, on 120 (measured), so that V = 151936 in
// bfloat16 has twice the rows in work. It also takes rows of more than 256k.
inline ResidentPolicy best_resident_policy(const RowShape& shape, const DeviceLimits& limits,
                                           int largest_cluster, bool has_wide, int reserved) {
  ResidentPolicy best;
  for (int cluster = 1; cluster <= largest_cluster; cluster *= 2) {
    for (const int columns : {kColumnsPerThread, kWideColumnsPerThread}) {
      const bool wide = columns != kColumnsPerThread;
      if (wide && (!has_wide || cluster < 8 || best.stages > 1)) continue;
      const ResidentPolicy policy = resident_policy(shape, limits, cluster, columns, reserved);
      if (!policy.cluster || (wide && cluster == 8 && policy.stages < 2)) continue;
      const bool idle = shape.rows * cluster <= limits.processors &&
                        slice_columns(shape, cluster) >= kLeastColumns;
      const bool wide_before = best.columns_per_thread != kColumnsPerThread && best.stages > 1;
      if ((policy.stages > best.stages && !wide_before) || idle) best = policy;
    }
  }
  return best;
}

}  // namespace kd::cuda
