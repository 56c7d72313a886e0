#include "entries.cuh"

namespace kd::cuda {

template Kernel entries_kernel_of<KernelGroup::mixtures>(const Divergence&, DType);

}  // namespace kd::cuda
