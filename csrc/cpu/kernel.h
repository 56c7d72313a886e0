// What an instruction set offers to the driver, and the driver to the bindings.
#pragma once

#include "../problem.h"

namespace kd {

// Memory that a thread reuses from row to row; a few rows of float32, never proportional to rows.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();
  // At least `bytes`, aligned to a cache line, with undefined contents.
  char* reserve(int64_t bytes);
  // Gives a large block back, so that one call with a huge vocabulary is not paid for ever.
  void trim();

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Computes one row that counts: its statistics, and its gradient if the problem has one. All
// columns of the vocabulary are written, none beyond.
using RowFunction = void (*)(const Problem&, const Row&, Workspace&, RowStatistics&);

void run_row_baseline(const Problem&, const Row&, Workspace&, RowStatistics&);
void run_row_avx2(const Problem&, const Row&, Workspace&, RowStatistics&);
void run_row_avx512(const Problem&, const Row&, Workspace&, RowStatistics&);
void run_row_float64(const Problem&, const Row&, Workspace&, RowStatistics&);

struct InstructionSet {
  const char* name;
  RowFunction run_row;
  bool runs_here;
};

struct InstructionSets {
  const InstructionSet* first;
  int count;
};

// Every instruction set this build knows, slowest first.
InstructionSets instruction_sets();
// The one in force: the fastest that runs here, or the one that KDKERNELS_CPU_ISA names now. Throws
// std::invalid_argument where that name is unknown or cannot run. To be called with the GIL, under
// which Python changes the environment.
const InstructionSet& instruction_set();

// Runs the whole problem; returns -1, or the first row whose label is out of range, and then
// nothing has been computed. Or -2 minus the first row whose entries are none of a teacher's, which
// has NaN.
int64_t run_on_cpu(const Problem& problem, const InstructionSet& instructions);

}  // namespace kd
