// Tensor maps, encoded by the driver. Its entry point is fetched at first use, so that the module loads without a
// driver.
#include <cuda_runtime_api.h>

#include "gemm/hopper.h"

namespace igva::cuda {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &status);
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  return found;
}

} // namespace

int describe_matrix(CUtensorMap* map, const Matrix& matrix, int box_rows) {
  if (encoder() == nullptr) return cudaErrorSymbolNotFound;
  const cuuint64_t size[2] = {cuuint64_t(matrix.columns), cuuint64_t(matrix.rows)};
  const cuuint64_t stride[1] = {cuuint64_t(matrix.stride) * 2};
  const cuuint32_t box[2] = {gemm_tile_k, cuuint32_t(box_rows)}, step[2] = {1, 1};
  const CUresult error = encoder()(
      map, matrix.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      matrix.data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

} // namespace igva::cuda
