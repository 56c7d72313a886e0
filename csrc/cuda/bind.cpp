// The CUDA entries of the Python module. Addresses are device addresses; nothing is read here.
#include "../bindings.h"
#include "launch.h"

namespace py = pybind11;

namespace kd {
namespace cuda {
namespace {

Launch make_launch(int device, Address stream, Address workspace, Address label_errors,
                   Address num_items) {
  Launch launch;
  launch.device = device;
  launch.stream = pointer<void>(stream);
  launch.workspace = pointer<void>(workspace);
  launch.label_errors = pointer<unsigned long long>(label_errors);
  launch.num_items = pointer<const float>(num_items);
  return launch;
}

void kd_loss(const Logits& student, const Logits& teacher, const Rows& rows,
             const GivenOptions& options, const Results& results, const Launch& launch) {
  const Problem problem = make_problem(student, teacher, rows, options, results);
  if (problem.is_double()) throw std::invalid_argument("float64 has no CUDA kernel");
  if (problem.vocab > (1 << 30)) throw std::invalid_argument("vocab must be in [1, 2^30]");
  py::gil_scoped_release release;
  run(problem, launch);
}

void scale_gradient(Address from, Address to, int dtype, int64_t rows, int64_t columns,
                    int64_t row_stride, Address factor, int64_t factor_stride,
                    const Launch& launch) {
  py::gil_scoped_release release;
  scale(pointer<void>(from), pointer<void>(to), static_cast<DType>(dtype), rows, columns,
        row_stride, pointer<const float>(factor), factor_stride, launch);
}

}  // namespace
}  // namespace cuda

void bind_cuda(py::module_& m) {
  py::class_<cuda::Launch>(m, "Launch", py::module_local())
      .def(py::init(&cuda::make_launch), py::arg("device"), py::arg("stream"), py::arg("workspace"),
           py::arg("label_errors"), py::arg("num_items"));
  m.def("cuda_kd_loss", &cuda::kd_loss, py::arg("student"), py::arg("teacher"), py::arg("rows"),
        py::arg("options"), py::arg("results"), py::arg("launch"),
        "Enqueues the loss on a stream.");
  m.def("cuda_scale_gradient", &cuda::scale_gradient, py::arg("source"), py::arg("target"),
        py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"),
        py::arg("factor"), py::arg("factor_stride"), py::arg("launch"));
  m.def("cuda_workspace_bytes", &cuda::workspace_bytes, py::arg("rows"));
  m.def("cuda_why_not", &cuda::why_not, py::arg("device"));
  m.def("cuda_description", &cuda::description);
}

}  // namespace kd
