#include "kernel.h"
#include "stream.cuh"

namespace kd::cuda {

Kernel stream_kernel_of(const AlphaBeta<false>& functor, int) {
  return make_kernel((const void*)stream_kernel<AlphaBeta<false>, 4>, functor);
}

Kernel stream_kernel_of(const AlphaOnly<false>& functor, int) {
  return make_kernel((const void*)stream_kernel<AlphaOnly<false>, 4>, functor);
}

Kernel stream_kernel_of(const BetaOnly<false>& functor, int) {
  return make_kernel((const void*)stream_kernel<BetaOnly<false>, 4>, functor);
}

Kernel stream_kernel_of(const AlphaOpposite& functor, int) {
  return make_kernel((const void*)stream_kernel<AlphaOpposite, 4>, functor);
}

Kernel stream_kernel_of(const LogRatio& functor, int) {
  return make_kernel((const void*)stream_kernel<LogRatio, 4>, functor);
}

}  // namespace kd::cuda
