"""Matrix products by the library that suits this CPU.

``choose`` decides from what the CPU and torch have and from the error rule, never from timings. Most products are
torch's own, of whole matrices. Two kinds are cut into tiles, each of which is copied into dense memory: products by
oneDNN, whose error grows with the inner dimension, and products in bf16 or fp16 on a CPU without instructions for
them. There torch's low-precision GEMM is an order of magnitude slower than fp32, so tiles of both operands are
converted to fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from igva_kernels.runtime import native
from igva_kernels.runtime.cpu.features import INTEL, Cpu, this_cpu

BLOCK_ROWS = 2304
"""The most rows of one block of a product by tiles (half as many where they must be converted). Every block copies the
weight again, so blocks are as large as the cache lets them be; 2304 rows are four images of CLIP-L/336."""

TILE_BYTES = 8 << 20
"""The most bytes of one copied tile of the weight, and of its product. Smaller tiles save memory, but then more
products wait for one another when other work shares the CPU."""

ONEDNN_DEPTH = 512
"""The longest inner dimension that one oneDNN product sums. oneDNN adds it up in one chain, whose relative error grows
with the square root of its length: a chain of 512 is 4.1e-7 away from fp64 (measured), where MKL's products are 2.4e-7
to 2.6e-7 away. That keeps the whole operator at 1.4 times plain torch's error; the rule allows 2."""

_INSTRUCTIONS = {
    torch.bfloat16: ("avx512bf16", "amxbf16", "bf16"),
    torch.float16: ("avx512fp16", "amxfp16", "fp16arith", "asimdhp"),
}
"""The CPU features that multiply a dtype; the last ones of each are Arm's."""


class Route(NamedTuple):
    """How products of a dtype are computed."""

    library: str
    """"torch": its public product, by whichever library it calls; or "oneDNN", called directly."""
    dtype: torch.dtype
    """Of the operands and the result: fp32 where the CPU has no instructions for the dtype itself."""
    depth: int | None
    """The longest inner dimension of one product, or None: longer ones are cut and the parts added."""
    reason: str


def choose(dtype: torch.dtype, cpu: Cpu) -> Route:
    """How ``cpu`` multiplies ``dtype``."""
    if dtype in _INSTRUCTIONS:
        has = [feature for feature in _INSTRUCTIONS[dtype] if feature in cpu.features]
        if cpu.onednn and has:
            return Route("torch", dtype, None, f"it calls oneDNN, which uses {has[0]}")
        wide = choose(torch.float32, cpu)
        return wide._replace(reason=f"{wide.reason}; in fp32, as the CPU has no instructions for {dtype}")
    if dtype != torch.float32:
        reason = "no other library takes this dtype"
    elif not cpu.mkl:
        reason = "its BLAS is not MKL, and is assumed to suit the CPU"
    elif "avx512f" not in cpu.features:
        reason = "it calls MKL, which without AVX-512 is as fast as oneDNN and closer to fp64"
    elif cpu.vendor == INTEL:
        reason = "it calls MKL, which uses the AVX-512 of Intel's CPUs"
    elif not cpu.vendor or not cpu.onednn:
        reason = f"it calls MKL, as {'this torch has no oneDNN' if cpu.vendor else 'the vendor of the CPU is unknown'}"
    else:
        return Route("oneDNN", dtype, ONEDNN_DEPTH, "MKL uses the AVX-512 of Intel's CPUs only")
    return Route("torch", dtype, None, reason)


@cache
def route(dtype: torch.dtype) -> Route:
    """How this CPU multiplies ``dtype``."""
    return choose(dtype, this_cpu())


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are computed in fp32 because the CPU has no instructions for them."""
    return route(dtype).dtype != dtype


def describe(dtype: torch.dtype) -> str:
    """The route of ``dtype`` as a line of text."""
    library, _, depth, reason = route(dtype)
    cut = "" if depth is None else f", cut at an inner dimension of {depth}"
    held = library == "oneDNN" and not _threads_are_granted()
    return f"{library}{cut}: {reason}" + ("; now torch, as OpenMP does not grant torch's threads" if held else "")


def block_rows(rows: int, limit: int) -> int:
    """Rows of equal blocks that hold at most ``limit`` rows, a multiple of 16 where there are several."""
    blocks = -(-rows // limit)
    return max(rows, 1) if blocks <= 1 else min(limit, -(-rows // (16 * blocks)) * 16)


def products(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """``x @ weight.T + bias`` in blocks: ``(rows, columns, block)``.

    Args:
        x: ``[M, K]``, any strides; in the dtype of ``weight`` or of the products.
        weight: ``[N, K]``, any strides.
        bias: ``[N]`` or None, any stride.
        out: ``[M, N]``, where the products may be written if it has their dtype.

    Yields:
        Blocks in the dtype of the products: parts of ``out``, or scratch memory that the next block may reuse. The
        caller may overwrite either.
    """
    chosen = route(weight.dtype)
    bias = None if bias is None else bias.to(chosen.dtype)
    out = None if out is None or out.dtype != chosen.dtype else out
    use_onednn = chosen.library == "oneDNN" and x.numel() > 0 and weight.numel() > 0 and _threads_are_granted()
    if not use_onednn and chosen.dtype == weight.dtype:
        everything = slice(0, x.shape[0]), slice(0, weight.shape[0])
        block = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
        yield *everything, _torch_product(x, weight, bias, block)
        return
    (m, k), n = x.shape, weight.shape[0]
    step, depth = block_rows(m, BLOCK_ROWS if x.dtype == chosen.dtype else BLOCK_ROWS // 2), k
    if use_onednn and chosen.depth:
        depth = block_rows(k, chosen.depth)
    width = block_rows(n, max(16, TILE_BYTES // (chosen.dtype.itemsize * max(depth, step))))
    tile = x.new_empty(width * depth, dtype=chosen.dtype)
    converted = x.new_empty(0 if x.dtype == chosen.dtype else min(step, m) * k, dtype=chosen.dtype)
    scratch = x.new_empty(0 if use_onednn or out is not None else min(step, m) * width, dtype=chosen.dtype)
    for top in range(0, m, step):
        rows = slice(top, min(top + step, m))
        x_rows = x[rows] if x.dtype == chosen.dtype else _copy(x[rows], converted)
        if use_onednn and x_rows.stride(1) != 1:
            x_rows = x_rows.contiguous()  # once, not for every tile
        for left in range(0, n, width):
            columns = slice(left, min(left + width, n))
            tile_bias = None if bias is None else bias[columns]
            if use_onednn:
                block = _onednn_product(x_rows, weight[columns], tile_bias, depth, tile)
            else:
                shape = rows.stop - rows.start, columns.stop - columns.start
                block = scratch[: shape[0] * shape[1]].view(shape) if out is None else out[rows, columns]
                _torch_product(x_rows, _copy(weight[columns], tile), tile_bias, block)
            yield rows, columns, block


def _torch_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None, depth: int, tile: Tensor) -> Tensor:
    """``x @ weight.T + bias`` in parts of the inner dimension; each product adds the sum of those before it.

    torch's operator is a private one, because no public one hands fp32 to oneDNN. For a weight that is a slice of a
    matrix it has only a slow reference loop, and it reads the bias as if it were dense.
    """
    bias = None if bias is None else bias.contiguous()
    total = torch.ops.mkldnn._linear_pointwise(x[:, :depth], _copy(weight[:, :depth], tile), bias, "none", [], "")
    for start in range(depth, x.shape[1], depth):
        inner = slice(start, start + depth)
        total = torch.ops.mkldnn._linear_pointwise(x[:, inner], total, _copy(weight[:, inner], tile), None, "add")
    return total


def _copy(source: Tensor, tile: Tensor) -> Tensor:
    """A dense copy in the memory order of the source: libraries take both orders, and transposing takes time."""
    n, k = source.shape
    flat = tile[: n * k]
    return (flat.view(k, n).t() if source.stride(0) == 1 else flat.view(n, k)).copy_(source)


def _threads_are_granted() -> bool:
    """Whether OpenMP grants the caller the threads that torch asks for: otherwise oneDNN leaves parts undone."""
    module, threads = native.load()[0], torch.get_num_threads()
    return module is not None and module.granted_threads(threads) == threads
