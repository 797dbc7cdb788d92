#include "common/bindings.h"

#include "common/activations.h"
#include "common/operands.h"

namespace py = pybind11;

namespace igva {

// Module-local: both modules have these types, and neither may meet the other's.
void bind_common(py::module_& m) {
  py::enum_<DType>(m, "DType", py::module_local())
      .value("f32", DType::f32)
      .value("bf16", DType::bf16)
      .value("f16", DType::f16)
      .value("f64", DType::f64);
#define IGVA_VALUE(name) .value(#name, Activation::name)
  py::enum_<Activation>(m, "Activation", py::module_local()) IGVA_VALUE(none) IGVA_ACTIVATIONS(IGVA_VALUE);
#undef IGVA_VALUE
  py::class_<View>(m, "View", py::module_local())
      .def(py::init([](DType dtype, Address data, Ints3 strides) {
             return View{dtype, pointer(data), strides[0], strides[1]};
           }),
           py::arg("dtype"), py::arg("data"), py::arg("strides"));
  py::class_<Matrix>(m, "Matrix", py::module_local())
      .def(py::init([](DType dtype, Address data, Ints2 shape, Ints2 strides) {
             return Matrix{dtype, pointer(data), shape[0], shape[1], strides[0]};
           }),
           py::arg("dtype"), py::arg("data"), py::arg("shape"), py::arg("strides"));
  py::class_<Parameter>(m, "Parameter", py::module_local())
      .def(py::init([](DType dtype, Address data) { return Parameter{dtype, pointer(data)}; }), py::arg("dtype"),
           py::arg("data"));
  py::class_<Norm>(m, "Norm", py::module_local())
      .def(py::init([](const Parameter& weight, const Parameter& bias, double eps, Address mean, Address rstd) {
             return Norm{weight, bias, eps, pointer(mean), pointer(rstd)};
           }),
           py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("mean"), py::arg("rstd"));
}

} // namespace igva
