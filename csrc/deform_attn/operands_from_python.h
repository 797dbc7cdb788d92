// Levels and origins as Python hands them in.
#pragma once

#include "common/bindings.h"
#include "deform_attn/operands.h"

namespace igva {

// (address, strides of batch, row, head and channel, (height, width, first point, points))
inline Level make_level(Address data, Ints<4> strides, Ints<4> sizes) {
  return {pointer(data),     strides[0],        strides[1],        strides[2],
          int32_t(sizes[0]), int32_t(sizes[1]), int32_t(sizes[2]), int32_t(sizes[3])};
}

} // namespace igva

namespace pybind11::detail {

template <>
struct type_caster<igva::Level> : igva::from_tuple<&igva::make_level> {};

// By its place among the names of igva_kernels/ops/deform_attn/geometry.py.
template <>
struct type_caster<igva::Origin> {
  PYBIND11_TYPE_CASTER(igva::Origin, const_name("int"));

  bool load(handle source, bool) {
    const long origin = PyLong_AsLong(source.ptr());
    if (PyErr_Occurred()) PyErr_Clear();
    else if (origin >= 0 && origin <= long(igva::Origin::boxes)) return value = igva::Origin(origin), true;
    return false;
  }
};

} // namespace pybind11::detail
