#include "kernel.h"
#include "stream.cuh"

namespace kd::cuda {

Kernel stream_kernel_of(const AlphaBeta& functor, int) {
  return make_kernel((const void*)stream_kernel<AlphaBeta, 4>, functor);
}

Kernel stream_kernel_of(const AlphaOnly& functor, int) {
  return make_kernel((const void*)stream_kernel<AlphaOnly, 4>, functor);
}

Kernel stream_kernel_of(const BetaOnly& functor, int) {
  return make_kernel((const void*)stream_kernel<BetaOnly, 4>, functor);
}

Kernel stream_kernel_of(const AlphaOpposite& functor, int) {
  return make_kernel((const void*)stream_kernel<AlphaOpposite, 4>, functor);
}

Kernel stream_kernel_of(const LogRatio& functor, int) {
  return make_kernel((const void*)stream_kernel<LogRatio, 4>, functor);
}

}  // namespace kd::cuda
