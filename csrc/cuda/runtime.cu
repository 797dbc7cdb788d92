#include "cuda/host.h"

#include <cuda_runtime_api.h>

namespace igva::cuda {

const char* error_name(int error) { return cudaGetErrorString(cudaError_t(error)); }

int set_device(int device) { return cudaSetDevice(device); }

int card(Card& found) {
  int device = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  found.shared = size_t(shared);
  return error;
}

std::pair<int, int> versions() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  cudaRuntimeGetVersion(&runtime);
  return {driver, runtime};
}

} // namespace igva::cuda
