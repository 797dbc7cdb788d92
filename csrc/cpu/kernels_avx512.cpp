#include "vec_avx512.h"

namespace {
using Vec = Avx512;
}

#include "kernels_impl.h"

const igva::cpu::Kernels igva::cpu::avx512_kernels = {"avx512", mix, epilogue, activation_grad, dots, layer_grads};
