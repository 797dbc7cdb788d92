// Shapes and tensor maps of the Hopper GEMM, which hopper.cuh runs.
#pragma once

#include <cuda.h>

#include "common/operands.h"

namespace igva::cuda {

// A block of threads computes 128 x N of the product in steps of 64 along K, N being one of these; two blocks form a
// cluster.
constexpr int gemm_tile_m = 128, gemm_tile_k = 64, gemm_wide = 256, gemm_narrow = 192;
constexpr int gemm_cluster = 2;

// Describes a matrix of 2-byte elements to the copy engine, in boxes of box_rows x 64 columns with the 128-byte
// swizzle. Returns the driver's error, 0 being success.
int describe_matrix(CUtensorMap* map, const Matrix& matrix, int box_rows);

} // namespace igva::cuda
