#include "dense/bindings.h"

#include <pybind11/stl.h>

#include "cpu/isa.h"

namespace py = pybind11;

namespace igva {

namespace {

void epilogue(const Matrix& x, Activation activation, const Matrix& y, const Matrix* z, int threads) {
  py::gil_scoped_release release;
  threads = cpu::threads_for(x.rows * x.columns, threads);
  cpu::check_served(cpu::kernels_for(x.dtype).dense.epilogue(x, activation, y, z, threads));
}

void activation_grad(const Matrix& grad_y, const Matrix& z, Activation activation, const Matrix& grad_z, const Matrix* y,
                     int threads) {
  py::gil_scoped_release release;
  threads = cpu::threads_for(z.rows * z.columns, threads);
  cpu::check_served(cpu::kernels_for(grad_y.dtype).dense.activation_grad(grad_y, z, activation, grad_z, y, threads));
}

} // namespace

void bind_dense(py::module_& m) {
  m.def("epilogue", epilogue);
  m.def("activation_grad", activation_grad);
}

} // namespace igva
