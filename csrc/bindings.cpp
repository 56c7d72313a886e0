// The Python module: its parts, and what it says of itself.
#include "bindings.h"

#include "cpu/kernel.h"
#include "cuda/policy.h"

namespace py = pybind11;

namespace kd {
namespace {

std::vector<std::string> runnable() {
  std::vector<std::string> names;
  const InstructionSets all = instruction_sets();
  for (int i = 0; i < all.count; ++i) {
    if (all.first[i].runs_here) names.push_back(all.first[i].name);
  }
  return names;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace kd

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of kdkernels. Addresses are integers; nothing here knows torch.";
  kd::bind_problem(m);
  kd::bind_mathematics(m);
#if defined(KDKERNELS_CUDA)
  kd::bind_cuda(m);
#endif
  m.def(
      "cpu_isa", [] { return kd::instruction_set().name; },
      "The instruction set in force; KDKERNELS_CPU_ISA forces one.");
  m.def("cpu_isas", &kd::runnable, "The instruction sets that can run here, slowest first.");
  m.def("build_info", &kd::build_info);
  m.def(
      "cuda_most_columns", &kd::cuda::most_register_columns, py::arg("bytes"),
      "The longest row that the CUDA kernels hold in registers, by the bytes of the wider logits; "
      "known in every build.");
  m.def(
      "cuda_entries_limits",
      [] { return py::make_tuple(kd::cuda::kEntriesBytes, kd::cuda::kSlotBytes); },
      "What the CUDA kernel of sparse teachers has of shared memory for a bit of every column and "
      "for a row's slots, and the bytes of a slot; known in every build.");
}
