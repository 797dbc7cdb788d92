#include "vec_avx2.h"

namespace {
using Vec = Avx2;
}

#include "kernels_impl.h"

const igva::cpu::Kernels igva::cpu::avx2_kernels = {"avx2", mix, epilogue, activation_grad, dots, layer_grads};
