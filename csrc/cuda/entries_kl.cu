#include "entries.cuh"

namespace kd::cuda {

template Kernel entries_kernel_of<KernelGroup::kl>(const Divergence&, DType);

}  // namespace kd::cuda
