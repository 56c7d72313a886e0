#include "kernel.h"
#include "register.cuh"

namespace kd::cuda {

Kernel register_kernel_of_bfloat16_float32_forward(LabelSum label_sum, int columns) {
  return choose_register_kernel<ForwardKl, BFloat16, Float32>(label_sum, columns);
}

}  // namespace kd::cuda
