#include "kernel.h"
#include "resident.cuh"

namespace kd::cuda {

Kernel resident_kernel_of(const AlphaBeta<false>& functor) {
  return make_kernel((const void*)resident_kernel<AlphaBeta<false>>, functor);
}

Kernel resident_kernel_of(const AlphaOnly<false>& functor) {
  return make_kernel((const void*)resident_kernel<AlphaOnly<false>>, functor);
}

Kernel resident_kernel_of(const BetaOnly<false>& functor) {
  return make_kernel((const void*)resident_kernel<BetaOnly<false>>, functor);
}

Kernel resident_kernel_of(const AlphaOpposite& functor) {
  return make_kernel((const void*)resident_kernel<AlphaOpposite>, functor);
}

Kernel resident_kernel_of(const LogRatio& functor) {
  return make_kernel((const void*)resident_kernel<LogRatio>, functor);
}

}  // namespace kd::cuda
