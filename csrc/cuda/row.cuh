// One row, from its label to its gradient: what is the same in every kernel.
#pragma once

#include "sums.cuh"

namespace kd::cuda {

// A closed-form KL this much smaller than what it was subtracted from is summed anew, entry by
// entry.
constexpr float kCancelled = 1.0f / 1024;
// A student is sure of an entry with more of its probability. At most one has so much, also where
// two halves are rounded up; below it a gradient loses two bits.
constexpr float kSure = 0.75f;
constexpr float kLn2f = static_cast<float>(kLn2);

// scale first, then the soft cap: z = cap tanh(scale x / cap), and dz/dx.
KD_DEVICE void twofold_decay(float u, float& power, float& shortfall) {
  decay(bounded(2.0f * static_cast<float>(kLog2E) * fabsf(u)), power, shortfall);
}

KD_DEVICE float transform(const Side& side, float x) {
  const float scaled = x * side.scale;
  if (side.softcap == 0.0f) return scaled;
  const float u = scaled / side.softcap;
  float power, shortfall;
  twofold_decay(u, power, shortfall);
  const float magnitude = side.softcap * (-shortfall / (2.0f + shortfall));
  // `bounded` drops a NaN.
  return is_nan(u) ? u : u < 0.0f ? -magnitude : magnitude;
}

KD_DEVICE float derivative(const Side& side, float x) {
  if (side.softcap == 0.0f) return side.scale;
  float e, shortfall;
  twofold_decay(x * side.scale / side.softcap, e, shortfall);
  const float whole = 1.0f + e;
  return side.scale * (4.0f * e / (whole * whole));
}

KD_DEVICE bool is_plain(const Side& side) { return side.scale == 1.0f && side.softcap == 0.0f; }

KD_DEVICE RowPlan load_plan(const RowPlan* from) {
  const int4 w = *reinterpret_cast<const int4*>(from);
  return {w.x, w.y, __int_as_float(w.z), __int_as_float(w.w)};
}

// The number of columns before the first that is aligned to 16 bytes; vectors start there, and one
// more covers the columns before.
KD_DEVICE int columns_before_alignment(const char* row, DType dtype) {
  const int bytes = -static_cast<int>(reinterpret_cast<uintptr_t>(row)) & 15;
  return bytes / static_cast<int>(size_of(dtype));
}

// Vectors of a row are counted in units of 8 columns, of which each block has a run.
struct Span {
  int origin;       // the column of unit 0; negative if the row does not start aligned
  int first, past;  // columns of this part; may stick out of the row by less than a unit
};

// `each` is the most units of a part: with it, as the launcher worked it out, no part costs a
// division.
KD_DEVICE int units_of(int vocab, int origin) { return (vocab - origin + 7) / 8; }

KD_DEVICE Span span_of(const char* row, DType dtype, int vocab, int part, int each) {
  const int before = columns_before_alignment(row, dtype);
  const int origin = before ? before - 8 : 0;
  const int units = units_of(vocab, origin);
  const int first = min(part * each, units), past = min(first + each, units);
  return {origin, origin + 8 * first, origin + 8 * past};
}

// The gradient's row; 16-byte stores where its alignment is that of the span.
template <int kWidth>
struct GradientRow {
  char* row;
  DType dtype;
  int first_whole,
      whole;  // vectors that begin in [first_whole, first_whole + whole) are stored whole

  // `of`: the student's format, where the compiler may know it.
  KD_DEVICE GradientRow(const Task& task, int index, const Span& span, DType of)
      : row(task.gradient + index * task.gradient_stride * size_of(of)), dtype(of) {
    const int size = static_cast<int>(size_of(dtype));
    const bool aligned = is_aligned(row + span.first * size, kWidth * size);
    first_whole = max(span.first, 0);
    whole = aligned ? task.vocab - kWidth + 1 - first_whole : 0;
  }

  // Whether every vector within these columns is stored whole.
  KD_DEVICE bool is_whole(int first, int past) const {
    return first >= first_whole && past - kWidth - first_whole < whole;
  }

  KD_DEVICE void store(const Task& task, int first, const Vector<kWidth>& x) const {
    store(task.vocab, first, x, dtype);
  }

  // Where the format is known to the compiler.
  template <DType kDType>
  KD_DEVICE void store_as(const Task& task, int first, const Vector<kWidth>& x) const {
    store(task.vocab, first, x, kDType);
  }

 private:
  KD_DEVICE void store(int vocab, int first, const Vector<kWidth>& x, DType as) const {
    const int size = static_cast<int>(size_of(as));
    char* to = row + static_cast<int64_t>(first) * size;
    if (first >= first_whole && first - first_whole < whole) {
      store_vector(to, as, x);
      return;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (first + i >= 0 && first + i < vocab) store_one(to + i * size, as, x.at[i]);
    }
  }
};

// All of this part's columns, and with the last part those beyond the vocabulary.
template <int kWidth>
KD_DEVICE void fill_gradient(const Task& task, int row, const Span& span, float value) {
  const GradientRow<kWidth> gradient(task, row, span, task.student.dtype);
  Vector<kWidth> x;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x.at[i] = value;
  for (int first = span.first + threadIdx.x * kWidth; first < span.past;
       first += blockDim.x * kWidth) {
    gradient.store(task, first, x);
  }
}

KD_DEVICE void clear_beyond_vocabulary(const Task& task, int row) {
  const int64_t size = size_of(task.student.dtype);
  for (int64_t i = task.vocab + threadIdx.x; i < task.gradient_columns; i += blockDim.x) {
    store_one(task.gradient_row(row) + i * size, task.student.dtype, 0.0f);
  }
}

KD_DEVICE bool is_bad(float sum) { return !(sum > 0.0f && sum < INFINITY); }

// A KL in bits from its closed form.
template <class Functor>
KD_DEVICE float weigher(const Sums& s) {
  return teacher_weighs<Functor> ? s.teacher : s.student;
}

template <class Functor>
KD_DEVICE float closed_bits(float gap, float excess) {
  return teacher_weighs<Functor> ? gap + excess : -gap - excess;
}

KD_DEVICE bool is_cancelled(float bits, float gap) {
  return bits != 0.0f && fabsf(bits) < kCancelled * (1.0f + fabsf(gap));
}

// The same decision from approximate logarithms, which all threads of a cluster take alike.
template <class Functor>
KD_DEVICE bool seems_cancelled(const Sums& s) {
  const float gap = s.gap * reciprocal(weigher<Functor>(s));
  const float excess = fast_log2(s.student) - fast_log2(s.teacher);
  return is_cancelled(closed_bits<Functor>(gap, excess), gap);
}

struct Soundness {
  bool student_is_bad, teacher_is_bad;

  KD_DEVICE explicit Soundness(const Sums& s)
      : student_is_bad(is_bad(s.student) || s.student_reference == INFINITY),
        teacher_is_bad(is_bad(s.teacher) || s.teacher_reference == INFINITY) {}
  KD_DEVICE bool spoils_row(const Task& task) const {
    return student_is_bad || (teacher_is_bad && task.alpha != 0.0f);
  }
};

// The sums at T = 1 are the student's where T is 1.
KD_DEVICE Sums with_label_sum(const Task& task, Sums s) {
  if (task.label_sum == LabelSum::student) {
    s.label = s.student;
    s.label_reference = s.student_reference;
  }
  return s;
}

// What all sums of a row lead to. Logarithms are to base 2, relative to the references.
struct Totals : Soundness {
  Sums sums;
  float student_log, teacher_log;
  float kd;         // nats, without T^2
  float slope;      // the sum of all entries' slopes, in the functor's unit
  float sure_pull;  // of the entry that the student is sure of, slope - q * (sum of slopes)

  KD_DEVICE Totals(const Task& task, const Sums& s)
      : Soundness(s), sums(with_label_sum(task, s)), kd(0.0f), slope(0.0f), sure_pull(0.0f) {
    student_log = log2f(s.student);
    teacher_log = log2f(s.teacher);
  }

  // The mean of the gaps u_t - u_s, for sums with a pilot if the student weighs.
  template <class Functor>
  KD_DEVICE float mean_gap(const Task& task) const {
    const float mean = quotient(sums.gap, weigher<Functor>(sums));
    return student_weighs<Functor> ? mean + gap_at_pilot(task, sums) : mean;
  }

  // The closed form, from the mean gap; false if a sum over the entries has to take its place.
  template <class Functor>
  KD_DEVICE bool close(float gap) {
    if constexpr (!has_closed_form<Functor>) return false;
    const float bits = closed_bits<Functor>(gap, student_log - teacher_log);
    kd = kLn2f * bits;
    return !is_cancelled(bits, gap);
  }
  template <class Functor>
  KD_DEVICE bool close(const Task& task) {
    return close<Functor>(mean_gap<Functor>(task));
  }

  // Where q is nearly 1, q times the sum of slopes is nearly the entry's own slope, and their
  // difference rounding. It is slope (1 - q) - q (slopes of the others), in which nothing cancels.
  KD_DEVICE void take(const Task& task, const Evaluated& e) {
    kd = e.value * task.value_unit;
    slope = e.slope + e.sure_slope;
    sure_pull = e.sure_slope * e.others - (1.0f - e.others) * e.slope;
    // As inf - q * inf is.
    if (fabsf(e.sure_slope) == INFINITY) sure_pull = NAN;
  }
};

// weight * term, where a term without weight may be inf or NaN.
KD_DEVICE float weigh_term(float weight, float term) {
  return weight == 0.0f ? 0.0f : weight * term;
}

// kPlain, here and below: as register kernels are asked, for more than one entry, without label
// smoothing and extra outputs.
template <bool kPlain = false>
KD_DEVICE float label_lse(const Task& task, const Sums& sums) {
  const float lse = kLn2f * (sums.label_reference + log2f(sums.label));
  return !kPlain && task.is_single() ? sums.student_top : lse;
}

struct LabelTerms {
  float lse, ce, z;
};

template <bool kPlain>
KD_DEVICE LabelTerms label_terms(const Task& task, const RowPlan& plan, const Sums& sums) {
  if (task.label_sum == LabelSum::none) return {0.0f, 0.0f, 0.0f};
  const float log = log2f(sums.label);
  LabelTerms terms;
  terms.lse = label_lse<kPlain>(task, sums);
  terms.z = task.z_loss == 0.0f ? 0.0f : task.z_loss * terms.lse * terms.lse;
  terms.ce = 0.0f;
  if (plan.label < 0) return terms;
  const float smoothing = kPlain ? 0.0f : task.label_smoothing;
  const float hard = log - fmaf(sums.label_logit, task.label_factor, -sums.label_reference);
  float bits = weigh_term(1.0f - smoothing, hard);
  if (smoothing != 0.0f) {
    const float mean = quotient(sums.logits, static_cast<float>(task.vocab));
    bits += smoothing * (log - fmaf(mean, task.label_factor, -sums.label_reference));
  }
  terms.ce = kLn2f * bits;
  return terms;
}

template <bool kPlain>
KD_DEVICE void write_row(const Task& task, int row, const float (&values)[10]) {
  if (task.losses) task.losses[row] = values[0];
  if (!task.statistics) return;
  // The last three nobody asked for without `extras`.
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    if (i < 7 || (!kPlain && task.extras)) task.statistics[i * task.rows() + row] = values[i];
  }
}

// By one thread.
template <bool kPlain = false>
KD_DEVICE void write_statistics(const Task& task, const RowPlan& plan, const Totals& totals) {
  const Sums& s = totals.sums;
  const LabelTerms terms = label_terms<kPlain>(task, plan, s);
  const float nan = NAN;
  // Rounding may leave a negative residue; a NaN stays.
  float kd = task.kd_scale * (totals.kd < 0.0f ? 0.0f : totals.kd);
  float teacher_lse = kLn2f * (s.teacher_reference + totals.teacher_log);
  float student_lse = kLn2f * (s.student_reference + totals.student_log);
  if (!kPlain && task.is_single()) {
    student_lse = s.student_top * task.inverse_temperature;
    teacher_lse = s.teacher_top * task.inverse_temperature;
  }
  float teacher_entropy = 0.0f, student_entropy = 0.0f, hits = 0.0f;
  if (!kPlain && task.extras) {
    student_entropy = kLn2f * (totals.student_log - quotient(s.student_moment, s.student));
    teacher_entropy = kLn2f * (totals.teacher_log - quotient(s.teacher_moment, s.teacher));
    hits = s.student_at == s.teacher_at && !totals.teacher_is_bad ? 1.0f : 0.0f;
    if (s.student_at == plan.label) hits += 2.0f;
  }
  // Without weight the loss does not contain this teacher: only the statistics show that it is bad.
  if (totals.teacher_is_bad) kd = teacher_lse = teacher_entropy = nan;
  float loss = weigh_term(task.alpha, kd) + weigh_term(task.ce_weight, terms.ce) + terms.z;
  loss *= plan.weight;
  const float values[10] = {loss,        kd,        terms.ce,        terms.z,         student_lse,
                            teacher_lse, terms.lse, student_entropy, teacher_entropy, hits};
  write_row<kPlain>(task, plan.row, values);
}

// A row that is ignored (0) or spoiled (NaN). By one thread.
KD_DEVICE void write_constant(const Task& task, int row, float value) {
  const float values[10] = {value, value, value, value, value, value, value, value, value, 0.0f};
  write_row<false>(task, row, values);
}

// The gradient in a transformed logit is
//   student e_s - teacher e_t + label e_label + constant   for forward KL,
//   student e_s (mean gap - gap_v) + label e_label + constant   for reverse KL, in bits,
//   slope (slope_v - q_v slope_sum) + label e_label + constant   otherwise.
struct Factors {
  float student, teacher, label, constant, label_pull;
  float slope;

  KD_DEVICE Factors(const Task& task, const RowPlan& plan, const Sums& s) {
    const float ce = plan.label < 0 ? 0.0f : plan.share * task.ce_weight;
    float pull = ce;
    if (task.z_loss != 0.0f) {
      pull += plan.share * 2.0f * task.z_loss * label_lse(task, s);
    }
    const float kd = plan.share * task.kd_slope;
    slope = kd * task.slope_unit;
    // Sums lie between 1/16 and 2^31, and such a quotient errs by 2 ulp.
    student = kd * reciprocal(s.student);
    teacher = kd * reciprocal(s.teacher);
    label = pull == 0.0f ? 0.0f : pull * reciprocal(s.label);
    constant = quotient(-ce * task.label_smoothing, static_cast<float>(task.vocab));
    label_pull = ce * (1.0f - task.label_smoothing);
  }
};

// The vocabulary entries of a vector as a divergence sees them.
template <class Functor>
KD_DEVICE Entry<float> make_entry(const Task& task, const Totals& totals, float s, float t) {
  const float u_s = fmaf(s, task.student.factor, -totals.sums.student_reference);
  const float u_t = fmaf(t, task.teacher.factor, -totals.sums.teacher_reference);
  const float log_q = u_s - totals.student_log, log_p = u_t - totals.teacher_log;
  Entry<float> e;
  e.q = power_of_two(log_q);
  e.p = power_of_two(log_p);
  e.delta = (u_s - u_t) - (totals.student_log - totals.teacher_log);
  e.template set_ratio<Functor::kRatio>();
  if constexpr (Functor::kUsesLog) e.log_larger = maximum(log_p, log_q);
  return e;
}

template <class Functor, int kWidth>
KD_DEVICE void evaluate_vector(const Functor& functor, const Task& task, const Totals& totals,
                               const Vector<kWidth>& s, const Vector<kWidth>& t, Evaluated& sum) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const Entry<float> entry = make_entry<Functor>(task, totals, s.at[i], t.at[i]);
    const Term<float> term = functor(entry);
    sum.value += term.value;
    if (entry.q > kSure) {
      sum.sure_slope += term.slope;
    } else {
      sum.slope += term.slope;
      sum.others += entry.q;
    }
  }
}

template <int kWidth>
KD_DEVICE void pull_label(int label, int first, float pull, Vector<kWidth>& gradient) {
  if (static_cast<unsigned>(label - first) >= kWidth) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) gradient.at[i] -= label == first + i ? pull : 0.0f;
}

// The gradient in transformed logits.
template <class Functor, int kWidth>
KD_DEVICE Vector<kWidth> differentiate_vector(const Functor& functor, const Task& task,
                                              const Totals& totals, const Factors& factors,
                                              const Vector<kWidth>& s, const Vector<kWidth>& t) {
  // Of the student's mean of gaps.
  const float pilot = student_weighs<Functor> ? gap_at_pilot(task, totals.sums) : 0.0f;
  const float mean =
      student_weighs<Functor> ? quotient(totals.sums.gap, totals.sums.student) : 0.0f;
  Vector<kWidth> gradient;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float e_s =
        power_of_two(fmaf(s.at[i], task.student.factor, -totals.sums.student_reference));
    float g = 0.0f;
    if (task.alpha != 0.0f) {
      if constexpr (teacher_weighs<Functor>) {
        const float e_t =
            power_of_two(fmaf(t.at[i], task.teacher.factor, -totals.sums.teacher_reference));
        // Two rounded products: equal operands must cancel to exactly 0.
        g = factors.student * e_s - factors.teacher * e_t;
      } else if constexpr (student_weighs<Functor>) {
        const float u_s = fmaf(s.at[i], task.student.factor, -totals.sums.student_reference);
        const float u_t = fmaf(t.at[i], task.teacher.factor, -totals.sums.teacher_reference);
        const float pull = mean - ((u_t - u_s) - pilot);
        g = e_s > 0.0f ? kLn2f * factors.student * e_s * pull : 0.0f;
      } else {
        const Entry<float> e = make_entry<Functor>(task, totals, s.at[i], t.at[i]);
        const float pull = functor(e).slope - e.q * totals.slope;
        g = factors.slope * (e.q > kSure ? totals.sure_pull : pull);
      }
    }
    if (factors.label != 0.0f) {
      const float e = task.label_sum == LabelSum::student
                          ? e_s
                          : label_exponential(task, s.at[i], e_s, totals.sums.label_reference);
      g = fmaf(factors.label, e, g);
    }
    gradient.at[i] = g + factors.constant;
  }
  return gradient;
}

}  // namespace kd::cuda
