// What the host side offers to the bindings, and the kernels to the launcher.
#pragma once

#include <cuda_runtime_api.h>

#include "policy.h"
#include "task.h"

namespace kd::cuda {

// How the dynamic shared memory of the row-resident kernels is used.
struct Stages {
  int count;
  int teacher_offset, bytes;  // of a stage
  int cluster, clusters;      // blocks of a cluster; clusters of the grid
  int each;                   // units of 8 columns that a block has at most
  // Of type int, which the kernels test without a register.
  int congruent;  // whether vectors of every student's row are aligned in the teacher's, too
  int aligned;    // and whether every row starts and ends at a multiple of 16 bytes
};

// A kernel's address, and its functor as the bytes of the argument.
struct Kernel {
  const void* address = nullptr;
  alignas(8) unsigned char functor[16] = {};
};

template <class Functor>
Kernel make_kernel(const void* address, const Functor& functor) {
  static_assert(sizeof(Functor) <= sizeof(Kernel::functor));
  Kernel kernel;
  kernel.address = address;
  memcpy(kernel.functor, &functor, sizeof(functor));
  return kernel;
}

// One kernel serves exponents of either sign: the functor that expects positive ones saves a few
// instructions of many.
template <class Functor>
Functor general(const Functor& functor) {
  return functor;
}
inline AlphaBeta<false> general(const AlphaBeta<true>& f) { return {f.a, f.b}; }
inline AlphaOnly<false> general(const AlphaOnly<true>& f) { return AlphaOnly<false>(f.a); }
inline BetaOnly<false> general(const BetaOnly<true>& f) { return BetaOnly<false>(f.b); }

// Defined in resident.cuh, stream.cuh and register.cuh, and instantiated in sources of their own,
// which compile side by side.

// By divergence of this group, and for stream kernels the width of a vector (4, or 8 where both
// formats have two bytes).
template <KernelGroup kGroup>
Kernel stream_kernel_of(const Divergence& divergence, int width);
template <KernelGroup kGroup>
Kernel resident_kernel_of(const Divergence& divergence);

// Of a divergence with a closed form between plain logits, for `columns` per thread.
template <class Functor, DType kStudent, DType kTeacher>
Kernel register_kernel_of(LabelSum label_sum, int columns);

constexpr bool has_register_kernel(DType student, DType teacher) {
  return student == teacher || (student != DType::float16 && teacher != DType::float16);
}

// Where each thread may have kWideColumnsPerThread. With float32 only one stage of such a block's
// slice would fit.
constexpr bool has_wide_form(DType student, DType teacher) {
  return student == teacher && student != DType::float32;
}

// Where there are kernels for the cube and the fourth power, too; elsewhere those count as
// separate.
constexpr bool has_every_power(DType student, DType teacher, int columns) {
  return student == teacher && columns == kColumnsPerThread;
}

}  // namespace kd::cuda
