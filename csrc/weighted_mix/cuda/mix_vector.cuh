// The mix of one vector of a row: what mix.cu and mix_norm.cu share.
#pragma once

#include "cuda/common.cuh"
#include "weighted_mix/cuda/params.h"

namespace igva::cuda {

// Independent 16-byte loads of a thread before the first use: a group of layers of IGVA in one round trip.
constexpr int loads_at_once = 6;

// Every block of the mixed row at (b, patch, d .. d + V - 1): emit(g, values), unrounded. Layers are added in the order
// of the plan, then scaled, then weighed by a fused multiply-add. Kept sums are written on the way, where there are
// any.
template <class T, int V, class Emit>
__device__ inline void mix_vector(const MixParams& params, int64_t b, int64_t patch, int d, Emit emit) {
  using W = Wide<T>;
  const int64_t image = image_of(params.image_index, b, params.num_images);
  W part[V] = {}, block[V] = {};
  int entry = 0, g = 0;
  for (int t = 0; t < params.num_terms; ++t) {
    const MixTerm& term = params.terms[t];
    W sum[V] = {};
    for (int e = entry; image >= 0 && e < term.end; e += loads_at_once) {
      Vector<T, V> loaded[loads_at_once];
#pragma unroll
      for (int u = 0; u < loads_at_once; ++u) {
        if (e + u >= term.end) continue;
        const Layer& layer = params.layers[params.entries[e + u]];
        const T* from = static_cast<const T*>(layer.data) + image * layer.image_stride + patch * layer.token_stride + d;
        loaded[u] = fetch<V>(from);
      }
#pragma unroll
      for (int u = 0; u < loads_at_once; ++u) {
        if (e + u >= term.end) continue;
        W value[V];
        widen<V>(loaded[u], value);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] += value[i];
      }
    }
    entry = term.end;
    const W scale = W(term.scale);
#pragma unroll
    for (int i = 0; i < V; ++i) part[i] += scale * sum[i];
    if (!term.ends_part) continue;
    if (term.sum >= 0) {
      store<V>(static_cast<T*>(params.sums[term.sum]) + (b * params.num_patches + patch) * params.width + d, part);
    }
    if (params.weights.data == nullptr || term.column < 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) block[i] += part[i];
    } else {
      const W weight = static_cast<const W*>(
          params.weights.data)[b * params.weights.row_stride + term.column * params.weights.column_stride];
#pragma unroll
      for (int i = 0; i < V; ++i) block[i] += weight * part[i];
    }
#pragma unroll
    for (int i = 0; i < V; ++i) part[i] = 0;
    if (!term.ends_block) continue;
    if (image < 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) block[i] = W(NAN);
    }
    emit(g++, block);
#pragma unroll
    for (int i = 0; i < V; ++i) block[i] = 0;
  }
}

} // namespace igva::cuda
