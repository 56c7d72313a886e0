#include "kernel.h"
#include "stream.cuh"

namespace kd::cuda {

// These spend their time on arithmetic: one width serves every pair of formats.
Kernel stream_kernel_of(const Jsd& functor, int) {
  return make_kernel((const void*)stream_kernel<Jsd, 4>, functor);
}

Kernel stream_kernel_of(const EvenJsd& functor, int) {
  return make_kernel((const void*)stream_kernel<EvenJsd, 4>, functor);
}

Kernel stream_kernel_of(const Tvd& functor, int) {
  return make_kernel((const void*)stream_kernel<Tvd, 4>, functor);
}

Kernel stream_kernel_of(const SkewForwardKl& functor, int) {
  return make_kernel((const void*)stream_kernel<SkewForwardKl, 4>, functor);
}

Kernel stream_kernel_of(const SkewReverseKl& functor, int) {
  return make_kernel((const void*)stream_kernel<SkewReverseKl, 4>, functor);
}

Kernel stream_kernel_of(const Nothing& functor, int) {
  return make_kernel((const void*)stream_kernel<Nothing, 4>, functor);
}

}  // namespace kd::cuda
