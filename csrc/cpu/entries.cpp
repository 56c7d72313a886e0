#include "entries.h"

namespace kd {

// False: an id is none of the vocabulary's, or comes twice where weights do not add up.
bool SparseRow::gather(const Problem& problem, int64_t row) {
  const SparseTeacher& given = problem.sparse;
  const int64_t first = given.first_of(row);
  const size_t words = static_cast<size_t>(problem.vocab + 63) / 64;
  if (seen_.size() < words) seen_.resize(words);
  categories_.clear();
  bool good = true;
  for (int64_t k = first; k < first + given.count && good; ++k) {
    const int64_t id = given.ids[k];
    if (id < 0) continue;
    if (id >= problem.vocab) {
      good = false;
      break;
    }
    uint64_t& word = seen_[id / 64];
    const uint64_t bit = uint64_t{1} << (id % 64);
    if (!(word & bit)) {
      word |= bit;
      categories_.push_back({id, given.log_probs[k], 0.0});
      continue;
    }
    good = problem.sparse.tail == Tail::none;
    for (Category& known : categories_) {
      if (good && known.column == id) {
        known.log_p = log(exp(known.log_p) + exp(given.log_probs[k]));
      }
    }
  }
  for (const Category& known : categories_) seen_[known.column / 64] = 0;
  return good;
}

// False: these are no probabilities.
bool SparseRow::normalize(Tail tail) {
  double top = -INFINITY;
  for (const Category& known : categories_) {
    if (!(known.log_p < INFINITY)) return false;
    top = maximum(top, known.log_p);
  }
  double mass = 0.0;  // relative to the largest
  for (Category& known : categories_) {
    known.p = top == -INFINITY ? 0.0 : exp(known.log_p - top);
    mass += known.p;
  }
  const double log_mass = top + log(mass), scale = exp(top);
  const bool with_rest = (tail == Tail::bucket || tail == Tail::uniform) && others > 0;
  if (with_rest) {
    // Of a part of the vocabulary only what rounding has added to 1 is taken off again.
    log_rest = mass * scale < 1.0 ? log1p(-mass * scale) : -INFINITY;
    norm = log_mass > 0.0 ? log_mass : 0.0;
  } else {
    norm = log_mass;
  }
  if ((tail == Tail::bucket || tail == Tail::uniform) && !(mass * scale <= kMostMass)) return false;
  if (tail == Tail::none) {
    weight = mass * scale;
    if (weight == 0.0) categories_.clear();
    if (weight == 0.0 || !(weight < INFINITY)) return weight == 0.0;
  }
  const double to_norm = norm == 0.0 ? scale : 1.0 / mass;
  for (Category& known : categories_) {
    known.log_p -= norm;
    known.p *= to_norm;
  }
  return fabs(norm) < INFINITY;
}

void SparseRow::read(const Problem& problem, int64_t row) {
  norm = 0.0;
  log_rest = -INFINITY;
  weight = 1.0;
  sound = gather(problem, row);
  others = problem.vocab - static_cast<int64_t>(categories_.size());
  if (sound && !is_empty()) sound = normalize(problem.sparse.tail);
  if (problem.sparse.tail == Tail::none) norm = 0.0;  // that is the weight
}

double SparseRow::log_share() const {
  return others > 0 ? log_rest - log(static_cast<double>(others)) : -INFINITY;
}

double SparseRow::entropy(Tail tail) const {
  double total = 0.0;
  // Weights that do not add up to 1 were divided by their sum.
  const double log_weight = log(weight);
  for (const Category& known : categories_) {
    const double log_p = known.log_p + log_weight;
    if (known.column >= 0 && log_p != -INFINITY) total -= exp(log_p) * log_p;
  }
  if (is_empty() || log_rest == -INFINITY) return total;
  return total - exp(log_rest) * (tail == Tail::uniform ? log_share() : log_rest);
}

int64_t SparseRow::likeliest() const {
  int64_t best = -1;
  double most = 0.0;
  for (const Category& known : categories_) {
    if (known.column < 0) continue;
    const bool is_better = best < 0 || known.log_p > most;
    if (is_better || (known.log_p == most && known.column < best)) {
      best = known.column;
      most = known.log_p;
    }
  }
  return best;
}

bool has_even_form(const Problem& problem) {
  return problem.sparse.tail == Tail::uniform &&
         problem.divergence.kind == DivergenceKind::forward_kl;
}

bool needs_spread(const Problem& problem) {
  if (problem.sparse.tail == Tail::uniform) return !has_even_form(problem);
  return problem.sparse.tail == Tail::renormalize &&
         problem.divergence.kind == DivergenceKind::alpha_beta;
}

namespace {

// The value and the slopes of a KL as they are written: of a few entries, in double.
double evaluate_kl(std::vector<Category>& categories, bool student_weighs) {
  double value = 0.0;
  for (Category& category : categories) {
    const double gap = category.log_p - category.log_q;
    const double weight = student_weighs ? category.q : category.p;
    const double part = weight == 0.0 ? 0.0 : weight * gap;
    value += student_weighs ? -part : part;
    category.gradient = student_weighs ? -part : -weight;
  }
  return value;
}

template <class Functor>
double evaluate(const Functor& functor, std::vector<Category>& categories) {
  const Term<double> unit = functor.unit();
  double value = 0.0;
  for (Category& category : categories) {
    const Term<double> term = functor(make_entry<double>(functor, category.log_p, category.log_q));
    value += term.value * unit.value;
    category.gradient = term.slope * unit.slope;
  }
  return value;
}

}  // namespace

double compare(const Divergence& divergence, std::vector<Category>& categories) {
  const ClosedForm form = closed_form_of(divergence);
  const double value =
      form != ClosedForm::none
          ? evaluate_kl(categories, form == ClosedForm::student_weighs)
          : visit(divergence, [&](auto functor) { return evaluate(functor, categories); });
  const Category* top = &categories.front();
  for (const Category& category : categories) {
    if (category.q > top->q) top = &category;
  }
  double level = top->gradient / top->q;
  // An infinite divergence has no digits to keep.
  if (!(top->q > 0.25 && fabs(level) < INFINITY)) level = 0.0;
  double sum = 0.0;
  for (Category& category : categories) {
    const bool is_level = &category == top && level != 0.0;
    category.gradient = is_level ? 0.0 : category.gradient - category.q * level;
    sum += category.gradient;
  }
  for (Category& category : categories) category.gradient -= category.q * sum;
  return value;
}

}  // namespace kd
