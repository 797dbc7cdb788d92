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

template <class V, class T>
inline V load(const T* p, int64_t n) {
  if (n >= V::width) return V::load(p);
  T lanes[V::width] = {};
  memcpy(lanes, p, n * sizeof(T));
  return V::load(lanes);
}

template <class V, class T>
inline void store(V v, T* p, int64_t n) {
  if (n >= V::width) return v.store(p);
  T lanes[V::width];
  v.store(lanes);
  memcpy(p, lanes, n * sizeof(T));
}

// ---- mix -----------------------------------------------------------------------------------------------------------

// Columns d..d+n of one layer's row; partial vectors only with U = 1. While this row is summed, the same columns of the
// next token are on their way.
template <class V, int U, class In, class F>
inline void for_each_vector(const In* row, int64_t token_stride, int64_t d, int64_t n, F f) {
  constexpr int64_t line = 64 / sizeof(In);
  const In* x = row + d;
  for (int64_t i = 0; i < U * V::width; i += line) prefetch(x + token_stride + i);
  for (int u = 0; u < U; ++u) f(u, load<V>(x + u * V::width, U == 1 ? n : int64_t(V::width)));
}

// Columns d..d+n of one block of one row.
template <class V, int U, class In>
inline void mix_columns(const Program& program, int block, const In* const* rows, const Layer* layers,
                        const typename V::Scalar* weights, int64_t column_stride, int64_t d, int64_t n, V* mixed) {
  const int first = program.block_begin[block], last = program.block_begin[block + 1];
  for (int t = first; t < last; ++t) {
    const Term& term = program.terms[t];
    V sum[U];
    int layer = program.term_layers[term.begin];
    for_each_vector<V, U>(rows[layer], layers[layer].token_stride, d, n, [&](int u, V x) { sum[u] = x; });
    for (int i = term.begin + 1; i < term.end; ++i) {
      layer = program.term_layers[i];
      for_each_vector<V, U>(rows[layer], layers[layer].token_stride, d, n, [&](int u, V x) { sum[u] = sum[u] + x; });
    }
    const V scale = V::set(typename V::Scalar(term.scale));
    for (int u = 0; u < U; ++u) {
      if (term.scale != 1.0) sum[u] = sum[u] * scale;
      if (term.column >= 0) {
        const V weight = V::set(weights[term.column * column_stride]);
        mixed[u] = t == first ? weight * sum[u] : fma(weight, sum[u], mixed[u]);
      } else {
        mixed[u] = t == first ? sum[u] : mixed[u] + sum[u];
      }
    }
  }
}

template <class V, bool stream, class In, class Out>
inline void mix_block(const Program& program, int block, const In* const* rows, const Layer* layers,
                      const typename V::Scalar* weights, int64_t column_stride, int64_t width, Out* out) {
  constexpr int U = 4;
  V mixed[U];
  int64_t d = 0;
  for (; d + U * V::width <= width; d += U * V::width) {
    mix_columns<V, U>(program, block, rows, layers, weights, column_stride, d, U * V::width, mixed);
    for (int u = 0; u < U; ++u) {
      if constexpr (stream) mixed[u].stream(out + d + u * V::width);
      else mixed[u].store(out + d + u * V::width);
    }
  }
  for (; d < width; d += V::width) {
    mix_columns<V, 1>(program, block, rows, layers, weights, column_stride, d, width - d, mixed);
    store(mixed[0], out + d, width - d);
  }
}

template <class V, class Out>
inline void normalize(const typename V::Scalar* row, int64_t n, const MixArgs& a, int64_t m, Out* out, Out* raw) {
  using S = typename V::Scalar;
  V total = V::set(0), square = V::set(0);
  for (int64_t i = 0; i < n; i += V::width) total = total + load<V>(row + i, n - i);
  const S mean = total.sum() / S(n);
  const V centre = V::set(mean);
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    const V x = V::load(row + i) - centre;
    square = fma(x, x, square);
  }
  S variance = square.sum();
  for (; i < n; ++i) variance += (row[i] - mean) * (row[i] - mean);
  const S rstd = S(1 / sqrt(double(variance / S(n)) + a.eps));
  static_cast<S*>(a.mean)[m] = mean;
  static_cast<S*>(a.rstd)[m] = rstd;
  const S* weight = static_cast<const S*>(a.norm_weight);
  const S* bias = static_cast<const S*>(a.norm_bias);
  for (i = 0; i < n; i += V::width) {
    const V x = load<V>(row + i, n - i);
    if (raw) store(x, raw + i, n - i);
    V y = (x - centre) * V::set(rstd);
    if (weight) y = y * load<V>(weight + i, n - i);
    if (bias) y = y + load<V>(bias + i, n - i);
    store(y, out + i, n - i);
  }
}

template <class V, bool stream, class In, class Out>
void mix_rows(const MixArgs& a, int threads) {
  using S = typename V::Scalar;
  const Program& program = a.program;
  const int64_t row_width = program.num_blocks * a.width;
  const RowGroups& groups = a.groups;
  parallel_for(a.end_row - a.first_row, threads, [&](int64_t begin, int64_t end, int thread) {
    begin += a.first_row, end += a.first_row;
    if (begin == end) return;
    const In** rows = reinterpret_cast<const In**>(a.row_pointers + thread * program.num_layers);
    int64_t group = 0;
    while (groups.begin[group + 1] * a.num_patches <= begin) ++group;
    int64_t size = groups.begin[group + 1] - groups.begin[group];
    // Position t of the grouped order is patch `patch` for member `member` of its group.
    int64_t patch = (begin - groups.begin[group] * a.num_patches) / size;
    int64_t member = (begin - groups.begin[group] * a.num_patches) % size;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t image = groups.images[group];
      if (member == 0 || t == begin) {
        for (int l = 0; l < program.num_layers; ++l) {
          const Layer& layer = a.layers[l];
          rows[l] = static_cast<const In*>(layer.data) + image * layer.image_stride + patch * layer.token_stride;
        }
      }
      if (member == 0) {
        for (int s = 0; s < program.num_sums; ++s) {
          In* sum = static_cast<In*>(a.sums[s]) + (image * a.num_patches + patch) * a.width;
          mix_block<V, stream>(program, program.num_blocks + s, rows, a.layers, nullptr, 0, a.width, sum);
        }
      }
      const int64_t b = groups.rows[groups.begin[group] + member], m = b * a.num_patches + patch;
      const S* weights = static_cast<const S*>(a.weights.data) + b * a.weights.row_stride;
      Out* out = static_cast<Out*>(a.rows) + (m - a.first_row) * row_width;
      if (a.normalize) {
        S* row = static_cast<S*>(a.scratch) + thread * row_width;
        for (int g = 0; g < program.num_blocks; ++g) {
          mix_block<V, false>(program, g, rows, a.layers, weights, a.weights.column_stride, a.width, row + g * a.width);
        }
        Out* raw = a.raw_rows ? static_cast<Out*>(a.raw_rows) + (m - a.first_row) * row_width : nullptr;
        normalize<V>(row, row_width, a, m, out, raw);
      } else {
        for (int g = 0; g < program.num_blocks; ++g) {
          mix_block<V, stream>(program, g, rows, a.layers, weights, a.weights.column_stride, a.width, out + g * a.width);
        }
      }
      if (++member < size) continue;
      member = 0;
      if (++patch < a.num_patches) continue;
      patch = 0;
      if (++group < groups.count) size = groups.begin[group + 1] - groups.begin[group];
    }
  });
}

bool mix(DType in, DType out, const MixArgs& args, int threads) {
  return dispatch(in, out, [&](auto x, auto y) {
    using V = typename VecOf<decltype(x)>::type;
    if (args.stream) mix_rows<V, true, decltype(x), decltype(y)>(args, threads);
    else mix_rows<V, false, decltype(x), decltype(y)>(args, threads);
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
  constexpr int U = V::width == 1 ? 16 : 4;
  V sums[U];
  for (int u = 0; u < U; ++u) sums[u] = V::set(0);
  int64_t i = 0;
  for (; i + U * V::width <= n; i += U * V::width) {
    for (int u = 0; u < U; ++u) {
      sums[u] = fma(V::load(a + i + u * V::width), V::load(b + i + u * V::width), sums[u]);
    }
  }
  for (; i < n; i += V::width) sums[0] = fma(load<V>(a + i, n - i), load<V>(b + i, n - i), sums[0]);
  for (int stride = U / 2; stride > 0; stride /= 2) {
    for (int u = 0; u < stride; ++u) sums[u] = sums[u] + sums[u + stride];
  }
  return sums[0].sum();
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
