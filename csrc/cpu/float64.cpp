// The same loss in double, element by element: for gradcheck, where nobody waits for it.
#include "entries.h"
#include "kernel.h"

namespace kd {
namespace {

struct Logit {
  double z, derivative;
};

// scale first, then the soft cap.
Logit load(const Logits& logits, const char* row, int64_t column) {
  const double x = reinterpret_cast<const double*>(row)[column * logits.column_stride];
  const double scaled = x * logits.scale;
  if (logits.softcap == 0.0) return {scaled, logits.scale};
  const double cosine = cosh(scaled / logits.softcap);
  return {logits.softcap * tanh(scaled / logits.softcap), logits.scale / (cosine * cosine)};
}

struct Sums {
  LogSumExp student, teacher, label;
  LogSumExp others;  // the label's without the label
  double smoothed = 0.0, value = 0.0, slope = 0.0;
  double student_peak = -INFINITY, teacher_peak = -INFINITY;
  int64_t student_top = 0, teacher_top = 0;
};

struct Columns {
  double *student, *teacher, *derivative, *slope;
};

// A NaN or +inf in the student, or nothing but -inf.
bool is_bad(const LogSumExp& lse) { return !(fabs(lse.value()) < INFINITY); }

void load_logits(const Logits& logits, const Problem& problem, const Row& row, double* to) {
  const char* from = problem.row_of(logits, row.index);
  for (int64_t v = 0; v < problem.vocab; ++v) to[v] = load(logits, from, v).z;
}

// The logits of the teacher: a sparse one's are T log p, with the rest spread evenly.
void load_teacher(const Problem& problem, const Row& row, const SparseRow* sparse, double* to) {
  if (!sparse) return load_logits(problem.teacher, problem, row, to);
  const double t = problem.temperature, share = t * sparse->log_share();
  for (int64_t v = 0; v < problem.vocab; ++v) to[v] = share;
  for (const Category& known : sparse->categories()) to[known.column] = t * known.log_p;
}

void observe(const Problem& problem, const Row& row, const Columns& at, Sums& sums) {
  const char* student = problem.row_of(problem.student, row.index);
  for (int64_t v = 0; v < problem.vocab; ++v) {
    const Logit s = load(problem.student, student, v);
    const double t = at.teacher[v];
    at.student[v] = s.z;
    at.derivative[v] = s.derivative;
    sums.student.observe(s.z / problem.temperature);
    sums.teacher.observe(t / problem.temperature);
    sums.label.observe(s.z);
    if (v != row.label) sums.others.observe(s.z);
    sums.smoothed += s.z / static_cast<double>(problem.vocab);
    if (s.z > sums.student_peak) sums.student_peak = s.z, sums.student_top = v;
    if (t > sums.teacher_peak) sums.teacher_peak = t, sums.teacher_top = v;
  }
}

double log_probability(double z, double temperature, const LogSumExp& lse) {
  return z / temperature - lse.value();
}

// A multiple of q that is added to the slopes does not change slope - q sum(slope). The one that
// makes the slope 0 at an entry with more than half of the probability keeps the digits of a row
// where the student is sure: there the two are equal but for what the sum over the other entries
// is.
void evaluate(const Problem& problem, const Columns& at, Sums& sums, RowStatistics& statistics) {
  visit(problem.divergence, [&](auto functor) {
    const Term<double> unit = functor.unit();
    const auto entry_at = [&](int64_t v, double& log_p, double& log_q) {
      log_p = log_probability(at.teacher[v], problem.temperature, sums.teacher);
      log_q = log_probability(at.student[v], problem.temperature, sums.student);
      return make_entry<double>(functor, log_p, log_q);
    };
    double log_p, log_q;
    const Entry<double> top = entry_at(sums.student_top, log_p, log_q);
    double level = functor(top).slope / top.q;
    // An infinite divergence has no digits to keep.
    if (!(top.q > 0.5 && fabs(level) < INFINITY)) level = 0.0;
    for (int64_t v = 0; v < problem.vocab; ++v) {
      const Entry<double> e = entry_at(v, log_p, log_q);
      const Term<double> term = functor(e);
      const bool is_level = v == sums.student_top && level != 0.0;
      const double slope = is_level ? 0.0 : (term.slope - e.q * level) * unit.slope;
      sums.value += term.value * unit.value;
      sums.slope += slope;
      at.slope[v] = slope;
      statistics.student_entropy -= weigh(e.q, log_q);
      statistics.teacher_entropy -= weigh(e.p, log_p);
    }
  });
}

// The entries' categories instead: `slope` becomes the gradient in the student's log-odds, which
// has nothing left to be summed.
void evaluate_entries(const Problem& problem, const Columns& at, SparseRow& sparse, Sums& sums) {
  const double t = problem.temperature, weight = sparse.weight;
  const bool is_subset = problem.sparse.tail == Tail::subset;
  sums.value = sums.slope = 0.0;
  for (int64_t v = 0; v < problem.vocab; ++v) at.slope[v] = 0.0;
  if (sparse.is_empty()) return;
  std::vector<Category>& categories = sparse.categories();
  for (const Category& known : categories) at.slope[known.column] = NAN;  // a mark
  LogSumExp others, all;
  for (int64_t v = 0; v < problem.vocab; ++v) {
    const bool is_known = at.slope[v] != at.slope[v];
    (is_known ? all : others).observe(at.student[v] / t);
  }
  if (!is_subset) all.combine(others);
  for (Category& known : categories) {
    known.log_q = at.student[known.column] / t - all.value();
    known.q = exp(known.log_q);
  }
  const double log_rest = others.value() - all.value();
  const bool with_rest = !is_subset && sparse.others > 0;
  if (with_rest) categories.push_back(sparse.rest(log_rest, exp(log_rest)));
  sums.value = maximum(0.0, compare(problem.divergence, categories));  // keeps a NaN
  // Weights that do not add up to 1 were compared as if they did.
  if (problem.sparse.tail == Tail::none) sums.value = weight * (sums.value + log(weight));
  const double of_others = with_rest && log_rest != -INFINITY ? categories.back().gradient : 0.0;
  for (int64_t v = 0; v < problem.vocab && of_others != 0.0; ++v) {
    at.slope[v] = weight * of_others * exp(at.student[v] / t - others.value());
  }
  for (const Category& known : categories) {
    if (known.column >= 0) at.slope[known.column] = weight * known.gradient;
  }
}

void differentiate(const Problem& problem, const Row& row, const Columns& at, const Sums& sums) {
  if (!problem.gradient) return;
  double* gradient = reinterpret_cast<double*>(problem.gradient_row(row.index));
  const double t = problem.temperature, ce_weight = row.label < 0 ? 0.0 : problem.ce_weight();
  const double kd_factor = problem.alpha * problem.kd_scale() / t;
  const double pull = ce_weight + 2.0 * problem.z_loss * sums.label.value();
  // The label's probability minus 1, where that is near 0, is minus what the others have.
  const double hard = ce_weight * (1.0 - problem.label_smoothing), surplus = pull - hard;
  const double others = sums.others.sum * exp(sums.others.max - sums.label.max) / sums.label.sum;
  const double constant = ce_weight * problem.label_smoothing / static_cast<double>(problem.vocab);
  for (int64_t v = 0; v < problem.vocab; ++v) {
    const double q = exp(log_probability(at.student[v], t, sums.student));
    const double of_label = exp(at.student[v] - sums.label.value());
    double g = pull == 0.0 ? 0.0 : pull * of_label;
    if (v == row.label) g = of_label > 0.5 ? surplus - pull * others : g - hard;
    g -= constant;
    if (problem.alpha != 0.0) g += kd_factor * (at.slope[v] - q * sums.slope);
    gradient[v] = g * row.gradient_scale * at.derivative[v];
  }
}

void label_terms(const Problem& problem, const Row& row, const Columns& at, const Sums& sums,
                 RowStatistics& statistics) {
  const double lse = sums.label.value(), smoothing = problem.label_smoothing;
  statistics.label_lse = lse;
  if (problem.z_loss != 0.0) statistics.z = problem.z_loss * lse * lse;
  if (row.label < 0) return;
  if (smoothing != 1.0) statistics.ce = (1.0 - smoothing) * (lse - at.student[row.label]);
  if (smoothing != 0.0) statistics.ce += smoothing * (lse - sums.smoothed);
}

void spoil(const Problem& problem, const Row& row, RowStatistics& statistics) {
  statistics.kd = statistics.ce = statistics.z = NAN;
  statistics.student_lse = statistics.teacher_lse = statistics.label_lse = NAN;
  statistics.student_entropy = statistics.teacher_entropy = NAN;
  double* gradient = reinterpret_cast<double*>(problem.gradient_row(row.index));
  for (int64_t v = 0; gradient && v < problem.vocab; ++v) gradient[v] = NAN;
}

}  // namespace

void run_row_float64(const Problem& problem, const Row& row, Workspace& workspace,
                     RowStatistics& statistics) {
  const int64_t vocab = problem.vocab;
  double* memory = reinterpret_cast<double*>(workspace.reserve(4 * vocab * sizeof(double)));
  const Columns at{memory, memory + vocab, memory + 2 * vocab, memory + 3 * vocab};
  Sums sums;
  static thread_local SparseRow of_thread;
  SparseRow* sparse = problem.sparse.ids ? &of_thread : nullptr;
  bool is_taught = true;
  if (sparse) {
    sparse->read(problem, row.index);
    is_taught = sparse->sound;
    statistics.has_bad_entries = !is_taught;
  }
  const bool is_spread = problem.sparse.tail == Tail::uniform || needs_spread(problem);
  const bool is_row = !sparse || (is_taught && is_spread && !sparse->is_empty());
  if (is_row) {
    load_teacher(problem, row, sparse, at.teacher);
  } else {  // categories are compared by themselves: the student stands in
    load_logits(problem.student, problem, row, at.teacher);
  }
  observe(problem, row, at, sums);
  is_taught = is_taught && !is_bad(sums.teacher);
  const bool kd_counts = problem.alpha != 0.0;
  if (is_bad(sums.student) || (kd_counts && !is_taught)) return spoil(problem, row, statistics);
  if ((kd_counts && is_row) || problem.extras) evaluate(problem, at, sums, statistics);
  if (!is_row && is_taught) evaluate_entries(problem, at, *sparse, sums);
  if (is_row && sums.value < 0.0) sums.value = 0.0;
  statistics.kd = problem.kd_scale() * sums.value;
  statistics.student_lse = sums.student.value();
  statistics.teacher_lse = sparse ? sparse->norm : sums.teacher.value();
  if (sparse && is_taught) {
    statistics.teacher_entropy = sparse->entropy(problem.sparse.tail);
    sums.teacher_top = sparse->likeliest();
  }
  statistics.top_agrees = sums.student_top == sums.teacher_top;
  if (!is_taught) {
    statistics.kd = statistics.teacher_lse = statistics.teacher_entropy = NAN;
    statistics.top_agrees = false;
  }
  statistics.label_is_top = sums.student_top == row.label;
  label_terms(problem, row, at, sums, statistics);
  differentiate(problem, row, at, sums);
}

}  // namespace kd
