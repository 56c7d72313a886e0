#include "stream.cuh"

namespace kd::cuda {

template Kernel stream_kernel_of<KernelGroup::alpha_beta>(const Divergence&, int);

}  // namespace kd::cuda
