// The row-resident kernel for what distillation mostly runs: a KL of plain logits, with or without
// labels. Its exponentials stay in registers between the sweeps: two
// special-function operations per element where e^z is a small power of e^(z/T) or not needed, four
// where it is no such power.
#pragma once

#include "kernel.h"
#include "resident.cuh"

namespace kd::cuda {

struct Float32 {
  static constexpr DType kDType = DType::float32;
  static constexpr int kColumns = 4;  // of 16 bytes
  static constexpr unsigned kMinusInfinity = 0xff800000u;
  float top = -INFINITY;
  KD_DEVICE void see(const Words<4>& w) {
#pragma unroll
    for (const unsigned word : w.at) top = fmaxf(top, __uint_as_float(word));
  }
  KD_DEVICE float largest() const { return top; }
  static KD_DEVICE Vector<4> widen(const Words<4>& w) {
    return {{__uint_as_float(w.at[0]), __uint_as_float(w.at[1]), __uint_as_float(w.at[2]),
             __uint_as_float(w.at[3])}};
  }
};

// Two to a register: half the comparisons.
template <class Pair, DType kCode>
struct Half {
  static constexpr DType kDType = kCode;
  static constexpr int kColumns = 8;
  static constexpr unsigned kMinusInfinity = kCode == DType::bfloat16 ? 0xff80ff80u : 0xfc00fc00u;
  unsigned top = kMinusInfinity;
  template <int kWords>
  KD_DEVICE void see(const Words<kWords>& w) {
#pragma unroll
    for (const unsigned word : w.at) {
      const Pair larger =
          __hmax2(*reinterpret_cast<const Pair*>(&top), *reinterpret_cast<const Pair*>(&word));
      top = *reinterpret_cast<const unsigned*>(&larger);
    }
  }
  KD_DEVICE float largest() const {
    float low, high;
    unpack(kCode, top, low, high);
    return fmaxf(low, high);
  }
  template <int kWords>
  static KD_DEVICE Vector<2 * kWords> widen(const Words<kWords>& w) {
    Vector<2 * kWords> x;
#pragma unroll
    for (int i = 0; i < kWords; ++i) unpack(kCode, w.at[i], x.at[2 * i], x.at[2 * i + 1]);
    return x;
  }
};

using BFloat16 = Half<__nv_bfloat162, DType::bfloat16>;
using Float16 = Half<__half2, DType::float16>;

template <DType kCode>
struct FormatOf;
template <>
struct FormatOf<DType::float32> {
  using Type = Float32;
};
template <>
struct FormatOf<DType::bfloat16> {
  using Type = BFloat16;
};
template <>
struct FormatOf<DType::float16> {
  using Type = Float16;
};

// A vector of -inf in shared memory, which is read instead of columns that are not there, where
// rows are not aligned. Of aligned ones a slice has the same place in every stage, and what its
// threads read behind it is -inf from the start.
template <class Format>
struct Beyond {
  static KD_DEVICE uint4* vector() {
    __shared__ uint4 words;
    return &words;
  }
  // By one thread, before a barrier of the block.
  static KD_DEVICE void make() {
    constexpr unsigned kWord = Format::kMinusInfinity;
    *vector() = make_uint4(kWord, kWord, kWord, kWord);
  }
};

// Of the two models. A vector has as many columns as 16 bytes of the wider one.
template <class S, class T>
struct Formats {
  using Student = S;
  using Teacher = T;
  static constexpr int kWidth = S::kColumns < T::kColumns ? S::kColumns : T::kColumns;
  template <class Format>
  static constexpr int kWords = 4 * kWidth / Format::kColumns;
  static KD_DEVICE void make_beyond() {
    Beyond<Student>::make();
    Beyond<Teacher>::make();
  }
  // By the block, before the first copies: behind the slices of aligned rows.
  static KD_DEVICE void fill(const Task& task, const Stages& stages, char* memory) {
    const char* start = task.row_of(task.student, 0);
    const Span span = span_of(start, Student::kDType, task.vocab, cluster_rank(), stages.each);
    const int columns = span.past - span.first;
    for (int i = 0; i < stages.count; ++i, memory += stages.bytes) {
      fill_with(Student::kMinusInfinity, memory + columns * size_of(Student::kDType),
                memory + stages.teacher_offset);
      fill_with(Teacher::kMinusInfinity,
                memory + stages.teacher_offset + columns * size_of(Teacher::kDType),
                memory + stages.bytes);
    }
    fence_bulk_copies();
    __syncthreads();
  }

 private:
  static KD_DEVICE void fill_with(unsigned word, char* from, char* to) {
    for (from += 4 * threadIdx.x; from < to; from += 4 * blockDim.x) {
      *reinterpret_cast<unsigned*>(from) = word;
    }
  }
};

// e_s, and for forward KL e_t, for reverse KL e_s (u_t - u_s): relative to the thread's references.
template <class Formats, int kColumns>
struct Kept {
  static constexpr int kVectors = kColumns / Formats::kWidth;
  Vector<Formats::kWidth> student[kVectors], second[kVectors];

  template <class Step>
  KD_DEVICE void each(const Step& step) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int i = 0; i < Formats::kWidth; ++i) step(student[k].at[i], second[k].at[i]);
    }
  }
};

// How kPower says where e^z comes from: it is that power of e^(z/T), or computed from the logits,
// in each sweep that needs it.
constexpr int kSeparate = 0;

// This block's slice of a row. A warp owns a run of columns, so that a thread's vectors are
// constant distances apart, and that most warps know at once that nothing about their columns is
// special. All warps of a launch run the same instructions, also those with the end of a slice: one
// that ran others, which no warp beside it had fetched, made a row 7 % longer on an H200.
template <class Formats, int kColumns>
struct KeptSlice {
  using Student = typename Formats::Student;
  using Teacher = typename Formats::Teacher;
  static constexpr int kWidth = Formats::kWidth, kColumnsPerWarp = 32 * kColumns;
  static constexpr int kVectors = kColumns / kWidth;
  const Task& task;
  const Span& span;
  int row;
  char *student, *teacher;

  KD_DEVICE int first_of_warp() const {
    return span.first + static_cast<int>(threadIdx.x / 32) * kColumnsPerWarp;
  }
  KD_DEVICE int past_of_warp() const { return min(first_of_warp() + kColumnsPerWarp, span.past); }
  KD_DEVICE int first() const {
    return first_of_warp() + static_cast<int>(threadIdx.x % 32) * kWidth;
  }
  // Whether all columns that the warp has are columns of the row.
  KD_DEVICE bool is_inner_warp() const {
    return first_of_warp() >= 0 && past_of_warp() <= task.vocab;
  }
  KD_DEVICE bool has(int column) const {
    return column >= max(first_of_warp(), 0) && column < past_of_warp();
  }

  KD_DEVICE Slice of_student() const { return {task, task.student, student, row, span}; }
  KD_DEVICE Slice of_teacher() const { return {task, task.teacher, teacher, row, span}; }

  KD_DEVICE void mend() const {
    kd::cuda::mend(of_student(), of_teacher(), first_of_warp(), past_of_warp());
  }

  // A vector's words; behind the slice, which only the last warps of a block reach, -inf, which
  // adds nothing, without a branch.
  template <class Format, bool kFilled>
  KD_DEVICE auto words_at(const char* slice, int column) const {
    const char* from = slice + (column - span.first) * static_cast<int>(size_of(Format::kDType));
    if (!kFilled && column >= span.past) from = reinterpret_cast<char*>(Beyond<Format>::vector());
    return load_words<Formats::template kWords<Format>>(from);
  }

  template <bool kFilled, class Step>
  KD_DEVICE void each_vector(const Step& step) const {
    const int begin = first();
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int column = begin + k * 32 * kWidth;
      step(k, words_at<Student, kFilled>(student, column),
           words_at<Teacher, kFilled>(teacher, column));
    }
  }

  // The largest logits first, so that a thread has one reference for all its columns, and, if
  // kOfWarp, a warp.
  template <bool kOfWarp>
  KD_DEVICE References references(bool filled) const {
    Student of_student;
    Teacher of_teacher;
    if (filled) {
      see<true>(of_student, of_teacher);
    } else {
      see<false>(of_student, of_teacher);
    }
    float top = of_student.largest(), teacher_top = of_teacher.largest();
    if constexpr (kOfWarp) top = warp_max(top), teacher_top = warp_max(teacher_top);
    return {whole_exponent(top, task.student.factor),
            whole_exponent(teacher_top, task.teacher.factor),
            whole_exponent(top, task.label_factor)};
  }

  KD_DEVICE float label_logit(int label) const {
    return has(label) ? of_student().load_one_at(label) : -INFINITY;
  }

 private:
  template <bool kFilled>
  KD_DEVICE void see(Student& of_student, Teacher& of_teacher) const {
    each_vector<kFilled>([&](int, const auto& s, const auto& t) {
      of_student.see(s);
      of_teacher.see(t);
    });
  }
};

template <int kPower>
KD_DEVICE float label_power(float e) {
  if constexpr (kPower == 2) return e * e;
  if constexpr (kPower == 3) return e * e * e;
  if constexpr (kPower == 4) return (e * e) * (e * e);
  return e;
}

// sum + e^kPower
template <int kPower>
KD_DEVICE float add_label_power(float e, float sum) {
  if constexpr (kPower == 3) return fmaf(e * e, e, sum);
  const float root = label_power<kPower / 2>(e);
  return fmaf(root, root, sum);
}

template <class Functor, int kPower, bool kFilled, class Formats, int kColumns>
KD_DEVICE Sums observe_kept(const Task& task, const KeptSlice<Formats, kColumns>& slice,
                            const References& r, Kept<Formats, kColumns>& kept) {
  constexpr int kWidth = Formats::kWidth;
  Sums sums = nothing();
  sums.student_reference = r.student;
  sums.teacher_reference = r.teacher;
  sums.label_reference = kPower == kSeparate ? r.label : kPower * r.student;
  slice.template each_vector<kFilled>([&](int k, const auto& of_student, const auto& of_teacher) {
    Vector<kWidth>&es = kept.student[k], &second = kept.second[k];
    const Vector<kWidth> s = Formats::Student::widen(of_student);
    const Vector<kWidth> t = Formats::Teacher::widen(of_teacher);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float u_s = fmaf(s.at[i], task.student.factor, -r.student);
      const float u_t = fmaf(t.at[i], task.teacher.factor, -r.teacher);
      const float e_s = power_of_two(u_s), e_t = power_of_two(u_t);
      es.at[i] = e_s;
      sums.student += e_s;
      sums.teacher += e_t;
      if constexpr (kPower > 1) sums.label = add_label_power<kPower>(e_s, sums.label);
      if constexpr (kPower == kSeparate) {
        sums.label += power_of_two(fmaf(s.at[i], task.label_factor, -r.label));
      }
      if constexpr (teacher_weighs<Functor>) {
        second.at[i] = e_t;
        add_weighed(sums.gap, e_t, u_t - u_s);
      } else {
        second.at[i] = 0.0f;
        weigh(second.at[i], e_s, u_t - u_s);
        sums.gap += second.at[i];
      }
    }
  });
  return sums;
}

template <class Functor, int kPower, class Formats, int kColumns>
KD_DEVICE Sums observe_kept(const Task& task, const KeptSlice<Formats, kColumns>& slice,
                            bool filled, const References& r, Kept<Formats, kColumns>& kept) {
  return filled ? observe_kept<Functor, kPower, true>(task, slice, r, kept)
                : observe_kept<Functor, kPower, false>(task, slice, r, kept);
}

// The student's sums without the thread that has the largest reference: where the student is sure
// of an entry, it is that thread's.
struct Others {
  float student, gap;
};

// Sums of which only these are used, as they travel. Where no leader's are kept apart, the threads
// of a warp have the same references.
template <class Functor, int kPower>
struct Brief {
  static constexpr bool kLed = student_weighs<Functor>;
  float student_reference, teacher_reference;
  float student, teacher, gap;
  float label_logit;
  float label[kPower == 1 ? 0 : 1];                    // the student's otherwise
  float label_reference[kPower == kSeparate ? 1 : 0];  // a multiple of the student's otherwise
  Others others[kLed ? 1 : 0];

  // Of one thread.
  static KD_DEVICE Brief of(const Sums& s) {
    Brief b{s.student_reference, s.teacher_reference, s.student, s.teacher, s.gap, s.label_logit};
    if constexpr (kPower != 1) b.label[0] = s.label;
    if constexpr (kPower == kSeparate) b.label_reference[0] = s.label_reference;
    if constexpr (kLed) b.others[0] = {0.0f, 0.0f};
    return b;
  }

  KD_DEVICE Sums sums() const {
    Sums s = nothing();
    s.student_reference = student_reference;
    s.teacher_reference = teacher_reference;
    if constexpr (kPower == kSeparate) {
      s.label_reference = label_reference[0];
    } else {
      s.label_reference = kPower * student_reference;
    }
    s.student = student;
    s.teacher = teacher;
    if constexpr (kPower != 1) s.label = label[0];
    s.gap = gap;
    s.label_logit = label_logit;
    return s;
  }

  template <int kCount>
  KD_DEVICE void reduce(Lanes<kCount> lanes) {
    constexpr bool kAlike = !kLed && kCount == 32;
    Sums s = sums();
    const References from{student_reference, teacher_reference, s.label_reference};
    References top = from;
    if constexpr (!kAlike) {
      top = {warp_max(student_reference), warp_max(teacher_reference), 0.0f};
      top.label = kPower * top.student;
      if constexpr (kPower == kSeparate) top.label = warp_max(s.label_reference);
    }
    Others rest;
    if constexpr (kLed) {
      // All of each, but of the leading one what is not its leader's.
      const unsigned leaders = __ballot_sync(kWholeWarp, student_reference == top.student);
      rest = {student, gap};
      if (static_cast<int>(threadIdx.x % kCount) == __ffs(leaders) - 1) rest = others[0];
    }
    if constexpr (!kAlike) rebase<Functor, false>(s, top);
    float four[4] = {s.student, s.teacher, s.gap, s.label};
    warp_sums(four, lanes);
    s.student = four[0], s.teacher = four[1], s.gap = four[2], s.label = four[3];
    s.label_logit = warp_max(s.label_logit);
    if constexpr (kLed) {
      const float student_move = from.student - top.student;
      const float move = (from.teacher - top.teacher) - student_move;
      const float scale = power_of_two(student_move);
      rest.gap = warp_sum(scale > 0.0f ? fmaf(rest.student, move, rest.gap) * scale : 0.0f, lanes);
      rest.student = warp_sum(rest.student * scale, lanes);
    }
    *this = of(s);
    if constexpr (kLed) others[0] = rest;
  }
};

// The entry that the student is sure of. There the row's mean gap is nearly the entry's own, and
// the gradient what the two leave of each other. So its thread measures gaps from that one, which
// makes the mean one of the other entries alone.
struct SureEntry {
  float exponential, gap;
  float mean;  // the row's mean gap, from the entry's

  // Whether the entry is the thread's. One thread of a row at most has more to do than to look.
  template <class Functor, int kPower, class Formats, int kColumns>
  KD_DEVICE bool find(const Brief<Functor, kPower>& row, const References& mine,
                      const Kept<Formats, kColumns>& kept) {
    const Others& rest = row.others[0];
    const float least = kSure * row.student;
    if (row.student - rest.student <= least || mine.student != row.student_reference) return false;
    float top = 0.0f, weighed = 0.0f;
    kept.each([&](float e, float second) {
      if (e > top) top = e, weighed = second;
    });
    SureEntry found{top, weighed * reciprocal(top)};
    if (top <= least || fabsf(found.gap) == INFINITY) return false;
    const float moved = mine.teacher - row.teacher_reference;
    float others = rest.gap - (found.gap + moved) * rest.student;
    kept.each([&](float e, float second) { others += found.from_here(e, second); });
    found.mean = others * reciprocal(row.student);
    *this = found;
    return true;
  }

  // From shared memory, where it is its thread's alone: no other thread may read it for nothing.
  KD_DEVICE SureEntry load() const {
    const volatile SureEntry& v = *this;
    return {v.exponential, v.gap, v.mean};
  }

  KD_DEVICE float from_here(float e, float second) const {
    return e == exponential ? 0.0f : second - gap * e;
  }
};

// The gradient is student e_s - second second + label e_s^T, with the thread's own references
// folded into the factors.
struct KeptFactors {
  float student, second, label;
  float label_reference;  // of kSeparate

  // `sure`: of the thread, or null.
  template <class Functor, int kPower>
  static KD_DEVICE KeptFactors make(const Factors& f, const Sums& s, const References& mine,
                                    const SureEntry* sure) {
    const float student_move = mine.student - s.student_reference;
    const float teacher_move = mine.teacher - s.teacher_reference;
    const float student_scale = power_of_two(student_move);
    KeptFactors k;
    if constexpr (teacher_weighs<Functor>) {
      k.student = f.student * student_scale;
      k.second = f.teacher * power_of_two(teacher_move);
    } else {
      // q (log q/p - KL), in which the two log-sum-exps cancel.
      float mean = s.gap * reciprocal(s.student) - (teacher_move - student_move);
      if (sure) mean = sure->load().mean;
      k.second = kLn2f * f.student * student_scale;
      k.student = k.second * mean;
    }
    k.label = f.label;
    k.label_reference = s.label_reference;
    if constexpr (kPower != kSeparate) k.label *= label_power<kPower>(student_scale);
    if constexpr (kPower == 1) k.student += k.label;
    return k;
  }
};

// `z`: the vector's logits, for kSeparate.
template <int kPower, class Formats, int kColumns>
KD_DEVICE Vector<Formats::kWidth> gradient_of(const Task& task, const KeptFactors& f,
                                              const Kept<Formats, kColumns>& kept, int k,
                                              const Vector<Formats::kWidth>& z,
                                              const SureEntry* sure) {
  Vector<Formats::kWidth> g;
#pragma unroll
  for (int i = 0; i < Formats::kWidth; ++i) {
    const float e = kept.student[k].at[i];
    float second = kept.second[k].at[i];
    if (sure) second = sure->from_here(e, second);
    float student = f.student;  // and nothing more of a row without a label
    if constexpr (kPower > 1) student = fmaf(f.label, label_power<kPower - 1>(e), student);
    // Two rounded products: equal operands must cancel to exactly 0.
    g.at[i] = student * e - f.second * second;
    if constexpr (kPower == kSeparate) {
      const float e_label = power_of_two(fmaf(z.at[i], task.label_factor, -f.label_reference));
      g.at[i] = fmaf(f.label, e_label, g.at[i]);
    }
  }
  return g;
}

template <class Functor, int kPower, class Formats, int kColumns>
KD_DEVICE void differentiate_kept(const Task& task, const RowPlan& plan,
                                  const KeptSlice<Formats, kColumns>& slice, const Sums& sums,
                                  const References& mine, const SureEntry* sure,
                                  const Kept<Formats, kColumns>& kept) {
  using Format = typename Formats::Student;
  constexpr int kWidth = Formats::kWidth, kVectors = KeptSlice<Formats, kColumns>::kVectors;
  const Factors factors(task, plan, sums);
  const KeptFactors f = KeptFactors::make<Functor, kPower>(factors, sums, mine, sure);
  const GradientRow<kWidth> gradient(task, plan.row, slice.span, Format::kDType);
  const int begin = slice.first_of_warp(), past = slice.past_of_warp();
  const auto vector_of = [&](int k, int column, const SureEntry* of_row) {
    Vector<kWidth> z{};
    if constexpr (kPower == kSeparate) {
      z = Format::widen(slice.template words_at<Format, false>(slice.student, column));
    }
    return gradient_of<kPower>(task, f, kept, k, z, of_row);
  };
  const int64_t size = size_of(Format::kDType);
  char* to = gradient.row + slice.first() * size;
  const bool is_plain = begin < past && gradient.is_whole(begin, past) && !slice.has(plan.label);
  if (is_plain && !sure) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int column = slice.first() + k * 32 * kWidth;
      const Vector<kWidth> g = vector_of(k, column, nullptr);
      store_vector_if(column < past, to + k * 32 * kWidth * size, Format::kDType, g);
    }
    return;
  }
  SureEntry from{INFINITY, 0.0f, 0.0f};  // no entry
  if (sure) from = sure->load();
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int column = slice.first() + k * 32 * kWidth;
    if (column >= past) continue;
    Vector<kWidth> g = vector_of(k, column, student_weighs<Functor> ? &from : nullptr);
    if (is_plain) {
      store_vector(to + k * 32 * kWidth * size, Format::kDType, g);
    } else {
      pull_label(plan.label, column, factors.label_pull, g);
      gradient.template store_as<Format::kDType>(task, column, g);
    }
  }
}

// What is left to write of the row before: a thread does so while it waits for other blocks.
template <class Functor, int kPower>
struct Outcome {
  Brief<Functor, kPower> brief;
  Evaluated anew;
  bool cancelled;

  KD_DEVICE void write(const Task& task, const RowPlan& plan) const {
    Totals totals(task, brief.sums());
    totals.close<Functor>(quotient(totals.sums.gap, weigher<Functor>(totals.sums)));
    if (cancelled) totals.take(task, anew);
    write_outcome<true>(task, plan, totals);
  }
};

template <int kColumns>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
inline constexpr int kRegisterThreads =
    kColumns == kColumnsPerThread ? kResidentThreadsOfSm120 : kWideThreadsOfSm120;
#else
inline constexpr int kRegisterThreads =
    kColumns == kColumnsPerThread ? kResidentThreads : kWideThreads;
#endif

// What the steps of register_kernel share.
template <class Functor, class Formats, int kColumns, int kPower>
struct RegisterRows {
  using Message = Brief<Functor, kPower>;
  // And one for the claim that goes along.
  static constexpr int kWidth = Formats::kWidth, kWords = (sizeof(Message) + 4 + 15) / 16 * 4;
  static constexpr bool kReadsTwice = kPower == kSeparate;  // the stage, for the gradient, too
  // The others would spill.
  static constexpr bool kLooksAhead = kColumns == kColumnsPerThread || teacher_weighs<Functor>;
  // A sure entry is its thread's.
  static constexpr bool kOfWarp = !Message::kLed;
  using Slice = KeptSlice<Formats, kColumns>;
  const Task& task;
  const Functor& functor;
  const Stages& stages;
  Pipeline<kWords>& pipeline;
  Exchange<kWords>& exchange;
  Outcome<Functor, kPower>& outcome;
  References* ahead;  // by thread, of the next row

  // Of one block, another one for every row.
  KD_DEVICE bool writes_outcome(unsigned number) const {
    const unsigned thread = blockDim.x > 64 ? 64 : 0;
    return threadIdx.x == thread &&
           (number & (stages.cluster - 1)) == static_cast<unsigned>(pipeline.rank());
  }

  KD_DEVICE void write_last_outcome() const {
    const unsigned number = pipeline.taken + 15u;
    if (!pipeline.begun || !writes_outcome(number)) return;
    outcome.write(task, load_plan(&pipeline.scratch.plans[number % kPlans]));
  }

  KD_DEVICE Slice slice_of(const Pipeline<kWords>& from, int row, const Span& columns) const {
    return Slice{task, columns, row, from.student_slice(), from.teacher_slice()};
  }

  KD_DEVICE References references(const Slice& slice) const {
    if (kLooksAhead && pipeline.looked) return ahead[threadIdx.x];
    if (stages.congruent) slice.mend();
    return slice.template references<kOfWarp>(stages.aligned);
  }

  // Where no row's are looked for ahead, this row's take their place, and no registers.
  KD_DEVICE void keep(const References& r) const {
    if (!kLooksAhead) ahead[threadIdx.x] = r;
  }
  KD_DEVICE References kept(const References& r) const {
    return kLooksAhead ? r : ahead[threadIdx.x];
  }

  // The next row's largest logits are looked for in the window, if it has arrived by then, if
  // nothing has to be mended, and by warps that have nothing else to do there.
  KD_DEVICE void look_ahead(bool sends) const {
    pipeline.looked = 0;
    if (!kLooksAhead || stages.count <= 1 || !stages.congruent) return;
    if (sends || is_last_warp()) return;
    Pipeline<kWords> next = pipeline;
    next.advance();
    if (!next.has_arrived()) return;
    const RowPlan row = next.plan();
    if (row.row < 0) return;
    const Span columns = next.span();
    const Slice following = slice_of(next, row.row, columns);
    pipeline.looked = following.is_inner_warp();
    if (pipeline.looked) {
      ahead[threadIdx.x] = following.template references<kOfWarp>(stages.aligned);
    }
  }

  // A cancelled closed form. The rare sweep has the registers to itself, and the kept ones are
  // filled again.
  KD_DEVICE void sum_anew(const Slice& slice, const Sums& sums, const References& r,
                          Kept<Formats, kColumns>& kept) const {
    using Row = SharedRow<kWidth>;
    const Row of_student{slice.of_student()}, of_teacher{slice.of_teacher()};
    const Sweep<Functor, kWidth, Row, true> sweep{task, functor, slice.span, of_student,
                                                  of_teacher};
    const Evaluated anew = exchange.sum(sweep.evaluate(Totals(task, sums)));
    if (writes_outcome(pipeline.taken)) outcome.anew = anew;
    observe_kept<Functor, kPower>(task, slice, stages.aligned, r, kept);
    __syncthreads();
  }

  KD_DEVICE void differentiate(const RowPlan& plan, const Slice& slice, const Sums& sums,
                               const References& r, const SureEntry* sure,
                               const Kept<Formats, kColumns>& kept, bool spoiled) const {
    if (!task.gradient) return;
    if (spoiled) {
      fill_gradient<kWidth>(task, plan.row, slice.span, NAN);
    } else {
      differentiate_kept<Functor, kPower>(task, plan, slice, sums, r, sure, kept);
    }
    if (pipeline.rank() == 0) clear_beyond_vocabulary(task, plan.row);
  }

  KD_DEVICE void request_behind_barrier() const {
    __syncthreads();
    if (pipeline.is_producer()) pipeline.request();
  }
};

template <class Functor, class Formats, int kColumns, int kPower>
__global__ void __launch_bounds__(kRegisterThreads<kColumns>, 1)
    register_kernel(const __grid_constant__ Task task, const __grid_constant__ Functor functor,
                    const __grid_constant__ Stages stages) {
#if __CUDA_ARCH__ >= 900
  using Rows = RegisterRows<Functor, Formats, kColumns, kPower>;
  using Message = typename Rows::Message;
  extern __shared__ __align__(128) char memory[];
  __shared__ ResidentScratch<Rows::kWords> scratch;
  __shared__ Outcome<Functor, kPower> outcome;
  __shared__ References ahead[kRegisterThreads<kColumns>];
  __shared__ SureEntry sure;
  static_assert(sizeof(scratch) + sizeof(outcome) + sizeof(ahead) + sizeof(sure) +
                    2 * sizeof(uint4) <=
                kResidentScratchBytes);
  Pipeline<Rows::kWords> pipeline{task, stages, scratch, memory};
  Exchange<Rows::kWords> exchange{scratch, stages.cluster};
  const Rows rows{task, functor, stages, pipeline, exchange, outcome, ahead};
  if (threadIdx.x == 0) Formats::make_beyond();
  if (stages.aligned) Formats::fill(task, stages, memory);
  pipeline.start(exchange);
  dismiss_rows<Rows::kWidth>(task, scratch.counted);
  pipeline.keep_claim(0, pipeline.claim());
  const auto reduce = [](Message& b, auto lanes) { b.reduce(lanes); };
  for (;; pipeline.advance()) {
    if (!Rows::kLooksAhead || !pipeline.looked) pipeline.wait();
    if (!stages.congruent) align(pipeline);
    const RowPlan before = pipeline.plan();
    if (before.row < 0) break;
    const Span span = pipeline.span();
    const auto slice = rows.slice_of(pipeline, before.row, span);
    const References r = rows.references(slice);
    Kept<Formats, kColumns> kept;
    Sums mine = observe_kept<Functor, kPower>(task, slice, stages.aligned, r, kept);
    rows.keep(r);
    mine.label_logit = slice.label_logit(before.label);
    const int parity = pipeline.taken % 2;
    exchange.begin(Message::of(mine), parity, Message::of(nothing()), reduce);
    const int answer = pipeline.claim();
    if (pipeline.is_producer()) pipeline.prepare();
    rows.write_last_outcome();
    rows.look_ahead(exchange.is_sender(exchange.turn));
    const Message brief = exchange.end(Message::of(nothing()), reduce);
    const References same_r = rows.kept(r);
    bool is_sure = false;
    if constexpr (student_weighs<Functor>) is_sure = sure.find(brief, same_r, kept);
    if (pipeline.is_producer()) scratch.copy.next = exchange.received(parity);
    pipeline.keep_claim(1 - parity, answer);
    // Again, instead of registers.
    const RowPlan plan = pipeline.plan();
    const Span same = pipeline.span();
    const auto again = rows.slice_of(pipeline, plan.row, same);
    const Sums sums = with_label_sum(task, brief.sums());
    const bool spoiled = Soundness(sums).spoils_row(task);
    const bool cancelled = seems_cancelled<Functor>(sums) && task.alpha != 0.0f && !spoiled;
    if (rows.writes_outcome(pipeline.taken)) outcome = {brief, Evaluated{}, cancelled};
    if (cancelled) rows.sum_anew(again, sums, same_r, kept);
    // All threads have passed a barrier since they read the stage: it is free.
    if (!Rows::kReadsTwice && pipeline.is_producer()) pipeline.request();
    rows.differentiate(plan, again, sums, same_r, is_sure ? &sure : nullptr, kept, spoiled);
    if (Rows::kReadsTwice) rows.request_behind_barrier();
  }
  rows.write_last_outcome();
#endif
}

template <class Functor, DType kStudent, DType kTeacher>
Kernel register_kernel_of(LabelSum label_sum, int columns) {
  constexpr int kFew = kColumnsPerThread, kMany = kWideColumnsPerThread;
  using Both = Formats<typename FormatOf<kStudent>::Type, typename FormatOf<kTeacher>::Type>;
  const auto kernel = [](auto function) { return make_kernel((const void*)function, Functor{}); };
  const auto of_every_shape = [&](auto few_or_many) {
    constexpr int kColumns = few_or_many;
    if (label_sum == LabelSum::square) return kernel(register_kernel<Functor, Both, kColumns, 2>);
    if (label_sum == LabelSum::separate) {
      return kernel(register_kernel<Functor, Both, kColumns, kSeparate>);
    }
    return kernel(register_kernel<Functor, Both, kColumns, 1>);
  };
  if constexpr (has_wide_form(kStudent, kTeacher)) {
    if (columns == kMany) return of_every_shape(std::integral_constant<int, kMany>{});
  }
  if constexpr (has_every_power(kStudent, kTeacher, kFew)) {
    if (label_sum == LabelSum::cube) return kernel(register_kernel<Functor, Both, kFew, 3>);
    if (label_sum == LabelSum::fourth) return kernel(register_kernel<Functor, Both, kFew, 4>);
  }
  return of_every_shape(std::integral_constant<int, kFew>{});
}

}  // namespace kd::cuda
