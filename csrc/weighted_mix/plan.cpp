#include "weighted_mix/plan.h"

#include <algorithm>
#include <initializer_list>

namespace py = pybind11;

namespace igva {

namespace {

void check_lengths(std::initializer_list<size_t> lengths) {
  if (std::equal(lengths.begin() + 1, lengths.end(), lengths.begin())) return;
  throw std::invalid_argument("plan: its arrays must have equal lengths");
}

} // namespace

void check_index(const char* what, int64_t index, int64_t count) {
  if (index >= 0 && index < count) return;
  throw std::invalid_argument(std::string("plan: it names ") + what + " " + std::to_string(index) + ", got " +
                              std::to_string(count));
}

void check_steps(const Steps& steps) {
  check_lengths({steps.layers.size(), steps.ends.size(), steps.scales.size(), steps.columns.size(), steps.sums.size()});
  if (!steps.ends.empty() && steps.ends.back() != end_of_block) {
    throw std::invalid_argument("plan: its last step must end a block");
  }
}

void check_dots(const Dots& dots, const Layers& layers, int64_t columns) {
  check_lengths({dots.blocks.size(), dots.layers.size(), dots.columns.size(), dots.scales.size()});
  for (int column : dots.columns) check_index("weight column", column, columns);
  for (int layer : dots.layers) check_index("layer", layer, int64_t(layers.views.size()));
}

void check_shares(const Shares& shares, const MixWeights& weights, size_t grads) {
  check_lengths({shares.blocks.size(), shares.columns.size(), shares.scales.size(), shares.ends.size()});
  for (int column : shares.columns) {
    if (column >= 0) check_index("weight column", column, weights.columns);
  }
  const auto found = size_t(std::count(shares.ends.begin(), shares.ends.end(), 1));
  if (found != grads) {
    throw std::invalid_argument("plan: it has " + std::to_string(found) + " different layer gradients, got memory for " +
                                std::to_string(grads));
  }
}

// Module-local: both modules have these types, and neither may meet the other's.
void bind_plan(py::module_& m) {
  const auto shape_of = [](DType dtype, const Ints3& shape, int64_t skip) {
    return LayerShape{dtype, shape[0], shape[1], shape[2], skip};
  };
  py::class_<LayerShape>(m, "LayerShape", py::module_local())
      .def(py::init(shape_of), py::arg("dtype"), py::arg("shape"), py::arg("skip"));
  using Views = std::vector<std::pair<Address, Ints3>>;
  py::class_<Layers>(m, "Layers", py::module_local())
      .def(py::init([shape_of](DType dtype, const Ints3& shape, int64_t skip, const Views& views) {
             Layers layers = {shape_of(dtype, shape, skip), {}};
             layers.views.reserve(views.size());
             for (const auto& [data, strides] : views) layers.views.push_back({pointer(data), strides[0], strides[1]});
             return layers;
           }),
           py::arg("dtype"), py::arg("shape"), py::arg("skip"), py::arg("views"), "`views` are (address, strides).");
  py::class_<MixWeights>(m, "MixWeights", py::module_local())
      .def(py::init([](Address data, Ints2 strides, int64_t columns) {
             return MixWeights{pointer(data), strides[0], strides[1], columns};
           }),
           py::arg("data"), py::arg("strides"), py::arg("columns"));
  py::class_<Batch>(m, "Batch", py::module_local())
      .def(py::init([](Address image_index, int64_t rows) { return Batch{pointer<const int64_t>(image_index), rows}; }),
           py::arg("image_index"), py::arg("rows"));
}

} // namespace igva
