// The Python module: a Problem from raw addresses, and the mathematics in double for tests.
#include "bindings.h"

#include <stdexcept>

#include "cpu/kernel.h"

namespace py = pybind11;

namespace kd {

Divergence resolve(const std::string& name, const std::vector<double>& parameters) {
  for (const DivergenceName& known : kDivergences) {
    if (name != known.name) continue;
    if (static_cast<int>(parameters.size()) != known.parameters) {
      throw std::invalid_argument("divergence '" + name + "' takes " +
                                  std::to_string(known.parameters) + " parameters, got " +
                                  std::to_string(parameters.size()));
    }
    Divergence divergence{known.kind};
    if (known.parameters > 0) divergence.first = parameters[0];
    if (known.parameters > 1) divergence.second = parameters[1];
    const double beta = divergence.first;
    const bool open = known.kind == DivergenceKind::jsd;
    const bool mixes = open || known.kind == DivergenceKind::skew_forward_kl ||
                       known.kind == DivergenceKind::skew_reverse_kl;
    if (mixes && !(beta < 1.0 && (open ? beta > 0.0 : beta >= 0.0))) {
      throw std::invalid_argument("beta of '" + name + "' must be in " + (open ? "(" : "[") +
                                  "0, 1), got " + std::to_string(beta));
    }
    return divergence;
  }
  throw std::invalid_argument("unknown divergence '" + name + "'");
}

Logits make_logits(Address data, int dtype, const Strides& strides, double scale, double softcap) {
  if (dtype < 0 || dtype > 3) {
    throw std::invalid_argument("dtype code must be 0, 1, 2 or 3, got " + std::to_string(dtype));
  }
  return {reinterpret_cast<const char*>(data),
          static_cast<DType>(dtype),
          std::get<0>(strides),
          std::get<1>(strides),
          std::get<2>(strides),
          scale,
          softcap};
}

void check_gradient(Address gradient, int64_t vocab, int64_t columns, int64_t stride) {
  if (gradient && !(vocab <= columns && columns <= stride)) {
    throw std::invalid_argument(
        "gradient_columns must be at least vocab, and gradient_stride at least gradient_columns");
  }
}

namespace {

int64_t kd_loss(Address student, int student_dtype, const Strides& student_strides, Address teacher,
                int teacher_dtype, const Strides& teacher_strides, int64_t outer, int64_t inner,
                int64_t vocab, Address labels, int64_t ignore_index, Address row_weights,
                Address grad_output, int64_t grad_output_stride, double denominator,
                double temperature, bool temperature_squared, double alpha, double label_smoothing,
                double z_loss, double student_scale, double teacher_scale, double student_softcap,
                double teacher_softcap, const std::string& divergence,
                const std::vector<double>& parameters, Address loss, bool reduce,
                Address statistics, bool extras, Address gradient, int64_t gradient_columns,
                int64_t gradient_stride, int threads) {
  Problem p{};
  p.student = make_logits(student, student_dtype, student_strides, student_scale, student_softcap);
  p.teacher = make_logits(teacher, teacher_dtype, teacher_strides, teacher_scale, teacher_softcap);
  if ((p.student.dtype == DType::float64) != (p.teacher.dtype == DType::float64)) {
    throw std::invalid_argument("float64 needs both tensors to be float64");
  }
  if (outer < 0 || inner < 0 || vocab < 1) {
    throw std::invalid_argument("rows must not be negative, and vocab at least 1");
  }
  check_gradient(gradient, vocab, gradient_columns, gradient_stride);
  p.outer = outer;
  p.inner = inner;
  p.vocab = vocab;
  p.labels = reinterpret_cast<const int64_t*>(labels);
  p.ignore_index = ignore_index;
  p.row_weights = reinterpret_cast<const float*>(row_weights);
  p.grad_output = reinterpret_cast<const void*>(grad_output);
  p.grad_output_stride = grad_output_stride;
  p.denominator = denominator;
  p.temperature = temperature;
  p.temperature_squared = temperature_squared;
  p.alpha = alpha;
  p.label_smoothing = label_smoothing;
  p.z_loss = z_loss;
  p.divergence = resolve(divergence, parameters);
  p.loss = reinterpret_cast<void*>(loss);
  p.reduce = reduce;
  p.statistics = reinterpret_cast<void*>(statistics);
  p.extras = extras;
  p.gradient = reinterpret_cast<void*>(gradient);
  p.gradient_columns = gradient_columns;
  p.gradient_stride = gradient_stride;
  p.threads = threads;
  py::gil_scoped_release release;
  return run_on_cpu(p);
}

// The textbook summand and its slope.
std::pair<double, double> divergence_at(const std::string& name,
                                        const std::vector<double>& parameters, double log_p,
                                        double log_q) {
  return visit(resolve(name, parameters), [&](auto functor) {
    const Entry<double> e = make_entry(functor, log_p, log_q);
    const Term<double> centred = functor(e), unit = functor.unit(), offset = functor.offset(e);
    return std::make_pair(centred.value * unit.value - offset.value,
                          centred.slope * unit.slope - offset.slope);
  });
}

std::vector<std::string> runnable() {
  std::vector<std::string> names;
  const InstructionSets all = instruction_sets();
  for (int i = 0; i < all.count; ++i) {
    if (all.first[i].runs_here) names.push_back(all.first[i].name);
  }
  return names;
}

std::vector<std::string> divergence_names() {
  std::vector<std::string> names;
  for (const DivergenceName& known : kDivergences) names.push_back(known.name);
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

void bind_kd_loss(py::module_& m) {
  m.def("kd_loss", &kd_loss, py::arg("student"), py::arg("student_dtype"),
        py::arg("student_strides"), py::arg("teacher"), py::arg("teacher_dtype"),
        py::arg("teacher_strides"), py::arg("outer"), py::arg("inner"), py::arg("vocab"),
        py::arg("labels"), py::arg("ignore_index"), py::arg("row_weights"), py::arg("grad_output"),
        py::arg("grad_output_stride"), py::arg("denominator"), py::arg("temperature"),
        py::arg("temperature_squared"), py::arg("alpha"), py::arg("label_smoothing"),
        py::arg("z_loss"), py::arg("student_scale"), py::arg("teacher_scale"),
        py::arg("student_softcap"), py::arg("teacher_softcap"), py::arg("divergence"),
        py::arg("parameters"), py::arg("loss"), py::arg("reduce"), py::arg("statistics"),
        py::arg("extras"), py::arg("gradient"), py::arg("gradient_columns"),
        py::arg("gradient_stride"), py::arg("threads"),
        "Row losses, statistics and the student's gradient from raw addresses. Returns -1, or the "
        "first row whose label is out of range; then nothing was computed.");
}

}  // namespace
}  // namespace kd

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of kdkernels. Addresses are integers; nothing here knows torch.";
  kd::bind_kd_loss(m);
#if defined(KDKERNELS_CUDA)
  kd::bind_cuda(m);
#endif
  m.def("divergence", &kd::divergence_at, py::arg("name"), py::arg("parameters"), py::arg("log_p"),
        py::arg("log_q"), "(value, slope) of one vocabulary entry, in double.");
  m.def("divergence_names", &kd::divergence_names);
  m.def(
      "cpu_isa", [] { return kd::instruction_set().name; },
      "The instruction set in force; KDKERNELS_CPU_ISA forces one.");
  m.def("cpu_isas", &kd::runnable, "The instruction sets that can run here, slowest first.");
  m.def("build_info", &kd::build_info);
  // Local: the simulated tests load a second build of this module beside the first.
  py::class_<kd::LogSumExp>(m, "LogSumExp", py::module_local())
      .def(py::init<>())
      .def(py::init([](double max, double sum) { return kd::LogSumExp{max, sum}; }), py::arg("max"),
           py::arg("sum"))
      .def("observe", &kd::LogSumExp::observe, py::arg("z"))
      .def("combine", &kd::LogSumExp::combine, py::arg("other"))
      .def("value", &kd::LogSumExp::value)
      .def_readonly("max", &kd::LogSumExp::max)
      .def_readonly("sum", &kd::LogSumExp::sum);
}
