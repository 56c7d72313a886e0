// The three sweeps over this block's part of a row, wherever it lies.
#pragma once

#include "row.cuh"

namespace kd::cuda {

// Raw logits of one model's row in global memory, with any alignment and column stride.
template <int kWidth>
struct GlobalRow {
  const char* row;
  const Side& side;
  int vocab;
  bool aligned;
  uint64_t policy;

  KD_DEVICE GlobalRow(const Task& task, const Side& of, int64_t index, const Span& span, Keep keep)
      : row(task.row_of(of, index)), side(of), vocab(task.vocab), policy(cache_policy(keep)) {
    const int size = static_cast<int>(size_of(side.dtype));
    aligned = side.column_stride == 1 && is_aligned(row + span.first * size, kWidth * size);
  }

  KD_DEVICE float load_one_at(int column) const {
    return load_one(row + column * side.column_stride * size_of(side.dtype), side.dtype);
  }

  // -inf beyond the row, which adds nothing anywhere.
  KD_DEVICE Vector<kWidth> load(int first) const {
    if (aligned && first >= 0 && first + kWidth <= vocab) {
      const char* from = row + first * size_of(side.dtype);
      return widen<kWidth>(side.dtype, [&](auto words) {
        return load_global<sizeof(words) / sizeof(unsigned)>(from, policy);
      });
    }
    Vector<kWidth> x;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const bool inside = first + i >= 0 && first + i < vocab;
      x.at[i] = inside ? load_one_at(first + i) : -INFINITY;
    }
    return x;
  }
};

template <int kWidth>
KD_DEVICE void transform_vector(const Side& side, int first, int vocab, Vector<kWidth>& x) {
  if (is_plain(side)) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    // The filling beyond the row must stay -inf.
    if (first + i >= 0 && first + i < vocab) x.at[i] = transform(side, x.at[i]);
  }
}

// The only entry of a row as 0, or NaN if it is not finite; `kept` is the entry.
template <int kWidth>
KD_DEVICE Vector<kWidth> center_single(int first, int vocab, const Vector<kWidth>& x, float& kept) {
  Vector<kWidth> y;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const bool is_entry = first + i >= 0 && first + i < vocab;
    kept = is_entry ? x.at[i] : kept;
    y.at[i] = is_entry ? x.at[i] - x.at[i] : x.at[i];
  }
  return y;
}

// Row is GlobalRow or SharedRow. kPlain: it is known that no logit is transformed, and more
// than one.
template <class Functor, int kWidth, class Row, bool kPlain = false>
struct Sweep {
  const Task& task;
  const Functor& functor;
  const Span& span;
  const Row &student, &teacher;

  template <class Step>
  KD_DEVICE void each_vector(const Step& step) const {
#pragma unroll 1
    for (int first = span.first + threadIdx.x * kWidth; first < span.past;
         first += blockDim.x * kWidth) {
      step(first);
    }
  }

  KD_DEVICE Vector<kWidth> transformed(const Row& row, const Side& side, int first) const {
    Vector<kWidth> x = row.load(first);
    if constexpr (!kPlain) transform_vector(side, first, task.vocab, x);
    return x;
  }

  KD_DEVICE void center(int first, Vector<kWidth>& x, float& kept) const {
    if constexpr (!kPlain) {
      if (task.is_single()) x = center_single(first, task.vocab, x, kept);
    }
  }

  KD_DEVICE Sums observe() const {
    Sums sums = nothing();
    each_vector([&](int first) {
      Vector<kWidth> s = transformed(student, task.student, first);
      Vector<kWidth> t = transformed(teacher, task.teacher, first);
      center(first, s, sums.student_top);
      center(first, t, sums.teacher_top);
      observe_vector<Functor>(task, first, s, t, sums);
    });
    return sums;
  }

  KD_DEVICE Evaluated evaluate(const Totals& totals) const {
    Evaluated sum{};
    each_vector([&](int first) {
      Vector<kWidth> s = transformed(student, task.student, first);
      Vector<kWidth> t = transformed(teacher, task.teacher, first);
      float unused = 0.0f;
      center(first, s, unused);
      center(first, t, unused);
      evaluate_vector(functor, task, totals, s, t, sum);
    });
    return sum;
  }

  KD_DEVICE void differentiate(const RowPlan& plan, const Totals& totals) const {
    const Factors factors(task, plan, totals.sums);
    const GradientRow<kWidth> gradient(task, plan.row, span, task.student.dtype);
    each_vector([&](int first) {
      Vector<kWidth> s = student.load(first);
      Vector<kWidth> t = transformed(teacher, task.teacher, first);
      const Vector<kWidth> raw = s;
      transform_vector(task.student, first, task.vocab, s);
      float unused = 0.0f;
      center(first, s, unused);
      center(first, t, unused);
      Vector<kWidth> g = differentiate_vector(functor, task, totals, factors, s, t);
      if (plan.label >= 0) pull_label(plan.label, first, factors.label_pull, g);
      if (!is_plain(task.student)) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) g.at[i] *= derivative(task.student, raw.at[i]);
      }
      gradient.store(task, first, g);
    });
  }
};

// The student's logit at the label, transformed, if the label is one of this block's columns; -inf
// otherwise. The gradient may take its place, but only this block writes that.
template <class Row>
KD_DEVICE float label_logit(const Task& task, const RowPlan& plan, const Span& span,
                            const Row& student) {
  if (plan.label < 0 || plan.label < span.first || plan.label >= span.past) return -INFINITY;
  if (task.is_single()) return 0.0f;
  const float x = student.load_one_at(plan.label);
  return is_plain(task.student) ? x : transform(task.student, x);
}

// A row that is not computed: 0, or NaN for a label that is no column.
template <int kWidth>
KD_DEVICE void dismiss_row(const Task& task, const RowPlan& plan, const Span& span,
                           bool is_first_part) {
  const float value = plan.label == kSpoiled ? NAN : 0.0f;
  if (task.gradient) fill_gradient<kWidth>(task, plan.row, span, value);
  if (!is_first_part) return;
  if (task.gradient) clear_beyond_vocabulary(task, plan.row);
  if (threadIdx.x == 0) write_constant(task, plan.row, value);
}

}  // namespace kd::cuda
