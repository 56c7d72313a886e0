// The row-resident kernel for what distillation mostly runs: a KL of plain logits of one format,
// with or without labels, at T = 1, 2, 4 or without labels at any T. Its exponentials stay in
// registers between the sweeps, two special-function operations per element in all.
#pragma once

#include "kernel.h"
#include "resident.cuh"

namespace kd::cuda {

struct Float32 {
  static constexpr DType kDType = DType::float32;
  static constexpr int kWidth = 4;
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
  static constexpr int kWidth = 8;
  unsigned top = kCode == DType::bfloat16 ? 0xff80ff80u : 0xfc00fc00u;
  KD_DEVICE void see(const Words<4>& w) {
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
  static KD_DEVICE Vector<8> widen(const Words<4>& w) {
    Vector<8> x;
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack(kCode, w.at[i], x.at[2 * i], x.at[2 * i + 1]);
    return x;
  }
};

using BFloat16 = Half<__nv_bfloat162, DType::bfloat16>;
using Float16 = Half<__half2, DType::float16>;

// e_s, and for forward KL e_t, for reverse KL e_s (u_t - u_s): relative to the thread's references.
template <class Format>
struct Kept {
  static constexpr int kVectors = kColumnsPerThread / Format::kWidth;
  Vector<Format::kWidth> student[kVectors], second[kVectors];
};

// A warp owns a run of columns, so that a thread's vectors are constant distances apart, and that
// most warps know at once that nothing about their columns is special.
constexpr int kColumnsPerWarp = 32 * kColumnsPerThread;

KD_DEVICE int first_column_of_warp(const Span& span) {
  return span.first + static_cast<int>(threadIdx.x / 32) * kColumnsPerWarp;
}

KD_DEVICE bool is_full_warp(const Span& span) {
  return first_column_of_warp(span) + kColumnsPerWarp <= span.past;
}

template <class Format>
KD_DEVICE int first_column_of(const Span& span) {
  return first_column_of_warp(span) + static_cast<int>(threadIdx.x % 32) * Format::kWidth;
}

template <class Format, class Step>
KD_DEVICE void each_kept_vector(const Span& span, const Step& step) {
  const int first = first_column_of<Format>(span);
#pragma unroll
  for (int k = 0; k < Kept<Format>::kVectors; ++k) step(k, first + k * 32 * Format::kWidth);
}

// `beyond(k)` instead for vectors behind the slice, which only the last warps of a block have: the
// others run without a comparison.
template <class Format, class Step, class Beyond>
KD_DEVICE void each_kept_vector(const Span& span, const Step& step, const Beyond& beyond) {
  if (is_full_warp(span)) return each_kept_vector<Format>(span, step);
  each_kept_vector<Format>(span, [&](int k, int column) {
    if (column < span.past) {
      step(k, column);
    } else {
      beyond(k);
    }
  });
}

template <class Format>
KD_DEVICE Words<4> words_at(const char* slice, const Span& span, int column) {
  return load_words<4>(slice + (column - span.first) * static_cast<int>(size_of(Format::kDType)));
}

// The largest logits first, so that a thread has one reference for all its columns.
template <class Format>
KD_DEVICE References references_of(const Task& task, const Span& span, const char* student,
                                   const char* teacher) {
  Format of_student, of_teacher;
  const auto see = [&](int, int column) {
    of_student.see(words_at<Format>(student, span, column));
    of_teacher.see(words_at<Format>(teacher, span, column));
  };
  each_kept_vector<Format>(span, see, [](int) {});
  References r;
  r.student = whole_exponent(of_student.largest(), task.student.factor);
  r.teacher = whole_exponent(of_teacher.largest(), task.teacher.factor);
  return r;
}

template <int kPower>
KD_DEVICE float label_power(float e) {
  if constexpr (kPower == 2) return e * e;
  if constexpr (kPower == 4) return (e * e) * (e * e);
  return e;
}

// sum + e^kPower
template <int kPower>
KD_DEVICE float add_label_power(float e, float sum) {
  const float root = label_power<kPower / 2>(e);
  return fmaf(root, root, sum);
}

template <class Functor, class Format, int kPower>
KD_DEVICE Sums observe_kept(const Task& task, const Span& span, const char* student,
                            const char* teacher, Kept<Format>& kept) {
  const References r = references_of<Format>(task, span, student, teacher);
  Sums sums = nothing();
  sums.student_reference = r.student;
  sums.teacher_reference = r.teacher;
  sums.label_reference = kPower > 1 ? kPower * r.student : r.student;
  const auto observe = [&](int k, int column) {
    Vector<Format::kWidth>&es = kept.student[k], &second = kept.second[k];
    const Vector<Format::kWidth> s = Format::widen(words_at<Format>(student, span, column));
    const Vector<Format::kWidth> t = Format::widen(words_at<Format>(teacher, span, column));
#pragma unroll
    for (int i = 0; i < Format::kWidth; ++i) {
      const float u_s = fmaf(s.at[i], task.student.factor, -r.student);
      const float u_t = fmaf(t.at[i], task.teacher.factor, -r.teacher);
      const float e_s = power_of_two(u_s), e_t = power_of_two(u_t);
      es.at[i] = e_s;
      sums.student += e_s;
      sums.teacher += e_t;
      if constexpr (kPower > 1) sums.label = add_label_power<kPower>(e_s, sums.label);
      if constexpr (is_forward_kl<Functor>) {
        second.at[i] = e_t;
        add_weighed(sums.gap, e_t, u_t - u_s);
      } else {
        second.at[i] = 0.0f;
        weigh(second.at[i], e_s, u_t - u_s);
        sums.gap += second.at[i];
      }
    }
  };
  each_kept_vector<Format>(span, observe, [&](int k) {
#pragma unroll
    for (int i = 0; i < Format::kWidth; ++i) {
      kept.student[k].at[i] = kept.second[k].at[i] = 0.0f;
    }
  });
  return sums;
}

// The gradient is student e_s - second second + label e_s^T, with the thread's own references
// folded into the factors.
struct KeptFactors {
  float student, second, label;

  template <class Functor, int kPower>
  static KD_DEVICE KeptFactors make(const Factors& f, const Sums& s, const Sums& mine) {
    const float student_move = mine.student_reference - s.student_reference;
    const float teacher_move = mine.teacher_reference - s.teacher_reference;
    const float student_scale = power_of_two(student_move);
    KeptFactors k;
    if constexpr (is_forward_kl<Functor>) {
      k.student = f.student * student_scale;
      k.second = f.teacher * power_of_two(teacher_move);
    } else {
      // q (log q/p - KL), in which the two log-sum-exps cancel.
      k.second = kLn2f * f.student * student_scale;
      k.student = k.second * (__fdividef(s.gap, s.student) - (teacher_move - student_move));
    }
    k.label = f.label * label_power<kPower>(student_scale);
    if constexpr (kPower == 1) k.student += k.label;
    return k;
  }
};

template <int kPower, class Format>
KD_DEVICE Vector<Format::kWidth> gradient_of(const KeptFactors& f, const Kept<Format>& kept,
                                             int k) {
  Vector<Format::kWidth> g;
#pragma unroll
  for (int i = 0; i < Format::kWidth; ++i) {
    const float e = kept.student[k].at[i];
    // Two rounded products: equal operands must cancel to exactly 0.
    g.at[i] = f.student * e - f.second * kept.second[k].at[i];
    if constexpr (kPower > 1) g.at[i] = fmaf(f.label, label_power<kPower>(e), g.at[i]);
  }
  return g;
}

template <class Functor, class Format, int kPower>
KD_DEVICE void differentiate_kept(const Task& task, int64_t row, const RowPlan& plan,
                                  const Span& span, const Sums& sums, const Sums& mine,
                                  const Kept<Format>& kept) {
  constexpr int kWidth = Format::kWidth;
  const Factors factors(task, plan, sums);
  const KeptFactors f = KeptFactors::make<Functor, kPower>(factors, sums, mine);
  const GradientRow<kWidth> gradient(task, row, span);
  const int begin = first_column_of_warp(span), end = begin + kColumnsPerWarp;
  const bool has_label = plan.label >= begin && plan.label < end;
  if (is_full_warp(span) && gradient.is_whole(begin, end) && !has_label) {
    const int64_t size = size_of(Format::kDType);
    char* to = gradient.row + first_column_of<Format>(span) * size;
    each_kept_vector<Format>(span, [&](int k, int) {
      store_vector(to + k * 32 * kWidth * size, Format::kDType, gradient_of<kPower>(f, kept, k));
    });
    return;
  }
  each_kept_vector<Format>(span, [&](int k, int column) {
    if (column >= span.past) return;
    Vector<kWidth> g = gradient_of<kPower>(f, kept, k);
    pull_label(plan.label, column, factors.label_pull, g);
    gradient.template store_as<Format::kDType>(task, column, g);
  });
}

// Sums of which only these are used, as they travel.
struct Brief {
  float student_reference, teacher_reference;
  float student, teacher, label, gap;

  static KD_DEVICE Brief of(const Sums& s) {
    return {s.student_reference, s.teacher_reference, s.student, s.teacher, s.label, s.gap};
  }

  template <int kPower>
  KD_DEVICE Sums sums() const {
    Sums s = nothing();
    s.student_reference = student_reference;
    s.teacher_reference = teacher_reference;
    s.label_reference = kPower * student_reference;
    s.student = student;
    s.teacher = teacher;
    s.label = label;
    s.gap = gap;
    return s;
  }

  template <class Functor, int kPower, class Group>
  KD_DEVICE void reduce(Group lanes) {
    const float top_student = warp_max(student_reference);
    const References top{top_student, warp_max(teacher_reference), kPower * top_student};
    Sums s = sums<kPower>();
    rebase<Functor, false>(s, top);
    *this = {top.student,
             top.teacher,
             warp_sum(s.student, lanes),
             warp_sum(s.teacher, lanes),
             kPower > 1 ? warp_sum(s.label, lanes) : 0.0f,
             warp_sum(s.gap, lanes)};
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kRegisterThreads = kResidentThreadsOfSm120;
#else
constexpr int kRegisterThreads = kResidentThreads;
#endif

template <class Functor, class Format, int kPower>
__global__ void __launch_bounds__(kRegisterThreads, 1)
    register_kernel(const __grid_constant__ Task task, const __grid_constant__ Functor functor,
                    const __grid_constant__ Stages stages) {
#if __CUDA_ARCH__ >= 900
  constexpr int kWidth = Format::kWidth, kWords = 8;
  extern __shared__ __align__(128) char memory[];
  __shared__ ResidentScratch<kWords> scratch;
  const float scale = gradient_scale(task);
  Pipeline<kWords> pipeline{task, stages, scratch, memory, cluster_rank(), scale};
  Exchange<kWords> exchange{scratch, pipeline.rank, stages.cluster};
  start(pipeline, exchange);
  const auto work = [&](int64_t row, const RowPlan& plan, const Span& span) {
    const char *student = pipeline.student_slice(), *teacher = pipeline.teacher_slice();
    const bool is_writer = pipeline.rank == 0 && threadIdx.x == 0;
    float logit = -INFINITY;
    if (is_writer) logit = label_logit(task, row, plan.label);
    Kept<Format> kept;
    Sums mine = observe_kept<Functor, Format, kPower>(task, span, student, teacher, kept);
    // Storing it waits for it: another block, which may overwrite it in memory with its gradient,
    // does so only after this block's message.
    if (is_writer) scratch.label_logit = logit;
    const Brief brief =
        exchange.reduce(Brief::of(mine), Brief::of(nothing()),
                        [](Brief& b, auto lanes) { b.reduce<Functor, kPower>(lanes); });
    const Sums sums = with_label_sum(task, brief.sums<kPower>());
    const Soundness soundness(sums);
    const bool spoiled = soundness.spoils_row(task);
    Evaluated anew{};
    const bool cancelled = seems_cancelled<Functor>(sums) && task.alpha != 0.0f && !spoiled;
    if (cancelled) {
      using Row = SharedRow<kWidth>;
      const Row of_student{student, span.first, Format::kDType};
      const Row of_teacher{teacher, span.first, Format::kDType};
      const Sweep<Functor, kWidth, Row, true> sweep{task, functor, span, of_student, of_teacher};
      anew = exchange.sum(sweep.evaluate(Totals(task, sums)));
      // The rare sweep has the registers to itself, and the kept ones are filled again.
      mine = observe_kept<Functor, Format, kPower>(task, span, student, teacher, kept);
      __syncthreads();
    }
    // All threads have passed a barrier since they read the stage: it is free.
    if (threadIdx.x == 0) pipeline.request(pipeline.stage);
    if (task.gradient && !spoiled) {
      differentiate_kept<Functor, Format, kPower>(task, row, plan, span, sums, mine, kept);
    }
    if (is_writer) {
      Totals totals(task, sums);
      totals.sums.label_logit = scratch.label_logit;
      totals.close<Functor>();
      if (cancelled) totals.take(task, anew);
      write_outcome(task, row, plan, totals);
    }
    if (!task.gradient) return;
    if (spoiled) fill_gradient<kWidth>(task, row, span, NAN);
    if (pipeline.rank == 0) clear_beyond_vocabulary(task, row);
  };
  for_each_row<kWidth>(task, pipeline, scale, work);
#endif
}

template <class Functor, class Format>
Kernel choose_register_kernel(LabelSum label_sum) {
  if (label_sum == LabelSum::square) {
    return make_kernel((const void*)register_kernel<Functor, Format, 2>, Functor{});
  }
  if (label_sum == LabelSum::fourth) {
    return make_kernel((const void*)register_kernel<Functor, Format, 4>, Functor{});
  }
  return make_kernel((const void*)register_kernel<Functor, Format, 1>, Functor{});
}

template <class Format>
Kernel choose_register_kernel(bool reverse, LabelSum label_sum) {
  return reverse ? choose_register_kernel<ReverseKl, Format>(label_sum)
                 : choose_register_kernel<ForwardKl, Format>(label_sum);
}

}  // namespace kd::cuda
