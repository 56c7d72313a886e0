// What the parts of the Python module share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "problem.h"

namespace kd {

using Address = uintptr_t;

template <class To>
To* pointer(Address address) {
  return reinterpret_cast<To*>(address);
}

// Throws std::invalid_argument for a name or parameters that there are not.
Divergence resolve(const std::string& name, const std::vector<double>& parameters);

// kdkernels.problem.Options: a Problem's, and what belongs to its logits.
struct GivenOptions {
  Options numbers;
  Transform student, teacher;
};

// Throws std::invalid_argument for what contradicts itself.
Problem make_problem(const Logits& student, const Logits& teacher, const Rows& rows,
                     const GivenOptions& options, const Results& results);

// Each adds a part of the module. The CUDA entries are only in builds that have the kernels.
void bind_problem(pybind11::module_& m);
void bind_mathematics(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace kd
