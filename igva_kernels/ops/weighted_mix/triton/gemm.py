"""The products that read the layers, or whose result is dotted with them.

    mix_linear                   Y = act(norm?(A) W^T + b), A read from the layers by the product        (prologue)
    mix_weights_grad_of_linear   row partials of <dZ W[:, block], h_l>: dA is never stored               (epilogue)

Accumulation, roundings, TMA and the constants of a configuration are those of ``runtime.triton.gemm``.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.ops.weighted_mix.program import dots
from igva_kernels.ops.weighted_mix.steps import MixArgs
from igva_kernels.ops.weighted_mix.triton.mix import dot_entries, image_of, kernel
from igva_kernels.runtime.config import GemmConfig
from igva_kernels.runtime.triton.common import cast, dot
from igva_kernels.runtime.triton.gemm import (
    column_slices,
    gemm_tile,
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


@kernel
def mix_weights_grad_of_linear_kernel(
    grad_z, weight, layers, index, partials, num_rows, num_images, num_patches, first_column, slot, slots,
    stride_grad, stride_w, stride_image, stride_token,
    LAYERS: tl.constexpr, SCALES: tl.constexpr, COLUMNS: tl.constexpr, NUM_COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Partials of one tile of one block of dA, one slot per column slice of its rows."""
    SLICE: tl.constexpr = BLOCK_N // SLICES
    m, n = tile_of(tl.program_id(0), num_rows, WIDTH, BLOCK_M, BLOCK_N, GROUP_M)
    b_acc = gemm_tile(
        grad_z, weight, m, first_column + n, num_rows, first_column + WIDTH, stride_grad, stride_w, K, False, TMA,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    o_m = m + tl.arange(0, BLOCK_M)
    m_m = o_m < num_rows
    o_row = tl.where(m_m, o_m, 0)
    image, exists = image_of(index, o_row // num_patches, num_images)
    o_t = (o_row % num_patches).to(tl.int64)[:, None]
    b_slices = column_slices(b_acc, BLOCK_M, BLOCK_N, SLICES)
    for s in tl.static_range(SLICES):
        o_d = (n + s * SLICE + tl.arange(0, SLICE))[None, :]
        m_x = m_m[:, None] & (o_d < WIDTH)
        o_partial = (o_m.to(tl.int64) * slots + slot + n // SLICE + s) * NUM_COLUMNS
        dot_entries(
            b_slices[s], layers, image[:, None], exists, o_t, o_d, m_x, partials, o_partial, m_m,
            stride_image, stride_token, LAYERS, SCALES, COLUMNS, NUM_COLUMNS, BLOCK_M,
        )  # fmt: skip


@triton.jit
def add_taps(
    b_acc, layers, o_x, weight, n, columns, stride_w,
    START: tl.constexpr, TAPS: tl.constexpr, FIRST: tl.constexpr, LAYERS: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds a run of taps to the accumulator: one loop, so that the pipeline stays full from one tap to the next."""
    STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    for step in range(0, TAPS * STEPS):
        tap = step // STEPS
        k = (step % STEPS) * BLOCK_K
        p_x = layers[LAYERS[START]]
        for t in tl.static_range(1, TAPS):
            p_x = tl.where(tap == t, layers[LAYERS[START + t]], p_x)
        o_k = (k + tl.arange(0, BLOCK_K))[None, :]
        if WIDTH % BLOCK_K == 0:
            b_x = tl.load(p_x + o_x + o_k)
        else:
            b_x = tl.load(p_x + o_x + o_k, mask=o_k < WIDTH, other=0.0)
        k_w = (FIRST + tap) * WIDTH + k
        b_w = weight_tile(weight, n, k_w, columns, K, stride_w, True, TMA, BLOCK_N, BLOCK_K)
        b_acc = dot(b_x, b_w, b_acc, PRECISION)
    return b_acc


@triton.jit
def add_mixed(
    b_acc, layers, mix_weights, b, o_x, weight, n, columns, stride_wb, stride_wc, stride_w,
    START: tl.constexpr, STOP: tl.constexpr, FIRST: tl.constexpr, LAYERS: tl.constexpr, ENDS: tl.constexpr,
    SCALES: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds a mixed block to the accumulator: each tile of it is mixed as in the mix kernel, and rounded."""
    for step in range(0, (WIDTH + BLOCK_K - 1) // BLOCK_K):
        o_k = (step * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        b_term = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        b_part = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        b_block = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for i in tl.static_range(START, STOP):
            p_x = layers[LAYERS[i]] + o_x + o_k
            if WIDTH % BLOCK_K == 0:
                b_term += tl.load(p_x).to(tl.float32)
            else:
                b_term += tl.load(p_x, mask=o_k < WIDTH, other=0.0).to(tl.float32)
            if ENDS[i] >= 1:
                b_part += b_term * SCALES[i]
                b_term = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            if ENDS[i] >= 2:
                if COLUMNS[i] >= 0:
                    p_mix = mix_weights + b.to(tl.int64) * stride_wb + COLUMNS[i] * stride_wc
                    b_block += b_part * tl.load(p_mix)[:, None]
                else:
                    b_block += b_part
                b_part = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        k_w = FIRST * WIDTH + step * BLOCK_K
        b_w = weight_tile(weight, n, k_w, columns, K, stride_w, True, TMA, BLOCK_N, BLOCK_K)
        b_acc = dot(cast(b_block, b_w.dtype), b_w, b_acc, PRECISION)
    return b_acc


@kernel
def mix_linear_kernel(
    layers, mix_weights, index, weight, bias, mean, rstd, column_sums, y, z,
    num_rows, columns, num_images, num_patches, skip, stride_image, stride_token, stride_wb, stride_wc, stride_w,
    STARTS: tl.constexpr, STOPS: tl.constexpr, FIRSTS: tl.constexpr, TAPS: tl.constexpr,
    LAYERS: tl.constexpr, ENDS: tl.constexpr, SCALES: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, ACTIVATION: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One tile of ``mix_linear``, the rows read from the layers run by run."""
    m, n = tile_of(tl.program_id(0), num_rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = m + tl.arange(0, BLOCK_M)
    o_row = tl.where(o_m < num_rows, o_m, 0)
    b = o_row // num_patches
    image, exists = image_of(index, b, num_images)
    o_x = (image * stride_image + (skip + o_row % num_patches).to(tl.int64) * stride_token)[:, None]  # [BM, 1]
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in tl.static_range(len(TAPS)):
        if TAPS[r] > 0:
            b_acc = add_taps(
                b_acc, layers, o_x, weight, n, columns, stride_w, STARTS[r], TAPS[r], FIRSTS[r], LAYERS, WIDTH, K,
                TMA, PRECISION, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            b_acc = add_mixed(
                b_acc, layers, mix_weights, b, o_x, weight, n, columns, stride_wb, stride_wc, stride_w,
                STARTS[r], STOPS[r], FIRSTS[r], LAYERS, ENDS, SCALES, COLUMNS, WIDTH, K, TMA, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    if index is not None:
        b_acc = tl.where(exists[:, None], b_acc, float("nan"))
    store_activated(
        b_acc, bias, mean, rstd, column_sums, y, z, m, n, num_rows, columns, ACTIVATION, BLOCK_M, BLOCK_N, SLICES
    )  # fmt: skip


def mix_weights_grad_of_linear(
    grad_z: Tensor, weight: Tensor, blocks: Sequence[int], args: MixArgs, config: GemmConfig
) -> Tensor:
    """``WeightedMix.mix_weights_grad_of_linear``."""
    rows, width = grad_z.shape[0], args.width
    slots = triton.cdiv(width, config.block_n) * config.slices
    partials = grad_z.new_empty(
        args.num_rows, args.num_patches * len(blocks) * slots, args.plan.num_columns, dtype=torch.float32
    )
    tma = config.tma and is_aligned(grad_z) and _has_aligned_blocks(weight, width)
    layers = tuple(args.layers)
    for position, block in enumerate(blocks):
        wanted = dots(args.plan, (block,))
        launch(
            mix_weights_grad_of_linear_kernel, tiles(config, rows, width), grad_z.device,
            operand(grad_z, (config.block_m, config.block_k), tma),
            operand(weight, (config.block_k, config.block_n), tma),
            layers, args.image_index, partials, rows, layers[0].shape[0], args.num_patches,
            block * width, position * slots, len(blocks) * slots, grad_z.stride(0), weight.stride(0),
            strides(layers, 0), strides(layers, 1),
            LAYERS=wanted.layers, SCALES=wanted.scales, COLUMNS=wanted.columns,
            NUM_COLUMNS=args.plan.num_columns, WIDTH=width,
            K=grad_z.shape[1], TMA=tma, PRECISION=precision(grad_z.dtype), **options(config),
        )  # fmt: skip
    return partials.sum(1)


def mix_linear(
    args: MixArgs, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool, config: GemmConfig,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``act(norm?(A) @ weight.T + bias)`` with A read from the layers, and z if asked for.

    ``norm`` is (mean, rstd, row sums of ``weight``); weight and bias then come from ``norm.fold_norm``. All layers
    must share their strides.
    """
    layers, index, mix_weights = tuple(args.layers), args.image_index, args.mix_weights
    rows, columns = args.num_rows * args.num_patches, weight.shape[0]
    y = weight.new_empty(rows, columns)
    z = torch.empty_like(y) if keep_z and activation is not None else None
    tma = config.tma and _has_aligned_blocks(weight, args.width)
    steps, runs = args.program.steps, args.program.runs
    (stride_image,), (stride_token,) = strides(layers, 0), strides(layers, 1)
    mean, rstd, column_sums = norm or (None, None, None)
    launch(
        mix_linear_kernel, tiles(config, rows, columns), weight.device,
        layers, mix_weights, index, operand(weight, (config.block_n, config.block_k), tma),
        bias, mean, rstd, column_sums, y, z, rows, columns, layers[0].shape[0], args.num_patches, args.skip_tokens,
        stride_image, stride_token, *(mix_weights.stride() if mix_weights is not None else (0, 0)), weight.stride(0),
        STARTS=tuple(run.start for run in runs), STOPS=tuple(run.stop for run in runs),
        FIRSTS=tuple(run.block for run in runs), TAPS=tuple(run.taps for run in runs),
        LAYERS=steps.layers, ENDS=steps.ends, SCALES=steps.scales, COLUMNS=steps.columns, WIDTH=args.width,
        K=weight.shape[1], ACTIVATION=activation, TMA=tma, PRECISION=precision(weight.dtype), **options(config),
    )  # fmt: skip
    return y, z


def _has_aligned_blocks(weight: Tensor, width: int) -> bool:
    """Whether TMA can read the weight from the first column of any block of the mixed row."""
    return is_aligned(weight) and width * weight.element_size() % 16 == 0
