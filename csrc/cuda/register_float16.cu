#include "kernel.h"
#include "register.cuh"

namespace kd::cuda {

Kernel register_kernel_of_float16(bool reverse, LabelSum label_sum) {
  return choose_register_kernel<Float16>(reverse, label_sum);
}

}  // namespace kd::cuda
