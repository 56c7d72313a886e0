#include "register.cuh"

namespace kd::cuda {

template Kernel register_kernel_of<ForwardKl, DType::float32, DType::float32>(LabelSum, int);

}  // namespace kd::cuda
