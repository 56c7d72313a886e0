#include "entries.cuh"

namespace kd::cuda {

template Kernel entries_kernel_of<KernelGroup::alpha_beta>(const Divergence&, int);

}  // namespace kd::cuda
