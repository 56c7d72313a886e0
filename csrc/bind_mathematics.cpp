// The mathematics for tests, in double and in the float that CUDA kernels use.
#include "bindings.h"

namespace py = pybind11;

namespace kd {
namespace {

using Parameters = std::vector<double>;
using Pair = std::pair<double, double>;

// The textbook summand and its slope.
Pair textbook(const std::string& name, const Parameters& parameters, double log_p, double log_q) {
  return visit(resolve(name, parameters), [&](const auto& functor) {
    const Entry<double> e = make_entry<double>(functor, log_p, log_q);
    const Term<double> centred = functor(e), unit = functor.unit(), offset = functor.offset(e);
    return Pair(centred.value * unit.value - offset.value,
                centred.slope * unit.slope - offset.slope);
  });
}

// What the kernels sum.
template <class X>
Pair centred(const std::string& name, const Parameters& parameters, double log_p, double log_q) {
  return visit(resolve(name, parameters), [&](const auto& functor) {
    const Term<X> term = functor(make_entry<X>(functor, log_p, log_q));
    const Term<double> unit = functor.unit();
    return Pair(term.value * unit.value, term.slope * unit.slope);
  });
}

std::vector<std::string> divergence_names() {
  std::vector<std::string> names;
  for (const DivergenceName& known : kDivergences) names.push_back(known.name);
  return names;
}

std::vector<std::string> closed_form_names() {
  std::vector<std::string> names;
  for (const DivergenceName& known : kDivergences) {
    if (closed_form_of({known.kind}) != ClosedForm::none) names.push_back(known.name);
  }
  return names;
}

// The functions whose steps portable.h has for float; each returns what it writes or returns.
void bind_float32(py::module_ m) {
  m.def("decay", [](float a) {
    float power, less_one;
    decay(bounded(a), power, less_one);
    return Pair(power, less_one);
  });
  m.def("grow", [](float a) {
    float power, less_one;
    grow(a, power, less_one);
    return Pair(power, less_one);
  });
  m.def("log_of_share", [](float u, float u_minus_one) { return log_of_share(u, u_minus_one); });
  m.def("log_of_half_share", [](float r_minus_one) { return log_of_half_share(r_minus_one); });
  m.def("centred", &centred<float>, py::arg("name"), py::arg("parameters"), py::arg("log_p"),
        py::arg("log_q"));
}

}  // namespace

void bind_mathematics(py::module_& m) {
  m.def("divergence_names", &divergence_names);
  m.def("closed_form_names", &closed_form_names,
        "The divergences that follow from the first sweep over a row.");
  m.def("divergence", &textbook, py::arg("name"), py::arg("parameters"), py::arg("log_p"),
        py::arg("log_q"), "(value, slope) of one vocabulary entry, in double.");
  m.def("centred", &centred<double>, py::arg("name"), py::arg("parameters"), py::arg("log_p"),
        py::arg("log_q"), "The same with terms that sum to zero over a row: what kernels compute.");
  bind_float32(m.def_submodule("float32", "As the CUDA kernels compute it, on this CPU."));
  py::class_<LogSumExp>(m, "LogSumExp", py::module_local())
      .def(py::init<>())
      .def(py::init([](double max, double sum) { return LogSumExp{max, sum}; }), py::arg("max"),
           py::arg("sum"))
      .def("observe", &LogSumExp::observe, py::arg("z"))
      .def("combine", &LogSumExp::combine, py::arg("other"))
      .def("value", &LogSumExp::value)
      .def_readonly("max", &LogSumExp::max)
      .def_readonly("sum", &LogSumExp::sum);
}

}  // namespace kd
