#include "cpu/vec_avx512.h"

namespace {
using Vec = Avx512;
}

#include "cpu/all_kernels.h"

const igva::cpu::Kernels igva::cpu::avx512_kernels = kernels_of("avx512");
