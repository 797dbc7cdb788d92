"""Matrix products in blocks, by the fastest GEMM that torch has on this CPU.

fp32 goes to oneDNN, which uses AVX-512 on every vendor's CPU, but adds up the whole inner dimension in one chain: long
ones are cut, and the parts added, so that the error stays near that of a GEMM which does so itself. bf16 and fp16 go to
it where the CPU has matrix or dot instructions for them; elsewhere torch's low-precision GEMM is an order of magnitude
slower than fp32, so tiles of both operands are converted and multiplied in fp32.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 384
"""Rows of a block: its operands stay in the cache, and packing the weight again for every block costs little."""

TILED_BLOCK_ROWS = 1024
"""The most rows of a block where tiles of the weight are copied for every block."""

TILE_BYTES = 8 << 20
"""Of a copied tile of the weight: smaller ones save memory, but where other work shares the CPU every product waits."""

TILE_DEPTH = 1024
"""Inner dimension of a product in fp32: one of 2048 is 2.25 times as far from fp64 as MKL's, halves are 1.6 times."""

COPY_BYTES = 64 << 20
"""Of the contiguous copy that oneDNN makes of a transposed operand."""

_POINTWISE = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


@cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are computed in fp32 because the CPU has no instructions for them."""
    if dtype == torch.bfloat16:
        if _onednn() is None or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return True
        # On x86 oneDNN also says yes where it emulates bf16 with fp32 instructions.
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
        allowed = any(part in limit for part in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10"))
        has_dot = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return x86 and not (allowed and has_dot)
    if dtype == torch.float16:
        return _onednn() is None or not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def fuses_activation(dtype: torch.dtype) -> bool:
    """Whether the GEMM itself must apply bias and activation, because what it returns is already rounded."""
    return dtype in (torch.bfloat16, torch.float16) and not is_emulated(dtype)


def block_rows(rows: int, limit: int) -> int:
    """Rows of equal blocks that hold at most ``limit`` rows, a multiple of 16 where there are several."""
    blocks = -(-rows // limit)
    return max(rows, 1) if blocks <= 1 else min(limit, -(-rows // (16 * blocks)) * 16)


def whole_rows(x: Tensor) -> int:
    """Rows of a block where the result is wanted whole: all of them, unless x is transposed and large."""
    if x.is_contiguous():
        return x.shape[0]
    return max(BLOCK_ROWS, COPY_BYTES // max(1, x.shape[1] * x.itemsize))


def products(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, limit: int | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """``act(x @ weight.T + bias)`` in blocks: ``(rows, columns, block)``.

    Args:
        x: ``[M, K]``, any strides; fp32 or the dtype of ``weight``.
        weight: ``[N, K]``, any strides.
        bias: ``[N]`` or None.
        activation: only where ``fuses_activation``.
        limit: rows of a block; ``BLOCK_ROWS`` unless given, ``TILED_BLOCK_ROWS`` with tiles of the weight.

    Yields:
        Blocks in the dtype of ``weight``, or in fp32 where it is emulated; the caller may overwrite them.
    """
    if is_emulated(weight.dtype):
        yield from _tiled_products(x, weight, bias, torch.float32, limit)
        return
    is_long = weight.dtype == torch.float32 and weight.shape[1] > TILE_DEPTH and _onednn() is not None
    # Of a slice of a matrix: oneDNN has nothing but a reference loop for it.
    if is_long or not (weight.is_contiguous() or weight.t().is_contiguous()):
        yield from _tiled_products(x, weight, bias, weight.dtype, limit)
        return
    step = block_rows(x.shape[0], limit or BLOCK_ROWS)
    everything = slice(0, weight.shape[0])
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        yield rows, everything, _linear(x[rows], weight, bias, activation)


def _tiled_products(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, limit: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The same with dense copies of tiles of the weight in ``dtype``."""
    (m, k), n = x.shape, weight.shape[0]
    step = block_rows(m, min(limit or TILED_BLOCK_ROWS, TILED_BLOCK_ROWS))
    depth = block_rows(k, TILE_DEPTH) if dtype == torch.float32 else k  # partial sums are not rounded to 16 bits
    width = block_rows(n, max(16, TILE_BYTES // (dtype.itemsize * max(depth, 1))))
    bias = None if bias is None else bias.to(dtype)
    for top in range(0, m, step):
        rows = slice(top, top + step)
        x_rows = x[rows] if x.stride(1) == 1 else x[rows].contiguous()  # transposed once, not for every tile
        for left in range(0, n, width):
            columns = slice(left, left + width)
            tile_bias = None if bias is None else bias[columns]
            block = _linear(x_rows[:, :depth].to(dtype), _copy(weight[columns, :depth], dtype), tile_bias, None)
            for start in range(depth, k, depth):
                inner = slice(start, start + depth)
                block += _linear(x_rows[:, inner].to(dtype), _copy(weight[columns, inner], dtype), None, None)
            yield rows, columns, block


def _copy(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense copy in the order in which the tile lies in memory: oneDNN takes both, transposing takes time."""
    return tile.t().to(dtype).contiguous().t() if tile.stride(0) == 1 else tile.to(dtype).contiguous()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    op = _onednn()
    if op is None or weight.dtype == torch.float64 or x.numel() == 0 or weight.numel() == 0:
        return F.linear(x, weight, bias)
    attribute, algorithm = _POINTWISE[activation]
    return op(x, weight, bias, attribute, [], algorithm)


@cache
def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's linear, or None where this torch comes without."""
    if not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default
