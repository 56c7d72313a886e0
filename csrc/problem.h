// The contract of one call: what every kernel receives.
#pragma once

#include <stdint.h>

#include "row_statistics.h"
#include "visit.h"

namespace kd {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

KD_INLINE int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// What is done to logits before anything else.
struct Transform {
  double scale = 1.0;    // multiplies first; 1 = none
  double softcap = 0.0;  // then cap * tanh(z / cap); 0 = none

  KD_INLINE bool is_plain() const { return scale == 1.0 && softcap == 0.0; }
};

// Logits [outer, inner, vocab]; strides in elements; no alignment is assumed.
struct Logits : Transform {
  const char* data;
  DType dtype;
  int64_t outer_stride, inner_stride, column_stride;
  // Of a teacher whose rows meet the student's in an order of their own: [rows], where each begins,
  // in elements, a sum of multiples of the two strides. Null: at (outer, inner).
  const int64_t* offsets = nullptr;
  int64_t extent = 0;  // with offsets: elements from the first that the tensor has to past the last
};

// What is known of the vocabulary entries that a sparse teacher does not give, in the order of
// kdkernels/entries.py, which says what each means.
enum class Tail : int { bucket = 0, uniform = 1, renormalize = 2, subset = 3, none = 4 };

// Probabilities of a row that rounding to bfloat16 has let add up to more than this are none: what
// kdkernels/entries.py calls MOST_MASS.
constexpr double kMostMass = 1.1;

// A teacher of which a row has a few entries [rows, count].
struct SparseTeacher {
  const int64_t* ids;       // negative: an empty slot; null: the teacher is dense
  const double* log_probs;  // natural, at the loss's temperature
  int64_t count;
  Tail tail;
  const int64_t* offsets;  // as of Logits: [rows], where each row's entries begin; null: in order

  KD_INLINE int64_t first_of(int64_t row) const { return offsets ? offsets[row] : row * count; }
};

// What a caller chooses once for many calls.
struct Options {
  double temperature;
  bool temperature_squared;
  double alpha;  // weight of the divergence
  double label_smoothing, z_loss;
  Divergence divergence;
  int64_t ignore_index;
  bool reduce;
};

// The rows, and what is given of them beside their logits.
struct Rows {
  int64_t outer, inner, vocab;
  const int64_t* labels;     // [rows] or null
  const float* row_weights;  // [rows] or null
  const void* grad_output;   // float32, or float64 when the math is double; null = 1
  int64_t grad_output_stride;
  double denominator;  // 0 = the number of rows that count
  SparseTeacher sparse;
};

struct Results {
  void* loss;        // float32 or float64; [1] if reduce, else [rows]
  void* statistics;  // [10, rows] of the loss's dtype, or null
  bool extras;
  void* gradient;  // student dtype, [rows, gradient_columns], or null
  int64_t gradient_columns;
  int64_t gradient_stride;  // elements from row to row; what is between rows is not touched
};

struct Problem : Options, Rows, Results {
  Logits student, teacher;
  int threads;  // of the CPU

  KD_INLINE int64_t rows() const { return outer * inner; }
  KD_INLINE bool is_double() const { return student.dtype == DType::float64; }
  KD_INLINE double ce_weight() const { return labels ? 1.0 - alpha : 0.0; }
  KD_INLINE double kd_scale() const {
    return temperature_squared ? temperature * temperature : 1.0;
  }
  KD_INLINE const char* row_of(const Logits& logits, int64_t row) const {
    const int64_t offset =
        logits.offsets ? logits.offsets[row]
                       : row / inner * logits.outer_stride + row % inner * logits.inner_stride;
    return logits.data + offset * size_of(logits.dtype);
  }
  KD_INLINE char* gradient_row(int64_t row) const {
    if (!gradient) return nullptr;
    return static_cast<char*>(gradient) + row * gradient_stride * size_of(student.dtype);
  }
};

// One row to do: where its label is (-1 = no label), and what its gradient is multiplied by.
struct Row {
  int64_t index;
  int64_t label;
  double gradient_scale;
};

}  // namespace kd
