// The kernels, written once for a vector type `Vec`. Each kernels_*.cpp compiles this file with the flags of its
// instruction set; everything is in an anonymous namespace and no library template is used, so that no function built
// for a wide instruction set can be merged with one that another file calls on a machine without it.
#pragma once

#include <math.h>

#include "activation.h"
#include "kernels.h"
#include "parallel.h"

namespace {

using namespace igva;

template <class T>
struct VecOf {
  using type = Vec;
};
#ifdef IGVA_SCALAR
template <>
struct VecOf<double> {
  using type = Lane<double>;
};
#endif

// f(A{}, B{}) with the C++ types of two dtypes; fp64 meets fp64 only, in the scalar build.
template <class A, class F>
inline bool dispatch_second(DType b, F f) {
  switch (b) {
    case DType::f32: return f(A(), float()), true;
    case DType::bf16: return f(A(), bf16()), true;
    case DType::f16: return f(A(), f16()), true;
    default: return false;
  }
}

template <class F>
inline bool dispatch(DType a, DType b, F f) {
  switch (a) {
    case DType::f32: return dispatch_second<float>(b, f);
    case DType::bf16: return dispatch_second<bf16>(b, f);
    case DType::f16: return dispatch_second<f16>(b, f);
#ifdef IGVA_SCALAR
    case DType::f64: return b == DType::f64 && (f(double(), double()), true);
#endif
    default: return false;
  }
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// The first n lanes, zeros after them.
template <class V, class T>
inline V load(const T* p, int64_t n) {
  if (n >= V::width) return V::load(p);
  T lanes[V::width] = {};
  memcpy(lanes, p, n * sizeof(T));
  return V::load(lanes);
}

// The same with `fill` instead of zeros.
template <class V>
inline V load_or(const typename V::Scalar* p, int64_t n, typename V::Scalar fill) {
  if (n >= V::width) return V::load(p);
  typename V::Scalar lanes[V::width];
  for (int i = 0; i < V::width; ++i) lanes[i] = i < n ? p[i] : fill;
  return V::load(lanes);
}

template <class V, class T>
inline void store(V v, T* p, int64_t n) {
  if (n >= V::width) return v.store(p);
  T lanes[V::width];
  v.store(lanes);
  memcpy(p, lanes, n * sizeof(T));
}

// The sum of what f(sum, i) adds for the vectors at i = 0, width, ..., the last of them partial. Several partial sums
// keep the rounding error small and the additions independent.
template <class V, class F>
inline typename V::Scalar sum_over(int64_t n, F f) {
  constexpr int U = V::width == 1 ? 16 : 4;
  V sums[U];
  for (int u = 0; u < U; ++u) sums[u] = V::set(0);
  int64_t i = 0;
  for (; i + U * V::width <= n; i += U * V::width) {
    for (int u = 0; u < U; ++u) sums[u] = f(sums[u], i + u * V::width);
  }
  for (; i < n; i += V::width) sums[0] = f(sums[0], i);
  for (int stride = U / 2; stride > 0; stride /= 2) {
    for (int u = 0; u < stride; ++u) sums[u] = sums[u] + sums[u + stride];
  }
  return sums[0].sum();
}

// ---- mix -----------------------------------------------------------------------------------------------------------

// One term of a block for columns d..d+n of one token, added to what the terms before it left in `sums`; the last one
// rounds the block into `out`. Partial vectors only with U = 1.
template <class V, int U, bool stream, class In, class Out>
inline void mix_columns(const In* const* rows, int num_layers, typename V::Scalar scale, typename V::Scalar weight,
                        bool first, bool last, int64_t n, int64_t d, typename V::Scalar* sums, Out* out) {
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

// One block of the tokens of a tile, term by term: what is read of one layer is long and contiguous, and what the terms
// add up to stays in the first-level cache. `sums` may be `out`.
template <class V, bool stream, class In, class Out>
inline void mix_block(const MixArgs& a, int block, const Tile& tile, const In** rows, const typename V::Scalar* weights,
                      typename V::Scalar* sums, int64_t sums_stride, Out* out, int64_t out_stride) {
  using S = typename V::Scalar;
  constexpr int U = 4;
  const Program& program = a.program;
  const int first = program.block_begin[block], last = program.block_begin[block + 1] - 1;
  for (int t = first; t <= last; ++t) {
    const Term& term = program.terms[t];
    const S weight = term.column < 0 ? S(1) : weights[term.column * a.weights.column_stride];
    const int num_layers = term.end - term.begin;
    for (int64_t p = 0; p < tile.patches; ++p) {
      for (int i = 0; i < num_layers; ++i) {
        const Layer& layer = a.layers[program.term_layers[term.begin + i]];
        rows[i] = static_cast<const In*>(layer.data) + tile.image * layer.image_stride +
                  (tile.patch + p) * layer.token_stride;
      }
      const auto columns = [&](auto unroll, int64_t d) {
        mix_columns<V, decltype(unroll)::value, stream>(rows, num_layers, S(term.scale), weight, t == first, t == last,
                                                        a.width - d, d, sums + p * sums_stride, out + p * out_stride);
      };
      int64_t d = 0;
      for (; d + U * V::width <= a.width; d += U * V::width) columns(Int<U>(), d);
      for (; d < a.width; d += V::width) columns(Int<1>(), d);
    }
  }
}

template <class V, class Out>
inline void normalize(const typename V::Scalar* row, int64_t n, const MixArgs& a, int64_t m, Out* out, Out* raw) {
  using S = typename V::Scalar;
  const S mean = sum_over<V>(n, [&](V sum, int64_t i) { return sum + load<V>(row + i, n - i); }) / S(n);
  const V centre = V::set(mean);
  const S variance = sum_over<V>(n, [&](V sum, int64_t i) {
    const V x = load_or<V>(row + i, n - i, mean) - centre;
    return fma(x, x, sum);
  }) / S(n);
  const S rstd = S(1 / sqrt(double(variance) + a.eps));
  static_cast<S*>(a.mean)[m] = mean;
  static_cast<S*>(a.rstd)[m] = rstd;
  const S* weight = static_cast<const S*>(a.norm_weight);
  const S* bias = static_cast<const S*>(a.norm_bias);
  for (int64_t i = 0; i < n; i += V::width) {
    const V x = load<V>(row + i, n - i);
    if (raw) store(x, raw + i, n - i);
    V y = (x - centre) * V::set(rstd);
    if (weight) y = y * load<V>(weight + i, n - i);
    if (bias) y = y + load<V>(bias + i, n - i);
    store(y, out + i, n - i);
  }
}

template <class V, bool stream, class In, class Out>
void mix_tiles(const MixArgs& a, int threads) {
  using S = typename V::Scalar;
  const Program& program = a.program;
  const int64_t row_width = program.num_blocks * a.width;
  parallel_tasks(a.num_tiles, threads, [&](int64_t i, int thread) {
    const Tile& tile = a.tiles[i];
    S* scratch = static_cast<S*>(a.scratch) + thread * a.scratch_stride;
    const In** rows = reinterpret_cast<const In**>(a.row_pointers + thread * program.longest_term);
    for (int s = 0; s < program.num_sums; ++s) {
      In* sums = static_cast<In*>(a.sums[s]) + (tile.image * a.num_patches + tile.patch) * a.width;
      mix_block<V, stream>(a, program.num_blocks + s, tile, rows, nullptr, scratch, a.width, sums, a.width);
    }
    for (int64_t k = tile.begin; k < tile.end; ++k) {
      const int64_t b = a.batch_rows[k], m = b * a.num_patches + tile.patch;
      const S* weights = static_cast<const S*>(a.weights.data) + b * a.weights.row_stride;
      Out* out = static_cast<Out*>(a.rows) + (m - a.first_row) * row_width;
      if (!a.normalize) {
        for (int g = 0; g < program.num_blocks; ++g) {
          mix_block<V, stream>(a, g, tile, rows, weights, scratch, a.width, out + g * a.width, row_width);
        }
        continue;
      }
      for (int g = 0; g < program.num_blocks; ++g) {
        S* block = scratch + g * a.width;
        mix_block<V, false>(a, g, tile, rows, weights, block, row_width, block, row_width);
      }
      Out* raw = a.raw_rows ? static_cast<Out*>(a.raw_rows) + (m - a.first_row) * row_width : nullptr;
      for (int64_t p = 0; p < tile.patches; ++p) {
        const int64_t at = p * row_width;
        normalize<V>(scratch + at, row_width, a, m + p, out + at, raw ? raw + at : nullptr);
      }
    }
    if (stream) stream_fence();
  });
}

bool mix(DType in, DType out, const MixArgs& args, int threads) {
  return dispatch(in, out, [&](auto x, auto y) {
    using V = typename VecOf<decltype(x)>::type;
    if (args.stream) mix_tiles<V, true, decltype(x), decltype(y)>(args, threads);
    else mix_tiles<V, false, decltype(x), decltype(y)>(args, threads);
  });
}

// ---- activation ----------------------------------------------------------------------------------------------------

template <class F>
inline void dispatch_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::none: return f.template operator()<Activation::none>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return f.template operator()<Activation::gelu_tanh>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::silu: return f.template operator()<Activation::silu>();
  }
}

// f(row, first column, end column) over a matrix, in pieces that one row can share among threads.
template <class F>
inline void for_each_piece(int64_t rows, int64_t columns, int threads, F f) {
  constexpr int64_t piece = 1024;
  const int64_t pieces = (columns + piece - 1) / piece;
  parallel_for(rows * pieces, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * piece;
      f(i / pieces, first, first + piece < columns ? first + piece : columns);
    }
  });
}

template <class V, class In, class Out>
struct Epilogue {
  const EpilogueArgs& a;
  int threads;

  template <Activation activation>
  void operator()() const {
    for_each_piece(a.rows, a.columns, threads, [&](int64_t row, int64_t first, int64_t end) {
      const In* x = static_cast<const In*>(a.x) + row * a.x_stride;
      Out* y = static_cast<Out*>(a.y) + row * a.y_stride;
      Out* z = a.z ? static_cast<Out*>(a.z) + row * a.z_stride : nullptr;
      for (int64_t i = first; i < end; i += V::width) {
        const int64_t n = end - i;
        const V value = load<V>(x + i, n);
        if (z) store(value, z + i, n);
        store(act<activation>(value), y + i, n);
      }
    });
  }
};

bool epilogue(DType in, DType out, const EpilogueArgs& args, int threads) {
  return dispatch(in, out, [&](auto x, auto y) {
    using V = typename VecOf<decltype(x)>::type;
    dispatch_activation(args.activation, Epilogue<V, decltype(x), decltype(y)>{args, threads});
  });
}

template <class V, class Grad, class T>
struct ActivationGrad {
  const ActivationGradArgs& a;
  int threads;

  template <Activation activation>
  void operator()() const {
    for_each_piece(a.rows, a.columns, threads, [&](int64_t row, int64_t first, int64_t end) {
      const Grad* grad_y = static_cast<const Grad*>(a.grad_y) + row * a.grad_y_stride;
      const T* z = static_cast<const T*>(a.z) + row * a.z_stride;
      T* grad_z = static_cast<T*>(a.grad_z) + row * a.grad_z_stride;
      T* y = a.y ? static_cast<T*>(a.y) + row * a.y_stride : nullptr;
      for (int64_t i = first; i < end; i += V::width) {
        const int64_t n = end - i;
        const ValueAndGrad<V> result = act_grad<activation>(load<V>(z + i, n), load<V>(grad_y + i, n));
        if (y) store(result.value, y + i, n);
        store(result.grad, grad_z + i, n);
      }
    });
  }
};

bool activation_grad(DType grad, DType out, const ActivationGradArgs& args, int threads) {
  return dispatch(grad, out, [&](auto x, auto y) {
    using V = typename VecOf<decltype(x)>::type;
    dispatch_activation(args.activation, ActivationGrad<V, decltype(x), decltype(y)>{args, threads});
  });
}

// ---- gradients of the mix ------------------------------------------------------------------------------------------

template <class V, class Grad, class In>
inline typename V::Scalar dot(const Grad* a, const In* b, int64_t n) {
  return sum_over<V>(n, [&](V sum, int64_t i) { return fma(load<V>(a + i, n - i), load<V>(b + i, n - i), sum); });
}

// A row's dot is summed in lanes, rows in double: the order depends on nothing but the shape.
bool dots(DType grad, DType layer, const DotsArgs& a, int threads) {
  return dispatch(grad, layer, [&](auto x, auto y) {
    using Grad = decltype(x);
    using In = decltype(y);
    using V = typename VecOf<Grad>::type;
    const int64_t chunks = (a.num_patches + a.chunk - 1) / a.chunk;
    parallel_for(a.batch * chunks, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / chunks, first = i % chunks * a.chunk;
        const int64_t last = first + a.chunk < a.num_patches ? first + a.chunk : a.num_patches;
        const int64_t image = a.image_index ? a.image_index[b] : b;
        double* sums = a.dots + i * a.num_entries;
        for (int e = 0; e < a.num_entries; ++e) sums[e] = 0;
        for (int64_t p = first; p < last; ++p) {
          const Grad* g = static_cast<const Grad*>(a.grad) + b * a.grad_batch_stride + p * a.grad_token_stride;
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

bool layer_grads(DType grad, DType out, const LayerGradsArgs& a, int threads) {
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
        for (int s = 0; s < a.num_signatures; ++s) {
          Out* sum = static_cast<Out*>(a.grads[s]) + t * a.width;
          for (int64_t d = 0; d < a.width; d += V::width) {
            const int64_t n = a.width - d;
            V total = V::set(0);
            for (int64_t i = first; i < last; ++i) {
              const int64_t b = a.image_rows[i];
              const Grad* row = static_cast<const Grad*>(a.grad) + b * a.grad_batch_stride + p * a.grad_token_stride;
              const S* weights = static_cast<const S*>(a.weights.data) + b * a.weights.row_stride;
              for (int e = a.signature_begin[s]; e < a.signature_begin[s + 1]; ++e) {
                const GradEntry& entry = a.entries[e];
                S factor = S(entry.scale);
                if (entry.column >= 0) factor *= weights[entry.column * a.weights.column_stride];
                total = fma(V::set(factor), load<V>(row + entry.block * a.width + d, n), total);
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
