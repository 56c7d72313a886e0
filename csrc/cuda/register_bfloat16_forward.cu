#include "register.cuh"

namespace kd::cuda {

template Kernel register_kernel_of<ForwardKl, DType::bfloat16, DType::bfloat16>(LabelSum, int);

}  // namespace kd::cuda
