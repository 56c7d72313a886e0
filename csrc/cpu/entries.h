// A row of a sparse teacher, and the categories in which a divergence compares it with the student:
// the known entries and, but for the tail subset, all others as one more. In double: they are few.
#pragma once

#include <vector>

#include "../problem.h"

namespace kd {

struct Category {
  int64_t column;  // of the rest: -1
  double log_p, p;
  double log_q = 0.0, q = 0.0;
  double gradient = 0.0;  // of the divergence in the student's log-odds; of the rest: all columns'
  float kept = 0.0f;      // whoever takes an entry out of a row keeps it here
  int64_t next = -1;      // the next one of the same block, as they are linked
};

class SparseRow {
 public:
  // Reads a row. Afterwards `sound` tells whether it is a teacher's.
  void read(const Problem& problem, int64_t row);

  bool sound = false;
  double norm = 0.0;      // the logarithm of what the probabilities were divided by
  double log_rest = 0.0;  // of all that is not among the entries; -inf: nothing
  int64_t others = 0;     // how many entries that is
  // Under the tail none the weights add up to this.
  double weight = 1.0;

  bool is_empty() const { return categories_.empty(); }
  std::vector<Category>& categories() { return categories_; }
  const std::vector<Category>& categories() const { return categories_; }
  // The entries of a row's blocks, linked: the first of each, and what was added up of them.
  struct Block {
    int64_t first = -1;
    double sum = 0.0;
  };
  std::vector<Block>& link(int64_t blocks, int64_t length) {
    blocks_.assign(static_cast<size_t>(blocks), Block{});
    int64_t at = 0;
    for (Category& known : categories_) {
      Block& block = blocks_[static_cast<size_t>(known.column / length)];
      known.next = block.first;
      block.first = at++;
    }
    return blocks_;
  }
  // The category of all that is not among the entries, for a student that gives it this.
  Category rest(double log_q, double q) const { return {-1, log_rest, exp(log_rest), log_q, q}; }
  // log p of each of the others where the rest is spread evenly
  double log_share() const;
  // Shannon entropy in nats of what the tail makes of the entries
  double entropy(Tail tail) const;
  // The likeliest id, the lowest of equals; -1 where nothing is known
  int64_t likeliest() const;

 private:
  bool gather(const Problem& problem, int64_t row);
  bool normalize(Tail tail);

  std::vector<Category> categories_;
  std::vector<Block> blocks_;
  std::vector<uint64_t> seen_;  // a bit for each column; all 0 between rows
};

// Whether a sparse teacher has to be spread over a row of the vocabulary to be compared: its others
// are no single category. A divergence with value(0, q) proportional to q does not tell them apart.
bool needs_spread(const Problem& problem);
// Whether the others' evenly spread mass has a closed form.
bool has_even_form(const Problem& problem);

// The divergence of categories whose p, q and logarithms are set, and their gradients. With the
// slopes s the gradient of a category is s - q sum(s); where one has most of q, the digits that
// this loses are kept by first subtracting the multiple of q that makes its slope 0.
double compare(const Divergence& divergence, std::vector<Category>& categories);

}  // namespace kd
