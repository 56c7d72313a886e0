// What the host side offers to the bindings.
#pragma once

#include <string>
#include <vector>

#include "../problem.h"

namespace kd::cuda {

// Where a Problem's pointers are, and what its caller lends for the call.
struct Launch {
  int device = 0;
  void* stream = nullptr;
  void* workspace = nullptr;  // at least workspace_bytes(rows) bytes, aligned to 16
  unsigned long long* label_errors = nullptr;  // see Task
  const float* num_items = nullptr;            // on the device: the denominator; null = Problem's
};

// Everything here throws std::runtime_error naming the call and the device if CUDA fails.
void run(const Problem& problem, const Launch& launch);

// A stored gradient times one factor or one per row, on the device.
void scale(const void* from, void* to, DType dtype, int64_t rows, int64_t columns,
           int64_t row_stride, const float* factor, int64_t factor_stride, const Launch& launch);

int64_t workspace_bytes(int64_t rows);

// Why no kernel of this build can run on this device; empty: they can.
std::string why_not(int device);

// The versions and architectures of this build, for people.
std::string description();

}  // namespace kd::cuda
