// Features into the hidden states of a language model, and the gradients of the features and of their gate.
//
//   out[b, t] = hidden[b, t] + gate * features[rows[b, t]], rounded once; the bits of hidden[b, t] where the row is -1
//
// Every thread of the forward owns one vector of a token. Modelled floor (T 4096, H 4096, V 3000, bf16, 4.3 TB/s; not
// measured): the states read and written, the features read = 92 MB = 21 us. The gradient of the features reads and
// writes 25 MB each, one block per row, so that the row's share of the gate's gradient is a sum in a fixed order.
#include "cuda/common.cuh"
#include "inject_tokens/cuda/params.h"

namespace igva::cuda {

template <class T>
__device__ inline const T* token_of(const View& view, int32_t at, int32_t tokens) {
  const int32_t b = at / tokens, t = at - b * tokens;
  return static_cast<const T*>(view.data) + b * view.batch_stride + t * view.token_stride;
}

template <class T>
__device__ inline const T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}

template <class W>
__device__ inline W gate_of(const Gate& gate, int64_t row) {
  return gate.data == nullptr ? W(1) : static_cast<const W*>(gate.data)[row * gate.stride];
}

template <class T, int V>
__global__ void __launch_bounds__(block_threads) inject_kernel(const __grid_constant__ InjectParams params) {
  using W = Wide<T>;
  const Place at = place(blockIdx.x, threadIdx.x, params.width / V);
  if (at.row >= params.num_tokens) return;
  const int d = at.vector * V;
  const int32_t row = params.rows[at.row];
  const T* hidden = token_of<T>(params.hidden, int32_t(at.row), params.tokens) + d;
  T* out = static_cast<T*>(params.out) + at.row * params.width + d;

  if (row == -1) { // moved, never computed with
    *reinterpret_cast<Vector<T, V>*>(out) = *reinterpret_cast<const Vector<T, V>*>(hidden);
    return;
  }
  W sum[V] = {};
  if (row < 0 || row >= params.features.rows) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = W(NAN);
  } else if (params.features.data != nullptr) {
    W value[V];
    load<V>(row_of<T>(params.features, row) + d, value);
    if (!params.replace) load<V>(hidden, sum);
    const W gate = gate_of<W>(params.gate, row);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = params.replace ? gate * value[i] : sum[i] + gate * value[i];
  }
  store<V>(out, sum);
}

template <class T, int V>
__global__ void __launch_bounds__(block_threads)
    features_grad_kernel(const __grid_constant__ FeaturesGradParams params) {
  using W = Wide<T>;
  __shared__ W scratch[block_threads / 32];
  const int64_t row = blockIdx.x;
  const int32_t position = params.positions[row];
  const bool is_taken = position >= 0;
  const W otherwise = position == -1 ? W(0) : W(NAN);
  const T* grad = is_taken ? token_of<T>(params.grad, position, params.tokens) : nullptr;
  const bool needs_dot = params.row_dots != nullptr; // the features of a width of 0 have no address
  T* out = params.grad_features == nullptr ? nullptr : static_cast<T*>(params.grad_features) + row * params.width;
  const W gate = gate_of<W>(params.gate, row);

  W dot = 0;
  for (int d = threadIdx.x * V; d < params.width; d += block_threads * V) {
    W value[V];
    if (is_taken) load<V>(grad + d, value);
    if (is_taken && needs_dot) {
      W feature[V];
      load<V>(row_of<T>(params.features, row) + d, feature);
#pragma unroll
      for (int i = 0; i < V; ++i) dot += value[i] * feature[i];
    }
    if (out == nullptr) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = is_taken ? gate * value[i] : otherwise;
    store<V>(out + d, value);
  }
  if (!needs_dot) return;
  dot = block_sum(dot, scratch);
  if (threadIdx.x == 0) static_cast<W*>(params.row_dots)[row] = is_taken ? dot : otherwise;
}

int inject(const InjectParams& params, bool vector, Stream stream) {
  return with_type(params.hidden.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int V = vector_width<T>;
    const dim3 grid(blocks_for(int64_t(params.num_tokens) * (vector ? params.width / V : params.width)));
    return launch(vector ? inject_kernel<T, V> : inject_kernel<T, 1>, grid, block_threads, 0, stream, params);
  });
}

int features_grad(const FeaturesGradParams& params, bool vector, Stream stream) {
  return with_type(params.grad.dtype, [&](auto type) {
    using T = decltype(type);
    return launch(vector ? features_grad_kernel<T, vector_width<T>> : features_grad_kernel<T, 1>,
                  dim3(unsigned(params.num_features)), block_threads, 0, stream, params);
  });
}

} // namespace igva::cuda
