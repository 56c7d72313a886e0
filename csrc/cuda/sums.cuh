// RowStatistics as float kernels keep them: observing vectors, moving references, reducing.
#pragma once

#include <limits.h>

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

// What the student's mean of differences u_t - u_s is measured from: the difference where the
// student's logit is the largest. There it is exactly 0, so of a student that is sure of this entry
// the mean is one of the other entries alone. Measured from anywhere else it would be nearly the
// entry's own difference, and what the two leave of each other, the gradient, rounding.
struct Pilot {
  float student, teacher;
};

// Both finite, so that 0 times the distance of two is 0.
KD_DEVICE Pilot make_pilot(float student, float teacher) {
  return {fmaxf(student, kNoReference), fabsf(teacher) < -kNoReference ? teacher : 0.0f};
}

KD_DEVICE Pilot pilot_of(const Sums& s) { return {fmaxf(s.student_top, kNoReference), s.pilot}; }

// u_t - u_s at the pilot, rounded as in the sweeps.
KD_DEVICE float gap_at(const Task& task, const Pilot& pilot, float student_reference,
                       float teacher_reference) {
  return fmaf(pilot.teacher, task.teacher.factor, -teacher_reference) -
         fmaf(pilot.student, task.student.factor, -student_reference);
}

// Both are 0 of a single entry, whose own logit is the top.
KD_DEVICE float gap_at_pilot(const Task& task, const Sums& s) {
  if (task.is_single()) return 0.0f;
  return gap_at(task, pilot_of(s), s.student_reference, s.teacher_reference);
}

// What differences grow by when they are measured from `to`.
KD_DEVICE float distance(const Task& task, const Pilot& from, const Pilot& to) {
  return task.student.factor * ((from.teacher - to.teacher) - (from.student - to.student));
}

KD_DEVICE void move_pilot(const Task& task, Sums& s, const Pilot& from, const Pilot& to) {
  s.gap = fmaf(s.student, distance(task, from, to), s.gap);
  s.pilot = to.teacher;
}

// The gap is measured between u_t and u_s, which both move, but where it has a pilot. A side that
// vanishes takes its part of the moments with it, and 0 * inf must not be formed. kFull: with what
// only options need, and the student's gap has a pilot.
template <class Functor, bool kFull>
KD_DEVICE void rebase(Sums& s, const References& to) {
  const float student_move = s.student_reference - to.student;
  const float teacher_move = s.teacher_reference - to.teacher;
  const float student_scale = power_of_two(student_move);
  const float teacher_scale = power_of_two(teacher_move);
  if constexpr (has_closed_form<Functor>) {
    constexpr bool kHasPilot = kFull && student_weighs<Functor>;
    const float sum = teacher_weighs<Functor> ? s.teacher : s.student;
    const float scale = teacher_weighs<Functor> ? teacher_scale : student_scale;
    const float moved = kHasPilot ? s.gap : fmaf(sum, teacher_move - student_move, s.gap);
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

// x / y, to within an ulp, where neither y nor the result is near an end of the range, for which
// division has a subroutine, and a call takes registers.
KD_DEVICE float quotient(float x, float y) {
  const float inverse = reciprocal(y), q = x * inverse;
  return fabsf(q) < INFINITY ? fmaf(fmaf(-q, y, x), inverse, q) : q;
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
KD_DEVICE void observe_extras(const Task& task, const Vector<kWidth>& s, const Vector<kWidth>& t,
                              Sums& sums) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float u_s = fmaf(s.at[i], task.student.factor, -sums.student_reference);
    const float u_t = fmaf(t.at[i], task.teacher.factor, -sums.teacher_reference);
    add_weighed(sums.student_moment, power_of_two(u_s), u_s);
    add_weighed(sums.teacher_moment, power_of_two(u_t), u_t);
  }
}

// Whether the largest logits are looked for, and not only their exponents.
template <class Functor>
KD_DEVICE bool needs_tops(const Task& task) {
  return (student_weighs<Functor> || task.extras) && !task.is_single();
}

// Of a vector with larger logits than those before. A thread's columns ascend, so the first of
// equal logits stays.
template <class Functor, int kWidth>
KD_DEVICE void raise_tops(const Task& task, int first, const Vector<kWidth>& s,
                          const Vector<kWidth>& t, const Vector<2>& tops, Sums& sums) {
  if (tops.at[0] > sums.student_top) {
    float beside = 0.0f;
#pragma unroll
    for (int i = kWidth - 1; i >= 0; --i) {
      if (s.at[i] == tops.at[0]) sums.student_at = first + i, beside = t.at[i];
    }
    if constexpr (student_weighs<Functor>) {
      move_pilot(task, sums, pilot_of(sums), make_pilot(tops.at[0], beside));
    }
    sums.student_top = tops.at[0];
  }
  if (tops.at[1] > sums.teacher_top) {
#pragma unroll
    for (int i = kWidth - 1; i >= 0; --i) {
      if (t.at[i] == tops.at[1]) sums.teacher_at = first + i;
    }
    sums.teacher_top = tops.at[1];
  }
}

// One vector of transformed logits, -inf beyond the row. u is an exponent relative to its
// reference, rounded once; its difference measures z_t - z_s near the tops of the two rows, where
// logits far from zero would have lost their digits.
template <class Functor, int kWidth>
KD_DEVICE void observe_vector(const Task& task, int first, const Vector<kWidth>& s,
                              const Vector<kWidth>& t, Sums& sums) {
  const float top_s = largest_of(s), top_t = largest_of(t);
  if (needs_tops<Functor>(task) && (top_s > sums.student_top || top_t > sums.teacher_top)) {
    raise_tops<Functor>(task, first, s, t, {{top_s, top_t}}, sums);
  }
  References to;
  to.student = fmaxf(whole_exponent(top_s, task.student.factor), sums.student_reference);
  to.teacher = fmaxf(whole_exponent(top_t, task.teacher.factor), sums.teacher_reference);
  if (to.student > sums.student_reference || to.teacher > sums.teacher_reference) {
    to.label = fmaxf(label_reference_of(task, top_s, to.student), sums.label_reference);
    rebase<Functor, true>(sums, to);
  }
  const float pilot = student_weighs<Functor> ? gap_at_pilot(task, sums) : 0.0f;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float u_s = fmaf(s.at[i], task.student.factor, -sums.student_reference);
    const float u_t = fmaf(t.at[i], task.teacher.factor, -sums.teacher_reference);
    const float e_s = power_of_two(u_s), e_t = power_of_two(u_t);
    sums.student += e_s;
    sums.teacher += e_t;
    if constexpr (teacher_weighs<Functor>) add_weighed(sums.gap, e_t, u_t - u_s);
    if constexpr (student_weighs<Functor>) add_weighed(sums.gap, e_s, (u_t - u_s) - pilot);
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
  if (task.extras) observe_extras(task, s, t, sums);
}

// The warp's largest logit and its first column; returns a lane that has it.
KD_DEVICE int lead(float& top, int& at) {
  const float largest = warp_max(top);
  const int mine = top == largest ? at : INT_MAX;
  top = largest;
  at = __reduce_min_sync(kWholeWarp, mine);
  return __ffs(__ballot_sync(kWholeWarp, mine == at)) - 1;
}

// The sums of each group of kCount lanes, which must not differ in their largest references, as
// one, the same in every lane: first the references, so that each lane's sums are rescaled once,
// then the sums, in a fixed order.
template <class Functor, int kCount>
KD_DEVICE void warp_reduce(const Task& task, Sums& s, Lanes<kCount> lanes) {
  const References top{warp_max(s.student_reference), warp_max(s.teacher_reference),
                       warp_max(s.label_reference)};
  rebase<Functor, true>(s, top);
  if (student_weighs<Functor> || task.extras || task.is_single()) {
    const Pilot from = pilot_of(s);
    const int leader = lead(s.student_top, s.student_at);
    lead(s.teacher_top, s.teacher_at);
    if constexpr (student_weighs<Functor>) {
      s.pilot = __shfl_sync(kWholeWarp, s.pilot, leader);
      move_pilot(task, s, from, pilot_of(s));
    }
  }
  s.student = warp_sum(s.student, lanes);
  s.teacher = warp_sum(s.teacher, lanes);
  if (needs_label_exponential(task)) s.label = warp_sum(s.label, lanes);
  if constexpr (has_closed_form<Functor>) s.gap = warp_sum(s.gap, lanes);
  s.label_logit = warp_max(s.label_logit);
  if (task.label_smoothing != 0.0f) s.logits = warp_sum(s.logits, lanes);
  if (!task.extras) return;
  s.student_moment = warp_sum(s.student_moment, lanes);
  s.teacher_moment = warp_sum(s.teacher_moment, lanes);
}

template <int kCount>
KD_DEVICE void warp_reduce(Evaluated& e, Lanes<kCount> lanes) {
  float four[4] = {e.value, e.slope, e.sure_slope, e.others};
  warp_sums(four, lanes);
  e = {four[0], four[1], four[2], four[3]};
}

}  // namespace kd::cuda
