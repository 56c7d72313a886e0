#include "resident.cuh"

namespace kd::cuda {

template Kernel resident_kernel_of<KernelGroup::alpha_beta>(const Divergence&);

}  // namespace kd::cuda
