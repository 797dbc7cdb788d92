#include "cuda/host.h"

#include <cuda_runtime_api.h>

namespace igva::cuda {

const char* error_name(int error) { return cudaGetErrorString(cudaError_t(error)); }

int set_device(int device) { return cudaSetDevice(device); }

std::pair<int, int> versions() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  cudaRuntimeGetVersion(&runtime);
  return {driver, runtime};
}

} // namespace igva::cuda
