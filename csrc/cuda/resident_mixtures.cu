#include "resident.cuh"

namespace kd::cuda {

template Kernel resident_kernel_of<KernelGroup::mixtures>(const Divergence&);

}  // namespace kd::cuda
