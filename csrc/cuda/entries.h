// Rows whose teacher is a few entries of the vocabulary, as the launcher hands them to
// entries_kernel.
#pragma once

#include "kernel.h"

namespace kd::cuda {

// The kernel's shared memory beside entries_bytes; checked there.
constexpr int kEntriesScratchBytes = 4096;

struct EntriesJob {
  SparseTeacher teacher;
  int units;       // of 8 columns that a row has at most
  int mask_words;  // a bit of every column
  bool by_column;  // whether the columns outside are compared one by one, not as one category
};

// Defined in entries.cuh and instantiated by group.
template <KernelGroup kGroup>
Kernel entries_kernel_of(const Divergence& divergence, DType student);

}  // namespace kd::cuda
