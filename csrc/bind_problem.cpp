// A Problem from raw addresses, checked, for the kernels of the CPU and of CUDA alike.
#include <stdexcept>

#include "bindings.h"
#include "cpu/kernel.h"

namespace py = pybind11;

namespace kd {

Divergence resolve(const std::string& name, const std::vector<double>& parameters) {
  for (const DivergenceName& known : kDivergences) {
    if (name != known.name) continue;
    const ParameterRule& rule = known.rule;
    if (static_cast<int>(parameters.size()) != rule.count) {
      throw std::invalid_argument("divergence '" + name + "' takes " + std::to_string(rule.count) +
                                  " parameters, got " + std::to_string(parameters.size()));
    }
    Divergence divergence{known.kind};
    if (rule.count > 0) divergence.first = parameters[0];
    if (rule.count > 1) divergence.second = parameters[1];
    const double beta = divergence.first;
    if (rule.is_share && !(beta < 1.0 && (rule.may_be_zero ? beta >= 0.0 : beta > 0.0))) {
      throw std::invalid_argument("beta of '" + name + "' must be in " +
                                  (rule.may_be_zero ? "[" : "(") + "0, 1), got " +
                                  std::to_string(beta));
    }
    return simplest(divergence);
  }
  throw std::invalid_argument("unknown divergence '" + name + "'");
}

Problem make_problem(const Logits& student, const Logits& teacher, const Rows& rows,
                     const GivenOptions& options, const Results& results) {
  if ((student.dtype == DType::float64) != (teacher.dtype == DType::float64)) {
    throw std::invalid_argument("float64 needs both tensors to be float64");
  }
  const int64_t columns = results.gradient_columns;
  if (results.gradient && !(rows.vocab <= columns && columns <= results.gradient_stride)) {
    throw std::invalid_argument(
        "gradient_columns must be at least vocab, and gradient_stride at least gradient_columns");
  }
  Problem problem{options.numbers, rows, results, student, teacher, 1};
  static_cast<Transform&>(problem.student) = options.student;
  static_cast<Transform&>(problem.teacher) = options.teacher;
  return problem;
}

namespace {

GivenOptions make_options(const py::object& given) {
  const auto number = [&](const char* name) { return given.attr(name).cast<double>(); };
  GivenOptions options{};
  options.numbers.temperature = number("temperature");
  options.numbers.temperature_squared = given.attr("temperature_squared").cast<bool>();
  options.numbers.alpha = number("alpha");
  options.numbers.label_smoothing = number("label_smoothing");
  options.numbers.z_loss = number("z_loss");
  options.numbers.divergence = resolve(given.attr("divergence").cast<std::string>(),
                                       given.attr("parameters").cast<std::vector<double>>());
  options.numbers.ignore_index = given.attr("ignore_index").cast<int64_t>();
  options.numbers.reduce = given.attr("reduction").cast<std::string>() != "none";
  options.student = {number("student_scale"), number("student_softcap")};
  options.teacher = {number("teacher_scale"), number("teacher_softcap")};
  return options;
}

Logits make_logits(Address data, int dtype, int64_t outer_stride, int64_t inner_stride,
                   int64_t column_stride, Address offsets, int64_t extent) {
  if (dtype < 0 || dtype > 3) {
    throw std::invalid_argument("dtype code must be 0, 1, 2 or 3, got " + std::to_string(dtype));
  }
  return {{},
          pointer<const char>(data),
          static_cast<DType>(dtype),
          outer_stride,
          inner_stride,
          column_stride,
          pointer<const int64_t>(offsets),
          extent};
}

SparseTeacher make_sparse_teacher(Address ids, Address log_probs, int64_t count, int tail,
                                  Address offsets) {
  if (tail < 0 || tail > static_cast<int>(Tail::none)) {
    throw std::invalid_argument("tail must be 0 to 4, got " + std::to_string(tail));
  }
  return {pointer<const int64_t>(ids), pointer<const double>(log_probs), count,
          static_cast<Tail>(tail), pointer<const int64_t>(offsets)};
}

Rows make_rows(int64_t outer, int64_t inner, int64_t vocab, Address labels, Address row_weights,
               Address grad_output, int64_t grad_output_stride, double denominator,
               const SparseTeacher& sparse) {
  if (outer < 0 || inner < 0 || vocab < 1) {
    throw std::invalid_argument("rows must not be negative, and vocab at least 1");
  }
  return {outer,
          inner,
          vocab,
          pointer<const int64_t>(labels),
          pointer<const float>(row_weights),
          pointer<const void>(grad_output),
          grad_output_stride,
          denominator,
          sparse};
}

Results make_results(Address loss, Address statistics, bool extras, Address gradient,
                     int64_t gradient_columns, int64_t gradient_stride) {
  return {pointer<void>(loss),     pointer<void>(statistics), extras,
          pointer<void>(gradient), gradient_columns,          gradient_stride};
}

int64_t kd_loss(const Logits& student, const Logits& teacher, const Rows& rows,
                const GivenOptions& options, const Results& results, int threads) {
  Problem problem = make_problem(student, teacher, rows, options, results);
  problem.threads = threads;
  const InstructionSet& instructions = instruction_set();
  py::gil_scoped_release release;
  return run_on_cpu(problem, instructions);
}

}  // namespace

void bind_problem(py::module_& m) {
  // Local: the simulated tests load a second build of this module beside the first.
  const py::module_local local;
  py::class_<GivenOptions>(m, "Options", local)
      .def(py::init(&make_options), py::arg("options"), "From a kdkernels.problem.Options.");
  py::class_<Logits>(m, "Logits", local)
      .def(py::init(&make_logits), py::arg("data"), py::arg("dtype"), py::arg("outer_stride"),
           py::arg("inner_stride"), py::arg("column_stride"), py::arg("offsets") = 0,
           py::arg("extent") = 0);
  py::class_<SparseTeacher>(m, "SparseTeacher", local)
      .def(py::init(&make_sparse_teacher), py::arg("ids"), py::arg("log_probs"), py::arg("count"),
           py::arg("tail"), py::arg("offsets") = 0);
  py::class_<Rows>(m, "Rows", local)
      .def(py::init(&make_rows), py::arg("outer"), py::arg("inner"), py::arg("vocab"),
           py::arg("labels"), py::arg("row_weights"), py::arg("grad_output"),
           py::arg("grad_output_stride"), py::arg("denominator"),
           py::arg("sparse") = SparseTeacher{});
  py::class_<Results>(m, "Results", local)
      .def(py::init(&make_results), py::arg("loss"), py::arg("statistics"), py::arg("extras"),
           py::arg("gradient"), py::arg("gradient_columns"), py::arg("gradient_stride"));
  m.def("kd_loss", &kd_loss, py::arg("student"), py::arg("teacher"), py::arg("rows"),
        py::arg("options"), py::arg("results"), py::arg("threads"),
        "Row losses, statistics and the student's gradient. Returns -1; or the first row whose "
        "label is out of range, and then nothing was computed; or -2 minus a row whose entries are "
        "none of a teacher's.");
}

}  // namespace kd
