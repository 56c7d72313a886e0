#include "kernel.h"
#include "register.cuh"

namespace kd::cuda {

Kernel register_kernel_of_bfloat16(bool reverse, LabelSum label_sum) {
  return choose_register_kernel<BFloat16>(reverse, label_sum);
}

}  // namespace kd::cuda
