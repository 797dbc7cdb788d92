"""The mix on the CPU: addresses and strides of torch tensors go to the C++ module."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.operands import batch, layer_shape, layers, serves_pair, weights
from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import Shares, Steps, dots, lower
from igva_kernels.ops.weighted_mix.steps import Keep, LayerShape, MixArgs, Mixed, Projector, WeightedMix
from igva_kernels.runtime import operands
from igva_kernels.runtime.cpu import products
from igva_kernels.runtime.cpu.dense import CpuDense, linear_into, module
from igva_kernels.runtime.dense import Norm, accumulation_dtype
from igva_kernels.runtime.operands import activations, address, dtype_of, view

SCRATCH_BYTES = 40 << 20
"""The most bytes of the row blocks that ``project`` works on; with the copied tiles of the weights, its scratch stays
below 64 MiB. Blocks are as large as that allows, because libraries pack the weight again for every block, which takes
as long as multiplying a hundred rows."""

STREAM_BYTES = 4 << 20
"""Mixed rows of more bytes than this are written around the cache, which would not hold them until they are read."""


class CpuWeightedMix(CpuDense, WeightedMix):
    """Mixing, activations and the gradients of the mix in C++; GEMMs by torch, on row blocks that stay in the cache."""

    def activations(self) -> Collection[str]:
        return activations(module())

    def mix(self, args: MixArgs, dtype: torch.dtype, norm: Norm | None = None, keep: Keep = Keep.NOTHING) -> Mixed:
        """The mixed rows, rounded once to ``dtype``; ``norm`` is applied to the unrounded rows."""
        first = args.layers[0]
        if not serves_pair(first.dtype, dtype):
            return self.mix(args, accumulation_dtype(first.dtype), norm, keep).to(dtype)
        rows = args.new_rows(dtype)
        raw_rows = torch.empty_like(rows) if keep == Keep.ROWS and norm is not None else None
        sums = args.new_sums() if keep == Keep.SOURCES else []
        stats = args.new_stats(norm)
        _mix_rows(args, slice(0, args.num_rows * args.num_patches), rows, sums, norm, raw_rows, stats)
        return Mixed(rows, raw_rows, sums, *stats)

    def mix_weights_grad(self, grad_rows: Tensor, blocks: Sequence[int], args: MixArgs) -> Tensor:
        """``dw[b, c]`` in the accumulation dtype, summed in an order that depends on the shapes only."""
        assert args.mix_weights is not None
        first = args.layers[0]
        if not serves_pair(first.dtype, grad_rows.dtype):
            grad_rows = grad_rows.to(first.dtype)
        shape, wide = args.mix_weights.shape, accumulation_dtype(first.dtype)
        grad, native = first.new_empty(shape, dtype=wide), module()
        native.mix_weights_grad(
            view(native, grad_rows), dots(args.plan, tuple(blocks)), layers(dtype_of(native, first.dtype), args),
            batch(args.image_index, args.num_rows), shape[1], address(grad), torch.get_num_threads(),
        )  # fmt: skip
        return grad

    def layer_grads(
        self, grad_rows: Tensor, shares: Shares, mix_weights: Tensor | None, image_index: Tensor | None,
        shape: LayerShape,
    ) -> list[Tensor]:  # fmt: skip
        """One gradient ``[I, T, D]`` per signature; skipped tokens get zeros, rows of one image add in row order."""
        if not serves_pair(shape.dtype, grad_rows.dtype):
            grad_rows = grad_rows.to(shape.dtype)
        grads, native = shape.new_grads(grad_rows, shares.num_grads), module()
        native.layer_grads(
            view(native, grad_rows), shares, weights(mix_weights), batch(image_index, grad_rows.shape[0]),
            layer_shape(native, shape), [grad.data_ptr() for grad in grads], torch.get_num_threads(),
        )  # fmt: skip
        return grads

    def project(
        self, args: MixArgs, projector: Projector, keep: Keep, keep_z: bool
    ) -> tuple[Tensor, Mixed, Tensor | None]:
        """As in ``WeightedMix``, on blocks of rows: A, Z and Y exist whole only where they are kept."""
        weight1, bias1, weight2, bias2, norm, activation = projector
        first, dtype = args.layers[0], weight1.dtype
        # The sums of an image that several rows read must be written once, which work by blocks of rows cannot ensure.
        if not serves_pair(first.dtype, dtype) or (keep == Keep.SOURCES and args.image_index is not None):
            return super().project(args, projector, keep, keep_z)
        batch, patches, total = args.num_rows, args.num_patches, args.num_rows * args.num_patches
        row_width, hidden = weight1.shape[1], weight1.shape[0]
        width = hidden if weight2 is None else weight2.shape[0]
        out = weight1.new_empty((total, width))
        z = weight1.new_empty((total, hidden)) if keep_z else None
        kept_rows = weight1.new_empty((total, row_width)) if keep == Keep.ROWS else None
        sums = args.new_sums() if keep == Keep.SOURCES else []
        stats = args.new_stats(norm)

        # Where products are emulated, inference keeps a block of rows in fp32 from the mix to the output.
        block_dtype = torch.float32 if products.is_emulated(dtype) and keep == Keep.NOTHING and not keep_z else dtype
        size, own = block_dtype.itemsize, kept_rows is None or norm is not None
        # Mixed rows that are not kept borrow the memory of their block's output, if it is large enough: they have been
        # read by the time the output is written, and every page of fresh memory takes time.
        lent = own and weight2 is not None and row_width * size <= width * dtype.itemsize
        row_bytes = size * (hidden + (0 if lent else row_width))
        step = products.block_rows(total, max(16, SCRATCH_BYTES // max(1, row_bytes)))
        x_rows = weight1.new_empty((min(step, total), row_width), dtype=block_dtype) if own and not lent else None
        y_rows = None if weight2 is None else weight1.new_empty((min(step, total), hidden), dtype=block_dtype)
        for start in range(0, total, step):
            rows = slice(start, min(start + step, total))
            count, kept = rows.stop - start, None if kept_rows is None else kept_rows[rows]
            if lent:
                memory = out[rows].view(-1)[: count * row_width * size // dtype.itemsize]
                x = memory.view(block_dtype).view(count, row_width)
            else:
                x = kept if x_rows is None else x_rows[:count]
            assert x is not None
            _mix_rows(args, rows, x, sums, norm, kept if own else None, stats)
            y = out[rows] if y_rows is None else y_rows[:count]
            linear_into(x, weight1, bias1, activation, y, None if z is None else z[rows])
            if weight2 is not None:
                linear_into(y, weight2, bias2, None, out[rows])
        whole = None if kept_rows is None else kept_rows.view(batch, patches, row_width)
        mixed = Mixed(whole, None, sums, *stats) if norm is None else Mixed(None, whole, sums, *stats)
        return torch.ops.aten._unsafe_view(out, (batch, patches, width)), mixed, z  # see WeightedMix.project


# ---- calls of the C++ module ---------------------------------------------------------------------------------------

Stats = tuple[Tensor | None, Tensor | None]


def _mix_rows(
    args: MixArgs, rows: slice, out: Tensor, sums: Sequence[Tensor], norm: Norm | None, raw_rows: Tensor | None,
    stats: Stats,
) -> None:  # fmt: skip
    """Mix the rows ``b * P + p`` of the slice into ``out`` and, before the norm, into ``raw_rows``."""
    first, native, threads = args.layers[0], module(), torch.get_num_threads()
    mean, rstd = stats
    native_norm = None
    if norm is not None:
        assert mean is not None
        # These have names, so that they live until the call returns.
        weight, bias = (None if p is None else p.to(mean.dtype) for p in norm[:2])
        native_norm = operands.norm(native, weight, bias, norm[2], mean, rstd)
    program = _program(args.plan, bool(sums))
    scratch = first.new_empty(
        (threads, program.scratch(args.width, norm is not None)), dtype=accumulation_dtype(first.dtype)
    )
    block = native.RowBlock(
        dtype_of(native, out.dtype), address(out), address(raw_rows), (rows.start, rows.stop),
        [s.data_ptr() for s in sums], out.nbytes > STREAM_BYTES,
    )  # fmt: skip
    native.mix(
        program, layers(dtype_of(native, first.dtype), args), weights(args.mix_weights),
        batch(args.image_index, args.num_rows), block, native_norm, address(scratch), threads,
    )  # fmt: skip


@cache
def _program(plan: MixPlan, with_sums: bool) -> Any:
    """The plan in the tables of the C++ module."""
    program = lower(plan)
    return module().Program(program.steps, program.sum_steps if with_sums else Steps((), (), (), (), ()))


IMPLEMENTATION = CpuWeightedMix()
