#include "cpu/isa.h"

#include <stdexcept>

namespace igva::cpu {

namespace {

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found = {&scalar_kernels};
#ifdef IGVA_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(&avx2_kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      found.push_back(&avx512_kernels);
    }
  }
#endif
  return found;
}

const std::vector<const Kernels*> supported = supported_kernels();
const Kernels* chosen = supported.back();

} // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported) names.push_back(kernels->isa);
  return names;
}

std::string isa() { return chosen->isa; }

void set_isa(const std::string& isa) {
  for (const Kernels* kernels : supported) {
    if (isa == kernels->isa) {
      chosen = kernels;
      return;
    }
  }
  throw std::invalid_argument("isa: this CPU or this build has no " + isa);
}

const Kernels& kernels_for(DType dtype) { return dtype == DType::f64 ? scalar_kernels : *chosen; }

void check_served(bool served) {
  if (!served) throw std::invalid_argument("igva_kernels: no CPU kernel for this pair of dtypes");
}

int threads_for(int64_t elements, int threads) {
  // Elements below which waking a second thread costs more than it saves.
  constexpr int64_t worth_a_second_thread = 1 << 15;
  return elements < worth_a_second_thread ? 1 : threads;
}

} // namespace igva::cpu
