// What a sweep over a row of logits leaves behind.
#pragma once

#include <float.h>

#include "portable.h"

namespace kd {

// log(sum(exp(z))) as a commutative monoid: lanes, blocks, threads and shards of a vocabulary all
// combine alike. The empty state has the lowest finite maximum, not -inf, so that combining two
// empty states needs no branch and gives no NaN.
struct LogSumExp {
  double max = -DBL_MAX;
  double sum = 0.0;

  KD_INLINE void observe(double z) {
    // -inf adds nothing, and must not become the maximum: -inf - -inf is NaN.
    if (z == -INFINITY) return;
    combine({z, 1.0});
  }

  KD_INLINE void combine(const LogSumExp& other) {
    // Not `maximum`: a NaN on either side has to stay.
    const double top = max >= other.max || max != max ? max : other.max;
    sum = sum * exp(max - top) + other.sum * exp(other.max - top);
    max = top;
  }

  KD_INLINE double value() const { return sum == 0.0 ? -INFINITY : max + log(sum); }
};

// The same sum as the float kernels keep it: relative to 2^reference, an integer, so that moving
// the reference multiplies by an exact power of two. `moment` is a weighted sum under the same
// scale.
struct PowerSum {
  int reference = 0;
  double sum = 0.0;
  double moment = 0.0;

  KD_INLINE void combine(const PowerSum& other) {
    // An empty side has no reference to measure the other's by: 0 * 2^9000 would be NaN.
    if (other.sum == 0.0) return;
    if (sum == 0.0) {
      *this = other;
      return;
    }
    if (other.reference == reference) {  // the rule: the blocks of a row
      sum += other.sum;
      moment += other.moment;
      return;
    }
    const int top = other.reference > reference ? other.reference : reference;
    const double mine = ldexp(1.0, reference - top), theirs = ldexp(1.0, other.reference - top);
    sum = sum * mine + other.sum * theirs;
    moment = moment * mine + other.moment * theirs;
    reference = top;
  }

  // log2 of the sum
  KD_INLINE double log2_value() const { return reference + log2(sum); }
};

// The results of one row, in double and in nats.
struct RowStatistics {
  double kd = 0.0;  // with T^2, without alpha
  double ce = 0.0;
  double z = 0.0;
  double student_lse = 0.0, teacher_lse = 0.0;  // at T
  double label_lse = 0.0;                       // student, T = 1
  double student_entropy = 0.0, teacher_entropy = 0.0;
  bool top_agrees = false, label_is_top = false;
  bool has_bad_entries = false;  // the sparse teacher's are none of a teacher's
};

}  // namespace kd
