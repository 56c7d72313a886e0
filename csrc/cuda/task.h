// What a kernel receives: a Problem as float32 numbers, with everything per call worked out.
#pragma once

#include "../problem.h"

namespace kd::cuda {

// Logits [outer, inner, vocab] of one model. `factor` makes an exponent of a transformed logit:
// 2^(factor z) = e^(z / T). All of a row's exponents use the same rounded factor, so its rounding
// is a relative change of T by 2^-25 and nothing else.
struct Side {
  const char* data;
  const char *begin, *end;  // the memory that the tensor's rows span
  int64_t outer_stride, inner_stride, column_stride;
  const int64_t* offsets;  // as of Logits
  DType dtype;
  float factor;
  float scale, softcap;
};

// How the exponentials at T = 1 come about; up to `fourth` the power of the student's.
enum class LabelSum : int {
  none = 0,     // nothing needs them
  student = 1,  // T = 1: they are the student's
  square = 2,   // T = 2: the student's, squared
  cube = 3,
  fourth = 4,
  separate = 5,  // another exponential per element
};

// What is known of a row before its logits are read: see plan_kernel.
struct alignas(16) RowPlan {
  int row;    // -1: there are no more
  int label;  // -1: none. Of a row that does not count: kIgnored or kSpoiled
  float weight;
  float share;  // of the row's gradient in the result's
};

constexpr int kIgnored = -1, kSpoiled = -2;

// What plan_kernel leaves in the workspace.
struct Plan {
  int next;           // of the rows that count, those that clusters have taken beyond their first
  int counted;        // rows that count
  float denominator;  // of "mean"
};

struct Task {
  Side student, teacher;
  int64_t outer, inner;
  int vocab;

  Plan* plan;
  const RowPlan* rows_planned;  // [rows]: first those that count, then the others

  float alpha, ce_weight, kd_scale;
  float kd_slope;                // alpha kd_scale / T
  float value_unit, slope_unit;  // of the functor's terms
  float label_smoothing, z_loss;
  LabelSum label_sum;
  float label_factor;  // as Side::factor, at T = 1
  bool extras;
  float inverse_temperature;

  float* losses;      // [rows] for reduction "none", or null
  float* statistics;  // [10, rows], or null; the last 3 only with `extras`
  char* gradient;     // [rows, gradient_columns] in the student's dtype, or null
  int64_t gradient_columns;
  int64_t gradient_stride;  // elements from row to row

  KD_INLINE int64_t rows() const { return outer * inner; }
  // A single entry has probability 1 whatever its logit: it is replaced by 0, so that every
  // exponent is exactly 0, and kept for the log-sum-exps as the row's top.
  KD_INLINE bool is_single() const { return vocab == 1; }
  KD_INLINE const char* row_of(const Side& side, int64_t row) const {
    // The general case costs a division of 64 bits.
    const int64_t offset = side.offsets ? side.offsets[row]
                           : outer == 1
                               ? row * side.inner_stride
                               : row / inner * side.outer_stride + row % inner * side.inner_stride;
    return side.data + offset * size_of(side.dtype);
  }
  KD_INLINE char* gradient_row(int64_t row) const {
    return gradient + row * gradient_stride * size_of(student.dtype);
  }
};

// What blocks tell each other about a row: sums of powers of two, each relative to 2^reference.
// References are whole numbers, so moving one multiplies by an exact power of two.
struct alignas(16) Sums {
  float student_reference, teacher_reference, label_reference;
  float student, teacher, label;
  float gap;                             // of w (u_t - u_s): see observe_vector
  float student_moment, teacher_moment;  // sums of e u, for the entropies
  float logits;                          // sum of the student's logits, for label smoothing
  float student_top, teacher_top;
  int student_at, teacher_at;
  float label_logit;
  float pilot;  // the teacher's logit beside student_top; the last, see resident_kernel
};

// Sums over a row's entries. An entry that has nearly all of the student's probability is kept out
// of those of the others: see Totals.
struct Evaluated {
  float value;
  float slope;       // of the others
  float sure_slope;  // of that entry
  float others;      // the student's probability of the others
};

// A row whose vocabulary is split between `parts` blocks needs the steps as separate launches.
enum Steps : int { observe_step = 1, evaluate_step = 2, differentiate_step = 4, all_steps = 7 };

struct Split {
  int parts = 1;
  int each = 0;  // units of 8 columns that a part has at most
  int steps = all_steps;
  Sums* observed = nullptr;        // [rows, parts]
  Evaluated* evaluated = nullptr;  // [rows, parts]
};

}  // namespace kd::cuda
