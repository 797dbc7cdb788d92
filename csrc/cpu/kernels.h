// The CPU kernels as one instruction set offers them.
#pragma once

#include "igva/args.h"

namespace igva::cpu {

// Each entry takes the dtypes of what it reads and writes and returns false for a pair that it was not built for.
struct Kernels {
  const char* isa;
  bool (*mix)(DType in, DType out, const MixArgs&, int threads);
  bool (*epilogue)(DType in, DType out, const EpilogueArgs&, int threads);
  bool (*activation_grad)(DType grad, DType out, const ActivationGradArgs&, int threads);
  bool (*dots)(DType grad, DType layer, const DotsArgs&, int threads);
  bool (*layer_grads)(DType grad, DType out, const LayerGradsArgs&, int threads);
};

extern const Kernels scalar_kernels;
#ifdef IGVA_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// How many threads a parallel region that asks for `threads` is sure to get from here: fewer under OMP_THREAD_LIMIT,
// OMP_DYNAMIC or OMP_MAX_ACTIVE_LEVELS, and inside another region.
int granted_threads(int threads);

} // namespace igva::cpu
