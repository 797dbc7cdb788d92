#include "cpu/vec_avx2.h"

namespace {
using Vec = Avx2;
}

#include "cpu/all_kernels.h"

const igva::cpu::Kernels igva::cpu::avx2_kernels = kernels_of("avx2");
