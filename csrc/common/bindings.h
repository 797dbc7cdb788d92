// What the bindings of both modules share: addresses and tuples from Python, and the types of this folder.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <utility>

namespace igva {

using Address = uintptr_t;
using Ints2 = std::array<int64_t, 2>; // a shape or strides, as torch has them
using Ints3 = std::array<int64_t, 3>;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Loads an aggregate from a Python tuple of its fields, such as a NamedTuple: type_caster<S> : from_tuple<S, fields...>.
template <class Struct, class... Fields>
struct from_tuple {
  PYBIND11_TYPE_CASTER(Struct, pybind11::detail::const_name("tuple"));

  bool load(pybind11::handle source, bool convert) {
    pybind11::detail::make_caster<std::tuple<Fields...>> fields;
    if (!fields.load(source, convert)) return false;
    value = std::apply([](auto&&... field) { return Struct{std::move(field)...}; },
                       pybind11::detail::cast_op<std::tuple<Fields...>&&>(std::move(fields)));
    return true;
  }
};

// Adds DType, Activation, View, Matrix, Parameter and Norm.
void bind_common(pybind11::module_& m);

} // namespace igva
