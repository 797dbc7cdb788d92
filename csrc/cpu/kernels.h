// The CPU kernels as one instruction set offers them.
#pragma once

#include "deform_attn/cpu/table.h"
#include "dense/cpu/table.h"
#include "inject_tokens/cpu/table.h"
#include "weighted_mix/cpu/table.h"

namespace igva::cpu {

struct Kernels {
  const char* isa;
  DenseKernels dense;
  MixKernels mix;
  InjectKernels inject;
  DeformKernels deform;
};

extern const Kernels scalar_kernels;
#ifdef IGVA_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

} // namespace igva::cpu
