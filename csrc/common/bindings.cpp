#include "common/bindings.h"

#include "common/activations.h"

namespace py = pybind11;

namespace igva {

// Module-local: both modules have these types, and must not share them.
void bind_common(py::module_& m) {
  py::enum_<DType>(m, "DType", py::module_local())
      .value("f32", DType::f32)
      .value("bf16", DType::bf16)
      .value("f16", DType::f16)
      .value("f64", DType::f64);
#define IGVA_VALUE(name) .value(#name, Activation::name)
  py::enum_<Activation>(m, "Activation", py::module_local()) IGVA_VALUE(none) IGVA_ACTIVATIONS(IGVA_VALUE);
#undef IGVA_VALUE
  py::class_<Norm>(m, "Norm", py::module_local())
      .def(py::init([](Parameter weight, Parameter bias, double eps, Address mean, Address rstd) {
             return Norm{weight, bias, eps, pointer(mean), pointer(rstd)};
           }),
           py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("mean"), py::arg("rstd"));
}

} // namespace igva
