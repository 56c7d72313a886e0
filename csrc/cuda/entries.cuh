// A teacher of which a row has a few entries. A block owns a row and sweeps over the student's
// columns twice; nothing of the teacher has the size of the vocabulary.
//
// The columns outside of the entries are one category, whose probability is a sum of its own: one
// minus that of the entries would have no digits where they hold nearly all of the student. So the
// first sweep leaves the entries out, which a bit for each column in shared memory tells, and the
// sums of all columns are those of the two sides together. The second sweep writes every column as
// if it were outside, and the entries' gradients are written over that.
#pragma once

#include "entries.h"
#include "stream.cuh"

namespace kd::cuda {

constexpr int kEntriesWarps = kEntriesThreads / 32;

// A slot, from its reading to its gradient.
struct KeptEntry {
  double log_p;
  double mass;  // of all slots that have this column: see EntriesRow::merge
  int column;   // -1: none
  float raw;    // the student's logit, which the gradient may take the place of
  float slope, q;
};
static_assert(sizeof(KeptEntry) == kSlotBytes);

// Over a warp, in a fixed order.
KD_DEVICE double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

KD_DEVICE double warp_max(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(kWholeWarp, x, step));
  return x;
}

// The entry with the most probability, of equals the first of the vocabulary.
struct Likeliest {
  double log_p;
  int column;

  KD_DEVICE void take(double other_log_p, int other_column) {
    if (other_log_p > log_p || (other_log_p == log_p && other_column < column)) {
      log_p = other_log_p, column = other_column;
    }
  }
};

KD_DEVICE Likeliest no_entry() { return {-INFINITY, INT_MAX}; }

KD_DEVICE Likeliest warp_likeliest(Likeliest x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const double log_p = __shfl_xor_sync(kWholeWarp, x.log_p, step);
    x.take(log_p, __shfl_xor_sync(kWholeWarp, x.column, step));
  }
  return x;
}

// What a tail makes of the entries: see kdkernels/entries.py.
struct Teacher {
  double log_norm;          // what is subtracted of log-probabilities
  double log_rest;          // of all columns outside
  double log_share, share;  // of each of them, where the rest is spread evenly
  int known, others;
  bool is_sound;
};

// From the sum of probabilities less `shift`, of `known` entries.
KD_DEVICE Teacher make_teacher(int vocab, Tail tail, double shift, double sum, int known,
                               bool is_sound) {
  Teacher teacher{0.0, -INFINITY, -INFINITY, 0.0, known, vocab - known, is_sound};
  const double mass = exp(shift) * sum;
  // Comparisons that NaN fails.
  teacher.is_sound &= mass < INFINITY;
  if (tail == Tail::none || known == 0) return teacher;
  teacher.log_norm = shift + log(sum);
  if (tail == Tail::bucket || tail == Tail::uniform) {
    teacher.is_sound &= mass <= kMostMass;
    // Of a part of the vocabulary only what rounding has added to 1 is taken off again.
    if (teacher.others > 0 && mass <= 1.0) teacher.log_norm = 0.0;
    if (teacher.others > 0 && mass < 1.0) {
      teacher.log_rest = log(1.0 - mass);
      teacher.log_share = teacher.log_rest - log(static_cast<double>(teacher.others));
      teacher.share = exp(teacher.log_share);
    }
  }
  teacher.is_sound &= fabs(teacher.log_norm) < INFINITY;
  return teacher;
}

// What warps tell each other about a row.
struct EntriesScratch {
  Sums outside[kEntriesWarps], inside[kEntriesWarps];
  Evaluated evaluated[kEntriesWarps];
  double top[kEntriesWarps], mass[kEntriesWarps], entropy[kEntriesWarps];
  Likeliest likeliest[kEntriesWarps];
  int known[kEntriesWarps];
  Teacher teacher;
  float rest_slope, rest_q;  // of the columns outside, as a category
};
static_assert(sizeof(EntriesScratch) <= kEntriesScratchBytes);

// One warp's slot, or what adds nothing.
template <class Number>
KD_DEVICE Number slot_of_lane(const Number (&slots)[kEntriesWarps], const Number& nothing) {
  const int lane = threadIdx.x % 32;
  return lane < kEntriesWarps ? slots[lane] : nothing;
}

template <int kWidth>
KD_DEVICE Vector<kWidth> exponentials(const Task& task, const Vector<kWidth>& z, float reference) {
  Vector<kWidth> e;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    e.at[i] = power_of_two(fmaf(z.at[i], task.student.factor, -reference));
  }
  return e;
}

// Those at T = 1: what is asked of the task is asked once a vector.
template <int kWidth>
KD_DEVICE Vector<kWidth> label_exponentials(const Task& task, const Vector<kWidth>& z,
                                            const Vector<kWidth>& e, float reference) {
  if (task.label_sum == LabelSum::student) return e;
  Vector<kWidth> label;
  if (task.label_sum == LabelSum::square) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) label.at[i] = e.at[i] * e.at[i];
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      label.at[i] = label_exponential(task, z.at[i], e.at[i], reference);
    }
  }
  return label;
}

// The student's logits in sums, which have no teacher. `present`: a bit for each that is neither
// beyond the row nor elsewhere; the others are -inf.
template <int kWidth>
KD_DEVICE void observe_student(const Task& task, int first, const Vector<kWidth>& s,
                               unsigned present, Sums& sums) {
  const float top = largest_of(s);
  const bool is_first = kWidth == 1 && top == sums.student_top && first < sums.student_at;
  if (task.extras && !task.is_single() && (top > sums.student_top || is_first)) {
#pragma unroll
    for (int i = kWidth - 1; i >= 0; --i) {
      if (s.at[i] == top) sums.student_at = first + i;
    }
    sums.student_top = top;
  }
  References to;
  to.student = fmaxf(whole_exponent(top, task.student.factor), sums.student_reference);
  to.teacher = sums.teacher_reference;
  if (to.student > sums.student_reference) {
    to.label = fmaxf(label_reference_of(task, top, to.student), sums.label_reference);
    rebase<Nothing, true>(sums, to);
  }
  const Vector<kWidth> e = exponentials(task, s, sums.student_reference);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums.student += e.at[i];
  if (needs_label_exponential(task)) {
    const Vector<kWidth> label = label_exponentials(task, s, e, sums.label_reference);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums.label += label.at[i];
  }
  if (task.label_smoothing != 0.0f) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums.logits += present >> i & 1 ? s.at[i] : 0.0f;
  }
  if (task.extras) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float u = fmaf(s.at[i], task.student.factor, -sums.student_reference);
      add_weighed(sums.student_moment, e.at[i], u);
    }
  }
}

// The sums of both sides, beside a teacher that spoils nothing.
KD_DEVICE Sums together(Sums a, Sums b) {
  const References to{fmaxf(a.student_reference, b.student_reference), kNoReference,
                      fmaxf(a.label_reference, b.label_reference)};
  rebase<Nothing, true>(a, to);
  rebase<Nothing, true>(b, to);
  a.student += b.student;
  a.label += b.label;
  a.student_moment += b.student_moment;
  a.logits += b.logits;
  a.label_logit = fmaxf(a.label_logit, b.label_logit);
  if (b.student_top > a.student_top ||
      (b.student_top == a.student_top && b.student_at < a.student_at)) {
    a.student_top = b.student_top, a.student_at = b.student_at;
  }
  a.teacher = 1.0f;
  a.teacher_reference = 0.0f;
  return a;
}

KD_DEVICE void take_term(Evaluated& sum, const Term<float>& term, float q) {
  sum.value += term.value;
  if (q > kSure) {
    sum.sure_slope += term.slope;
  } else {
    sum.slope += term.slope;
    sum.others += q;
  }
}

// log2 of the student's whole probability in the exponents of these sums.
KD_DEVICE double log_of(const Sums& s) {
  return static_cast<double>(s.student_reference) + log2(static_cast<double>(s.student));
}

// What columns outside of the entries take from the row.
struct Outside {
  float reference, label_reference;
  float factor;        // the category's gradient over its sum of exponentials
  float label_factor;  // as Factors::label, for exponentials relative to this reference
  float log;           // log2 of the student's whole probability, relative to the reference
  float log_p, p;      // of each column: an even share of the rest
  bool is_compared;    // each by itself

  KD_DEVICE Outside(const Sums& s, const Totals& totals, const Teacher& teacher, bool compared)
      : reference(s.student_reference),
        label_reference(s.label_reference),
        factor(0.0f),
        label_factor(0.0f),
        log(totals.student_log + (totals.sums.student_reference - s.student_reference)),
        is_compared(compared) {
    log_p = static_cast<float>(kLog2E * teacher.log_share);
    p = static_cast<float>(teacher.share);
  }
};

// The gradient in log-odds of what has this slope and probability.
KD_DEVICE float pull_of(const Totals& totals, float slope, float q) {
  return q > kSure ? totals.sure_pull : slope - q * totals.slope;
}

// The student's side, of a format that the compiler knows.
template <DType kDType>
KD_DEVICE Side side_of(const Task& task) {
  Side side = task.student;
  side.dtype = kDType;
  return side;
}

template <class Functor, DType kDType>
struct EntriesRow {
  static constexpr int kWidth = kDType == DType::float32 ? 4 : 8;
  using Row = GlobalRow<kWidth>;

  const Task& task;
  const Functor& functor;
  const EntriesJob& job;
  const RowPlan& plan;
  const Span& span;
  KeptEntry* kept;
  unsigned* mask;
  EntriesScratch& scratch;

  KD_DEVICE int count() const { return static_cast<int>(job.teacher.count); }

  template <class Step>
  KD_DEVICE void each_entry(const Step& step) const {
    for (int k = threadIdx.x; k < count(); k += blockDim.x) {
      if (kept[k].column >= 0) step(kept[k]);
    }
  }

  // With the vector behind it on its way.
  template <class Step>
  KD_DEVICE void each_vector(const Row& row, const Step& step) const {
    const int stride = blockDim.x * kWidth;
    int first = span.first + threadIdx.x * kWidth;
    Vector<kWidth> next = row.load(first);
#pragma unroll 1
    for (; first < span.past; first += stride) {
      Vector<kWidth> x = next;
      next = row.load(first + stride);
      step(first, x);
    }
  }

  // A column's transformed logit; the only one of a row as 0, see Task::is_single.
  KD_DEVICE float transformed(float raw) const {
    const float z = is_plain(task.student) ? raw : transform(task.student, raw);
    return task.is_single() ? z - z : z;
  }

  // Transforms a vector, with -inf at entries and beyond the row; the bits of what is left.
  KD_DEVICE unsigned leave_outside(int first, Vector<kWidth>& x) const {
    constexpr unsigned kAll = (1u << kWidth) - 1;
    const unsigned at = first - span.origin;
    unsigned present = ~(mask[at / 32] >> at % 32) & kAll;
    if (first < 0) present &= kAll << -first;
    if (first + kWidth > task.vocab) present &= kAll >> (first + kWidth - task.vocab);
    if (present == kAll && is_plain(task.student)) return present;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      x.at[i] = present >> i & 1 ? transformed(x.at[i]) : -INFINITY;
    }
    return present;
  }

  // The row's slots into `kept` and `mask`. Returns whether there is one that is no column.
  KD_DEVICE bool read(const Row& student, bool& comes_twice, double& top) const {
    const int64_t first = job.teacher.first_of(plan.row);
    bool is_outside = false;
    for (int k = threadIdx.x; k < count(); k += blockDim.x) {
      const int64_t id = job.teacher.ids[first + k];
      KeptEntry entry{-INFINITY, 0.0, -1, 0.0f, 0.0f, 0.0f};
      if (id >= task.vocab) is_outside = true;
      if (id >= 0 && id < task.vocab) {
        entry.column = static_cast<int>(id);
        entry.log_p = job.teacher.log_probs[first + k];
        entry.raw = student.load_one_at(entry.column);
        top = fmax(top, entry.log_p);
        const unsigned at = entry.column - span.origin, bit = 1u << at % 32;
        comes_twice |= (atomicOr(mask + at / 32, bit) & bit) != 0;
      }
      kept[k] = entry;
    }
    return is_outside;
  }

  // The weights of one column in its first slot, in the order of the slots.
  KD_DEVICE void merge() const {
    for (int k = threadIdx.x; k < count(); k += blockDim.x) {
      double mass = 0.0;
      bool is_first = true;
      for (int j = 0; j < count(); ++j) {
        if (kept[j].column != kept[k].column) continue;
        is_first &= j >= k;
        mass += exp(kept[j].log_p);
      }
      kept[k].mass = is_first ? mass : -1.0;
    }
    __syncthreads();
    each_entry([](KeptEntry& entry) {
      if (entry.mass < 0.0) entry.column = -1;
      entry.log_p = log(entry.mass);
    });
  }

  KD_DEVICE Sums observe_outside(const Row& student) const {
    Sums sums = nothing();
    each_vector(student, [&](int first, Vector<kWidth>& x) {
      const unsigned present = leave_outside(first, x);
      observe_student(task, first, x, present, sums);
    });
    if (threadIdx.x != 0) return sums;
    sums.label_logit = label_logit(task, plan, span, student);
    if (task.is_single()) sums.student_top = transform(task.student, student.load_one_at(0));
    return sums;
  }

  // By one thread for the row: D at the columns outside, as one category.
  KD_DEVICE void evaluate_rest(const Teacher& teacher, double log_q, Evaluated& sum) const {
    const Entry<float> entry = kd::make_entry<float>(functor, teacher.log_rest, log_q);
    const Term<float> term =
        job.teacher.tail == Tail::none ? Term<float>{0.0f, 0.0f} : functor(entry);
    take_term(sum, term, entry.q);
    scratch.rest_slope = term.slope, scratch.rest_q = entry.q;
  }

  // D at the entries; `whole`: log2 of what the student's probabilities are divided by.
  KD_DEVICE void evaluate_entries(const Teacher& teacher, double whole, Evaluated& sum) const {
    each_entry([&](KeptEntry& kept) {
      const double log_p = kept.log_p - teacher.log_norm;
      const double u = static_cast<double>(transformed(kept.raw)) * task.student.factor - whole;
      const Entry<float> entry = kd::make_entry<float>(functor, log_p, kLn2 * u);
      Term<float> term;
      if (job.teacher.tail == Tail::none) {
        // The textbook's: the weights are no distribution, and nothing is centred.
        term = {kd::weigh(entry.p, -static_cast<float>(kLn2) * entry.delta), -entry.p};
      } else {
        term = functor(entry);
      }
      take_term(sum, term, entry.q);
      kept.slope = term.slope, kept.q = entry.q;
    });
  }

  // The columns outside, each compared by itself with its share of the rest.
  KD_DEVICE Entry<float> entry_outside(const Outside& outside, float z) const {
    Entry<float> entry;
    const float log_q = fmaf(z, task.student.factor, -outside.reference) - outside.log;
    entry.q = power_of_two(log_q);
    entry.p = outside.p;
    entry.delta = log_q - outside.log_p;
    entry.template set_ratio<Functor::kRatio>();
    entry.log_larger = maximum(outside.log_p, log_q);
    return entry;
  }

  KD_DEVICE void evaluate_outside(const Outside& outside, const Row& student,
                                  Evaluated& sum) const {
    each_vector(student, [&](int first, Vector<kWidth>& x) {
      const unsigned present = leave_outside(first, x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (!(present >> i & 1)) continue;
        const Entry<float> entry = entry_outside(outside, x.at[i]);
        take_term(sum, functor(entry), entry.q);
      }
    });
  }

  // Every column's gradient as of one outside.
  KD_DEVICE void differentiate_outside(const Outside& outside, const Totals& totals,
                                       const Factors& factors, const Row& student) const {
    const GradientRow<kWidth> gradient(task, plan.row, span, kDType);
    each_vector(student, [&](int first, Vector<kWidth>& raw) {
      Vector<kWidth> z = raw, g;
      if (!is_plain(task.student) || task.is_single()) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z.at[i] = transformed(raw.at[i]);
      }
      const Vector<kWidth> e = exponentials(task, z, outside.reference);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g.at[i] = outside.factor * e.at[i];
      if (outside.is_compared) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const Entry<float> entry = entry_outside(outside, z.at[i]);
          g.at[i] = factors.slope * pull_of(totals, functor(entry).slope, entry.q);
        }
      }
      if (outside.label_factor != 0.0f) {
        const Vector<kWidth> label = label_exponentials(task, z, e, outside.label_reference);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          g.at[i] = fmaf(outside.label_factor, label.at[i], g.at[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g.at[i] += factors.constant;
      if (plan.label >= 0) pull_label(plan.label, first, factors.label_pull, g);
      if (!is_plain(task.student)) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) g.at[i] *= derivative(task.student, raw.at[i]);
      }
      gradient.template store_as<kDType>(task, first, g);
    });
  }

  KD_DEVICE void differentiate_entries(const Totals& totals, const Factors& factors) const {
    char* gradient = task.gradient_row(plan.row);
    const Sums& s = totals.sums;
    each_entry([&](KeptEntry& kept) {
      const float z = transformed(kept.raw);
      float g = 0.0f;
      if (task.alpha != 0.0f) g = factors.slope * pull_of(totals, kept.slope, kept.q);
      if (factors.label != 0.0f) {
        const float e = power_of_two(fmaf(z, task.student.factor, -s.student_reference));
        const float e_label = task.label_sum == LabelSum::student
                                  ? e
                                  : label_exponential(task, z, e, s.label_reference);
        g = fmaf(factors.label, e_label, g);
      }
      g += factors.constant;
      if (kept.column == plan.label) g -= factors.label_pull;
      if (!is_plain(task.student)) g *= derivative(task.student, kept.raw);
      store_one(gradient + kept.column * size_of(kDType), kDType, g);
    });
  }

  // What the teacher's distribution is by itself, for `extras`.
  KD_DEVICE void describe(const Teacher& teacher, double& entropy, Likeliest& likeliest) const {
    entropy = 0.0;
    likeliest = no_entry();
    each_entry([&](const KeptEntry& kept) {
      const double log_p = kept.log_p - teacher.log_norm, p = exp(log_p);
      if (p > 0.0) entropy -= p * log_p;
      likeliest.take(kept.log_p, kept.column);
    });
    if (threadIdx.x != 0) return;
    const double rest = exp(teacher.log_rest);
    const bool is_spread = job.teacher.tail == Tail::uniform;
    if (rest > 0.0) entropy -= rest * (is_spread ? teacher.log_share : teacher.log_rest);
  }

  KD_DEVICE void clear_mask() const {
    each_entry([&](const KeptEntry& kept) {
      const unsigned at = kept.column - span.origin;
      atomicAnd(mask + at / 32, ~(1u << at % 32));
    });
  }

  // The entries and the first sweep: sums of both sides, and what the tail makes of the teacher.
  KD_DEVICE Teacher observe(const Row& student, Sums& inside, Sums& outside) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bool comes_twice = false;
    double top = -INFINITY;
    const bool is_outside = __syncthreads_or(read(student, comes_twice, top));
    top = warp_max(top);
    if (lane == 0) scratch.top[warp] = top;
    comes_twice = __syncthreads_or(comes_twice);
    if (comes_twice) {
      merge();
      __syncthreads();
    }
    top = warp_max(slot_of_lane(scratch.top, static_cast<double>(-INFINITY)));
    const double shift = top == -INFINITY ? 0.0 : top;

    double mass = 0.0;
    int known = 0;
    inside = nothing();
    each_entry([&](const KeptEntry& kept) {
      mass += exp(kept.log_p - shift);
      ++known;
      observe_student<1>(task, kept.column, {{transformed(kept.raw)}}, 1, inside);
    });
    outside = observe_outside(student);
    warp_reduce<Nothing>(task, inside, Lanes<32>{});
    warp_reduce<Nothing>(task, outside, Lanes<32>{});
    mass = warp_sum(mass);
    known = __reduce_add_sync(kWholeWarp, known);
    if (lane == 0) {
      scratch.inside[warp] = inside, scratch.outside[warp] = outside;
      scratch.mass[warp] = mass, scratch.known[warp] = known;
    }
    __syncthreads();
    inside = with_label_sum(task, sum_of_slots<Nothing>(task, scratch.inside, kEntriesWarps));
    outside = with_label_sum(task, sum_of_slots<Nothing>(task, scratch.outside, kEntriesWarps));
    // By one warp: where few units compute in double, all of them would take longer than a sweep.
    if (warp == 0) {
      mass = warp_sum(slot_of_lane(scratch.mass, 0.0));
      known = __reduce_add_sync(kWholeWarp, slot_of_lane(scratch.known, 0));
      const Tail tail = job.teacher.tail;
      const bool is_sound = !is_outside && (!comes_twice || tail == Tail::none);
      const Teacher teacher = make_teacher(task.vocab, tail, shift, mass, known, is_sound);
      if (lane == 0) scratch.teacher = teacher;
    }
    __syncthreads();
    return scratch.teacher;
  }

  KD_DEVICE bool has_rest(const Teacher& teacher) const {
    return teacher.known > 0 && teacher.others > 0 && !job.by_column &&
           job.teacher.tail != Tail::subset;
  }

  // The sums that D and the gradient follow from.
  KD_DEVICE void evaluate(const Teacher& teacher, const Sums& inside, const Sums& outside,
                          const Outside& columns, const Row& student, Totals& totals) const {
    Evaluated sum{};
    if (threadIdx.x < count()) {
      const double whole = log_of(job.teacher.tail == Tail::subset ? inside : totals.sums);
      evaluate_entries(teacher, whole, sum);
      if (threadIdx.x == 0 && has_rest(teacher)) {
        evaluate_rest(teacher, kLn2 * (log_of(outside) - whole), sum);
      }
    }
    if (job.by_column) evaluate_outside(columns, student, sum);
    warp_reduce(sum, Lanes<32>{});
    if (threadIdx.x % 32 == 0) scratch.evaluated[threadIdx.x / 32] = sum;
    __syncthreads();
    totals.take(task, sum_of_slots(scratch.evaluated, kEntriesWarps));
  }

  // By all threads; the first one has the row's numbers.
  KD_DEVICE void write(const Teacher& teacher, const Totals& totals) const {
    double entropy = 0.0;
    Likeliest likeliest = no_entry();
    if (task.extras) {
      describe(teacher, entropy, likeliest);
      entropy = warp_sum(entropy);
      likeliest = warp_likeliest(likeliest);
      if (threadIdx.x % 32 == 0) {
        scratch.entropy[threadIdx.x / 32] = entropy;
        scratch.likeliest[threadIdx.x / 32] = likeliest;
      }
      __syncthreads();
      entropy = warp_sum(slot_of_lane(scratch.entropy, 0.0));
      likeliest = warp_likeliest(slot_of_lane(scratch.likeliest, no_entry()));
    }
    if (threadIdx.x != 0) return;
    if (totals.spoils_row(task)) return write_constant(task, plan.row, NAN);
    const Sums& s = totals.sums;
    const LabelTerms terms = label_terms<false>(task, plan, s);
    // Rounding may leave a negative residue, which is none of weights that are no distribution.
    const bool may_be_negative = job.teacher.tail == Tail::none;
    float kd = task.kd_scale * (totals.kd < 0.0f && !may_be_negative ? 0.0f : totals.kd);
    float teacher_lse = static_cast<float>(teacher.log_norm);
    float teacher_entropy = teacher.known > 0 ? static_cast<float>(entropy) : 0.0f;
    float student_lse = kLn2f * (s.student_reference + totals.student_log);
    if (task.is_single()) student_lse = s.student_top * task.inverse_temperature;
    float student_entropy = 0.0f, hits = 0.0f;
    if (task.extras) {
      student_entropy = kLn2f * (totals.student_log - quotient(s.student_moment, s.student));
      hits = s.student_at == likeliest.column && !totals.teacher_is_bad ? 1.0f : 0.0f;
      if (s.student_at == plan.label) hits += 2.0f;
    }
    if (totals.teacher_is_bad) kd = teacher_lse = teacher_entropy = NAN;
    float loss = weigh_term(task.alpha, kd) + weigh_term(task.ce_weight, terms.ce) + terms.z;
    loss *= plan.weight;
    const float values[10] = {loss,        kd,        terms.ce,        terms.z,         student_lse,
                              teacher_lse, terms.lse, student_entropy, teacher_entropy, hits};
    write_row<false>(task, plan.row, values);
  }

  KD_DEVICE void differentiate(const Teacher& teacher, const Sums& outside, const Totals& totals,
                               Outside& columns, const Row& student) const {
    const Factors factors(task, plan, totals.sums);
    if (task.alpha != 0.0f && has_rest(teacher) && outside.student > 0.0f) {
      const float pull = pull_of(totals, scratch.rest_slope, scratch.rest_q);
      columns.factor = factors.slope * pull * reciprocal(outside.student);
    }
    const float move = outside.label_reference - totals.sums.label_reference;
    columns.label_factor = factors.label * power_of_two(move);
    differentiate_outside(columns, totals, factors, student);
    __syncthreads();
    differentiate_entries(totals, factors);
  }

  KD_DEVICE void run() const {
    const Side side = side_of<kDType>(task);
    const Row student(task, side, plan.row, span,
                      task.gradient || job.by_column ? Keep::yes : Keep::no);
    Sums inside, outside;
    const Teacher teacher = observe(student, inside, outside);
    Totals totals(task, together(inside, outside));
    totals.teacher_is_bad = !teacher.is_sound;
    const bool spoiled = totals.spoils_row(task);
    const bool wanted = (task.alpha != 0.0f || task.extras) && teacher.known > 0;
    Outside columns(outside, totals, teacher, wanted && job.by_column && task.alpha != 0.0f);
    if (wanted && !spoiled) evaluate(teacher, inside, outside, columns, student, totals);
    write(teacher, totals);
    if (task.gradient) {
      if (spoiled) {
        fill_gradient<kWidth>(task, plan.row, span, NAN);
      } else {
        const Row last(task, side, plan.row, span, Keep::no);
        differentiate(teacher, outside, totals, columns, last);
      }
      clear_beyond_vocabulary(task, plan.row);
    }
    // The mask has been looked at for the last time before the sums were exchanged, or before this.
    __syncthreads();
    clear_mask();
    // The next row's slots take the place of what slower threads may still read.
    __syncthreads();
  }
};

template <class Functor, DType kDType>
__global__ void __launch_bounds__(kEntriesThreads, 1)
    entries_kernel(const __grid_constant__ Task task, const __grid_constant__ Functor functor,
                   const __grid_constant__ EntriesJob job) {
  extern __shared__ __align__(16) char entries_memory[];
  __shared__ EntriesScratch scratch;
  KeptEntry* kept = reinterpret_cast<KeptEntry*>(entries_memory);
  unsigned* mask = reinterpret_cast<unsigned*>(kept + job.teacher.count);
  for (int i = threadIdx.x; i < job.mask_words; i += blockDim.x) mask[i] = 0;
  __syncthreads();
  const int counted = task.plan->counted;
  for (int64_t i = blockIdx.x; i < task.rows(); i += gridDim.x) {
    const RowPlan plan = load_plan(task.rows_planned + i);
    const char* start = task.row_of(task.student, plan.row);
    const Span span = span_of(start, kDType, task.vocab, 0, job.units);
    if (i >= counted) {
      dismiss_row<EntriesRow<Functor, kDType>::kWidth>(task, plan, span, true);
      continue;
    }
    EntriesRow<Functor, kDType>{task, functor, job, plan, span, kept, mask, scratch}.run();
  }
}

template <KernelGroup kGroup>
Kernel entries_kernel_of(const Divergence& divergence, DType student) {
  return visit_group<kGroup>(divergence, [&](const auto& given) {
    const auto functor = general(given);
    using Functor = std::remove_const_t<decltype(functor)>;
    const void* kernels[] = {(const void*)entries_kernel<Functor, DType::float32>,
                             (const void*)entries_kernel<Functor, DType::bfloat16>,
                             (const void*)entries_kernel<Functor, DType::float16>};
    return make_kernel(kernels[static_cast<int>(student)], functor);
  });
}

}  // namespace kd::cuda
