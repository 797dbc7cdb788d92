#include "inject_tokens/bindings.h"

#include "common/bindings.h"
#include "cuda/host.h"
#include "inject_tokens/cuda/params.h"

namespace py = pybind11;

namespace igva {

namespace {

using namespace cuda;

void run_inject(Ints3 shape, const View& hidden, const std::optional<Matrix>& features, Address rows, Address gate,
                bool one_gate, bool replace, bool vector, Address out, Address stream) {
  const InjectParams params = {hidden,
                               features.value_or(Matrix{hidden.dtype, nullptr, INT32_MAX}),
                               pointer<int32_t>(rows),
                               {pointer(gate), one_gate ? 0 : 1},
                               pointer(out),
                               count32(shape[0] * shape[1]),
                               count32(shape[1]),
                               count32(shape[2]),
                               replace};
  check(cuda::inject(params, vector, pointer(stream)), "inject");
}

void run_features_grad(Ints3 shape, const View& grad, const std::optional<Matrix>& features, int64_t num_features,
                       Address positions, Address gate, bool one_gate, bool vector, Address grad_features,
                       Address row_dots, Address stream) {
  const FeaturesGradParams params = {grad,
                                     features.value_or(Matrix{}),
                                     pointer<int32_t>(positions),
                                     {pointer(gate), one_gate ? 0 : 1},
                                     pointer(grad_features),
                                     pointer(row_dots),
                                     count32(num_features),
                                     count32(shape[1]),
                                     count32(shape[2])};
  check(cuda::features_grad(params, vector, pointer(stream)), "features_grad");
}

} // namespace

void bind_inject_tokens(py::module_& m) {
  m.def("inject", run_inject);
  m.def("features_grad", run_features_grad);
}

} // namespace igva
