// The launchers of the CUDA kernels, with the kernels emulated. `runtime.cu` and `tensor_map.cu` are replaced.
#include "emulation.h"

#include "activation.cu"
#include "gemm_sm90.cu"
#include "layer_grads.cu"
#include "mix.cu"
#include "mix_norm.cu"
#include "mix_weights_grad.cu"
#include "mix_weights_grad_sm90.cu"
#include "norm_grad.cu"

#include "runtime.h"

namespace igva::cuda {

const char* error_name(int) { return "an argument that the driver would refuse"; }
int set_device(int) { return 0; }
std::pair<int, int> versions() { return {0, 0}; }

int describe_matrix(CUtensorMap* map, DType, const void* data, int64_t rows, int64_t columns, int64_t row_stride,
                    int box_rows) {
  const bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * 2 % 16 == 0 && row_stride >= columns;
  if (!fits || rows <= 0 || columns <= 0 || box_rows > 256) return 1;
  const emulation::TensorMap matrix = {static_cast<const unsigned char*>(data), rows, columns, row_stride, box_rows};
  std::memcpy(map, &matrix, sizeof(matrix));
  return 0;
}

} // namespace igva::cuda
