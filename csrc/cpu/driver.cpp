// The rows of a problem: which of them count, on which thread they run, and the sum of their
// losses.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <new>
#include <vector>

#include "deputy.h"
#include "kernel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kd {

char* Workspace::reserve(int64_t bytes) {
  if (bytes <= bytes_) return data_;
  free(data_);
  data_ = nullptr;
  bytes_ = 0;
  void* block = nullptr;
  if (posix_memalign(&block, 64, bytes) != 0) throw std::bad_alloc();
  data_ = static_cast<char*>(block);
  bytes_ = bytes;
  return data_;
}

void Workspace::trim() {
  constexpr int64_t kept = int64_t{8} << 20;
  if (bytes_ <= kept) return;
  free(data_);
  data_ = nullptr;
  bytes_ = 0;
}

Workspace::~Workspace() { free(data_); }

namespace {

// Fewer logits than this run on the calling thread: waking a second one costs more.
constexpr int64_t kSerialLogits = 64 * 1024;
// Fresh gradients of at least this size ask for huge pages.
constexpr int64_t kHugePageGradient = int64_t{4} << 20;

// OpenMP's threads do not survive a fork, but the thread that forked keeps its team in the child,
// be it torch's work or ours, and would wait for it for ever. A new thread there gets a new team.
thread_local bool forked = false;
thread_local Deputy* deputy = nullptr;  // of a thread that forked

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  deputy = nullptr;  // the parent's, which did not survive either
});

bool counts(const Problem& problem, int64_t row) {
  return !problem.labels || problem.labels[row] != problem.ignore_index;
}

double weight_of(const Problem& problem, int64_t row) {
  return problem.row_weights ? problem.row_weights[row] : 1.0;
}

// A term whose weight is 0 is not computed: its value could be inf or NaN.
double weigh_term(double weight, double term) { return weight == 0.0 ? 0.0 : weight * term; }

double loss_of(const Problem& problem, const RowStatistics& s) {
  return weigh_term(problem.alpha, s.kd) + weigh_term(problem.ce_weight(), s.ce) +
         (problem.z_loss == 0.0 ? 0.0 : s.z);
}

double grad_output_of(const Problem& problem, int64_t row) {
  if (!problem.grad_output) return 1.0;
  const int64_t at = row * problem.grad_output_stride;
  return problem.is_double() ? static_cast<const double*>(problem.grad_output)[at]
                             : static_cast<const float*>(problem.grad_output)[at];
}

void store(const Problem& problem, void* to, int64_t at, double value) {
  if (problem.is_double()) {
    static_cast<double*>(to)[at] = value;
  } else {
    static_cast<float*>(to)[at] = static_cast<float>(value);
  }
}

void store_statistics(const Problem& problem, int64_t row, double loss, const RowStatistics& s) {
  if (!problem.statistics) return;
  const double values[] = {loss,
                           s.kd,
                           s.ce,
                           s.z,
                           s.student_lse,
                           s.teacher_lse,
                           s.label_lse,
                           s.student_entropy,
                           s.teacher_entropy,
                           1.0 * s.top_agrees + 2.0 * s.label_is_top};
  for (int64_t i = 0; i < 10; ++i) {
    store(problem, problem.statistics, i * problem.rows() + row, values[i]);
  }
}

// One row, from its label to its loss. Of a row that does not count, by its label or a weight of 0,
// nothing is read: its results are 0.
double run_row(const Problem& problem, int64_t row, RowFunction function, double denominator,
               Workspace& workspace, int64_t& bad_row) {
  const double weight = weight_of(problem, row);
  const bool counted = counts(problem, row) && weight != 0.0;
  double share = counted ? weight * grad_output_of(problem, row) / denominator : 0.0;
  // A NaN's payload could become any other number in a format with fewer bits.
  if (share != share) share = NAN;
  RowStatistics statistics;
  double loss = 0.0;
  if (counted) {
    const Row work{row, problem.labels ? problem.labels[row] : -1, share};
    if (share != 0.0 || !problem.gradient) {
      function(problem, work, workspace, statistics);
    } else {
      Problem value_only = problem;
      value_only.gradient = nullptr;
      function(value_only, work, workspace, statistics);
    }
    loss = weight * loss_of(problem, statistics);
    if (statistics.has_bad_entries && row < bad_row) bad_row = row;
  }
  // Only now: the gradient's memory may be the student's.
  if (char* gradient = problem.gradient_row(row)) {
    const int64_t size = size_of(problem.student.dtype), written = share == 0.0 ? 0 : problem.vocab;
    memset(gradient + written * size, 0, (problem.gradient_columns - written) * size);
  }
  store_statistics(problem, row, loss, statistics);
  return loss;
}

// The streaming stores of a thread must be visible before its rows are reported done.
void finish_stores() {
#if defined(KDKERNELS_X86)
  __builtin_ia32_sfence();
#endif
}

// Returns the first row whose sparse teacher is none, or the number of rows.
int64_t run_rows(const Problem& problem, RowFunction function, double denominator, double* losses,
                 int threads) {
  static thread_local Workspace workspace;
  const int64_t rows = problem.rows();
  int64_t bad_row = rows;
  if (threads <= 1) {
    for (int64_t row = 0; row < rows; ++row) {
      losses[row] = run_row(problem, row, function, denominator, workspace, bad_row);
    }
    finish_stores();
    workspace.trim();
    return bad_row;
  }
  // Chunks that are taken as threads come free: a core lost to another process delays one chunk.
  [[maybe_unused]] const int64_t chunk = rows / (threads * 16) > 0 ? rows / (threads * 16) : 1;
  bool exhausted = false;
#pragma omp parallel num_threads(threads) reduction(|| : exhausted) reduction(min : bad_row)
  {
#pragma omp for schedule(dynamic, chunk)
    for (int64_t row = 0; row < rows; ++row) {
      // An exception must not leave the region.
      try {
        losses[row] = run_row(problem, row, function, denominator, workspace, bad_row);
      } catch (const std::bad_alloc&) {
        exhausted = true;
      }
    }
    finish_stores();
    workspace.trim();
  }
  if (exhausted) throw std::bad_alloc();
  return bad_row;
}

// A first touch costs the kernel of the operating system more than the gradient costs this one:
// 2 us per page of 4 KiB, and a page of 2 MiB for little more.
void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (!data || bytes < kHugePageGradient) return;
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Row r's label must be in the vocabulary or be the one to ignore.
int64_t first_bad_label(const Problem& problem, int64_t& counted) {
  counted = 0;
  for (int64_t row = 0; row < problem.rows(); ++row) {
    if (!counts(problem, row)) continue;
    ++counted;
    if (problem.labels && (problem.labels[row] < 0 || problem.labels[row] >= problem.vocab)) {
      return row;
    }
  }
  return -1;
}

}  // namespace

int64_t run_on_cpu(const Problem& given, const InstructionSet& instructions) {
  Problem problem = given;
  const RowFunction function = problem.is_double() ? run_row_float64 : instructions.run_row;
  int64_t counted;
  const int64_t bad = first_bad_label(problem, counted);
  if (bad >= 0) return bad;
  // A teacher without weight is not read: the student stands in for it, and cancels.
  if (problem.alpha == 0.0 && !problem.extras) {
    problem.teacher = problem.student;
    problem.sparse.ids = nullptr;
  }
  double denominator = problem.denominator;
  if (denominator == 0.0) denominator = counted > 0 ? static_cast<double>(counted) : 1.0;

  const int64_t rows = problem.rows();
  const int64_t extent = (rows - 1) * problem.gradient_stride + problem.gradient_columns;
  if (rows > 0) prefer_huge_pages(problem.gradient, extent * size_of(problem.student.dtype));
  const bool serial = rows * problem.vocab < kSerialLogits;
  const int64_t useful = problem.threads < rows ? problem.threads : rows;
  const int threads = serial ? 1 : static_cast<int>(useful);
  double few[64];
  std::vector<double> many(rows > 64 ? rows : 0);
  double* losses = rows > 64 ? many.data() : few;
  int64_t bad_row = rows;
  const auto work = [&] { bad_row = run_rows(problem, function, denominator, losses, threads); };
  if (forked && threads > 1) {
    if (!deputy) deputy = new Deputy;
    deputy->run(work);
  } else {
    work();
  }

  double sum = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    sum += losses[row];
    if (!problem.reduce) store(problem, problem.loss, row, losses[row]);
  }
  if (problem.reduce) store(problem, problem.loss, 0, sum / denominator);
  return bad_row < rows ? -2 - bad_row : -1;
}

}  // namespace kd
