#include "weighted_mix/bindings.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "dense/cpu/operand_from_python.h"
#include "weighted_mix/plan.h"

namespace py = pybind11;

namespace igva {

namespace {

using namespace cpu;

// A plan in the tables that the kernels walk; made once per plan.
class Program {
 public:
  Program(const Steps& row, const Steps& kept_sums) {
    num_blocks_ = add_blocks(row);
    num_sums_ = add_blocks(kept_sums);
    block_begin_.push_back(int32_t(terms_.size()));
  }

  // The tables; throws unless the layers and weight columns that they name were handed in.
  Tables tables(size_t layers, int64_t columns) const {
    check_index("layer", last_layer_, int64_t(layers));
    if (last_column_ >= 0) check_index("weight column", last_column_, columns);
    return {terms_.data(), term_layers_.data(), block_begin_.data(), num_blocks_, num_sums_, longest_term_};
  }

  // A norm needs whole rows in the accumulation dtype, a mix alone one block at a time.
  int64_t scratch_row(int64_t width, bool with_norm) const { return with_norm ? num_blocks_ * width : width; }

 private:
  // Returns how many blocks the steps have.
  int32_t add_blocks(const Steps& steps) {
    check_steps(steps);
    const size_t before = block_begin_.size();
    bool block_starts = true;
    auto term_begin = int32_t(term_layers_.size());
    for (size_t i = 0; i < steps.layers.size(); ++i) {
      check_index("layer", steps.layers[i], INT32_MAX);
      if (block_starts) block_begin_.push_back(int32_t(terms_.size()));
      term_layers_.push_back(steps.layers[i]);
      last_layer_ = std::max(last_layer_, steps.layers[i]);
      last_column_ = std::max(last_column_, steps.columns[i]);
      block_starts = steps.ends[i] >= end_of_block;
      if (steps.ends[i] < end_of_term) continue;
      const auto term_end = int32_t(term_layers_.size());
      terms_.push_back({steps.columns[i], term_begin, term_end, steps.scales[i]});
      longest_term_ = std::max(longest_term_, term_end - term_begin);
      term_begin = term_end;
    }
    return int32_t(block_begin_.size() - before);
  }

  std::vector<Term> terms_;
  std::vector<int32_t> term_layers_, block_begin_;
  int32_t num_blocks_, num_sums_, longest_term_ = 0, last_layer_ = -1, last_column_ = -1;
};

// Where the mixed rows `begin` to `end` of the M are written, and the kept sums of all patches.
struct RowBlock {
  DType dtype;
  void* rows;
  void* raw_rows; // the rows before the norm, or null
  int64_t begin;
  int64_t end;
  std::vector<void*> sums; // [I, P, D] each, in the layers' dtype
  bool stream;             // write around the cache, where that can be done
};

std::vector<void*> pointers(const std::vector<Address>& addresses) {
  std::vector<void*> found;
  for (Address address : addresses) found.push_back(pointer(address));
  return found;
}

// Batch rows sorted by the image they read, in row order within an image.
struct RowsByImage {
  std::vector<int64_t> rows, begin;

  RowsByImage(const Batch& batch, int64_t images) : rows(batch.rows), begin(images + 1, 0) {
    for (int64_t b = 0; b < batch.rows; ++b) ++begin[batch.image_of(b) + 1];
    for (int64_t i = 0; i < images; ++i) begin[i + 1] += begin[i];
    std::vector<int64_t> at(begin.begin(), begin.end() - 1);
    for (int64_t b = 0; b < batch.rows; ++b) rows[at[batch.image_of(b)]++] = b;
  }
};

void check_images(const Batch& batch, int64_t images) {
  if (!batch.image_index && batch.rows > images) {
    throw py::value_error("image_index: need one for " + std::to_string(batch.rows) + " rows of " +
                          std::to_string(images) + " images, got None");
  }
  for (int64_t b = 0; batch.image_index && b < batch.rows; ++b) {
    if (batch.image_index[b] < 0 || batch.image_index[b] >= images) {
      throw py::value_error("image_index: need values from 0 to " + std::to_string(images - 1) +
                            ", the images of the hidden states, got " + std::to_string(batch.image_index[b]) +
                            " in row " + std::to_string(b));
    }
  }
}

void check_norm(const Norm& norm, DType wide) {
  for (const Parameter& parameter : {norm.weight, norm.bias}) {
    if (parameter.data && parameter.dtype != wide) {
      throw py::value_error("norm: its weight and bias must be in the accumulation dtype");
    }
  }
}

// Patches per tile whose rows are `row_elements` wide in the accumulation dtype. 8192 elements are the 32 KB of a
// first-level cache; more than 16 patches gain nothing.
int64_t tile_patches(int64_t row_elements) {
  return std::clamp<int64_t>(8192 / std::max<int64_t>(row_elements, 1), 1, 16);
}

int64_t scratch_elements(const Program& program, int64_t width, bool with_norm) {
  const int64_t row = program.scratch_row(width, with_norm);
  return tile_patches(row) * row;
}

// The tiles that the threads take in turn.
struct Tiles {
  std::vector<int64_t> batch_rows;
  std::vector<Tile> tiles;
  int64_t step; // patches per tile

  // Rows that share an image are mixed side by side, while its layers are in the cache; where only a part of the rows
  // is mixed, they are in batch order.
  Tiles(const Layers& layers, const Batch& batch, const RowBlock& out, int64_t step) : step(step) {
    const int64_t patches = layers.patches();
    if (out.begin == 0 && out.end == batch.rows * patches) {
      RowsByImage by_image(batch, layers.images);
      for (int64_t i = 0; i < layers.images; ++i) {
        if (by_image.begin[i] < by_image.begin[i + 1] || !out.sums.empty()) {
          add(i, 0, patches, by_image.begin[i], by_image.begin[i + 1]);
        }
      }
      batch_rows = std::move(by_image.rows);
      return;
    }
    for (int64_t b = 0; b < batch.rows; ++b) batch_rows.push_back(b);
    for (int64_t b = out.begin / patches; b * patches < out.end; ++b) {
      add(batch.image_of(b), std::max<int64_t>(out.begin - b * patches, 0),
          std::min(out.end - b * patches, patches), b, b + 1);
    }
  }

 private:
  void add(int64_t image, int64_t first_patch, int64_t end_patch, int64_t begin, int64_t end) {
    for (int64_t p = first_patch; p < end_patch; p += step) {
      tiles.push_back({image, p, std::min(step, end_patch - p), begin, end});
    }
  }
};

// What a MixSource points to, alive while a kernel reads it.
class Source {
 public:
  // Throws unless everything that the plan names was handed in.
  Source(const Program& program, const Layers& layers, const std::optional<MixWeights>& weights, const Batch& batch,
         const Norm* norm, int threads)
      : layers_(patches_of(layers)) {
    check_images(batch, layers.images);
    if (norm) check_norm(*norm, accumulation_dtype(layers.dtype));
    const Tables plan = program.tables(layers.views.size(), weights ? weights->columns : 0);
    row_pointers_.resize(int64_t(threads) * plan.longest_term);
    source_ = {plan, layers_.data(), weights.value_or(MixWeights{}), batch, layers.patches(), layers.width, norm,
               row_pointers_.data()};
  }
  Source(const Source&) = delete;

  const MixSource& operator*() const { return source_; }

 private:
  static std::vector<Layer> patches_of(const Layers& layers) {
    std::vector<Layer> found;
    found.reserve(layers.views.size());
    for (size_t i = 0; i < layers.views.size(); ++i) found.push_back(layers.patches_of(i));
    return found;
  }

  std::vector<Layer> layers_;
  std::vector<const void*> row_pointers_;
  MixSource source_;
};

void mix(const Program& program, const Layers& layers, const std::optional<MixWeights>& weights, const Batch& batch,
         const RowBlock& out, const Norm* norm, Address scratch, int threads) {
  const Source source(program, layers, weights, batch, norm, threads);
  py::gil_scoped_release release;
  const int64_t width = layers.width, scratch_row = program.scratch_row(width, norm != nullptr);
  const Tiles tiles(layers, batch, out, tile_patches(scratch_row));
  threads = threads_for((out.end - out.begin) * width * int64_t(layers.views.size()), threads);
  MixJob job = {*source};
  job.tiles = tiles.tiles.data();
  job.num_tiles = int64_t(tiles.tiles.size());
  job.batch_rows = tiles.batch_rows.data();
  job.first_row = out.begin;
  job.rows = out.rows;
  job.raw_rows = out.raw_rows;
  job.sums = out.sums.data();
  job.scratch = pointer(scratch);
  job.scratch_stride = tiles.step * scratch_row;
  const auto whole_lines = [](uint64_t bytes) { return bytes % 64 == 0; }; // cache lines, which are written unread
  job.stream = out.stream && whole_lines(width * size_of(out.dtype)) && whole_lines(width * size_of(layers.dtype)) &&
               whole_lines(Address(out.rows)) &&
               std::all_of(out.sums.begin(), out.sums.end(), [&](void* sum) { return whole_lines(Address(sum)); });
  check_served(kernels_for(layers.dtype).mix.mix(layers.dtype, out.dtype, job, threads));
}

// The Linear of the mixed rows first_row..first_row + y.rows.
void mixed_linear(const Program& program, const Layers& layers, const std::optional<MixWeights>& weights,
                  const Batch& batch, const Norm* norm, int64_t first_row, const Operand& w, Address bias,
                  Activation activation, const Matrix& y, const std::optional<Matrix>& z, const Scratch& scratch,
                  int threads) {
  const Source source(program, layers, weights, batch, norm, threads);
  const ProductMemory memory = memory_of(y.rows, w.rows, &y, false, threads);
  check_product(memory, (*source).plan.num_blocks * layers.width, w, &y, or_null(z), scratch);
  if (first_row < 0 || first_row + y.rows > batch.rows * layers.patches()) {
    throw py::value_error("rows: there are " + std::to_string(batch.rows * layers.patches()) + " mixed rows, got " +
                          std::to_string(first_row) + " to " + std::to_string(first_row + y.rows));
  }
  py::gil_scoped_release release;
  const Product product = plan_product(memory, w.depth, &y, scratch);
  threads = threads_for_product(product, threads);
  const LinearEnd end = {pointer<float>(bias), activation, y, or_null(z)};
  const MixKernels& kernels = kernels_for(layers.dtype).mix;
  check_served(kernels.mixed_linear(product, layers.dtype, *source, first_row, w, end, threads));
}

// The gradient of that Linear's weight, where x is the gradient of its result, transposed.
void mixed_linear_grad(const Operand& x, const Program& program, const Layers& layers,
                       const std::optional<MixWeights>& weights, const Batch& batch, const Norm* norm,
                       const Matrix& grad, const Scratch& scratch, int threads) {
  const Source source(program, layers, weights, batch, norm, threads);
  const ProductMemory memory = memory_of(x.rows, (*source).plan.num_blocks * layers.width, &grad, false, threads);
  const Operand rows = {layers.dtype, nullptr, memory.columns, batch.rows * layers.patches(), 0, 0, Activation::none};
  check_product(memory, x.depth, rows, &grad, nullptr, scratch);
  py::gil_scoped_release release;
  const Product product = plan_product(memory, x.depth, &grad, scratch);
  threads = threads_for_product(product, threads);
  const MixKernels& kernels = kernels_for(layers.dtype).mix;
  check_served(kernels.mixed_linear_grad(product, x, layers.dtype, *source, grad, threads));
}

// out[b, column] += scale * the sums of one entry over the chunks of row b, `dots` being [B, chunks, entries].
void add_up(const Dots& dots, const std::vector<double>& sums, int64_t rows, int64_t chunks, int64_t columns,
            DType dtype, Address out) {
  const auto count = int64_t(dots.layers.size());
  std::vector<double> row(columns);
  for (int64_t b = 0; b < rows; ++b) {
    row.assign(columns, 0.0);
    for (int64_t e = 0; e < count; ++e) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += sums[(b * chunks + c) * count + e];
      row[dots.columns[e]] += dots.scales[e] * sum;
    }
    for (int64_t c = 0; c < columns; ++c) {
      if (dtype == DType::f64) pointer<double>(out)[b * columns + c] = row[c];
      else pointer<float>(out)[b * columns + c] = float(row[c]);
    }
  }
}

// The entries of dots as kernels take them.
struct DotEntries {
  std::vector<Layer> layers;
  std::vector<int64_t> offsets;

  DotEntries(const Dots& dots, const Layers& all) {
    for (int layer : dots.layers) layers.push_back(all.patches_of(layer));
    for (int block : dots.blocks) offsets.push_back(block * all.width);
  }
};

// `out` is [B, columns] in the accumulation dtype of the layers.
void mix_weights_grad(const View& grad, const Dots& dots, const Layers& layers, const Batch& batch, int64_t columns,
                      Address out, int threads) {
  check_images(batch, layers.images);
  check_dots(dots, layers, columns);
  py::gil_scoped_release release;
  constexpr int64_t chunk = 32; // patches that one thread sums, so that a single image keeps several threads busy
  const int64_t patches = layers.patches(), width = layers.width;
  const DotEntries entries(dots, layers);
  const int64_t chunks = (patches + chunk - 1) / chunk, count = int64_t(entries.offsets.size());
  std::vector<double> sums(batch.rows * chunks * count);
  const DotsJob job = {batch, patches, width, chunk, grad, int32_t(count), entries.offsets.data(),
                       entries.layers.data(), sums.data()};
  threads = threads_for(batch.rows * patches * width * count, threads);
  check_served(kernels_for(grad.dtype).mix.dots(grad.dtype, layers.dtype, job, threads));
  add_up(dots, sums, batch.rows, chunks, columns, layers.dtype, out);
}

// The same where the gradient of the mixed rows is x @ w^T, which is not written to memory.
void linear_mix_weights_grad(const Operand& x, const Operand& w, const Dots& dots, const Layers& layers,
                             const Batch& batch, int64_t columns, Address out, const Scratch& scratch, int threads) {
  check_images(batch, layers.images);
  check_dots(dots, layers, columns);
  const ProductMemory memory = memory_of(x.rows, w.rows, nullptr, false, threads);
  check_product(memory, x.depth, w, nullptr, nullptr, scratch);
  check_size("rows of the gradient", x.rows, batch.rows * layers.patches());
  py::gil_scoped_release release;
  const DotEntries entries(dots, layers);
  const int64_t patches = layers.patches(), count = int64_t(entries.offsets.size());
  const int64_t chunks = patches * ((w.rows + tile_columns - 1) / tile_columns);
  std::vector<double> sums(batch.rows * chunks * count);
  DotsJob job = {};
  job.batch = batch;
  job.num_patches = patches;
  job.width = layers.width;
  job.num_entries = int32_t(count);
  job.offsets = entries.offsets.data();
  job.layers = entries.layers.data();
  job.dots = sums.data();
  const Product product = plan_product(memory, x.depth, nullptr, scratch);
  threads = threads_for_product(product, threads);
  check_served(kernels_for(layers.dtype).mix.linear_dots(product, x, w, layers.dtype, job, threads));
  add_up(dots, sums, batch.rows, chunks, columns, layers.dtype, out);
}

void layer_grads(const View& grad, const Shares& shares, const std::optional<MixWeights>& weights,
                 const Batch& batch, const LayerShape& shape, const std::vector<Address>& grads, int threads) {
  const MixWeights used = weights.value_or(MixWeights{});
  check_images(batch, shape.images);
  check_shares(shares, used, grads.size());
  py::gil_scoped_release release;
  const RowsByImage by_image(batch, shape.images);
  std::vector<int32_t> share_begin = {0};
  std::vector<Share> entries;
  for (size_t i = 0; i < shares.ends.size(); ++i) {
    entries.push_back({shares.blocks[i], shares.columns[i], shares.scales[i]});
    if (shares.ends[i]) share_begin.push_back(int32_t(entries.size()));
  }
  const std::vector<void*> outs = pointers(grads);
  LayerGradsJob job = {};
  job.num_images = shape.images;
  job.num_patches = shape.patches();
  job.skip = shape.skip;
  job.width = shape.width;
  job.grad = grad;
  job.image_rows = by_image.rows.data();
  job.image_begin = by_image.begin.data();
  job.weights = used;
  job.num_grads = int32_t(outs.size());
  job.share_begin = share_begin.data();
  job.shares = entries.data();
  job.grads = outs.data();
  threads = threads_for(shape.images * shape.tokens * shape.width * int64_t(outs.size()), threads);
  check_served(kernels_for(grad.dtype).mix.layer_grads(grad.dtype, shape.dtype, job, threads));
}

} // namespace

void bind_weighted_mix(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init<const Steps&, const Steps&>(), py::arg("row"), py::arg("kept_sums"))
      .def("scratch", scratch_elements, py::arg("width"), py::arg("with_norm"),
           "Elements of the accumulation dtype that `mix` needs per thread.");
  py::class_<RowBlock>(m, "RowBlock")
      .def(py::init([](DType dtype, Address rows, Address raw_rows, Ints2 range, const std::vector<Address>& sums,
                       bool stream) {
             return RowBlock{dtype, pointer(rows), pointer(raw_rows), range[0], range[1], pointers(sums), stream};
           }),
           py::arg("dtype"), py::arg("rows"), py::arg("raw_rows"), py::arg("range"), py::arg("sums"), py::arg("stream"));
  m.def("mix", mix);
  m.def("mixed_linear", mixed_linear);
  m.def("mixed_linear_grad", mixed_linear_grad);
  m.def("mix_weights_grad", mix_weights_grad);
  m.def("linear_mix_weights_grad", linear_mix_weights_grad);
  m.def("layer_grads", layer_grads);
}

} // namespace igva
