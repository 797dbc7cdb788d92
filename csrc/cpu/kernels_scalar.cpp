#define IGVA_SCALAR // fp64 too, which no other instruction set serves
#include "cpu/vec_scalar.h"

namespace {
using Vec = Lane<float>;
}

#include "cpu/all_kernels.h"

const igva::cpu::Kernels igva::cpu::scalar_kernels = kernels_of("scalar");
