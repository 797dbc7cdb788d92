#ifdef IGVA_HOPPER

#include <tuple>

#include "cuda/host.h"
#include "weighted_mix/cuda/gemm_sm90.h"
#include "weighted_mix/cuda/program.h"

namespace py = pybind11;

namespace igva::cuda {

namespace {

// (map, first column there, position in the mixed row, mixed)
using BlockTuple = std::tuple<int, int, int, bool>;

// What is done with the products.
struct Epilogue {
  const void* bias; // or null
  Activation activation;
  void* y;
  void* z; // or null
};

// The blocks that are mixed into the scratch F [rows, blocks * D], over the layers that they read.
struct MixedBlocks {
  const MixProgram& program;
  Layers layers;
  std::optional<MixWeights> weights;
  std::vector<Address> sums;
  void* scratch;
  int32_t* counters; // zero, or null: at first_counter of the module's own
  int32_t first_counter;
};

// Columns of a tile, and blocks of the launch.
struct GemmForm {
  int32_t tile_n;
  int32_t grid;
};

// `taps` are the layers that the copy engine reads where they lie, with all tokens.
void run_gemm_sm90(const Layers& taps, const std::vector<BlockTuple>& blocks, const Matrix& weight,
                   const Epilogue& epilogue, const MixedBlocks* mixed, const GemmForm& form, Address stream) {
  check_capacity(taps.views.size(), gemm_max_taps, "taps");
  check_capacity(blocks.size(), 2 * gemm_max_taps, "blocks");
  if (epilogue.activation != Activation::none && epilogue.activation != Activation::gelu) {
    throw py::value_error("gemm_sm90: its epilogue has GELU only");
  }
  if (form.tile_n != gemm_wide && form.tile_n != gemm_narrow) {
    throw py::value_error("gemm_sm90: no tile is " + std::to_string(form.tile_n) + " columns wide");
  }
  const DType dtype = taps.dtype;
  GemmParams params = {};
  params.rows = count32(taps.images * taps.tokens);
  for (const auto& [map, offset, position, is_mixed] : blocks) {
    params.blocks[params.num_blocks++] = {map, offset, position, is_mixed};
  }
  CUtensorMap* a = params.a;
  for (const Layer& tap : taps.views) {
    check(describe_matrix(a++, {dtype, const_cast<void*>(tap.data), params.rows, taps.width, tap.token_stride}, gemm_tile_m),
          "the tensor map of a tap");
  }
  check(describe_matrix(&params.w, weight, form.tile_n / gemm_cluster), "the tensor map of the weight");
  if (mixed) {
    const int64_t f_width = mixed->program.num_blocks() * taps.width;
    check(describe_matrix(a, {dtype, mixed->scratch, params.rows, f_width, f_width}, gemm_tile_m),
          "the tensor map of the scratch");
    params.mix = mixed->program.params(mixed->layers, or_null(mixed->weights), {nullptr, taps.images}, mixed->sums);
    params.mix.out = dtype;
    params.mix.rows = mixed->scratch;
    params.counters = mixed->counters;
    params.first_counter = mixed->first_counter;
  }
  params.width = int32_t(taps.width);
  params.tokens = int32_t(taps.tokens);
  params.skip = int32_t(taps.skip);
  params.columns = int32_t(weight.rows);
  params.grid = form.grid;
  params.activation = epilogue.activation;
  params.bias = epilogue.bias;
  params.y = epilogue.y;
  params.z = epilogue.z;
  check(gemm_sm90(params, form.tile_n, dtype, pointer(stream)), "gemm_sm90");
}

} // namespace

void bind_gemm_sm90(py::module_& m) {
  py::class_<Epilogue>(m, "Epilogue", py::module_local())
      .def(py::init([](Address bias, Activation activation, Address y, Address z) {
             return Epilogue{pointer(bias), activation, pointer(y), pointer(z)};
           }),
           py::arg("bias"), py::arg("activation"), py::arg("y"), py::arg("z"));
  py::class_<MixedBlocks>(m, "MixedBlocks", py::module_local())
      .def(py::init([](const MixProgram& program, const Layers& layers, const std::optional<MixWeights>& weights,
                       const std::vector<Address>& sums, Address scratch, Address counters, int32_t first_counter) {
             return MixedBlocks{program, layers, weights, sums, pointer(scratch), pointer<int32_t>(counters),
                                first_counter};
           }),
           py::keep_alive<1, 2>(), py::arg("program"), py::arg("layers"), py::arg("weights"), py::arg("sums"),
           py::arg("scratch"), py::arg("counters"), py::arg("first_counter"));
  py::class_<GemmForm>(m, "GemmForm", py::module_local())
      .def(py::init([](int32_t tile_n, int32_t grid) { return GemmForm{tile_n, grid}; }), py::arg("tile_n"),
           py::arg("grid"));
  m.attr("GEMM_SM90") = py::dict(
      py::arg("tile_m") = gemm_tile_m, py::arg("wide") = gemm_wide, py::arg("narrow") = gemm_narrow,
      py::arg("tile_k") = gemm_tile_k, py::arg("cluster") = gemm_cluster, py::arg("taps") = gemm_max_taps,
      py::arg("first_flag") = gemm_first_flag, py::arg("counters") = gemm_counters);
  m.def("gemm_sm90", run_gemm_sm90);
}

} // namespace igva::cuda

#endif
