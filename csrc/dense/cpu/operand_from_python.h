// Operands of products as Python hands them over, and the threads of a product.
#pragma once

#include <string>

#include "common/bindings.h"
#include "cpu/isa.h"
#include "dense/cpu/plan_product.h"

namespace igva::cpu {

inline Operand make_operand(DType dtype, Address data, Ints2 shape, Ints2 strides, Activation activation) {
  return {dtype, pointer(data), shape[0], shape[1], strides[0], strides[1], activation};
}

inline Scratch make_scratch(Address data, int64_t floats) { return {pointer<float>(data), floats}; }

// Refuses operands, results and memory whose sizes do not agree, before anything is read or written.
inline void check_size(const char* what, int64_t given, int64_t needed) {
  if (given == needed) return;
  throw pybind11::value_error(std::string(what) + ": need " + std::to_string(needed) + ", got " +
                              std::to_string(given));
}

inline void check_product(const ProductMemory& memory, int64_t depth, const Operand& w, const Matrix* result,
                          const Matrix* other, const Scratch& scratch) {
  if (memory.rows < 1 || memory.columns < 1 || depth < 1) throw pybind11::value_error("product: it is empty");
  check_size("columns of the product", w.rows, memory.columns);
  check_size("depth of the second operand", w.depth, depth);
  for (const Matrix* matrix : {result, other}) {
    if (!matrix) continue;
    check_size("rows of a result", matrix->rows, memory.rows);
    check_size("columns of a result", matrix->columns, memory.columns);
  }
  if (memory.wanted(scratch.floats) > scratch.floats) throw pybind11::value_error("scratch: too small for a product");
}

inline int threads_for_product(const Product& product, int threads) {
  constexpr int64_t worth_an_element = 16; // multiplications and additions that take as long as a copied element
  return threads_for(product.rows * product.columns * product.depth / worth_an_element, threads);
}

} // namespace igva::cpu

namespace pybind11::detail {

template <>
struct type_caster<igva::cpu::Operand> : igva::from_tuple<&igva::cpu::make_operand> {};
template <>
struct type_caster<igva::cpu::Scratch> : igva::from_tuple<&igva::cpu::make_scratch> {};

} // namespace pybind11::detail
