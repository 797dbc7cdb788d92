"""The gradient of the mix weights in the product that makes the gradient of the mixed row (mix_weights_grad_sm90.cu).

When it serves a call, and what it is told. Everything else takes torch's GEMM and the dot kernel; ``why_not`` says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix import program
from igva_kernels.ops.weighted_mix.cuda import gemm
from igva_kernels.ops.weighted_mix.operands import batch, layers
from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.steps import MixArgs, take_blocks
from igva_kernels.runtime.cuda import launch
from igva_kernels.runtime.cuda.dense import allows_vectors, chunks
from igva_kernels.runtime.operands import dtype_of, matrix

MAX_DOTS = 64
"""The most weighted entries of one block: ``max_dots`` in csrc/weighted_mix/cuda/params.h."""


def dots(plan: MixPlan, block: int) -> list[tuple[int, int, int, float]]:
    """The weighted entries of one block as ``(0, layer, column, scale)``, those of a column together."""
    wanted = program.dots(plan, (block,))
    entries = zip(wanted.blocks, wanted.layers, wanted.columns, wanted.scales, strict=True)
    return sorted(entries, key=lambda dot: dot[2])


def slots(width: int) -> int:
    """The partials per row and column of one block: one per tile."""
    return chunks(width, gemm.TILE_N)


def why_not(grad_z: Tensor, weight1: Tensor, blocks: Sequence[int], args: MixArgs) -> str | None:
    """None if the kernel can serve the call on a Hopper GPU, otherwise why not: a function of shapes and layouts."""
    (rows, depth), states = grad_z.shape, args.layers
    dtypes = {grad_z.dtype, weight1.dtype, *(layer.dtype for layer in states)}
    if dtypes not in ({torch.bfloat16}, {torch.float16}):
        return f"it takes bf16 or fp16 throughout, not {', '.join(sorted(map(str, dtypes)))}"
    if not grad_z.numel() or rows + gemm.CLUSTER * gemm.TILE_M >= 2**31:
        return f"it counts rows in 32 bits and needs at least one, not {rows}"
    if rows < depth:
        return f"it transposes the weight first, which costs more than it saves below {depth} rows, not {rows}"
    if max(len(dots(args.plan, block)) for block in blocks) > MAX_DOTS:
        return f"it takes {MAX_DOTS} weighted entries per block"
    if grad_z.stride(1) != 1:
        return "the gradient is not contiguous"
    if depth % 8 or not allows_vectors(args.width, states) or not allows_vectors(depth, [grad_z]):
        return "an address or a stride is not a multiple of 16 bytes"
    return None


def run(grad_z: Tensor, weight1: Tensor, blocks: Sequence[int], args: MixArgs) -> Tensor:
    """``WeightedMix.mix_weights_grad_of_linear``, one launch per block; the partials are added in a fixed order."""
    first, width, columns = args.layers[0], args.width, args.plan.num_columns
    rows, tiles, native = grad_z.shape[0], slots(width), launch.module()
    # Zeros, since a block need not have every column.
    partials = torch.zeros(
        args.num_rows, args.num_patches, len(blocks), tiles, columns, dtype=torch.float64, device=first.device
    )
    grid = gemm.grid(rows, width, False, gemm.multiprocessors(first.device))
    for position, block in enumerate(blocks):
        # The kernel takes both operands contiguous along the depth of the product.
        weight = take_blocks(weight1, [block], width).t().contiguous()
        out = native.RowPartials(columns, partials[:, :, position].data_ptr(), len(blocks) * tiles)
        with launch.on_device_of(first) as stream:
            native.mix_weights_grad_sm90(
                matrix(native, grad_z), matrix(native, weight),
                program.Dots(*zip(*dots(args.plan, block), strict=True)), layers(dtype_of(native, first.dtype), args),
                batch(args.image_index, args.num_rows), out, grid, stream,
            )  # fmt: skip
    return partials.sum((1, 2, 3)).float()
