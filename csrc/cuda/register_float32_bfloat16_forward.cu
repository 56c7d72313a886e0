#include "kernel.h"
#include "register.cuh"

namespace kd::cuda {

Kernel register_kernel_of_float32_bfloat16_forward(LabelSum label_sum, int columns) {
  return choose_register_kernel<ForwardKl, Float32, BFloat16>(label_sum, columns);
}

}  // namespace kd::cuda
