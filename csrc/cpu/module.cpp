// The Python module `igva_kernels._native`: raw addresses in, nothing allocated for the caller, no torch.
#include "common/bindings.h"
#include "cpu/isa.h"
#include "deform_attn/bindings.h"
#include "dense/bindings.h"
#include "inject_tokens/bindings.h"
#include "weighted_mix/bindings.h"

using namespace igva;

PYBIND11_MODULE(_native, m) {
  bind_common(m);
  bind_dense(m);
  bind_weighted_mix(m);
  bind_inject_tokens(m);
  bind_deform_attn(m);
  m.def("isas", cpu::isas, "Instruction sets that this CPU and this build share, best last.");
  m.def("isa", cpu::isa);
  m.def("set_isa", cpu::set_isa);
}
