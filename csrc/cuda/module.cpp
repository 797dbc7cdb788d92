// The Python module `igva_kernels._cuda`: raw addresses and a stream in, work queued, nothing allocated, no torch.
//
// It links the CUDA runtime statically and touches no driver until the first launch.
#include "common/bindings.h"
#include "cuda/host.h"
#include "deform_attn/bindings.h"
#include "dense/bindings.h"
#include "inject_tokens/bindings.h"
#include "weighted_mix/bindings.h"

#ifndef IGVA_CUDA_MODULE
#define IGVA_CUDA_MODULE _cuda
#endif

using namespace igva;

PYBIND11_MODULE(IGVA_CUDA_MODULE, m) {
  bind_common(m);
  bind_dense(m);
  bind_deform_attn(m);
  bind_inject_tokens(m);
  bind_weighted_mix(m);
  m.def("set_device", [](int device) { cuda::check(cuda::set_device(device), "set_device"); },
        "Makes the current device of torch that of this module.");
  m.def("versions", cuda::versions, "(CUDA version of the driver, 0 without one; that of the runtime inside), as 13000.");
}
