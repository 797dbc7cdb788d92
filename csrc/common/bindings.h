// What the bindings of both modules share: addresses and tuples from Python, and the types of this folder.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "common/operands.h"

namespace igva {

using Address = uintptr_t;

// A shape or strides: a tuple of N integers, as torch gives it.
template <int N>
struct Ints {
  int64_t at[N];
  int64_t operator[](int i) const { return at[i]; }
};
using Ints2 = Ints<2>;
using Ints3 = Ints<3>;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Loads a struct from a Python tuple of what `make` takes: type_caster<Struct> : from_tuple<make>. Operands come as
// plain tuples, since a call has many of them and an object of a bound class takes most of a microsecond to make.
template <auto make, class Function = decltype(make)>
struct from_tuple;

template <auto make, class Struct, class... Fields>
struct from_tuple<make, Struct (*)(Fields...)> {
  PYBIND11_TYPE_CASTER(Struct, pybind11::detail::const_name("tuple"));

  bool load(pybind11::handle source, bool convert) {
    pybind11::detail::make_caster<std::tuple<Fields...>> fields;
    if (!fields.load(source, convert)) return false;
    value = std::apply(make, pybind11::detail::cast_op<std::tuple<Fields...>&&>(std::move(fields)));
    return true;
  }
};

inline View make_view(DType dtype, Address data, Ints3 strides) {
  return {dtype, pointer(data), strides[0], strides[1]};
}

inline Matrix make_matrix(DType dtype, Address data, Ints2 shape, Ints2 strides) {
  return {dtype, pointer(data), shape[0], shape[1], strides[0]};
}

inline Parameter make_parameter(DType dtype, Address data) { return {dtype, pointer(data)}; }

// For what is passed on as a pointer.
template <class T>
const T* or_null(const std::optional<T>& value) {
  return value ? &*value : nullptr;
}

// Adds DType, Activation and Norm.
void bind_common(pybind11::module_& m);

} // namespace igva

namespace pybind11::detail {

template <int N>
struct type_caster<igva::Ints<N>> {
  PYBIND11_TYPE_CASTER(igva::Ints<N>, const_name("tuple"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != N) return false;
    for (int i = 0; i < N; ++i) value.at[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
  }
};

template <>
struct type_caster<igva::View> : igva::from_tuple<&igva::make_view> {};
template <>
struct type_caster<igva::Matrix> : igva::from_tuple<&igva::make_matrix> {};
template <>
struct type_caster<igva::Parameter> : igva::from_tuple<&igva::make_parameter> {};

} // namespace pybind11::detail
