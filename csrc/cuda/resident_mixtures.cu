#include "kernel.h"
#include "resident.cuh"

namespace kd::cuda {

Kernel resident_kernel_of(const Jsd& functor) {
  return make_kernel((const void*)resident_kernel<Jsd>, functor);
}

Kernel resident_kernel_of(const EvenJsd& functor) {
  return make_kernel((const void*)resident_kernel<EvenJsd>, functor);
}

Kernel resident_kernel_of(const Tvd& functor) {
  return make_kernel((const void*)resident_kernel<Tvd>, functor);
}

Kernel resident_kernel_of(const SkewForwardKl& functor) {
  return make_kernel((const void*)resident_kernel<SkewForwardKl>, functor);
}

Kernel resident_kernel_of(const SkewReverseKl& functor) {
  return make_kernel((const void*)resident_kernel<SkewReverseKl>, functor);
}

Kernel resident_kernel_of(const Nothing& functor) {
  return make_kernel((const void*)resident_kernel<Nothing>, functor);
}

}  // namespace kd::cuda
