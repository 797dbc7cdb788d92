// Plans, layers and batches of Python in the form in which the kernels of the mix take them.
#pragma once

#include <cstdint>
#include <vector>

#include "weighted_mix/cuda/params.h"
#include "weighted_mix/plan.h"

namespace igva::cuda {

void check_capacity(size_t count, size_t capacity, const char* what);

// A plan as far as it goes into MixParams; made once per plan. With `keep_sums` its sums are by-products.
class MixProgram {
 public:
  MixProgram(const Steps& steps, bool keep_sums);

  // The parameters of a launch, except those of the output.
  MixParams params(const Layers& layers, const MixWeights* weights, const Batch& batch,
                   const std::vector<Address>& sums) const;

  int32_t num_blocks() const { return params_.num_blocks; }

 private:
  MixParams params_ = {};
  int last_layer_ = -1, last_column_ = -1, num_sums_ = 0; // as the terms name them
};

// The parameters of a launch, except the gradient and the output.
DotsParams dots_params(const Dots& dots, const Layers& layers, const Batch& batch, int64_t columns);

#ifdef IGVA_HOPPER
void bind_gemm_sm90(pybind11::module_& m);
#endif

} // namespace igva::cuda
