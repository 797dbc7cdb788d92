// The one list of activations that C++ knows, by their names in Python.
//
// A new activation is a name in this list, a formula in dense/cpu/activation.h and one in dense/cuda/activation.cuh.
// The enumeration, the names that Python sees and every dispatch follow from the list; a name without a formula does
// not compile.
#pragma once

#include <cstdint>

#define IGVA_ACTIVATIONS(X) X(gelu) X(gelu_tanh) X(relu) X(silu)

namespace igva {

#define IGVA_NAME(name) name,
enum class Activation : int32_t { none, IGVA_ACTIVATIONS(IGVA_NAME) };
#undef IGVA_NAME

} // namespace igva
