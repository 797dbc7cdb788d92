#include "weighted_mix/cuda/program.h"

#include <algorithm>
#include <string>

#include "cuda/host.h"

namespace igva::cuda {

void check_capacity(size_t count, size_t capacity, const char* what) {
  if (count <= capacity) return;
  throw std::invalid_argument("the CUDA kernels take at most " + std::to_string(capacity) + " " + what + ", got " +
                              std::to_string(count));
}

MixProgram::MixProgram(const Steps& steps, bool keep_sums) {
  check_steps(steps);
  check_capacity(steps.layers.size(), max_entries, "layers in all blocks together");
  for (size_t i = 0; i < steps.layers.size(); ++i) {
    const int layer = steps.layers[i], column = steps.columns[i], end = steps.ends[i];
    if (layer < 0) throw std::invalid_argument("plan: its layers must be resolved, got " + std::to_string(layer));
    last_layer_ = std::max(last_layer_, layer);
    last_column_ = std::max(last_column_, column);
    check_capacity(size_t(last_layer_ + 1), max_layers, "layers");
    check_capacity(size_t(last_column_ + 1), INT16_MAX, "weight columns");
    params_.entries[i] = uint8_t(layer);
    if (end < end_of_term) continue;
    check_capacity(size_t(params_.num_terms + 1), max_terms, "terms");
    const bool ends_part = end >= end_of_part, ends_block = end >= end_of_block;
    const int sum = ends_part && keep_sums ? steps.sums[i] : -1;
    params_.terms[params_.num_terms++] = {steps.scales[i], int16_t(column), uint8_t(i + 1), int8_t(sum), ends_part,
                                          ends_block};
    params_.num_blocks += ends_block;
    if (sum >= 0) num_sums_ = std::max(num_sums_, sum + 1);
  }
}

MixParams MixProgram::params(const Layers& layers, const MixWeights* weights, const Batch& batch,
                             const std::vector<Address>& sums) const {
  check_capacity(layers.views.size(), max_layers, "layers");
  check_index("layer", last_layer_, int64_t(layers.views.size()));
  if (weights && last_column_ >= 0) check_index("weight column", last_column_, weights->columns);
  check_capacity(sums.size(), max_sums, "kept sums");
  if (num_sums_ > 0) check_index("kept sum", num_sums_ - 1, int64_t(sums.size()));
  MixParams params = params_;
  for (size_t i = 0; i < layers.views.size(); ++i) params.layers[i] = layers.patches_of(i);
  for (size_t i = 0; i < sums.size(); ++i) params.sums[i] = pointer(sums[i]);
  if (weights) params.weights = *weights;
  params.image_index = batch.image_index;
  params.num_images = layers.images;
  params.num_rows = count32(batch.rows * layers.patches());
  params.num_patches = int32_t(layers.patches());
  params.width = int32_t(layers.width);
  return params;
}

DotsParams dots_params(const Dots& dots, const Layers& layers, const Batch& batch, int64_t columns) {
  check_dots(dots, layers, columns);
  check_capacity(dots.layers.size(), max_dots, "weighted entries over the reduced sources");
  DotsParams params = {};
  for (size_t e = 0; e < dots.layers.size(); ++e) {
    params.layers[e] = layers.patches_of(dots.layers[e]);
    params.dots[e] = {dots.blocks[e], dots.columns[e], dots.scales[e]};
  }
  params.num_dots = int32_t(dots.layers.size());
  params.num_columns = int32_t(columns);
  params.image_index = batch.image_index;
  params.num_images = layers.images;
  params.batch = int32_t(batch.rows);
  count32(batch.rows * layers.patches());
  params.num_patches = int32_t(layers.patches());
  params.width = int32_t(layers.width);
  return params;
}

} // namespace igva::cuda
