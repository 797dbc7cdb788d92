// The choice between the instruction sets, and how many threads a kernel gets.
#pragma once

#include <string>
#include <vector>

#include "common/dtype.h"
#include "cpu/kernels.h"

namespace igva::cpu {

// The instruction sets that this CPU and this build share, best last.
std::vector<std::string> isas();
std::string isa();
void set_isa(const std::string& isa);

// The kernels that calls use: those of the chosen set, and scalar ones for fp64, which serves tests and gradcheck.
const Kernels& kernels_for(DType dtype);

// Throws where a kernel has returned false: it does not serve its dtypes.
void check_served(bool served);

// How many threads, at most `threads`, to use for work on `elements` elements.
int threads_for(int64_t elements, int threads);

} // namespace igva::cpu
