#include "register.cuh"

namespace kd::cuda {

template Kernel register_kernel_of<ReverseKl, DType::float16, DType::float16>(LabelSum, int);

}  // namespace kd::cuda
