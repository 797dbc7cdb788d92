// The injection: every token is read and written once; a token without features keeps its bits.
#pragma once

#include "cpu/parallel.h"
#include "cpu/vector_loops.h"
#include "inject_tokens/cpu/table.h"

namespace {

using namespace igva::cpu;

// Whether rows of this many bytes can be written around the cache: every row has to start at a multiple of 64.
inline bool is_streamable(int64_t row_bytes) { return row_bytes % 64 == 0; }

template <class V, bool stream, class T>
inline void copy_bits(const T* from, int64_t n, T* to) {
  if constexpr (!stream || V::width == 1) {
    if (n) memcpy(to, from, n * sizeof(T)); // an empty tensor has no address
  } else {
    const float* words = reinterpret_cast<const float*>(from); // moved, never computed with
    const int64_t count = n * sizeof(T) / sizeof(float);
    for (int64_t i = 0; i < count; i += V::width) V::load(words + i).stream(reinterpret_cast<float*>(to) + i);
  }
}

template <class T>
inline void clear(T* to, int64_t n) {
  if (n) memset(to, 0, n * sizeof(T));
}

template <class V, bool stream, class T>
inline void write(V v, T* to, int64_t n) {
  if constexpr (stream) v.stream(to);
  else store(v, to, n);
}

template <class T>
inline const T* token_of(const View& view, int64_t b, int64_t t) {
  return static_cast<const T*>(view.data) + b * view.batch_stride + t * view.token_stride;
}

template <class S>
inline S gate_of(const Taken& taken, int64_t row) {
  return static_cast<const S*>(taken.gate)[taken.one_gate ? 0 : row];
}

// to = [hidden +] [gate *] features
template <class V, bool stream, class T>
inline void combine(const T* hidden, const T* features, const V* gate, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += V::width) {
    V v = load<V>(features + i, n - i);
    if (gate) v = hidden ? fma(*gate, v, load<V>(hidden + i, n - i)) : *gate * v;
    else v = load<V>(hidden + i, n - i) + v;
    write<V, stream>(v, to + i, n - i);
  }
}

template <class V, bool stream, class T>
void inject_rows(const InjectJob& job, int threads) {
  const Taken& taken = job.taken;
  const int64_t width = taken.width;
  parallel_for(taken.batch * taken.tokens, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = taken.rows[i];
      const T* hidden = token_of<T>(job.hidden, i / taken.tokens, i % taken.tokens);
      T* out = static_cast<T*>(job.out) + i * width;
      if (row < 0) {
        copy_bits<V, stream>(hidden, width, out);
      } else if (!job.features.data) {
        clear(out, width);
      } else {
        const T* features = static_cast<const T*>(job.features.data) + row * job.features.stride;
        if (job.replace && !taken.gate) {
          copy_bits<V, stream>(features, width, out);
          continue;
        }
        V gate = V::set(0);
        if (taken.gate) gate = V::set(gate_of<typename V::Scalar>(taken, row));
        combine<V, stream>(job.replace ? nullptr : hidden, features, taken.gate ? &gate : nullptr, width, out);
      }
    }
    if (stream) stream_fence();
  });
}

bool inject(const InjectJob& job, int threads) {
  return dispatch(job.hidden.dtype, [&](auto x) {
    using T = decltype(x);
    using V = typename VecOf<T>::type;
    if (job.stream && is_streamable(job.taken.width * sizeof(T))) inject_rows<V, true, T>(job, threads);
    else inject_rows<V, false, T>(job, threads);
  });
}

template <class V, bool stream, class T>
void features_grad_rows(const FeaturesGradJob& job, int threads) {
  using S = typename V::Scalar;
  const Taken& taken = job.taken;
  const int64_t width = taken.width;
  parallel_for(job.features.rows, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = taken.positions[row];
      const T* grad = at < 0 ? nullptr : token_of<T>(job.grad, at / taken.tokens, at % taken.tokens);
      if (job.row_dots) {
        const T* features = static_cast<const T*>(job.features.data) + row * job.features.stride;
        static_cast<S*>(job.row_dots)[row] = !grad ? S(0) : sum_over<V>(width, [&](V sum, int64_t i) {
          return fma(load<V>(grad + i, width - i), load<V>(features + i, width - i), sum);
        });
      }
      if (!job.grad_features) continue;
      T* out = static_cast<T*>(job.grad_features) + row * width;
      if (!grad) {
        clear(out, width);
      } else if (taken.gate) {
        const V gate = V::set(gate_of<S>(taken, row));
        combine<V, stream>(static_cast<const T*>(nullptr), grad, &gate, width, out);
      } else {
        copy_bits<V, stream>(grad, width, out);
      }
    }
    if (stream) stream_fence();
  });
  if (!job.gate_sum) return;
  double sum = 0; // one after the other: the same bits with any number of threads
  for (int64_t row = 0; row < job.features.rows; ++row) sum += static_cast<const S*>(job.row_dots)[row];
  *static_cast<S*>(job.gate_sum) = S(sum);
}

bool features_grad(const FeaturesGradJob& job, int threads) {
  return dispatch(job.grad.dtype, [&](auto x) {
    using T = decltype(x);
    using V = typename VecOf<T>::type;
    if (job.stream && is_streamable(job.taken.width * sizeof(T))) features_grad_rows<V, true, T>(job, threads);
    else features_grad_rows<V, false, T>(job, threads);
  });
}

} // namespace
