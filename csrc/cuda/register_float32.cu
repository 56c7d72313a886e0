#include "kernel.h"
#include "register.cuh"

namespace kd::cuda {

Kernel register_kernel_of_float32(bool reverse, LabelSum label_sum) {
  return choose_register_kernel<Float32>(reverse, label_sum);
}

}  // namespace kd::cuda
