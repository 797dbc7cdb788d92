#include "dense/bindings.h"

#include "common/bindings.h"
#include "cpu/isa.h"
#include "dense/cpu/operand_from_python.h"

namespace py = pybind11;

namespace igva {

namespace {

using namespace cpu;

void epilogue(const Matrix& x, Activation activation, const Matrix& y, const std::optional<Matrix>& z,
              int threads) {
  py::gil_scoped_release release;
  threads = threads_for(x.rows * x.columns, threads);
  check_served(kernels_for(x.dtype).dense.epilogue(x, activation, y, or_null(z), threads));
}

void activation_grad(const Matrix& grad_y, const Matrix& z, Activation activation, const Matrix& grad_z,
                     const std::optional<Matrix>& y, int threads) {
  py::gil_scoped_release release;
  threads = threads_for(z.rows * z.columns, threads);
  const DenseKernels& kernels = kernels_for(grad_y.dtype).dense;
  check_served(kernels.activation_grad(grad_y, z, activation, grad_z, or_null(y), threads));
}

void linear(const Operand& x, const Operand& w, Address bias, Activation activation, const Matrix& y,
            const std::optional<Matrix>& z, const Scratch& scratch, int threads) {
  const ProductMemory memory = memory_of(x.rows, w.rows, &y, false, threads);
  check_product(memory, x.depth, w, &y, or_null(z), scratch);
  py::gil_scoped_release release;
  const Product product = plan_product(memory, x.depth, &y, scratch);
  const LinearEnd end = {pointer<float>(bias), activation, y, or_null(z)};
  threads = threads_for_product(product, threads);
  check_served(kernels_for(y.dtype).dense.linear(product, x, w, end, threads));
}

void linear_grad(const Operand& x, const Operand& w, Activation activation, const std::optional<Matrix>& z,
                 const Matrix& grad_z, Address column_sums, const Scratch& scratch, int threads) {
  const ProductMemory memory = memory_of(x.rows, w.rows, &grad_z, column_sums != 0, threads);
  check_product(memory, x.depth, w, &grad_z, or_null(z), scratch);
  py::gil_scoped_release release;
  const Product product = plan_product(memory, x.depth, &grad_z, scratch);
  const ActivationGradEnd end = {activation, or_null(z), grad_z, pointer<float>(column_sums)};
  threads = threads_for_product(product, threads);
  check_served(kernels_for(grad_z.dtype).dense.linear_grad(product, x, w, end, threads));
}

// Floats of the scratch memory for a product, of `most` at best.
int64_t product_scratch(Ints2 shape, bool sums, bool strip_sums, int threads, int64_t most) {
  return ProductMemory{shape[0], shape[1], sums, strip_sums, threads}.wanted(most);
}

} // namespace

void bind_dense(py::module_& m) {
  m.def("epilogue", epilogue);
  m.def("activation_grad", activation_grad);
  m.def("linear", linear);
  m.def("linear_grad", linear_grad);
  m.def("product_scratch", product_scratch, py::arg("shape"), py::arg("sums"), py::arg("strip_sums"),
        py::arg("threads"), py::arg("most"),
        "Floats of scratch memory with which to multiply, `most` unless a product needs more at least.");
}

} // namespace igva
