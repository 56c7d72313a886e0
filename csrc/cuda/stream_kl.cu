#include "stream.cuh"

namespace kd::cuda {

template Kernel stream_kernel_of<KernelGroup::kl>(const Divergence&, int);

}  // namespace kd::cuda
