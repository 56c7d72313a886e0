#include "entries.cuh"

namespace kd::cuda {

template Kernel entries_kernel_of<KernelGroup::alpha_beta>(const Divergence&, DType);

}  // namespace kd::cuda
