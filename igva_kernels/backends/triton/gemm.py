"""The GEMMs, each with what would otherwise be a pass over its operand or result.

    linear                       Y = act(X W^T + b), Z = X W^T + b if asked for                    (epilogue)
    linear_grad_input            dZ = (dY W) * act'(Z), Y = act(Z) and row partials of dZ if asked (epilogue)
    mix_weights_grad_of_linear   row partials of <dZ W[:, block], h_l>: dA is never stored         (epilogue)
    mix_linear                   Y = act(norm?(A) W^T + b), A read from the layers by the GEMM     (prologue)

Products accumulate in fp32; bias, activation and its derivative work on the fp32 accumulator; one rounding.

On sm_90 and later operands come by TMA (descriptors made on the host: no scratch memory, so a CUDA graph captures
them), elsewhere, or where a pointer or stride is not a multiple of 16 bytes, by pointers. The reduction length K is a
constexpr: it is a property of the model, and the loop needs no mask where a tile divides it.

Modelled floor, IGVA on CLIP-L/336: linear 9.66 GFLOP an image = 12.2 us at 790 TFLOP/s, against 4.7 MB read and 4.7 MB
written (2.2 us); what the epilogues save is one read and one write of [M, H], 2.2 us an image each.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from igva_kernels.backends.base import MixArgs
from igva_kernels.backends.triton.common import activate, activate_grad, cast, dot, image_of, kernel
from igva_kernels.backends.triton.config import GemmConfig
from igva_kernels.backends.triton.launch import launch, strides
from igva_kernels.backends.triton.mix import dot_entries
from igva_kernels.backends.triton.program import dot_program, mix_program, runs


@triton.jit
def tile_of(pid, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The first row and column of a program's tile; GROUP_M row tiles share the L2 cache over all columns."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    size = min(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return (first + within % size) * BLOCK_M, (within // size) * BLOCK_N


@triton.jit
def weight_tile(
    weight, n, k, columns, K: tl.constexpr, stride, NK: tl.constexpr, TMA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile ``[BLOCK_K, BLOCK_N]`` at (k, n) of a weight stored ``[N, K]`` (NK) or ``[K, N]``."""
    if TMA:
        if NK:
            return weight.load([n, k]).T
        else:
            return weight.load([k, n])
    else:
        o_k = (k + tl.arange(0, BLOCK_K))[:, None]
        o_n = (n + tl.arange(0, BLOCK_N))[None, :]
        if NK:
            # Columns beyond the end read column 0 and are not stored.
            p_w = weight + tl.where(o_n < columns, o_n, 0).to(tl.int64) * stride + o_k
            if K % BLOCK_K == 0:
                return tl.load(p_w)
            else:
                return tl.load(p_w, mask=o_k < K, other=0.0)
        else:
            m_w = o_n < columns
            if K % BLOCK_K != 0:
                m_w = m_w & (o_k < K)
            return tl.load(weight + o_k.to(tl.int64) * stride + o_n, mask=m_w, other=0.0)


@triton.jit
def gemm_tile(
    x, weight, m, n, rows, columns, stride_x, stride_w, K: tl.constexpr, NK: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The fp32 tile ``[BLOCK_M, BLOCK_N]`` at (m, n) of ``x @ weight.T`` (NK) or ``x @ weight``."""
    o_m = m + tl.arange(0, BLOCK_M)
    # Rows beyond the end read row 0 and are not stored.
    o_row = tl.where(o_m < rows, o_m, 0).to(tl.int64)[:, None] * stride_x
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if TMA:
            b_x = x.load([m, k])
        else:
            o_k = (k + tl.arange(0, BLOCK_K))[None, :]
            if K % BLOCK_K == 0:
                b_x = tl.load(x + o_row + o_k)
            else:
                b_x = tl.load(x + o_row + o_k, mask=o_k < K, other=0.0)
        b_w = weight_tile(weight, n, k, columns, K, stride_w, NK, TMA, BLOCK_N, BLOCK_K)
        b_acc = dot(b_x, b_w, b_acc, PRECISION)
    return b_acc


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """The two column halves of ``[M, N]``."""
    return x.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def column_slices(x, M: tl.constexpr, N: tl.constexpr, SLICES: tl.constexpr):
    """1, 2 or 4 column slices: an epilogue on a slice at a time needs that many times fewer registers."""
    if SLICES == 1:
        return (x,)
    else:
        left, right = halves(x, M, N)
        if SLICES == 2:
            return (left, right)
        else:
            return halves(left, M, N // 2) + halves(right, M, N // 2)


@triton.jit
def store_activated(
    b_acc, bias, mean, rstd, column_sums, y, z, m, n, rows, columns,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """``z = norm?(acc) + bias`` and ``y = act(z)``; z is stored where there is room for it."""
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    o_m = m + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    if mean is not None:
        b_mean = tl.load(mean + o_m, mask=m_m, other=0.0)[:, None]
        b_rstd = tl.load(rstd + o_m, mask=m_m, other=0.0)[:, None]
    b_slices = column_slices(b_acc, BLOCK_M, BLOCK_N, SLICES)
    for s in tl.static_range(SLICES):
        o_n = n + s * WIDTH + tl.arange(0, WIDTH)
        m_n = o_n < columns
        b_z = b_slices[s]
        if mean is not None:
            b_z = b_rstd * (b_z - b_mean * tl.load(column_sums + o_n, mask=m_n, other=0.0)[None, :])
        if bias is not None:
            b_z += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        p_out = o_m.to(tl.int64)[:, None] * columns + o_n[None, :]
        m_out = m_m[:, None] & m_n[None, :]
        if z is not None:
            tl.store(z + p_out, cast(b_z, z.dtype.element_ty), mask=m_out)
        tl.store(y + p_out, cast(activate(b_z, ACTIVATION), y.dtype.element_ty), mask=m_out)


@kernel
def linear_kernel(
    x, weight, bias, y, z, num_rows, columns, stride_x, stride_w,
    K: tl.constexpr, ACTIVATION: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One tile of ``linear``."""
    m, n = tile_of(tl.program_id(0), num_rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    b_acc = gemm_tile(
        x, weight, m, n, num_rows, columns, stride_x, stride_w, K, True, TMA, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )  # fmt: skip
    store_activated(
        b_acc, bias, None, None, None, y, z, m, n, num_rows, columns, ACTIVATION, BLOCK_M, BLOCK_N, SLICES
    )  # fmt: skip


@kernel
def linear_grad_input_kernel(
    grad_out, weight, z, grad_z, y, partials, num_rows, columns, stride_grad, stride_w,
    K: tl.constexpr, ACTIVATION: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One tile of ``linear_grad_input``; ``partials`` gets its column sums, a row a tile of rows."""
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    m, n = tile_of(tl.program_id(0), num_rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    b_acc = gemm_tile(
        grad_out, weight, m, n, num_rows, columns, stride_grad, stride_w, K, False, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        PRECISION,
    )  # fmt: skip
    o_m = m + tl.arange(0, BLOCK_M)
    b_slices = column_slices(b_acc, BLOCK_M, BLOCK_N, SLICES)
    for s in tl.static_range(SLICES):
        o_n = n + s * WIDTH + tl.arange(0, WIDTH)
        p_out = o_m.to(tl.int64)[:, None] * columns + o_n[None, :]
        m_out = (o_m < num_rows)[:, None] & (o_n < columns)[None, :]
        b_z = tl.load(z + p_out, mask=m_out, other=0.0).to(tl.float32)
        b_y, b_slope = activate_grad(b_z, ACTIVATION)
        b_grad = b_slices[s] * b_slope
        tl.store(grad_z + p_out, cast(b_grad, grad_z.dtype.element_ty), mask=m_out)
        if partials is not None:
            b_sum = tl.sum(tl.where((o_m < num_rows)[:, None], b_grad, 0.0), axis=0)
            tl.store(partials + (m // BLOCK_M).to(tl.int64) * columns + o_n, b_sum, mask=o_n < columns)
        if y is not None:
            tl.store(y + p_out, cast(b_y, y.dtype.element_ty), mask=m_out)


@kernel
def mix_weights_grad_of_linear_kernel(
    grad_z, weight, layers, index, partials, num_rows, num_images, num_patches, first_column, slot, slots,
    stride_grad, stride_w, stride_image, stride_token,
    LAYERS: tl.constexpr, SCALES: tl.constexpr, COLUMNS: tl.constexpr, NUM_COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Partials of one tile of one block of dA, a slot a column slice of its rows."""
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


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool, config: GemmConfig
) -> tuple[Tensor, Tensor | None]:
    """``Backend.linear``."""
    rows, columns = x.shape[0], weight.shape[0]
    y = x.new_empty(rows, columns)
    z = torch.empty_like(y) if keep_z and activation is not None else None
    tma = config.tma and is_aligned(x) and is_aligned(weight)
    launch(
        linear_kernel, _tiles(config, rows, columns), x.device,
        _operand(x, (config.block_m, config.block_k), tma), _operand(weight, (config.block_n, config.block_k), tma),
        bias, y, z, rows, columns, x.stride(0), weight.stride(0),
        K=x.shape[1], ACTIVATION=activation, TMA=tma, PRECISION=precision(x.dtype), **_options(config),
    )  # fmt: skip
    return y, z


def linear_grad_input(
    grad_out: Tensor, weight: Tensor, z: Tensor, activation: str, need_y: bool, need_bias: bool, config: GemmConfig
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``Backend.linear_grad_input`` with a weight and an activation."""
    rows, columns = z.shape
    grad_z = torch.empty_like(z)
    y = torch.empty_like(z) if need_y else None
    partials = z.new_empty(triton.cdiv(rows, config.block_m), columns, dtype=torch.float32) if need_bias else None
    tma = config.tma and is_aligned(grad_out) and is_aligned(weight)
    launch(
        linear_grad_input_kernel, _tiles(config, rows, columns), z.device,
        _operand(grad_out, (config.block_m, config.block_k), tma),
        _operand(weight, (config.block_k, config.block_n), tma),
        z, grad_z, y, partials, rows, columns, grad_out.stride(0), weight.stride(0),
        K=grad_out.shape[1], ACTIVATION=activation, TMA=tma, PRECISION=precision(z.dtype), **_options(config),
    )  # fmt: skip
    return grad_z, y, None if partials is None else partials.sum(0).to(z.dtype)


def mix_weights_grad_of_linear(
    grad_z: Tensor, weight: Tensor, blocks: Sequence[int], args: MixArgs, config: GemmConfig
) -> Tensor:
    """``Backend.mix_weights_grad_of_linear``."""
    rows, width = grad_z.shape[0], args.width
    slots = triton.cdiv(width, config.block_n) * config.slices
    partials = grad_z.new_empty(
        args.num_rows, args.num_patches * len(blocks) * slots, args.plan.num_columns, dtype=torch.float32
    )
    tma = config.tma and is_aligned(grad_z) and is_aligned(weight)
    layers = tuple(args.layers)
    for position, block in enumerate(blocks):
        program = dot_program(args.plan, block)
        launch(
            mix_weights_grad_of_linear_kernel, _tiles(config, rows, width), grad_z.device,
            _operand(grad_z, (config.block_m, config.block_k), tma),
            _operand(weight, (config.block_k, config.block_n), tma),
            layers, args.image_index, partials, rows, layers[0].shape[0], args.num_patches,
            block * width, position * slots, len(blocks) * slots, grad_z.stride(0), weight.stride(0),
            strides(layers, 0), strides(layers, 1),
            LAYERS=program.layers, SCALES=program.scales, COLUMNS=program.columns,
            NUM_COLUMNS=args.plan.num_columns, WIDTH=width,
            K=grad_z.shape[1], TMA=tma, PRECISION=precision(grad_z.dtype), **_options(config),
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
    tma = config.tma and is_aligned(weight)
    program, plan_runs = mix_program(args.plan, False), runs(args.plan)
    (stride_image,), (stride_token,) = strides(layers, 0), strides(layers, 1)
    mean, rstd, column_sums = norm or (None, None, None)
    launch(
        mix_linear_kernel, _tiles(config, rows, columns), weight.device,
        layers, mix_weights, index, _operand(weight, (config.block_n, config.block_k), tma),
        bias, mean, rstd, column_sums, y, z, rows, columns, layers[0].shape[0], args.num_patches, args.skip_tokens,
        stride_image, stride_token, *(mix_weights.stride() if mix_weights is not None else (0, 0)), weight.stride(0),
        STARTS=tuple(run.start for run in plan_runs), STOPS=tuple(run.stop for run in plan_runs),
        FIRSTS=tuple(run.block for run in plan_runs), TAPS=tuple(run.taps for run in plan_runs),
        LAYERS=program.layers, ENDS=program.ends, SCALES=program.scales, COLUMNS=program.columns, WIDTH=args.width,
        K=weight.shape[1], ACTIVATION=activation, TMA=tma, PRECISION=precision(weight.dtype), **_options(config),
    )  # fmt: skip
    return y, z


def is_aligned(x: Tensor) -> bool:
    """Whether the last dimension is contiguous and all others start at multiples of 16 bytes, as TMA and the widest
    loads need."""
    steps = (stride * x.element_size() for stride in x.stride()[:-1])
    return x.numel() > 0 and x.stride(-1) == 1 and all(start % 16 == 0 for start in (x.data_ptr(), *steps))


def precision(dtype: torch.dtype) -> str:
    """How the matrix units take fp32 operands: as torch's own setting says."""
    if dtype != torch.float32:
        return "ieee"
    setting = torch.backends.cuda.matmul
    # From torch 2.9 on, reading the older of the two settings fails where the newer one was used.
    tf32 = setting.fp32_precision == "tf32" if hasattr(setting, "fp32_precision") else setting.allow_tf32
    return "tf32" if tf32 else "ieee"


def _operand(x: Tensor, block: tuple[int, int], tma: bool) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block)) if tma else x


def _tiles(config: GemmConfig, rows: int, columns: int) -> int:
    return triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)


def _options(config: GemmConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m, "SLICES": config.slices,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
