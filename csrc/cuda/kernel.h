// What the host side offers to the bindings, and the kernels to the launcher.
#pragma once

#include <cuda_runtime_api.h>

#include "task.h"

namespace kd::cuda {

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

// By divergence and width of a vector (4, or 8 where both formats have two bytes).
Kernel stream_kernel_of(const ForwardKl&, int width);
Kernel stream_kernel_of(const ReverseKl&, int width);
Kernel stream_kernel_of(const Jsd&, int width);
Kernel stream_kernel_of(const Tvd&, int width);
Kernel stream_kernel_of(const SkewForwardKl&, int width);
Kernel stream_kernel_of(const SkewReverseKl&, int width);
Kernel stream_kernel_of(const AlphaBeta&, int width);
Kernel stream_kernel_of(const AlphaOnly&, int width);
Kernel stream_kernel_of(const BetaOnly&, int width);
Kernel stream_kernel_of(const AlphaOpposite&, int width);
Kernel stream_kernel_of(const LogRatio&, int width);

}  // namespace kd::cuda
