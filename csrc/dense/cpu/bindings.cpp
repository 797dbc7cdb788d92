#include "dense/bindings.h"

#include "common/bindings.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace igva {

namespace {

void epilogue(const Matrix& x, Activation activation, const Matrix& y, const std::optional<Matrix>& z,
              int threads) {
  py::gil_scoped_release release;
  threads = cpu::threads_for(x.rows * x.columns, threads);
  cpu::check_served(cpu::kernels_for(x.dtype).dense.epilogue(x, activation, y, or_null(z), threads));
}

void activation_grad(const Matrix& grad_y, const Matrix& z, Activation activation, const Matrix& grad_z,
                     const std::optional<Matrix>& y, int threads) {
  py::gil_scoped_release release;
  threads = cpu::threads_for(z.rows * z.columns, threads);
  const cpu::DenseKernels& kernels = cpu::kernels_for(grad_y.dtype).dense;
  cpu::check_served(kernels.activation_grad(grad_y, z, activation, grad_z, or_null(y), threads));
}

} // namespace

void bind_dense(py::module_& m) {
  m.def("epilogue", epilogue);
  m.def("activation_grad", activation_grad);
}

} // namespace igva
