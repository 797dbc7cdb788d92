#include "weighted_mix/bindings.h"

#include "cuda/host.h"
#include "weighted_mix/cuda/program.h"

namespace py = pybind11;

namespace igva {

namespace {

using namespace cuda;

// Where the mixed rows and the sums of one launch are written; without rows the sums alone.
struct MixOutput {
  DType dtype;
  void* rows;
  void* raw_rows; // the rows before the norm, or null
  std::vector<Address> sums;
};

// The gradient of the mix weights: [B, columns], and the sums over chunks of patches that it is made of.
struct WeightsGrad {
  int64_t columns;
  void* data;
  double* partials;
  int32_t chunk; // patches per chunk
};

void run_mix(const MixProgram& program, const Layers& layers, const std::optional<MixWeights>& weights, const Batch& batch,
             const MixOutput& out, const Norm* norm, bool vector, Address stream) {
  MixParams params = program.params(layers, or_null(weights), batch, out.sums);
  params.out = out.dtype;
  params.rows = out.rows;
  params.raw_rows = out.raw_rows;
  if (norm) check(mix_norm(params, *norm, layers.dtype, vector, pointer(stream)), "mix_norm");
  else check(cuda::mix(params, layers.dtype, vector, pointer(stream)), "mix");
}

void run_mix_weights_grad(const View& grad, const Dots& dots, const Layers& layers, const Batch& batch,
                          const WeightsGrad& out, bool vector, Address stream) {
  DotsParams params = dots_params(dots, layers, batch, out.columns);
  params.chunk = out.chunk;
  params.grad = grad;
  params.partials = out.partials;
  params.grad_weights = out.data;
  check(cuda::mix_weights_grad(params, layers.dtype, vector, pointer(stream)), "mix_weights_grad");
}

void run_layer_grads(const View& grad, const Shares& shares, const std::optional<MixWeights>& weights,
                     const Batch& batch, const LayerShape& shape, const std::vector<Address>& grads, bool vector, Address stream) {
  LayerGradsParams params = {};
  params.weights = weights.value_or(MixWeights{});
  check_shares(shares, params.weights, grads.size());
  check_capacity(grads.size(), max_grads, "different layer gradients");
  check_capacity(shares.ends.size(), max_shares, "entries in all layer gradients together");
  for (size_t i = 0; i < shares.ends.size(); ++i) {
    params.shares[i] = {shares.blocks[i], shares.columns[i], shares.scales[i]};
    if (shares.ends[i]) params.share_end[params.num_grads++] = uint8_t(i + 1);
  }
  for (size_t s = 0; s < grads.size(); ++s) params.grads[s] = pointer(grads[s]);
  params.image_index = batch.image_index;
  params.batch = int32_t(batch.rows);
  params.num_images = int32_t(shape.images);
  count32(shape.images * shape.tokens);
  params.num_tokens = int32_t(shape.tokens);
  params.skip = int32_t(shape.skip);
  params.width = int32_t(shape.width);
  params.out = shape.dtype;
  params.grad = grad;
  check(cuda::layer_grads(params, vector, pointer(stream)), "layer_grads");
}

} // namespace

void bind_weighted_mix(py::module_& m) {
  py::class_<MixProgram>(m, "MixProgram", py::module_local())
      .def(py::init<const Steps&, bool>(), py::arg("steps"), py::arg("keep_sums"));
  py::class_<MixOutput>(m, "MixOutput", py::module_local())
      .def(py::init([](DType dtype, Address rows, Address raw_rows, const std::vector<Address>& sums) {
             return MixOutput{dtype, pointer(rows), pointer(raw_rows), sums};
           }),
           py::arg("dtype"), py::arg("rows"), py::arg("raw_rows"), py::arg("sums"));
  py::class_<WeightsGrad>(m, "WeightsGrad", py::module_local())
      .def(py::init([](int64_t columns, Address data, Address partials, int32_t chunk) {
             return WeightsGrad{columns, pointer(data), pointer<double>(partials), chunk};
           }),
           py::arg("columns"), py::arg("data"), py::arg("partials"), py::arg("chunk"));
  m.attr("LIMITS") = py::dict(py::arg("layers") = max_layers, py::arg("entries") = max_entries,
                              py::arg("terms") = max_terms, py::arg("sums") = max_sums, py::arg("dots") = max_dots,
                              py::arg("grads") = max_grads, py::arg("shares") = max_shares);
  m.def("mix", run_mix);
  m.def("mix_weights_grad", run_mix_weights_grad);
  m.def("layer_grads", run_layer_grads);
#ifdef IGVA_HOPPER
  bind_gemm_sm90(m);
#endif
}

} // namespace igva
