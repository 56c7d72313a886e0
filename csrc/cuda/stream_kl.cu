#include "kernel.h"
#include "stream.cuh"

namespace kd::cuda {

Kernel stream_kernel_of(const ForwardKl& functor, int width) {
  return width == 8 ? make_kernel((const void*)stream_kernel<ForwardKl, 8>, functor)
                    : make_kernel((const void*)stream_kernel<ForwardKl, 4>, functor);
}

Kernel stream_kernel_of(const ReverseKl& functor, int width) {
  return width == 8 ? make_kernel((const void*)stream_kernel<ReverseKl, 8>, functor)
                    : make_kernel((const void*)stream_kernel<ReverseKl, 4>, functor);
}

}  // namespace kd::cuda
