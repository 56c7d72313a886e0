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
  int bytes;  // student and teacher, one element of each
};

// The denominator, and space to the next aligned slot.
constexpr int64_t kWorkspaceHead = 64;
// Rows are split where there are at most this many: with more, one block per row fills the device.
constexpr int64_t kSplitRows = 64;
// A warp sums the parts of a row, one a lane.
constexpr int kMostParts = 32;
// Columns that are worth a block of their own: at 256 threads one vector of 8 each.
constexpr int64_t kLeastColumns = 2048;

constexpr int kStreamThreads = 256;

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

}  // namespace kd::cuda
