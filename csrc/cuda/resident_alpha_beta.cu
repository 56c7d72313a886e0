#include "kernel.h"
#include "resident.cuh"

namespace kd::cuda {

Kernel resident_kernel_of(const AlphaBeta& functor) {
  return make_kernel((const void*)resident_kernel<AlphaBeta>, functor);
}

Kernel resident_kernel_of(const AlphaOnly& functor) {
  return make_kernel((const void*)resident_kernel<AlphaOnly>, functor);
}

Kernel resident_kernel_of(const BetaOnly& functor) {
  return make_kernel((const void*)resident_kernel<BetaOnly>, functor);
}

Kernel resident_kernel_of(const AlphaOpposite& functor) {
  return make_kernel((const void*)resident_kernel<AlphaOpposite>, functor);
}

Kernel resident_kernel_of(const LogRatio& functor) {
  return make_kernel((const void*)resident_kernel<LogRatio>, functor);
}

}  // namespace kd::cuda
