#include "inject_tokens/bindings.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/bindings.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace igva {

namespace {

using namespace cpu;

// Fills positions[v] with the token that takes row v, -1 for none.
void find_positions(const int32_t* rows, int64_t tokens, int64_t num_features, int32_t* positions) {
  std::fill(positions, positions + num_features, -1);
  for (int64_t i = 0; i < tokens; ++i) {
    const int32_t row = rows[i];
    if (row == -1) continue;
    if (row < -1 || row >= num_features) {
      throw std::invalid_argument("token_rows: need values from -1 to " + std::to_string(num_features - 1) +
                                  ", the rows of the features, got a value out of this range");
    }
    if (positions[row] >= 0) {
      throw std::invalid_argument("token_rows: no two tokens may take the same row of the features");
    }
    positions[row] = int32_t(i);
  }
}

// Without `positions` the rows have been checked before.
Taken take(Ints3 shape, Address rows, Address positions, int64_t num_features, Address gate, bool one_gate) {
  if (shape[0] * shape[1] > INT32_MAX) throw std::invalid_argument("the CPU kernels count tokens in 32 bits");
  if (positions) find_positions(pointer<int32_t>(rows), shape[0] * shape[1], num_features, pointer<int32_t>(positions));
  return {shape[0], shape[1], shape[2], pointer<int32_t>(rows), pointer<int32_t>(positions), pointer(gate), one_gate};
}

void inject(Ints3 shape, const View& hidden, const std::optional<Matrix>& features, Address rows, Address positions,
            Address gate, bool one_gate, bool replace, bool stream, Address out, int threads) {
  py::gil_scoped_release release;
  const Taken taken = take(shape, rows, positions, features ? features->rows : 0, gate, one_gate);
  const InjectJob job = {taken, hidden, features.value_or(Matrix{}), replace, stream, pointer(out)};
  threads = threads_for(shape[0] * shape[1] * shape[2], threads);
  check_served(kernels_for(hidden.dtype).inject.inject(job, threads));
}

void features_grad(Ints3 shape, const View& grad, const std::optional<Matrix>& features, int64_t num_features,
                   Address rows, Address positions, Address gate, bool one_gate, bool stream, Address grad_features,
                   Address row_dots, Address gate_sum, int threads) {
  py::gil_scoped_release release;
  const Taken taken = take(shape, rows, positions, num_features, gate, one_gate);
  Matrix read = features.value_or(Matrix{});
  read.rows = num_features;
  const FeaturesGradJob job = {taken, grad, read, stream, pointer(grad_features), pointer(row_dots),
                               pointer(gate_sum)};
  threads = threads_for(num_features * shape[2], threads);
  check_served(kernels_for(grad.dtype).inject.features_grad(job, threads));
}

} // namespace

void bind_inject_tokens(py::module_& m) {
  m.def("inject", inject);
  m.def("features_grad", features_grad);
}

} // namespace igva
