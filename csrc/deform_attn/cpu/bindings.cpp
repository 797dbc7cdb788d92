#include "deform_attn/bindings.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "deform_attn/operands_from_python.h"

namespace py = pybind11;

namespace igva {

namespace cpu {

// (dtype of the levels, (batch, queries, heads, width, points), origin)
inline Sampling make_sampling(DType dtype, Ints<5> sizes, Origin origin) {
  Sampling sampling = {};
  sampling.dtype = dtype;
  sampling.batch = sizes[0];
  sampling.queries = sizes[1];
  sampling.heads = sizes[2];
  sampling.width = sizes[3];
  sampling.num_points = sizes[4];
  sampling.origin = origin;
  return sampling;
}

} // namespace cpu

} // namespace igva

namespace pybind11::detail {

template <>
struct type_caster<igva::cpu::Sampling> : igva::from_tuple<&igva::cpu::make_sampling> {};

} // namespace pybind11::detail

namespace igva {

namespace {

using namespace cpu;
using Levels = std::vector<Level>;

void add_levels(Sampling& sampling, const Levels& levels) {
  sampling.levels = levels.data();
  sampling.num_levels = int64_t(levels.size());
}

void add_operands(Sampling& sampling, const Levels& levels, const View& offsets, const View& logits,
                  const std::optional<View>& reference, Address weights, Address scratch) {
  sampling.offsets = offsets;
  sampling.logits = logits;
  sampling.reference = reference.value_or(View{});
  sampling.softmax = weights != 0;
  sampling.weights = pointer(weights);
  sampling.scratch = pointer(scratch);
  add_levels(sampling, levels);
}

int threads_of(const Sampling& s, int threads) {
  return threads_for(s.batch * s.queries * s.heads * s.num_points * 4 * s.width, threads);
}

// Heads are cut into slices of queries only where there are more threads than heads.
int64_t slices_of(const Sampling& s, int threads) {
  const int64_t heads = s.batch * s.heads;
  return std::max<int64_t>(1, std::min((threads + heads - 1) / heads, s.queries / 32));
}

int64_t scratch_of_attend(Sampling sampling, const Levels& levels, int threads) {
  add_levels(sampling, levels);
  threads = threads_of(sampling, threads);
  return threads * attend_scratch(sampling, slices_of(sampling, threads));
}

int64_t scratch_of_attend_grad(Sampling sampling, const Levels& levels, bool dots, bool sums, int threads) {
  add_levels(sampling, levels);
  return threads_of(sampling, threads) * attend_grad_scratch(sampling, dots, sums);
}

void run_attend(Sampling sampling, const Levels& levels, const View& offsets, const View& logits,
                const std::optional<View>& reference, Address weights, Address scratch, Address out, int threads) {
  py::gil_scoped_release release;
  add_operands(sampling, levels, offsets, logits, reference, weights, scratch);
  threads = threads_of(sampling, threads);
  const AttendJob job = {sampling, slices_of(sampling, threads), pointer(out)};
  check_served(kernels_for(sampling.dtype).deform.attend(job, threads));
}

void run_attend_grad(Sampling sampling, const Levels& levels, const View& offsets, const View& logits,
                     const std::optional<View>& reference, Address weights, Address scratch, const View& grad,
                     const Levels& grad_levels, bool in_pixels, Address grad_offsets, Address grad_logits, int threads) {
  py::gil_scoped_release release;
  add_operands(sampling, levels, offsets, logits, reference, weights, scratch);
  const AttendGradJob job = {sampling,  grad, grad_levels.empty() ? nullptr : grad_levels.data(),
                             in_pixels, pointer(grad_offsets), pointer(grad_logits)};
  check_served(kernels_for(sampling.dtype).deform.attend_grad(job, threads_of(sampling, threads)));
}

} // namespace

void bind_deform_attn(py::module_& m) {
  m.def("attend_scratch", scratch_of_attend);
  m.def("attend_grad_scratch", scratch_of_attend_grad);
  m.def("attend", run_attend);
  m.def("attend_grad", run_attend_grad);
}

} // namespace igva
