// All CPU kernels, written once for a vector type `Vec`. Each kernels_*.cpp compiles this file with the flags of its
// instruction set. Everything is in an anonymous namespace and no library template is used, so that no function built
// for a wide instruction set can be merged with one that another file calls on a machine without it.
#pragma once

#include "cpu/kernels.h"
#include "deform_attn/cpu/kernels.h"
#include "dense/cpu/kernels.h"
#include "dense/cpu/operand.h"
#include "inject_tokens/cpu/kernels.h"
#include "weighted_mix/cpu/kernels.h"
#include "weighted_mix/cpu/product.h"

namespace {

constexpr igva::cpu::Kernels kernels_of(const char* isa) {
  return {isa, {epilogue, activation_grad, linear, linear_grad},
          {mix, dots, layer_grads, mixed_linear, mixed_linear_grad, linear_dots},
          {inject, features_grad}, {attend, attend_grad}};
}

} // namespace
