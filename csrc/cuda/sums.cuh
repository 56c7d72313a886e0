// RowStatistics as float kernels keep them: observing vectors, moving references, reducing.
#pragma once

#include "device.cuh"

namespace kd::cuda {

template <class Functor>
constexpr bool has_closed_form = Functor::kClosedForm != ClosedForm::none;
template <class Functor>
constexpr bool teacher_weighs = Functor::kClosedForm == ClosedForm::teacher_weighs;
template <class Functor>
constexpr bool student_weighs = Functor::kClosedForm == ClosedForm::student_weighs;

KD_DEVICE Sums nothing() {
  Sums s{};
  s.student_reference = s.teacher_reference = s.label_reference = kNoReference;
  s.student_top = s.teacher_top = -INFINITY;
  s.label_logit = -INFINITY;
  return s;
}

// The references that take the place of `s`'s.
struct References {
  float student, teacher, label;
};

// The gap is measured between u_t and u_s, which both move. A side that vanishes takes its part of
// the moments with it, and 0 * inf must not be formed. kFull: with what only options need.
template <class Functor, bool kFull>
KD_DEVICE void rebase(Sums& s, const References& to) {
  const float student_move = s.student_reference - to.student;
  const float teacher_move = s.teacher_reference - to.teacher;
  const float student_scale = power_of_two(student_move);
  const float teacher_scale = power_of_two(teacher_move);
  if constexpr (has_closed_form<Functor>) {
    const float sum = teacher_weighs<Functor> ? s.teacher : s.student;
    const float scale = teacher_weighs<Functor> ? teacher_scale : student_scale;
    const float moved = fmaf(sum, teacher_move - student_move, s.gap);
    s.gap = scale > 0.0f ? moved * scale : 0.0f;
  }
  if constexpr (kFull) {
    s.student_moment = fmaf(s.student, student_move, s.student_moment) * student_scale;
    s.teacher_moment = fmaf(s.teacher, teacher_move, s.teacher_moment) * teacher_scale;
  }
  s.student *= student_scale;
  s.teacher *= teacher_scale;
  s.label *= power_of_two(s.label_reference - to.label);
  s.student_reference = to.student;
  s.teacher_reference = to.teacher;
  s.label_reference = to.label;
}

KD_DEVICE float whole_exponent(float top, float factor) {
  return fmaxf(ceilf(top * factor), kNoReference);
}

KD_DEVICE float label_reference_of(const Task& task, float top, float student_reference) {
  if (task.label_sum == LabelSum::separate) return whole_exponent(top, task.label_factor);
  return static_cast<float>(static_cast<int>(task.label_sum)) * student_reference;
}

// e^z at T = 1 from e^(z/T), relative to the label's reference.
KD_DEVICE float label_exponential(const Task& task, float z, float e, float reference) {
  if (task.label_sum == LabelSum::square) return e * e;
  if (task.label_sum == LabelSum::cube) return e * e * e;
  if (task.label_sum == LabelSum::fourth) return (e * e) * (e * e);
  return power_of_two(fmaf(z, task.label_factor, -reference));
}

KD_DEVICE bool needs_label_exponential(const Task& task) {
  return task.label_sum != LabelSum::none && task.label_sum != LabelSum::student;
}

template <int kWidth>
KD_DEVICE float largest_of(const Vector<kWidth>& x) {
  float top = x.at[0];
#pragma unroll
  for (int i = 1; i < kWidth; ++i) top = fmaxf(top, x.at[i]);
  return top;
}

template <int kWidth>
KD_DEVICE void observe_extras(const Task& task, int first, const Vector<kWidth>& s,
                              const Vector<kWidth>& t, Sums& sums) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float u_s = fmaf(s.at[i], task.student.factor, -sums.student_reference);
    const float u_t = fmaf(t.at[i], task.teacher.factor, -sums.teacher_reference);
    add_weighed(sums.student_moment, power_of_two(u_s), u_s);
    add_weighed(sums.teacher_moment, power_of_two(u_t), u_t);
    if (task.is_single()) continue;
    // A thread's columns ascend, so the first of equal logits stays.
    if (s.at[i] > sums.student_top) sums.student_top = s.at[i], sums.student_at = first + i;
    if (t.at[i] > sums.teacher_top) sums.teacher_top = t.at[i], sums.teacher_at = first + i;
  }
}

// One vector of transformed logits, -inf beyond the row. u is an exponent relative to its
// reference, rounded once; its difference measures z_t - z_s near the tops of the two rows, where
// logits far from zero would have lost their digits.
template <class Functor, int kWidth>
KD_DEVICE void observe_vector(const Task& task, int first, const Vector<kWidth>& s,
                              const Vector<kWidth>& t, Sums& sums) {
  const float top_s = largest_of(s), top_t = largest_of(t);
  References to;
  to.student = fmaxf(whole_exponent(top_s, task.student.factor), sums.student_reference);
  to.teacher = fmaxf(whole_exponent(top_t, task.teacher.factor), sums.teacher_reference);
  if (to.student > sums.student_reference || to.teacher > sums.teacher_reference) {
    to.label = fmaxf(label_reference_of(task, top_s, to.student), sums.label_reference);
    rebase<Functor, true>(sums, to);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float u_s = fmaf(s.at[i], task.student.factor, -sums.student_reference);
    const float u_t = fmaf(t.at[i], task.teacher.factor, -sums.teacher_reference);
    const float e_s = power_of_two(u_s), e_t = power_of_two(u_t);
    sums.student += e_s;
    sums.teacher += e_t;
    if constexpr (teacher_weighs<Functor>) add_weighed(sums.gap, e_t, u_t - u_s);
    if constexpr (student_weighs<Functor>) add_weighed(sums.gap, e_s, u_t - u_s);
    if (needs_label_exponential(task)) {
      sums.label += label_exponential(task, s.at[i], e_s, sums.label_reference);
    }
  }
  if (task.label_smoothing != 0.0f) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (first + i >= 0 && first + i < task.vocab) sums.logits += s.at[i];
    }
  }
  if (task.extras) observe_extras(task, first, s, t, sums);
}

KD_DEVICE void keep_larger(float& top, int& at, float other, int other_at) {
  if (other > top || (other == top && other_at < at)) top = other, at = other_at;
}

// The sums of each group of kCount lanes, which must not differ in their largest references, as
// one, the same in every lane: first the references, so that each lane's sums are rescaled once,
// then the sums, in a fixed order.
template <class Functor, int kCount>
KD_DEVICE void warp_reduce(const Task& task, Sums& s, Lanes<kCount> lanes) {
  const References top{warp_max(s.student_reference), warp_max(s.teacher_reference),
                       warp_max(s.label_reference)};
  rebase<Functor, true>(s, top);
  s.student = warp_sum(s.student, lanes);
  s.teacher = warp_sum(s.teacher, lanes);
  if (needs_label_exponential(task)) s.label = warp_sum(s.label, lanes);
  if constexpr (has_closed_form<Functor>) s.gap = warp_sum(s.gap, lanes);
  s.label_logit = warp_max(s.label_logit);
  if (task.label_smoothing != 0.0f) s.logits = warp_sum(s.logits, lanes);
  if (!task.extras && !task.is_single()) return;
  s.student_moment = warp_sum(s.student_moment, lanes);
  s.teacher_moment = warp_sum(s.teacher_moment, lanes);
#pragma unroll
  for (int step = kCount / 2; step > 0; step /= 2) {
    keep_larger(s.student_top, s.student_at, __shfl_xor_sync(kWholeWarp, s.student_top, step),
                __shfl_xor_sync(kWholeWarp, s.student_at, step));
    keep_larger(s.teacher_top, s.teacher_at, __shfl_xor_sync(kWholeWarp, s.teacher_top, step),
                __shfl_xor_sync(kWholeWarp, s.teacher_at, step));
  }
}

template <int kCount>
KD_DEVICE void warp_reduce(Evaluated& e, Lanes<kCount> lanes) {
  e.value = warp_sum(e.value, lanes);
  e.slope = warp_sum(e.slope, lanes);
}

}  // namespace kd::cuda
