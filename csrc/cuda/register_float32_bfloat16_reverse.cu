#include "kernel.h"
#include "register.cuh"

namespace kd::cuda {

Kernel register_kernel_of_float32_bfloat16_reverse(LabelSum label_sum, int columns) {
  return choose_register_kernel<ReverseKl, Float32, BFloat16>(label_sum, columns);
}

}  // namespace kd::cuda
