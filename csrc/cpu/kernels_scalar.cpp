#define IGVA_SCALAR
#include "vec_scalar.h"

namespace {
using Vec = Lane<float>;
}

#include "kernels_impl.h"

const igva::cpu::Kernels igva::cpu::scalar_kernels = {"scalar", mix, epilogue, activation_grad, dots, layer_grads};
