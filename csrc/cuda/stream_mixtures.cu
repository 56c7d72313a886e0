#include "stream.cuh"

namespace kd::cuda {

template Kernel stream_kernel_of<KernelGroup::mixtures>(const Divergence&, int);

}  // namespace kd::cuda
