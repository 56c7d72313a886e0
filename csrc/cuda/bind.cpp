// The CUDA entries of the Python module. Addresses are device addresses; nothing is read here.
#include "../bindings.h"
#include "launch.h"

namespace py = pybind11;

namespace kd {
namespace {

// (address, dtype code, strides, scale, softcap)
using LogitsArguments = std::tuple<Address, int, Strides, double, double>;
// (outer, inner, vocab, gradient columns, gradient stride)
using ShapeArguments = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
// (labels, ignore_index, row weights, grad_output, its stride, num_items)
using RowArguments = std::tuple<Address, int64_t, Address, Address, int64_t, Address>;
// (temperature, squared, alpha, label_smoothing, z_loss, denominator)
using NumberArguments = std::tuple<double, bool, double, double, double, double>;
// (loss, reduce, statistics, extras, gradient)
using ResultArguments = std::tuple<Address, bool, Address, bool, Address>;
// (device, stream, workspace, label errors)
using LaunchArguments = std::tuple<int, Address, Address, Address>;

template <class To>
To* pointer(Address address) {
  return reinterpret_cast<To*>(address);
}

Logits narrow_logits(const LogitsArguments& given) {
  const auto& [data, dtype, strides, scale, softcap] = given;
  const Logits logits = make_logits(data, dtype, strides, scale, softcap);
  if (logits.dtype == DType::float64) throw std::invalid_argument("float64 has no CUDA kernel");
  return logits;
}

void set_rows(Problem& p, const RowArguments& rows) {
  const auto& [labels, ignore_index, weights, grad_output, stride, num_items] = rows;
  p.labels = pointer<const int64_t>(labels);
  p.ignore_index = ignore_index;
  p.row_weights = pointer<const float>(weights);
  p.grad_output = pointer<const float>(grad_output);
  p.grad_output_stride = stride;
}

void set_numbers(Problem& p, const NumberArguments& numbers) {
  std::tie(p.temperature, p.temperature_squared, p.alpha, p.label_smoothing, p.z_loss,
           p.denominator) = numbers;
}

void set_results(Problem& p, const ResultArguments& results) {
  const auto& [loss, reduce, statistics, extras, gradient] = results;
  p.loss = pointer<void>(loss);
  p.reduce = reduce;
  p.statistics = pointer<void>(statistics);
  p.extras = extras;
  p.gradient = pointer<void>(gradient);
}

cuda::Launch make_launch(const LaunchArguments& given, Address num_items) {
  const auto& [device, stream, workspace, label_errors] = given;
  cuda::Launch launch;
  launch.device = device;
  launch.stream = pointer<void>(stream);
  launch.workspace = pointer<void>(workspace);
  launch.label_errors = pointer<unsigned long long>(label_errors);
  launch.num_items = pointer<const float>(num_items);
  return launch;
}

void kd_loss(const LogitsArguments& student, const LogitsArguments& teacher,
             const ShapeArguments& shape, const RowArguments& rows, const NumberArguments& numbers,
             const std::pair<std::string, std::vector<double>>& divergence,
             const ResultArguments& results, const LaunchArguments& launch) {
  Problem p{};
  p.student = narrow_logits(student);
  p.teacher = narrow_logits(teacher);
  std::tie(p.outer, p.inner, p.vocab, p.gradient_columns, p.gradient_stride) = shape;
  if (p.outer < 0 || p.inner < 0 || p.vocab < 1 || p.vocab > (1 << 30)) {
    throw std::invalid_argument("rows must not be negative, and vocab in [1, 2^30]");
  }
  set_rows(p, rows);
  set_numbers(p, numbers);
  p.divergence = resolve(divergence.first, divergence.second);
  set_results(p, results);
  check_gradient(std::get<4>(results), p.vocab, p.gradient_columns, p.gradient_stride);
  const cuda::Launch where = make_launch(launch, std::get<5>(rows));
  py::gil_scoped_release release;
  cuda::run(p, where);
}

void scale_gradient(Address from, Address to, int dtype, int64_t rows, int64_t columns,
                    int64_t row_stride, Address factor, int64_t factor_stride,
                    const LaunchArguments& launch) {
  const cuda::Launch where = make_launch(launch, 0);
  py::gil_scoped_release release;
  cuda::scale(pointer<void>(from), pointer<void>(to), static_cast<DType>(dtype), rows, columns,
              row_stride, pointer<const float>(factor), factor_stride, where);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_kd_loss", &kd_loss, py::arg("student"), py::arg("teacher"), py::arg("shape"),
        py::arg("rows"), py::arg("numbers"), py::arg("divergence"), py::arg("results"),
        py::arg("launch"), "Enqueues the loss on a stream; see csrc/cuda/bind.cpp for the tuples.");
  m.def("cuda_scale_gradient", &scale_gradient, py::arg("source"), py::arg("target"),
        py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"),
        py::arg("factor"), py::arg("factor_stride"), py::arg("launch"));
  m.def("cuda_workspace_bytes", &cuda::workspace_bytes, py::arg("rows"));
  m.def("cuda_why_not", &cuda::why_not, py::arg("device"));
  m.def("cuda_description", &cuda::description);
}

}  // namespace kd
