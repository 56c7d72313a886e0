#include "kernel.h"
#include "resident.cuh"

namespace kd::cuda {

Kernel resident_kernel_of(const ForwardKl& functor) {
  return make_kernel((const void*)resident_kernel<ForwardKl>, functor);
}

Kernel resident_kernel_of(const ReverseKl& functor) {
  return make_kernel((const void*)resident_kernel<ReverseKl>, functor);
}

}  // namespace kd::cuda
