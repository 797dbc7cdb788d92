"""The product that reads the layers itself: ``Y = act(norm?(A) W^T + b)`` where every block of A is a tap.

It removes the concatenation, of which a mix kernel would write and a GEMM read every element. A mixed block gains
nothing here: each column of tiles would read its layers again.

Accumulation, roundings, TMA and the constants of a configuration are those of ``runtime.triton.gemm``.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.ops.weighted_mix.steps import MixArgs
from igva_kernels.ops.weighted_mix.triton.mix import image_of, kernel
from igva_kernels.runtime.config import GemmConfig
from igva_kernels.runtime.triton.common import dot
from igva_kernels.runtime.triton.gemm import (
    is_aligned,
    operand,
    options,
    precision,
    store_activated,
    tile_of,
    tiles,
    weight_tile,
)
from igva_kernels.runtime.triton.launch import launch, strides


@triton.jit
def add_taps(
    b_acc, layers, o_x, weight, n, columns, stride_w,
    TAPS: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the taps to the accumulator: one loop, so that the pipeline stays full from one tap to the next."""
    STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    for step in range(0, len(TAPS) * STEPS):
        tap = step // STEPS
        k = (step % STEPS) * BLOCK_K
        p_x = layers[TAPS[0]]
        for t in tl.static_range(1, len(TAPS)):
            p_x = tl.where(tap == t, layers[TAPS[t]], p_x)
        o_k = (k + tl.arange(0, BLOCK_K))[None, :]
        if WIDTH % BLOCK_K == 0:
            b_x = tl.load(p_x + o_x + o_k)
        else:
            b_x = tl.load(p_x + o_x + o_k, mask=o_k < WIDTH, other=0.0)
        b_w = weight_tile(weight, n, tap * WIDTH + k, columns, K, stride_w, True, TMA, BLOCK_N, BLOCK_K)
        b_acc = dot(b_x, b_w, b_acc, PRECISION)
    return b_acc


@kernel
def mix_linear_kernel(
    layers, index, weight, bias, mean, rstd, column_sums, y, z,
    num_rows, columns, num_images, num_patches, skip, stride_image, stride_token, stride_w,
    TAPS: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One tile of ``mix_linear``; ``TAPS`` names the layer of every block."""
    m, n = tile_of(tl.program_id(0), num_rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = m + tl.arange(0, BLOCK_M)
    o_row = tl.where(o_m < num_rows, o_m, 0)
    image, exists = image_of(index, o_row // num_patches, num_images)
    o_x = (image * stride_image + (skip + o_row % num_patches).to(tl.int64) * stride_token)[:, None]  # [BM, 1]
    b_acc = add_taps(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), layers, o_x, weight, n, columns, stride_w,
        TAPS, WIDTH, K, TMA, PRECISION, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if index is not None:
        b_acc = tl.where(exists[:, None], b_acc, float("nan"))
    store_activated(
        b_acc, bias, mean, rstd, column_sums, y, z, m, n, num_rows, columns, ACTIVATION, BLOCK_M, BLOCK_N, SLICES
    )  # fmt: skip


def mix_linear(
    args: MixArgs, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool, config: GemmConfig,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``act(norm?(A) @ weight.T + bias)`` with A read from the layers, and z if asked for.

    ``norm`` is (mean, rstd, row sums of ``weight``); weight and bias then come from ``norm.fold_norm``. Every block
    must be a tap, and all layers must share their strides.
    """
    layers, index = tuple(args.layers), args.image_index
    rows, columns = args.num_rows * args.num_patches, weight.shape[0]
    y = weight.new_empty(rows, columns)
    z = torch.empty_like(y) if keep_z and activation is not None else None
    # TMA must be able to read the weight from the first column of any block.
    tma = config.tma and is_aligned(weight) and args.width * weight.element_size() % 16 == 0
    (stride_image,), (stride_token,) = strides(layers, 0), strides(layers, 1)
    mean, rstd, column_sums = norm or (None, None, None)
    launch(
        mix_linear_kernel, tiles(config, rows, columns), weight.device,
        layers, index, operand(weight, (config.block_n, config.block_k), tma),
        bias, mean, rstd, column_sums, y, z, rows, columns, layers[0].shape[0], args.num_patches, args.skip_tokens,
        stride_image, stride_token, weight.stride(0),
        TAPS=tuple(tap.layer for (tap,) in args.plan.blocks), WIDTH=args.width,
        K=weight.shape[1], ACTIVATION=activation, TMA=tma, PRECISION=precision(weight.dtype), **options(config),
    )  # fmt: skip
    return y, z
