// The launchers of the CUDA kernels, with the kernels emulated. `runtime.cu` and `tensor_map.cu` are replaced.
#include "emulation.h"

#include "dense/cuda/activation_grad.cu"
#include "deform_attn/cuda/attend.cu"
#include "deform_attn/cuda/levels_grad.cu"
#include "deform_attn/cuda/places_grad.cu"
#include "inject_tokens/cuda/inject.cu"
#include "weighted_mix/cuda/gemm_sm90.cu"
#include "weighted_mix/cuda/layer_grads.cu"
#include "weighted_mix/cuda/mix.cu"
#include "weighted_mix/cuda/mix_norm.cu"
#include "weighted_mix/cuda/mix_weights_grad.cu"
#include "dense/cuda/norm_grad.cu"

#include "cuda/host.h"

namespace igva::cuda {

const char* error_name(int) { return "an argument that the driver would refuse"; }
int set_device(int) { return 0; }
std::pair<int, int> versions() { return {0, 0}; }
int card(Card& found) {
  found = {int(emulation::setting("IGVA_EMULATION_MULTIPROCESSORS", 132)),
           size_t(emulation::setting("IGVA_EMULATION_SHARED", 227 << 10))};
  return 0;
}

int describe_matrix(CUtensorMap* map, const Matrix& given, int box_rows) {
  const bool fits = reinterpret_cast<uintptr_t>(given.data) % 16 == 0 && given.stride * 2 % 16 == 0;
  if (!fits || given.stride < given.columns || given.rows <= 0 || given.columns <= 0 || box_rows > 256) return 1;
  const emulation::TensorMap matrix = {static_cast<const unsigned char*>(given.data), given.rows, given.columns,
                                       given.stride, box_rows};
  std::memcpy(map, &matrix, sizeof(matrix));
  return 0;
}

} // namespace igva::cuda
