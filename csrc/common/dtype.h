// The element types of tensors.
#pragma once

#include <cstdint>

namespace igva {

enum class DType : int32_t { f32, bf16, f16, f64 };

// Bytes per element.
constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Sums of this type are accumulated in the type returned: fp32, or fp64 for fp64.
constexpr DType accumulation_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

} // namespace igva
