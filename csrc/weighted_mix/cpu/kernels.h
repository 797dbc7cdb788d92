// The CPU kernels of the mix and of its gradients. See cpu/all_kernels.h for how they are compiled.
#pragma once

#include <math.h>

#include "cpu/parallel.h"
#include "cpu/vector_loops.h"
#include "weighted_mix/cpu/table.h"

namespace {

using namespace igva::cpu;

// ---- mix -----------------------------------------------------------------------------------------------------------

// Memory bounds the mix: on a Zen 3, bf16 layers take as long without their conversions as with them. To ask for each
// layer's row this many bytes ahead made it up to a tenth faster there; 1 KB ahead gained little, 2 KB and more lost.
constexpr int64_t prefetch_bytes = 512;

// One term of a block for columns d..d+n of one token, added to what the terms before it left in `sums`; the last one
// rounds the block into `out`. Only U = 1 allows partial vectors.
template <class V, int U, bool stream, class In, class Out>
inline void mix_columns(const In* const* rows, int num_layers, typename V::Scalar scale, typename V::Scalar weight,
                        bool first, bool last, bool prefetch, int64_t n, int64_t d, typename V::Scalar* sums,
                        Out* out) {
  for (int i = 0; prefetch && i < num_layers; ++i) {
    const char* ahead = reinterpret_cast<const char*>(rows[i] + d) + prefetch_bytes;
    for (int64_t b = 0; b < int64_t(U * V::width * sizeof(In)); b += 64) __builtin_prefetch(ahead + b);
  }
  V sum[U];
  for (int u = 0; u < U; ++u) sum[u] = load<V>(rows[0] + d + u * V::width, U == 1 ? n : int64_t(V::width));
  for (int i = 1; i < num_layers; ++i) {
    for (int u = 0; u < U; ++u) sum[u] = sum[u] + load<V>(rows[i] + d + u * V::width, U == 1 ? n : int64_t(V::width));
  }
  for (int u = 0; u < U; ++u) {
    const int64_t at = d + u * V::width, left = U == 1 ? n : int64_t(V::width);
    V mixed = sum[u] * V::set(scale);
    mixed = first ? V::set(weight) * mixed : fma(V::set(weight), mixed, load<V>(sums + at, left));
    if (!last) store(mixed, sums + at, left);
    else if (stream && left >= V::width) mixed.stream(out + at);
    else store(mixed, out + at, left);
  }
}

// The tokens of one image that are mixed at a time, and the columns of a block.
struct Span {
  int64_t image;
  int64_t patch;
  int64_t patches;
  int64_t column;
  int64_t columns;
};

// One block of the tokens of a tile, term by term: what is read of one layer is long and contiguous, and what the terms
// add up to stays in the first-level cache. `sums` may be `out`.
template <class V, bool stream, class In, class Out>
inline void mix_block(const MixSource& a, int block, const Span& span, const In** rows,
                      const typename V::Scalar* weights, typename V::Scalar* sums, int64_t sums_stride, Out* out,
                      int64_t out_stride) {
  using S = typename V::Scalar;
  constexpr int U = 4;
  const Tables& plan = a.plan;
  const int first = plan.block_begin[block], last = plan.block_begin[block + 1] - 1;
  for (int t = first; t <= last; ++t) {
    const Term& term = plan.terms[t];
    const S weight = term.column < 0 ? S(1) : weights[term.column * a.weights.column_stride];
    const int num_layers = term.end - term.begin;
    for (int64_t p = 0; p < span.patches; ++p) {
      for (int i = 0; i < num_layers; ++i) {
        const Layer& layer = a.layers[plan.term_layers[term.begin + i]];
        rows[i] = static_cast<const In*>(layer.data) + span.image * layer.image_stride +
                  (span.patch + p) * layer.token_stride + span.column;
      }
      const auto columns = [&](auto unroll, int64_t d) {
        // Beyond a whole row lies the next one, beyond a part of one what this thread may never read.
        const bool prefetch = decltype(unroll)::value > 1 &&
                              (span.columns == a.width || d + prefetch_bytes / int64_t(sizeof(In)) < span.columns);
        mix_columns<V, decltype(unroll)::value, stream>(rows, num_layers, S(term.scale), weight, t == first, t == last,
                                                        prefetch, span.columns - d, d, sums + p * sums_stride,
                                                        out + p * out_stride);
      };
      int64_t d = 0;
      for (; d + U * V::width <= span.columns; d += U * V::width) columns(Int<U>(), d);
      for (; d < span.columns; d += V::width) columns(Int<1>(), d);
    }
  }
}

// The mean and 1 / standard deviation of a row, for its norm.
template <class V>
inline void take_statistics(const typename V::Scalar* row, int64_t n, const Norm& norm, int64_t m) {
  using S = typename V::Scalar;
  const S mean = sum_over<V>(n, [&](V sum, int64_t i) { return sum + load<V>(row + i, n - i); }) / S(n);
  const V centre = V::set(mean);
  const S variance = sum_over<V>(n, [&](V sum, int64_t i) {
    const V x = load_or<V>(row + i, n - i, mean) - centre;
    return fma(x, x, sum);
  }) / S(n);
  static_cast<S*>(norm.mean)[m] = mean;
  static_cast<S*>(norm.rstd)[m] = S(1 / sqrt(double(variance) + norm.eps));
}

// Columns column..column + n of row m, normalised.
template <class V, class Out>
inline void normalize(const typename V::Scalar* row, int64_t column, int64_t n, const Norm& norm, int64_t m, Out* out) {
  using S = typename V::Scalar;
  const V mean = V::set(static_cast<const S*>(norm.mean)[m]), rstd = V::set(static_cast<const S*>(norm.rstd)[m]);
  const S* weight = norm.weight.data ? static_cast<const S*>(norm.weight.data) + column : nullptr;
  const S* bias = norm.bias.data ? static_cast<const S*>(norm.bias.data) + column : nullptr;
  for (int64_t i = 0; i < n; i += V::width) {
    V y = (load<V>(row + i, n - i) - mean) * rstd;
    if (weight) y = y * load<V>(weight + i, n - i);
    if (bias) y = y + load<V>(bias + i, n - i);
    store(y, out + i, n - i);
  }
}

template <class V, bool stream, class In, class Out>
void mix_tiles(const MixJob& a, int threads) {
  using S = typename V::Scalar;
  const Tables& plan = a.plan;
  const int64_t row_width = plan.num_blocks * a.width;
  parallel_tasks(a.num_tiles, threads, [&](int64_t i, int thread) {
    const Tile& tile = a.tiles[i];
    const Span span = {tile.image, tile.patch, tile.patches, 0, a.width};
    S* scratch = static_cast<S*>(a.scratch) + thread * a.scratch_stride;
    const In** rows = reinterpret_cast<const In**>(a.row_pointers + thread * plan.longest_term);
    for (int s = 0; s < plan.num_sums; ++s) {
      In* sums = static_cast<In*>(a.sums[s]) + (tile.image * a.num_patches + tile.patch) * a.width;
      mix_block<V, stream>(a, plan.num_blocks + s, span, rows, nullptr, scratch, a.width, sums, a.width);
    }
    if (!a.rows && !a.norm) return;
    for (int64_t k = tile.begin; k < tile.end; ++k) {
      const int64_t b = a.batch_rows[k], m = b * a.num_patches + tile.patch, first = (m - a.first_row) * row_width;
      const S* weights = static_cast<const S*>(a.weights.data) + b * a.weights.row_stride;
      if (!a.norm) {
        Out* out = static_cast<Out*>(a.rows) + first;
        for (int g = 0; g < plan.num_blocks; ++g) {
          mix_block<V, stream>(a, g, span, rows, weights, scratch, a.width, out + g * a.width, row_width);
        }
        continue;
      }
      for (int g = 0; g < plan.num_blocks; ++g) {
        S* block = scratch + g * a.width;
        mix_block<V, false>(a, g, span, rows, weights, block, row_width, block, row_width);
      }
      for (int64_t p = 0; p < tile.patches; ++p) {
        const S* row = scratch + p * row_width;
        const int64_t at = first + p * row_width;
        take_statistics<V>(row, row_width, *a.norm, m + p);
        if (a.rows) normalize<V>(row, 0, row_width, *a.norm, m + p, static_cast<Out*>(a.rows) + at);
        if (a.raw_rows) copy_row<V>(row, row_width, static_cast<Out*>(a.raw_rows) + at);
      }
    }
    if (stream) stream_fence();
  });
}

bool mix(DType in, DType out, const MixJob& job, int threads) {
  return dispatch(in, out, [&](auto x, auto y) {
    using V = typename VecOf<decltype(x)>::type;
    if (job.stream) mix_tiles<V, true, decltype(x), decltype(y)>(job, threads);
    else mix_tiles<V, false, decltype(x), decltype(y)>(job, threads);
  });
}

// ---- gradients of the mix ------------------------------------------------------------------------------------------

template <class Grad>
inline const Grad* grad_row(const View& grad, int64_t b, int64_t p) {
  return static_cast<const Grad*>(grad.data) + b * grad.batch_stride + p * grad.token_stride;
}

template <class V, class Grad, class In>
inline typename V::Scalar dot(const Grad* a, const In* b, int64_t n) {
  return sum_over<V>(n, [&](V sum, int64_t i) { return fma(load<V>(a + i, n - i), load<V>(b + i, n - i), sum); });
}

// The dot of one row is summed in vector lanes, those of several rows in double: the order depends on the shape only.
bool dots(DType grad, DType layer, const DotsJob& a, int threads) {
  return dispatch(grad, layer, [&](auto x, auto y) {
    using Grad = decltype(x);
    using In = decltype(y);
    using V = typename VecOf<Grad>::type;
    const int64_t chunks = (a.num_patches + a.chunk - 1) / a.chunk;
    parallel_for(a.batch.rows * chunks, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / chunks, first = i % chunks * a.chunk;
        const int64_t last = first + a.chunk < a.num_patches ? first + a.chunk : a.num_patches;
        const int64_t image = a.batch.image_of(b);
        double* sums = a.dots + i * a.num_entries;
        for (int e = 0; e < a.num_entries; ++e) sums[e] = 0;
        for (int64_t p = first; p < last; ++p) {
          const Grad* g = grad_row<Grad>(a.grad, b, p);
          for (int e = 0; e < a.num_entries; ++e) {
            const Layer& source = a.layers[e];
            const In* h = static_cast<const In*>(source.data) + image * source.image_stride + p * source.token_stride;
            sums[e] += dot<V>(g + a.offsets[e], h, a.width);
          }
        }
      }
    });
  });
}

bool layer_grads(DType grad, DType out, const LayerGradsJob& a, int threads) {
  return dispatch(grad, out, [&](auto x, auto y) {
    using Grad = decltype(x);
    using Out = decltype(y);
    using V = typename VecOf<Grad>::type;
    using S = typename V::Scalar;
    const int64_t tokens = a.num_patches + a.skip;
    parallel_for(a.num_images * tokens, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t image = t / tokens, p = t % tokens - a.skip;
        const int64_t first = a.image_begin[image], last = p < 0 ? first : a.image_begin[image + 1];
        for (int s = 0; s < a.num_grads; ++s) {
          Out* sum = static_cast<Out*>(a.grads[s]) + t * a.width;
          for (int64_t d = 0; d < a.width; d += V::width) {
            const int64_t n = a.width - d;
            V total = V::set(0);
            for (int64_t i = first; i < last; ++i) {
              const int64_t b = a.image_rows[i];
              const Grad* row = grad_row<Grad>(a.grad, b, p);
              const S* weights = static_cast<const S*>(a.weights.data) + b * a.weights.row_stride;
              for (int e = a.share_begin[s]; e < a.share_begin[s + 1]; ++e) {
                const Share& share = a.shares[e];
                S factor = S(share.scale);
                if (share.column >= 0) factor *= weights[share.column * a.weights.column_stride];
                total = fma(V::set(factor), load<V>(row + share.block * a.width + d, n), total);
              }
            }
            store(total, sum + d, n);
          }
        }
      }
    });
  });
}

} // namespace
