#include "weighted_mix/plan.h"

#include <algorithm>
#include <initializer_list>

namespace igva {

namespace {

void check_lengths(std::initializer_list<size_t> lengths) {
  if (std::equal(lengths.begin() + 1, lengths.end(), lengths.begin())) return;
  throw std::invalid_argument("plan: its arrays must have equal lengths");
}

} // namespace

void check_index(const char* what, int64_t index, int64_t count) {
  if (index >= 0 && index < count) return;
  throw std::invalid_argument(std::string("plan: it names ") + what + " " + std::to_string(index) + ", got " +
                              std::to_string(count));
}

void check_steps(const Steps& steps) {
  check_lengths({steps.layers.size(), steps.ends.size(), steps.scales.size(), steps.columns.size(), steps.sums.size()});
  if (!steps.ends.empty() && steps.ends.back() != end_of_block) {
    throw std::invalid_argument("plan: its last step must end a block");
  }
}

void check_dots(const Dots& dots, const Layers& layers, int64_t columns) {
  check_lengths({dots.blocks.size(), dots.layers.size(), dots.columns.size(), dots.scales.size()});
  for (int column : dots.columns) check_index("weight column", column, columns);
  for (int layer : dots.layers) check_index("layer", layer, int64_t(layers.views.size()));
}

void check_shares(const Shares& shares, const MixWeights& weights, size_t grads) {
  check_lengths({shares.blocks.size(), shares.columns.size(), shares.scales.size(), shares.ends.size()});
  for (int column : shares.columns) {
    if (column >= 0) check_index("weight column", column, weights.columns);
  }
  const auto found = size_t(std::count(shares.ends.begin(), shares.ends.end(), 1));
  if (found != grads) {
    throw std::invalid_argument("plan: it has " + std::to_string(found) + " different layer gradients, got memory for " +
                                std::to_string(grads));
  }
}

} // namespace igva
