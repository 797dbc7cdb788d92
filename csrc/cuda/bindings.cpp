// The Python module `igva_kernels._cuda`: raw addresses and a stream in, work queued, nothing allocated, no torch.
//
// It links the CUDA runtime statically and touches no driver until the first launch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "igva/cuda_args.h"
#include "runtime.h"
#ifdef IGVA_HOPPER
#include "gemm_sm90.h"
#endif

#ifndef IGVA_CUDA_MODULE
#define IGVA_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
using namespace igva;
using namespace igva::cuda;

namespace {

using Address = uintptr_t;
using LayerTuple = std::tuple<Address, int64_t, int64_t>;   // data, image stride, token stride
using WeightsTuple = std::tuple<Address, int64_t, int64_t>; // data, row stride, column stride
using View = std::tuple<Address, int64_t, int64_t>;         // data, batch stride, token stride

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

const int64_t* index_pointer(Address address) { return reinterpret_cast<const int64_t*>(address); }

void check_capacity(size_t count, size_t capacity, const char* what) {
  if (count > capacity) {
    throw py::value_error(std::string("the CUDA kernels take at most ") + std::to_string(capacity) + " " + what + ", got " +
                          std::to_string(count));
  }
}

// Kernels count rows in 32 bits, and elements in 64.
int32_t count32(int64_t count) {
  if (count > INT32_MAX - 512) throw py::value_error("the CUDA kernels count rows in 32 bits, got " + std::to_string(count));
  return int32_t(count);
}

void check(int error, const char* what) {
  if (error == 0) return;
  throw std::runtime_error(std::string("igva_kernels: CUDA fails at ") + what + ": " + error_name(error));
}

void fill_layers(Layer* layers, const std::vector<LayerTuple>& tuples, int64_t skip, int64_t element) {
  for (const auto& [data, image_stride, token_stride] : tuples) {
    *layers++ = {reinterpret_cast<const char*>(data) + skip * token_stride * element, image_stride, token_stride};
  }
}

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

MixWeights weights_of(const WeightsTuple& tuple) {
  const auto& [data, row_stride, column_stride] = tuple;
  return {pointer(data), row_stride, column_stride};
}

// A plan in the form in which kernels take it; made once a plan. A block is a list of parts (column or -1, kept sum or -1,
// terms), a term (scale, layers).
class MixProgram {
 public:
  using TermTuple = std::tuple<double, std::vector<int>>;
  using PartTuple = std::tuple<int, int, std::vector<TermTuple>>;

  explicit MixProgram(const std::vector<std::vector<PartTuple>>& blocks) : params_() {
    size_t entries = 0, terms = 0;
    for (const auto& block : blocks) {
      for (const auto& [column, sum, part] : block) {
        for (const auto& [scale, layers] : part) {
          check_capacity(entries + layers.size(), max_entries, "layers in all blocks together");
          check_capacity(terms + 1, max_terms, "terms");
          check_capacity(size_t(column + 1), INT16_MAX, "weight columns");
          for (int layer : layers) {
            if (layer < 0) throw py::value_error("plan: its layers must be resolved, got " + std::to_string(layer));
            num_layers_ = std::max(num_layers_, size_t(layer) + 1);
            check_capacity(num_layers_, max_layers, "layers");
            params_.entries[entries++] = uint8_t(layer);
          }
          params_.terms[terms++] = {scale, int16_t(column), uint8_t(entries), -1, false, false};
        }
        params_.terms[terms - 1].sum = int8_t(sum);
        params_.terms[terms - 1].ends_part = true;
      }
      params_.terms[terms - 1].ends_block = true;
    }
    params_.num_terms = int32_t(terms);
    params_.num_blocks = int32_t(blocks.size());
  }

  MixParams params_;
  size_t num_layers_ = 0; // that the terms name
};

MixParams mix_params(const MixProgram& program, const std::vector<LayerTuple>& layers, int64_t skip, DType in,
                     const WeightsTuple& weights, Address image_index, int64_t images, int64_t batch, int64_t patches,
                     int64_t width, Address rows, DType out, const std::vector<Address>& sums) {
  check_capacity(layers.size(), max_layers, "layers");
  if (layers.size() < program.num_layers_) {
    throw py::value_error("plan: it names layer " + std::to_string(program.num_layers_ - 1) + ", got " +
                          std::to_string(layers.size()));
  }
  check_capacity(sums.size(), max_sums, "kept sums");
  MixParams params = program.params_;
  fill_layers(params.layers, layers, skip, size_of(in));
  for (size_t i = 0; i < sums.size(); ++i) params.sums[i] = pointer(sums[i]);
  params.weights = weights_of(weights);
  params.image_index = index_pointer(image_index);
  params.num_images = images;
  params.num_rows = count32(batch * patches);
  params.num_patches = int32_t(patches);
  params.width = int32_t(width);
  params.out = out;
  params.rows = pointer(rows);
  return params;
}

void run_mix(const MixProgram& program, const std::vector<LayerTuple>& layers, int64_t skip, DType in,
             const WeightsTuple& weights, Address image_index, int64_t images, int64_t batch, int64_t patches,
             int64_t width, Address rows, DType out, const std::vector<Address>& sums, bool vector, Address stream) {
  check(mix(mix_params(program, layers, skip, in, weights, image_index, images, batch, patches, width, rows, out, sums),
            in, vector, pointer(stream)),
        "mix");
}

void run_mix_norm(const MixProgram& program, const std::vector<LayerTuple>& layers, int64_t skip, DType in,
                  const WeightsTuple& weights, Address image_index, int64_t images, int64_t batch, int64_t patches,
                  int64_t width, Address rows, DType out, const std::vector<Address>& sums, Address norm_weight,
                  DType norm_weight_dtype, Address norm_bias, DType norm_bias_dtype, double eps, Address raw_rows,
                  Address mean, Address rstd, bool vector, Address stream) {
  const NormParams norm = {pointer(norm_weight), pointer(norm_bias), norm_weight_dtype, norm_bias_dtype, eps,
                           pointer(raw_rows),    pointer(mean),      pointer(rstd)};
  check(mix_norm(
      mix_params(program, layers, skip, in, weights, image_index, images, batch, patches, width, rows, out, sums), norm,
      in, vector, pointer(stream)), "mix_norm");
}

void run_norm_grad(DType dtype, int64_t rows, int64_t width, Address grad, Address row_values, Address mean, Address rstd,
                   Address weight, DType weight_dtype, Address grad_rows, Address partials, int64_t chunk, bool vector,
                   Address stream) {
  const NormGradParams params = {rows,          int32_t(width), pointer(grad),   pointer(row_values),
                                 pointer(mean), pointer(rstd),  pointer(weight), weight_dtype,
                                 pointer(grad_rows), pointer(partials), int32_t(chunk)};
  check(norm_grad(params, dtype, vector, pointer(stream)), "norm_grad");
}

void run_activation(DType dtype, Activation kind, int64_t count, Address z, Address y, Address stream) {
  check(activation({count, kind, pointer(z), pointer(y)}, dtype, pointer(stream)), "activation");
}

void run_activation_grad(DType dtype, Activation kind, int64_t rows, int64_t columns, Address grad_y, Address z,
                         Address grad_z, Address y, Address partials, int64_t chunk, bool vector, Address stream) {
  const ActivationGradParams params = {rows,            int32_t(columns), kind,
                                       pointer(grad_y), pointer(z),       pointer(grad_z),
                                       pointer(y),      pointer(partials), int32_t(chunk)};
  check(activation_grad(params, dtype, vector, pointer(stream)), "activation_grad");
}

// (block, layer, column, scale)
using DotTuple = std::tuple<int, int, int, double>;

DotsParams dots_params(const std::vector<LayerTuple>& layers, const std::vector<DotTuple>& dots, Address image_index,
                       int64_t images, int64_t batch, int64_t patches, int64_t width, int64_t columns, Address partials) {
  check_capacity(dots.size(), max_dots, "weighted entries over the reduced sources");
  DotsParams params = {};
  for (const auto& [block, layer, column, scale] : dots) {
    const auto& [data, image_stride, token_stride] = layers.at(layer);
    params.layers[params.num_dots] = {pointer(data), image_stride, token_stride};
    params.dots[params.num_dots++] = {block, int16_t(layer), int16_t(column), scale};
  }
  params.num_columns = int32_t(columns);
  params.image_index = index_pointer(image_index);
  params.num_images = images;
  params.batch = int32_t(batch);
  count32(batch * patches);
  params.num_patches = int32_t(patches);
  params.width = int32_t(width);
  params.partials = static_cast<double*>(pointer(partials));
  return params;
}

void run_mix_weights_grad(DType grad_dtype, DType in, const View& grad, const std::vector<LayerTuple>& layers,
                          const std::vector<DotTuple>& dots, Address image_index, int64_t images, int64_t batch,
                          int64_t patches, int64_t width, int64_t chunk, int64_t columns, Address partials, Address out,
                          bool vector, Address stream) {
  DotsParams params = dots_params(layers, dots, image_index, images, batch, patches, width, columns, partials);
  params.chunk = int32_t(chunk);
  params.grad = pointer(std::get<0>(grad));
  params.grad_batch_stride = std::get<1>(grad);
  params.grad_token_stride = std::get<2>(grad);
  params.grad_weights = pointer(out);
  check(mix_weights_grad(params, grad_dtype, in, vector, pointer(stream)), "mix_weights_grad");
}

// (block, column or -1, scale)
using ShareTuple = std::tuple<int, int, double>;

void run_layer_grads(DType grad_dtype, DType out, const View& grad, const std::vector<std::vector<ShareTuple>>& signatures,
                     const WeightsTuple& weights, Address image_index, int64_t batch, int64_t images, int64_t tokens,
                     int64_t skip, int64_t width, const std::vector<Address>& grads, bool vector, Address stream) {
  check_capacity(signatures.size(), max_signatures, "different layer gradients");
  LayerGradsParams params = {};
  size_t entries = 0;
  for (size_t s = 0; s < signatures.size(); ++s) {
    check_capacity(entries + signatures[s].size(), max_grad_entries, "entries in all layer gradients together");
    for (const auto& [block, column, scale] : signatures[s]) params.entries[entries++] = {block, column, scale};
    params.signature_end[s] = uint8_t(entries);
    params.grads[s] = pointer(grads.at(s));
  }
  params.num_signatures = int32_t(signatures.size());
  params.image_index = index_pointer(image_index);
  params.weights = weights_of(weights);
  params.batch = int32_t(batch);
  params.num_images = int32_t(images);
  count32(images * tokens);
  params.num_tokens = int32_t(tokens);
  params.skip = int32_t(skip);
  params.width = int32_t(width);
  params.out = out;
  params.grad = pointer(std::get<0>(grad));
  params.grad_batch_stride = std::get<1>(grad);
  params.grad_token_stride = std::get<2>(grad);
  check(layer_grads(params, grad_dtype, vector, pointer(stream)), "layer_grads");
}

#ifdef IGVA_HOPPER
// A tap: (address of its first token, row stride). A block: (map, first column there, position in the mixed row, mixed).
using TapTuple = std::tuple<Address, int64_t>;
using BlockTuple = std::tuple<int, int, int, bool>;

// A GEMM over flat rows; `program`, `layers` and what follows them describe the mixed blocks, `scratch` is F.
void run_gemm_sm90(DType dtype, const std::vector<TapTuple>& taps, const std::vector<BlockTuple>& blocks, int64_t images,
                   int64_t tokens, int64_t skip, int64_t width, const View& weight, int64_t columns, Address bias,
                   Activation kind, Address y, Address z, const std::optional<MixProgram>& program,
                   const std::vector<LayerTuple>& layers, const WeightsTuple& weights, const std::vector<Address>& sums,
                   Address scratch, Address flags, int grid, Address stream) {
  check_capacity(taps.size(), gemm_max_taps, "taps");
  check_capacity(blocks.size(), 2 * gemm_max_taps, "blocks");
  const int64_t rows = count32(images * tokens);
  GemmParams params = {};
  for (const auto& [map, offset, position, mixed] : blocks) {
    params.blocks[params.num_blocks++] = {map, offset, position, mixed};
  }
  for (size_t i = 0; i < taps.size(); ++i) {
    const auto& [data, stride] = taps[i];
    check(describe_matrix(&params.a[i], dtype, pointer(data), rows, width, stride, gemm_tile_m), "the tensor map of a tap");
  }
  const auto& [weight_data, weight_stride, depth] = weight;
  check(describe_matrix(&params.w, dtype, pointer(weight_data), columns, depth, weight_stride, gemm_tile_n / gemm_cluster),
        "the tensor map of the weight");
  if (program) {
    const int64_t f_width = program->params_.num_blocks * width;
    check(describe_matrix(&params.a[taps.size()], dtype, pointer(scratch), rows, f_width, f_width, gemm_tile_m),
          "the tensor map of the scratch");
    params.mix = mix_params(*program, layers, skip, dtype, weights, 0, images, images, tokens - skip, width, scratch,
                            dtype, sums);
  }
  params.width = int32_t(width);
  params.rows = int32_t(rows);
  params.tokens = int32_t(tokens);
  params.skip = int32_t(skip);
  params.columns = int32_t(columns);
  params.grid = grid;
  params.num_mix_layers = int32_t(layers.size());
  params.activation = kind;
  params.bias = pointer(bias);
  params.y = pointer(y);
  params.z = pointer(z);
  params.flags = static_cast<int32_t*>(pointer(flags));
  check(gemm_sm90(params, dtype, pointer(stream)), "gemm_sm90");
}

// One block of the gradient of the mixed row: `weight` is that block, transposed [D, H]; `dots` are sorted by column.
void run_mix_weights_grad_sm90(DType dtype, Address grad_z, int64_t grad_stride, Address weight, int64_t depth,
                               const std::vector<LayerTuple>& layers, const std::vector<DotTuple>& dots,
                               Address image_index, int64_t images, int64_t batch, int64_t patches, int64_t width,
                               int64_t columns, Address partials, int64_t slots, int grid, Address stream) {
  GradGemmParams params = {};
  params.dots = dots_params(layers, dots, image_index, images, batch, patches, width, columns, partials);
  check(describe_matrix(&params.grad_z, dtype, pointer(grad_z), batch * patches, depth, grad_stride, gemm_tile_m),
        "the tensor map of the gradient");
  check(describe_matrix(&params.weight, dtype, pointer(weight), width, depth, depth, gemm_tile_n / gemm_cluster),
        "the tensor map of the weight");
  params.rows = int32_t(batch * patches);
  params.depth = int32_t(depth);
  params.slots = int32_t(slots);
  params.grid = grid;
  check(mix_weights_grad_sm90(params, dtype, pointer(stream)), "mix_weights_grad_sm90");
}
#endif

} // namespace

PYBIND11_MODULE(IGVA_CUDA_MODULE, m) {
  py::enum_<DType>(m, "DType", py::module_local())
      .value("f32", DType::f32)
      .value("bf16", DType::bf16)
      .value("f16", DType::f16)
      .value("f64", DType::f64);
  py::enum_<Activation>(m, "Activation", py::module_local())
      .value("none", Activation::none)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("relu", Activation::relu)
      .value("silu", Activation::silu);
  py::class_<MixProgram>(m, "MixProgram", py::module_local())
      .def(py::init<const std::vector<std::vector<MixProgram::PartTuple>>&>());
  m.attr("LIMITS") = py::dict(py::arg("layers") = max_layers, py::arg("entries") = max_entries,
                              py::arg("terms") = max_terms, py::arg("sums") = max_sums, py::arg("dots") = max_dots,
                              py::arg("signatures") = max_signatures, py::arg("grad_entries") = max_grad_entries);
  m.def("set_device", [](int device) { check(set_device(device), "set_device"); },
        "Makes the current device of torch that of this module.");
  m.def("versions", versions, "(CUDA version of the driver, 0 without one; that of the runtime inside), as 13000.");
  m.def("mix", run_mix);
  m.def("mix_norm", run_mix_norm);
  m.def("norm_grad", run_norm_grad);
  m.def("activation", run_activation);
  m.def("activation_grad", run_activation_grad);
  m.def("mix_weights_grad", run_mix_weights_grad);
  m.def("layer_grads", run_layer_grads);
#ifdef IGVA_HOPPER
  m.attr("GEMM_SM90") = py::dict(py::arg("tile_m") = gemm_tile_m, py::arg("tile_n") = gemm_tile_n,
                                 py::arg("tile_k") = gemm_tile_k, py::arg("cluster") = gemm_cluster,
                                 py::arg("taps") = gemm_max_taps);
  m.def("gemm_sm90", run_gemm_sm90);
  m.def("mix_weights_grad_sm90", run_mix_weights_grad_sm90);
#endif
}
