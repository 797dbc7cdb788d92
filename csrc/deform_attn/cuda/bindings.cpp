#include "deform_attn/bindings.h"

#include <algorithm>
#include <vector>

#include "deform_attn/cuda/params.h"
#include "deform_attn/operands_from_python.h"

namespace py = pybind11;

namespace igva::cuda {

// (dtype of the levels, (batch, queries, heads, width, points), origin, softmax, vector, offsets, logits, reference)
inline Sampling make_sampling(DType dtype, Ints<5> sizes, Origin origin, bool softmax, bool vector,
                              const View& offsets, const View& logits, const std::optional<View>& reference) {
  Sampling sampling = {dtype, origin, softmax, vector};
  sampling.batch = count32(sizes[0]);
  sampling.queries = count32(sizes[1]);
  sampling.heads = count32(sizes[2]);
  sampling.width = count32(sizes[3]);
  sampling.num_points = count32(sizes[4]);
  count32(sizes[2] * sizes[4] * 2); // of a query
  sampling.offsets = offsets;
  sampling.logits = logits;
  sampling.reference = reference.value_or(View{});
  return sampling;
}

} // namespace igva::cuda

namespace pybind11::detail {

template <>
struct type_caster<igva::cuda::Sampling> : igva::from_tuple<&igva::cuda::make_sampling> {};

} // namespace pybind11::detail

namespace igva {

namespace {

using namespace cuda;
using Levels = std::vector<Level>;

Sampling with_levels(Sampling sampling, const Levels& levels) {
  if (levels.size() > size_t(max_levels)) {
    throw std::invalid_argument("shapes: the CUDA kernels take at most " + std::to_string(max_levels) +
                                " levels, got " + std::to_string(levels.size()));
  }
  for (const Level& level : levels) {
    // A point has its pixel and four more bits in one number.
    if (int64_t(level.height + 1) * (level.width + 1) < int64_t(1) << 27) continue;
    throw std::invalid_argument("shapes: the CUDA kernels take levels of less than 2^27 pixels, got " +
                                std::to_string(level.height) + " x " + std::to_string(level.width));
  }
  sampling.num_levels = int32_t(levels.size());
  std::copy(levels.begin(), levels.end(), sampling.levels);
  return sampling;
}

Card current_card() {
  Card found = {};
  check(cuda::card(found), "card");
  return found;
}

void run_attend(const Sampling& sampling, const Levels& levels, Address out, Address stream) {
  check(cuda::attend({with_levels(sampling, levels), {}, pointer(out)}, current_card(), pointer(stream)), "attend");
}

void run_places_grad(const Sampling& sampling, const Levels& levels, const View& grad, bool in_pixels,
                     Address grad_offsets, Address grad_logits, Address stream) {
  const PlacesGradParams params = {with_levels(sampling, levels), {},       grad, in_pixels, pointer(grad_offsets),
                                   pointer(grad_logits)};
  check(cuda::places_grad(params, current_card(), pointer(stream)), "places_grad");
}

bool run_levels_grad(const Sampling& sampling, const Levels& levels, const View& grad, Address stream) {
  bool fits = false;
  check(cuda::levels_grad({with_levels(sampling, levels), {}, grad, 0}, current_card(), fits, pointer(stream)),
        "levels_grad");
  return fits;
}

void run_points(const Sampling& sampling, const Levels& levels, Address cells, Address entries, Address stream) {
  const PointsParams params = {with_levels(sampling, levels), pointer<int32_t>(cells), pointer(entries)};
  check(cuda::points(params, pointer(stream)), "points");
}

void run_sorted_grad(const Sampling& sampling, const Levels& levels, const View& grad, Address order, Address starts,
                     Address entries, Address stream) {
  const SortedGradParams params = {with_levels(sampling, levels), {}, grad, pointer<int64_t>(order),
                                   pointer<int32_t>(starts),      pointer(entries)};
  check(cuda::sorted_grad(params, pointer(stream)), "sorted_grad");
}

} // namespace

void bind_deform_attn(py::module_& m) {
  m.def("attend", run_attend);
  m.def("places_grad", run_places_grad);
  m.def("levels_grad", run_levels_grad,
        "False where a head's gradients and points do not fit shared memory; then nothing was launched.");
  m.def("points", run_points);
  m.def("sorted_grad", run_sorted_grad);
}

} // namespace igva
