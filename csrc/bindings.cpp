// The Python module `igva_kernels._native`: raw addresses in, nothing allocated for the caller, no torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "igva/args.h"

namespace py = pybind11;
using namespace igva;
using cpu::Kernels;

namespace {

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found = {&cpu::scalar_kernels};
#ifdef IGVA_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(&cpu::avx2_kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      found.push_back(&cpu::avx512_kernels);
    }
  }
#endif
  return found;
}

const std::vector<const Kernels*> supported = supported_kernels();
const Kernels* chosen = supported.back();

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported) names.push_back(kernels->isa);
  return names;
}

void set_isa(const std::string& isa) {
  for (const Kernels* kernels : supported) {
    if (isa == kernels->isa) {
      chosen = kernels;
      return;
    }
  }
  throw py::value_error("isa: this CPU or this build has no " + isa);
}

// fp64 serves tests and gradcheck: scalar code everywhere.
const Kernels& kernels_for(DType dtype) { return dtype == DType::f64 ? cpu::scalar_kernels : *chosen; }

void check(bool served) {
  if (!served) throw std::invalid_argument("igva_kernels: no CPU kernel for this pair of dtypes");
}

// Below this many elements a second thread costs more than it saves.
int threads_for(int64_t elements, int threads) { return elements < (1 << 15) ? 1 : threads; }

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

using Address = uintptr_t;
using LayerTuple = std::tuple<Address, int64_t, int64_t>; // data, image stride, token stride
using WeightsTuple = std::tuple<Address, int64_t, int64_t, int64_t>; // data, row stride, column stride, columns
using TermTuple = std::tuple<int, double, std::vector<int>>;
using BlockList = std::vector<std::vector<TermTuple>>;

std::vector<Layer> to_layers(const std::vector<LayerTuple>& tuples, int64_t skip, DType dtype) {
  std::vector<Layer> layers;
  layers.reserve(tuples.size());
  for (const auto& [data, image_stride, token_stride] : tuples) {
    layers.push_back({pointer<const char>(data) + skip * token_stride * size_of(dtype), image_stride, token_stride});
  }
  return layers;
}

MixWeights to_weights(const WeightsTuple& tuple) {
  const auto& [data, row_stride, column_stride, columns] = tuple;
  return {pointer(data), row_stride, column_stride};
}

// What a plan names must have been handed in: an index beyond that would reach foreign memory.
void check_index(const char* what, int64_t index, int64_t count) {
  if (index < 0 || index >= count) {
    throw py::value_error(std::string("plan: it names ") + what + " " + std::to_string(index) + ", got " +
                          std::to_string(count));
  }
}

// A plan in the tables that the kernels walk; made once a plan.
class PlanProgram {
 public:
  PlanProgram(const BlockList& blocks, const BlockList& sums) {
    for (const BlockList* list : {&blocks, &sums}) {
      for (const auto& block : *list) {
        block_begin_.push_back(int32_t(terms_.size()));
        for (const auto& [column, scale, layers] : block) {
          const auto begin = int32_t(term_layers_.size());
          for (int layer : layers) {
            check_index("layer", layer, INT32_MAX);
            last_layer_ = std::max(last_layer_, layer);
            term_layers_.push_back(layer);
          }
          last_column_ = std::max(last_column_, column);
          longest_term_ = std::max(longest_term_, int32_t(layers.size()));
          terms_.push_back({column, begin, int32_t(term_layers_.size()), scale});
        }
      }
    }
    block_begin_.push_back(int32_t(terms_.size()));
    num_blocks_ = int32_t(blocks.size());
    num_sums_ = int32_t(sums.size());
  }

  // The tables, for so many layers and weight columns.
  Program view(size_t layers, int64_t columns) const {
    check_index("layer", last_layer_, int64_t(layers));
    if (last_column_ >= 0) check_index("weight column", last_column_, columns);
    return {terms_.data(), term_layers_.data(), block_begin_.data(), num_blocks_, num_sums_, longest_term_};
  }

 private:
  std::vector<Term> terms_;
  std::vector<int32_t> term_layers_, block_begin_;
  int32_t num_blocks_, num_sums_, longest_term_ = 0, last_layer_ = -1, last_column_ = -1;
};

// Batch rows sorted by the image they read, in row order within an image.
struct RowsByImage {
  std::vector<int64_t> rows, begin;

  RowsByImage(const int64_t* image_index, int64_t batch, int64_t images) : rows(batch), begin(images + 1, 0) {
    for (int64_t b = 0; b < batch; ++b) ++begin[(image_index ? image_index[b] : b) + 1];
    for (int64_t i = 0; i < images; ++i) begin[i + 1] += begin[i];
    std::vector<int64_t> at(begin.begin(), begin.end() - 1);
    for (int64_t b = 0; b < batch; ++b) rows[at[image_index ? image_index[b] : b]++] = b;
  }
};

void check_image_index(const int64_t* image_index, int64_t batch, int64_t images) {
  if (!image_index && batch > images) {
    throw py::value_error("image_index: need one for " + std::to_string(batch) + " rows of " + std::to_string(images) +
                          " images, got None");
  }
  for (int64_t b = 0; image_index && b < batch; ++b) {
    if (image_index[b] < 0 || image_index[b] >= images) {
      throw py::value_error("image_index: need values from 0 to " + std::to_string(images - 1) +
                            ", the images of the hidden states, got " + std::to_string(image_index[b]) + " in row " +
                            std::to_string(b));
    }
  }
}

struct NormTuple {
  Address weight, bias;
  double eps;
  Address raw_rows, mean, rstd;
};

// Patches a tile whose rows are `row_elements` wide: they fit the first-level cache.
int64_t tile_patches(int64_t row_elements) { return std::clamp<int64_t>((8 << 10) / std::max<int64_t>(row_elements, 1), 1, 16); }

// Elements of scratch a thread for rows of `row_elements`.
int64_t mix_scratch(int64_t row_elements) { return tile_patches(row_elements) * row_elements; }

void mix(const PlanProgram& plan, const std::vector<LayerTuple>& layer_tuples, DType in, DType out,
         const WeightsTuple& weights, Address image_index_address, int64_t images, int64_t batch, int64_t skip,
         int64_t patches, int64_t width, int64_t first_row, int64_t end_row, Address rows,
         const std::vector<Address>& sum_addresses, const std::optional<NormTuple>& norm, Address scratch,
         int64_t scratch_row, bool stream, int threads) {
  const auto* image_index = pointer<const int64_t>(image_index_address);
  check_image_index(image_index, batch, images);
  const Program program = plan.view(layer_tuples.size(), std::get<3>(weights));
  py::gil_scoped_release release;
  const std::vector<Layer> layers = to_layers(layer_tuples, skip, in);
  std::vector<void*> sums;
  for (Address address : sum_addresses) sums.push_back(pointer(address));

  // Rows that share an image are mixed side by side, while its layers are in the cache; a part of the rows in batch
  // order.
  const int64_t step = tile_patches(scratch_row);
  std::vector<int64_t> batch_rows;
  std::vector<Tile> tiles;
  const auto add_tiles = [&](int64_t image, int64_t first_patch, int64_t end_patch, int64_t begin, int64_t end) {
    for (int64_t p = first_patch; p < end_patch; p += step) {
      tiles.push_back({image, p, std::min(step, end_patch - p), begin, end});
    }
  };
  if (first_row == 0 && end_row == batch * patches) {
    RowsByImage by_image(image_index, batch, images);
    for (int64_t i = 0; i < images; ++i) {
      if (by_image.begin[i] < by_image.begin[i + 1] || !sums.empty()) {
        add_tiles(i, 0, patches, by_image.begin[i], by_image.begin[i + 1]);
      }
    }
    batch_rows = std::move(by_image.rows);
  } else {
    for (int64_t b = 0; b < batch; ++b) batch_rows.push_back(b);
    for (int64_t b = first_row / patches; b * patches < end_row; ++b) {
      add_tiles(image_index ? image_index[b] : b, std::max<int64_t>(first_row - b * patches, 0),
                std::min(end_row - b * patches, patches), b, b + 1);
    }
  }

  threads = threads_for((end_row - first_row) * width * int64_t(layers.size()), threads);
  std::vector<const void*> row_pointers(int64_t(threads) * program.longest_term);
  MixArgs args = {};
  args.program = program;
  args.layers = layers.data();
  args.weights = to_weights(weights);
  args.tiles = tiles.data();
  args.num_tiles = int64_t(tiles.size());
  args.batch_rows = batch_rows.data();
  args.num_patches = patches;
  args.width = width;
  args.first_row = first_row;
  args.rows = pointer(rows);
  args.sums = sums.data();
  if (norm) {
    args.normalize = true;
    args.norm_weight = pointer(norm->weight);
    args.norm_bias = pointer(norm->bias);
    args.eps = norm->eps;
    args.raw_rows = pointer(norm->raw_rows);
    args.mean = pointer(norm->mean);
    args.rstd = pointer(norm->rstd);
  }
  args.scratch = pointer(scratch);
  args.scratch_stride = mix_scratch(scratch_row);
  args.row_pointers = row_pointers.data();
  const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 64 == 0; };
  args.stream = stream && width * size_of(out) % 64 == 0 && width * size_of(in) % 64 == 0 && aligned(args.rows) &&
                std::all_of(sums.begin(), sums.end(), aligned);
  check(kernels_for(in).mix(in, out, args, threads));
}

void epilogue(DType in, DType out, int64_t rows, int64_t columns, Address x, int64_t x_stride,
              Activation activation, Address y, int64_t y_stride, Address z, int64_t z_stride, int threads) {
  py::gil_scoped_release release;
  const EpilogueArgs args = {rows, columns, pointer(x), x_stride, activation, pointer(y), y_stride, pointer(z), z_stride};
  check(kernels_for(in).epilogue(in, out, args, threads_for(rows * columns, threads)));
}

void activation_grad(DType grad, DType out, int64_t rows, int64_t columns, Address grad_y, int64_t grad_y_stride,
                     Address z, int64_t z_stride, Activation activation, Address grad_z, int64_t grad_z_stride,
                     Address y, int64_t y_stride, int threads) {
  py::gil_scoped_release release;
  const ActivationGradArgs args = {rows,     columns,    pointer(grad_y), grad_y_stride, pointer(z), z_stride,
                                   activation, pointer(grad_z), grad_z_stride, pointer(y), y_stride};
  check(kernels_for(grad).activation_grad(grad, out, args, threads_for(rows * columns, threads)));
}

// (position of the block in grad, column, layer, scale)
using DotTuple = std::tuple<int64_t, int64_t, int64_t, double>;

void mix_weights_grad(DType grad, DType layer, int64_t batch, int64_t patches, int64_t width, Address grad_address,
                      int64_t grad_batch_stride, int64_t grad_token_stride, const std::vector<LayerTuple>& layer_tuples,
                      int64_t skip, Address image_index, const std::vector<DotTuple>& entries, int64_t columns,
                      int64_t images, Address out, int threads) {
  check_image_index(pointer<const int64_t>(image_index), batch, images);
  for (const auto& [block, column, source, scale] : entries) {
    check_index("weight column", column, columns);
    check_index("layer", source, int64_t(layer_tuples.size()));
  }
  py::gil_scoped_release release;
  constexpr int64_t chunk = 32;
  const std::vector<Layer> sources = to_layers(layer_tuples, skip, layer);
  std::vector<Layer> layers;
  std::vector<int64_t> offsets;
  for (const auto& [block, column, source, scale] : entries) {
    layers.push_back(sources[source]);
    offsets.push_back(block * width);
  }
  const int64_t chunks = (patches + chunk - 1) / chunk, count = int64_t(entries.size());
  std::vector<double> dots(batch * chunks * count);
  const DotsArgs args = {batch,
                         patches,
                         width,
                         chunk,
                         pointer(grad_address),
                         grad_batch_stride,
                         grad_token_stride,
                         pointer<const int64_t>(image_index),
                         int32_t(count),
                         offsets.data(),
                         layers.data(),
                         dots.data()};
  check(kernels_for(grad).dots(grad, layer, args, threads_for(batch * patches * width * count, threads)));
  std::vector<double> row(columns);
  for (int64_t b = 0; b < batch; ++b) {
    row.assign(columns, 0.0);
    for (int64_t e = 0; e < count; ++e) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += dots[(b * chunks + c) * count + e];
      row[std::get<1>(entries[e])] += std::get<3>(entries[e]) * sum;
    }
    for (int64_t c = 0; c < columns; ++c) {
      if (layer == DType::f64) pointer<double>(out)[b * columns + c] = row[c];
      else pointer<float>(out)[b * columns + c] = float(row[c]);
    }
  }
}

// (block, column or -1, scale)
using GradTuple = std::tuple<int, int, double>;

void layer_grads(DType grad, DType out, int64_t batch, int64_t images, int64_t patches, int64_t skip, int64_t width,
                 Address grad_address, int64_t grad_batch_stride, int64_t grad_token_stride,
                 const WeightsTuple& weights, Address image_index,
                 const std::vector<std::vector<GradTuple>>& signatures, const std::vector<Address>& grad_addresses,
                 int threads) {
  check_image_index(pointer<const int64_t>(image_index), batch, images);
  for (const auto& signature : signatures) {
    for (const auto& [block, column, scale] : signature) {
      if (column >= 0) check_index("weight column", column, std::get<3>(weights));
    }
  }
  py::gil_scoped_release release;
  const RowsByImage by_image(pointer<const int64_t>(image_index), batch, images);
  std::vector<int32_t> signature_begin;
  std::vector<GradEntry> entries;
  std::vector<void*> grads;
  for (const auto& signature : signatures) {
    signature_begin.push_back(int32_t(entries.size()));
    for (const auto& [block, column, scale] : signature) entries.push_back({block, column, scale});
  }
  signature_begin.push_back(int32_t(entries.size()));
  for (Address address : grad_addresses) grads.push_back(pointer(address));
  const LayerGradsArgs args = {images,
                               patches,
                               skip,
                               width,
                               pointer(grad_address),
                               grad_batch_stride,
                               grad_token_stride,
                               by_image.rows.data(),
                               by_image.begin.data(),
                               to_weights(weights),
                               int32_t(signatures.size()),
                               signature_begin.data(),
                               entries.data(),
                               grads.data()};
  const int64_t elements = images * (patches + skip) * width * int64_t(signatures.size());
  check(kernels_for(grad).layer_grads(grad, out, args, threads_for(elements, threads)));
}

} // namespace

PYBIND11_MODULE(_native, m) {
  py::enum_<DType>(m, "DType")
      .value("f32", DType::f32)
      .value("bf16", DType::bf16)
      .value("f16", DType::f16)
      .value("f64", DType::f64);
  py::enum_<Activation>(m, "Activation")
      .value("none", Activation::none)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("relu", Activation::relu)
      .value("silu", Activation::silu);
  py::class_<PlanProgram>(m, "Program").def(py::init<const BlockList&, const BlockList&>());
  py::class_<NormTuple>(m, "Norm")
      .def(py::init<Address, Address, double, Address, Address, Address>());
  m.def("isas", isas, "Instruction sets that this CPU and this build share, best last.");
  m.def("isa", [] { return chosen->isa; });
  m.def("set_isa", set_isa);
  m.def("granted_threads", cpu::granted_threads, "Threads that OpenMP is sure to grant the caller of so many.");
  m.def("mix_scratch", mix_scratch, "Elements of scratch a thread that `mix` needs for rows of this width.");
  m.def("mix", mix);
  m.def("epilogue", epilogue);
  m.def("activation_grad", activation_grad);
  m.def("mix_weights_grad", mix_weights_grad);
  m.def("layer_grads", layer_grads);
}
