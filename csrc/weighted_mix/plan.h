// A plan as Python hands it over: the flat arrays of igva_kernels/ops/weighted_mix/program.py, field by field, and the
// layers that it names. What a plan names must have been handed in, or a kernel would reach foreign memory; the
// functions here refuse it with a ValueError.
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
  std::vector<int> sums; // at the end of a part: the kept sum that it is, or -1
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

// Checks that the arrays are equally long and that the last step ends a block.
void check_steps(const Steps& steps);

// Checks that the arrays are equally long, and name layers and weight columns that were handed in.
void check_dots(const Dots& dots, const Layers& layers, int64_t columns);

// Checks that the arrays are equally long, name weight columns that were handed in, and make `grads` gradients.
void check_shares(const Shares& shares, const MixWeights& weights, size_t grads);

using IntArray = std::vector<int>;
using DoubleArray = std::vector<double>;
using Views = std::vector<std::pair<Address, Ints3>>; // (address, strides)

inline Steps make_steps(IntArray layers, IntArray ends, DoubleArray scales, IntArray columns, IntArray sums) {
  return {std::move(layers), std::move(ends), std::move(scales), std::move(columns), std::move(sums)};
}

inline Dots make_dots(IntArray blocks, IntArray layers, IntArray columns, DoubleArray scales) {
  return {std::move(blocks), std::move(layers), std::move(columns), std::move(scales)};
}

inline Shares make_shares(IntArray blocks, IntArray columns, DoubleArray scales, IntArray ends) {
  return {std::move(blocks), std::move(columns), std::move(scales), std::move(ends)};
}

inline LayerShape make_layer_shape(DType dtype, Ints3 shape, int64_t skip) {
  return {dtype, shape[0], shape[1], shape[2], skip};
}

inline Layers make_layers(DType dtype, Ints3 shape, int64_t skip, Views views) {
  Layers layers = {make_layer_shape(dtype, shape, skip), {}};
  layers.views.reserve(views.size());
  for (const auto& [data, strides] : views) layers.views.push_back({pointer(data), strides[0], strides[1]});
  return layers;
}

inline MixWeights make_mix_weights(Address data, Ints2 strides, int64_t columns) {
  return {pointer(data), strides[0], strides[1], columns};
}

inline Batch make_batch(Address image_index, int64_t rows) { return {pointer<const int64_t>(image_index), rows}; }

} // namespace igva

namespace pybind11::detail {

template <>
struct type_caster<igva::Steps> : igva::from_tuple<&igva::make_steps> {};
template <>
struct type_caster<igva::Dots> : igva::from_tuple<&igva::make_dots> {};
template <>
struct type_caster<igva::Shares> : igva::from_tuple<&igva::make_shares> {};
template <>
struct type_caster<igva::LayerShape> : igva::from_tuple<&igva::make_layer_shape> {};
template <>
struct type_caster<igva::Layers> : igva::from_tuple<&igva::make_layers> {};
template <>
struct type_caster<igva::MixWeights> : igva::from_tuple<&igva::make_mix_weights> {};
template <>
struct type_caster<igva::Batch> : igva::from_tuple<&igva::make_batch> {};

} // namespace pybind11::detail
