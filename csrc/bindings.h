// What the parts of the Python module share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "problem.h"

namespace kd {

using Strides = std::tuple<int64_t, int64_t, int64_t>;
using Address = uintptr_t;

// Throws std::invalid_argument for a name, parameter or dtype that there is not.
Divergence resolve(const std::string& name, const std::vector<double>& parameters);
Logits make_logits(Address data, int dtype, const Strides& strides, double scale, double softcap);
// Throws std::invalid_argument where rows of a gradient would overlap or not hold the vocabulary.
void check_gradient(Address gradient, int64_t vocab, int64_t columns, int64_t stride);

// Adds the CUDA entries; only in builds that have the kernels.
void bind_cuda(pybind11::module_& m);

}  // namespace kd
