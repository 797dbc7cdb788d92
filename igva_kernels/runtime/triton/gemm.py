"""Matrix products whose kernels do more than multiply.

    linear              Y = act(X W^T + b), Z = X W^T + b if asked for                    (epilogue)
    linear_grad_input   dZ = (dY W) * act'(Z), Y = act(Z) and row partials of dZ if asked (epilogue)

Products accumulate in fp32; bias, activation and its derivative work on the fp32 accumulator, and the result is rounded
once. Operators build their own kernels from the same tiles.

On sm_90 and later, operands come by TMA (descriptors made on the host: no scratch memory, so a CUDA graph captures
them); elsewhere, and where a pointer or stride is not a multiple of 16 bytes, they come by pointers. The reduction
length K is a constexpr: it is a property of the model, and the loop needs no mask where a tile divides it.

Modelled floor, IGVA on CLIP-L/336: linear 9.66 GFLOP per image = 12.2 us at 790 TFLOP/s, against 2.4 MB of X read and
4.7 MB of Y written (1.6 us at 4.3 TB/s). An epilogue saves one read and one write of [M, H], 2.2 us per image.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from igva_kernels.runtime.config import GemmConfig
from igva_kernels.runtime.triton.common import activate, cast, dot, kernel, value_and_slope
from igva_kernels.runtime.triton.launch import launch


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
    """1, 2 or 4 column slices: an epilogue on one slice at a time needs that many times fewer registers."""
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
    """``z = norm?(acc) + bias`` and ``y = act(z)``; z is stored unless it is None."""
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
    """One tile of ``linear_grad_input``; ``partials`` gets its column sums, one row per tile of rows."""
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
        b_y, b_slope = value_and_slope(b_z, ACTIVATION)
        b_grad = b_slices[s] * b_slope
        tl.store(grad_z + p_out, cast(b_grad, grad_z.dtype.element_ty), mask=m_out)
        if partials is not None:
            b_sum = tl.sum(tl.where((o_m < num_rows)[:, None], b_grad, 0.0), axis=0)
            tl.store(partials + (m // BLOCK_M).to(tl.int64) * columns + o_n, b_sum, mask=o_n < columns)
        if y is not None:
            tl.store(y + p_out, cast(b_y, y.dtype.element_ty), mask=m_out)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool, config: GemmConfig
) -> tuple[Tensor, Tensor | None]:
    """``Dense.linear``."""
    rows, columns = x.shape[0], weight.shape[0]
    y = x.new_empty(rows, columns)
    z = torch.empty_like(y) if keep_z and activation is not None else None
    tma = config.tma and is_aligned(x) and is_aligned(weight)
    launch(
        linear_kernel, tiles(config, rows, columns), x.device,
        operand(x, (config.block_m, config.block_k), tma), operand(weight, (config.block_n, config.block_k), tma),
        bias, y, z, rows, columns, x.stride(0), weight.stride(0),
        K=x.shape[1], ACTIVATION=activation, TMA=tma, PRECISION=precision(x.dtype), **options(config),
    )  # fmt: skip
    return y, z


def linear_grad_input(
    grad_out: Tensor, weight: Tensor, z: Tensor, activation: str, need_y: bool, need_bias: bool, config: GemmConfig
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``Dense.linear_grad_input`` with a weight and an activation."""
    rows, columns = z.shape
    grad_z = torch.empty_like(z)
    y = torch.empty_like(z) if need_y else None
    partials = z.new_empty(triton.cdiv(rows, config.block_m), columns, dtype=torch.float32) if need_bias else None
    tma = config.tma and is_aligned(grad_out) and is_aligned(weight)
    launch(
        linear_grad_input_kernel, tiles(config, rows, columns), z.device,
        operand(grad_out, (config.block_m, config.block_k), tma),
        operand(weight, (config.block_k, config.block_n), tma),
        z, grad_z, y, partials, rows, columns, grad_out.stride(0), weight.stride(0),
        K=grad_out.shape[1], ACTIVATION=activation, TMA=tma, PRECISION=precision(z.dtype), **options(config),
    )  # fmt: skip
    return grad_z, y, None if partials is None else partials.sum(0).to(z.dtype)


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


def operand(x: Tensor, block: tuple[int, int], tma: bool) -> Any:
    """A matrix as a kernel takes it: by a descriptor of tiles ``block``, or by its pointer."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block)) if tma else x


def tiles(config: GemmConfig, rows: int, columns: int) -> int:
    """The number of programs of a product."""
    return triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)


def options(config: GemmConfig) -> dict[str, int]:
    """The constants of a kernel that come from a configuration."""
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m, "SLICES": config.slices,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
