// A plan as Python hands it over: the flat arrays of igva_kernels/ops/weighted_mix/program.py, field by field, and the
// layers that it names. What a plan names must have been handed in, or a kernel would reach foreign memory; the functions
// here refuse it with a ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/bindings.h"
#include "common/dtype.h"
#include "weighted_mix/operands.h"

namespace igva {

// What ends with a step; each end includes the ones before it.
constexpr int end_of_term = 1, end_of_part = 2, end_of_block = 3;

// One step per layer that is read.
struct Steps {
  std::vector<int> layers;
  std::vector<int> ends;
  std::vector<double> scales;
  std::vector<int> columns;
  std::vector<int> sums; // at the end of a part: which kept sum it is, or -1
};

// The entries that have a weight.
struct Dots {
  std::vector<int> blocks; // positions in the gradient that is handed in
  std::vector<int> layers;
  std::vector<int> columns;
  std::vector<double> scales;
};

// The shares of every gradient of a layer, one gradient after the other.
struct Shares {
  std::vector<int> blocks;
  std::vector<int> columns;
  std::vector<double> scales;
  std::vector<int> ends; // 1 at the last share of a gradient
};

// The hidden states' sizes, [images, tokens, width].
struct LayerShape {
  DType dtype;
  int64_t images;
  int64_t tokens;
  int64_t width;
  int64_t skip;
  int64_t patches() const { return tokens - skip; }
};

struct Layers : LayerShape {
  std::vector<Layer> views; // with all tokens
  // Layer i from the first token on that is not skipped.
  Layer patches_of(size_t i) const {
    const Layer& whole = views[i];
    const char* data = static_cast<const char*>(whole.data) + skip * whole.token_stride * size_of(dtype);
    return {data, whole.image_stride, whole.token_stride};
  }
};

void check_index(const char* what, int64_t index, int64_t count);

// Equal lengths; that the last step ends a block.
void check_steps(const Steps& steps);

// Equal lengths; layers and weight columns that were handed in.
void check_dots(const Dots& dots, const Layers& layers, int64_t columns);

// Equal lengths; weight columns and as many gradients as were handed in.
void check_shares(const Shares& shares, const MixWeights& weights, size_t grads);

// Adds Layers, LayerShape, MixWeights and Batch.
void bind_plan(pybind11::module_& m);

} // namespace igva

namespace pybind11::detail {

using IntArray = std::vector<int>;
using DoubleArray = std::vector<double>;

template <>
struct type_caster<igva::Steps> : igva::from_tuple<igva::Steps, IntArray, IntArray, DoubleArray, IntArray, IntArray> {};
template <>
struct type_caster<igva::Dots> : igva::from_tuple<igva::Dots, IntArray, IntArray, IntArray, DoubleArray> {};
template <>
struct type_caster<igva::Shares> : igva::from_tuple<igva::Shares, IntArray, IntArray, DoubleArray, IntArray> {};

} // namespace pybind11::detail
