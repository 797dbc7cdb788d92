#include "dense/bindings.h"

#include "common/bindings.h"
#include "cuda/host.h"
#include "dense/cuda/params.h"

namespace py = pybind11;

namespace igva {

namespace {

using namespace cuda;

// Sums of columns, a by-product: `partials` holds one row of them per `chunk` rows, or is null.
struct ColumnSums {
  void* partials;
  int32_t chunk;
};

// The address of a matrix that must be dense, as the kernels index it.
void* dense(const Matrix& matrix) {
  if (matrix.stride != matrix.columns && matrix.rows > 1) {
    throw py::value_error("the dense CUDA kernels take matrices without gaps between their rows");
  }
  return matrix.data;
}

void run_activation_grad(const Matrix& grad_y, const Matrix& z, Activation kind, const Matrix& grad_z,
                         const std::optional<Matrix>& y, const ColumnSums& sums, bool vector, Address stream) {
  const ActivationGradParams params = {z.rows,        int32_t(z.columns),     kind,          dense(grad_y), dense(z),
                                       dense(grad_z), y ? dense(*y) : nullptr, sums.partials, sums.chunk};
  check(activation_grad(params, z.dtype, vector, pointer(stream)), "activation_grad");
}

void run_norm_grad(const Matrix& grad, const Matrix& rows, const Norm& norm, const Matrix& grad_rows,
                   const ColumnSums& sums, bool vector, Address stream) {
  const NormGradParams params = {rows.rows, int32_t(rows.columns), dense(grad),   dense(rows),
                                 norm,      dense(grad_rows),      sums.partials, sums.chunk};
  check(norm_grad(params, rows.dtype, vector, pointer(stream)), "norm_grad");
}

} // namespace

void bind_dense(py::module_& m) {
  py::class_<ColumnSums>(m, "ColumnSums", py::module_local())
      .def(py::init([](Address partials, int32_t chunk) { return ColumnSums{pointer(partials), chunk}; }),
           py::arg("partials"), py::arg("chunk"));
  m.def("activation_grad", run_activation_grad);
  m.def("norm_grad", run_norm_grad);
}

} // namespace igva
