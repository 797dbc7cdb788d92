// The CUDA module with its kernels emulated; `runtime.cu` is replaced, the rest is compiled as it is.
#include "emulation.h"

#include "activation.cu"
#include "layer_grads.cu"
#include "mix.cu"
#include "mix_norm.cu"
#include "mix_weights_grad.cu"
#include "norm_grad.cu"

#include "runtime.h"
namespace igva::cuda {
const char* error_name(int) { return "an error of the emulation"; }
int set_device(int) { return 0; }
std::pair<int, int> versions() { return {0, 0}; }
} // namespace igva::cuda

#define IGVA_CUDA_MODULE _cuda_emulated
#include "bindings.cpp"
