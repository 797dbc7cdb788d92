"""The CPU backend's kernels: addresses and strides of torch tensors go to the C++ module."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from igva_kernels import native
from igva_kernels.backends.base import (
    Backend,
    Keep,
    LayerShape,
    MixArgs,
    Mixed,
    ProjectorWeights,
    Signature,
    accumulation_dtype,
)
from igva_kernels.backends.cpu import gemm
from igva_kernels.plan import Block, MixPlan, is_tap, terms
from igva_kernels.reference import Norm

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}

SCRATCH_BYTES = 40 << 20
"""Of the row blocks of ``project``; with the copied tiles of the weights, its scratch stays below 64 MiB. Blocks are as
large as that allows: libraries pack the weight again for every one of them, which takes the time of a hundred rows."""

STREAM_BYTES = 4 << 20
"""Rows that take more are written around the cache: nobody finds them there later."""


class CpuBackend(Backend):
    """Mixing, activations and the gradients of the mix in C++; GEMMs by torch, on row blocks that stay in the cache."""

    name = "cpu"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if tensors of this device and dtype can be served, otherwise the reason why not."""
        if device.type != "cpu":
            return f"it serves CPU tensors, not {device.type!r}"
        if dtype not in DTYPES:
            return f"it serves {', '.join(str(d) for d in DTYPES)}, not {dtype}"
        return native.load()[1] or None

    # ---- kernels ---------------------------------------------------------------------------------------------------

    def mix(self, args: MixArgs, dtype: torch.dtype, norm: Norm | None = None, keep: Keep = Keep.NOTHING) -> Mixed:
        """The mixed rows, rounded once to ``dtype``; ``norm`` is applied to the unrounded rows."""
        first = args.layers[0]
        if _mixes_fp64(dtype, first.dtype):
            mixed = self.mix(args, accumulation_dtype(first.dtype), norm, keep)
            assert mixed.rows is not None
            raw = [kept.to(dtype) for kept in mixed.kept] if keep == Keep.ROWS else mixed.kept
            return Mixed(mixed.rows.to(dtype), raw, mixed.mean, mixed.rstd)
        rows = first.new_empty((args.num_rows, args.num_patches, args.plan.num_blocks * args.width), dtype=dtype)
        raw_rows = torch.empty_like(rows) if keep == Keep.ROWS and norm is not None else None
        sums = _empty_sums(args) if keep == Keep.SOURCES else []
        mean, rstd = _mix_rows(args, slice(0, args.num_rows * args.num_patches), rows, sums, norm, raw_rows)
        return Mixed(rows, sums if raw_rows is None else [raw_rows], mean, rstd)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``y = act(z)`` and, if asked for and not ``y`` itself, ``z = x @ weight.T + bias``; x is ``[M, K]``."""
        z = x.new_empty((x.shape[0], weight.shape[0])) if keep_z and activation is not None else None
        y = x.new_empty((x.shape[0], weight.shape[0]), dtype=weight.dtype)
        _linear(x, weight, bias, activation, y, z)
        return y, z

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` in the dtype of both, accumulated in fp32; either may be a transposed view."""
        product = b.new_empty((a.shape[0], b.shape[1]))
        _linear(a, b.t(), None, None, product)
        return product

    def linear_grad_input(
        self,
        grad_out: Tensor,
        weight: Tensor | None,
        z: Tensor | None,
        activation: str | None,
        need_y: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As in ``Backend``, a block at a time."""
        if activation is None:
            return super().linear_grad_input(grad_out, weight, z, activation, need_y, need_bias)
        assert z is not None
        grad_z = torch.empty_like(z)
        y = torch.empty_like(z) if need_y else None
        if weight is None:
            _activation_grad(grad_out, z, activation, grad_z, y)
        else:
            for rows, columns, grad_y in gemm.products(grad_out, weight.t(), out=grad_z):
                at = (rows, columns)
                _activation_grad(grad_y, z[at], activation, grad_z[at], None if y is None else y[at])
        return grad_z, y, grad_z.sum(0) if need_bias else None

    def mix_weights_grad(self, grad_rows: Tensor, blocks: Sequence[int], args: MixArgs) -> Tensor:
        """``dw[b, c]`` in the accumulation dtype, summed in an order that depends on the shapes only."""
        assert args.mix_weights is not None
        first = args.layers[0]
        if _mixes_fp64(grad_rows.dtype, first.dtype):
            grad_rows = grad_rows.to(first.dtype)
        shape, wide = args.mix_weights.shape, accumulation_dtype(first.dtype)
        grad = first.new_empty(shape, dtype=wide)
        entries = [
            (position, e.column, e.layer, e.scale)
            for position, g in enumerate(blocks)
            for e in args.plan.blocks[g]
            if e.column is not None
        ]
        _module().mix_weights_grad(
            _dtype(grad_rows.dtype), _dtype(first.dtype), args.num_rows, args.num_patches, args.width,
            *_address(grad_rows), [_address(layer) for layer in args.layers], args.skip_tokens, _data(args.image_index),
            entries, shape[1], first.shape[0], _data(grad), torch.get_num_threads(),
        )  # fmt: skip
        return grad

    def layer_grads(
        self,
        grad_rows: Tensor,
        signatures: Sequence[Signature],
        mix_weights: Tensor | None,
        image_index: Tensor | None,
        skip_tokens: int,
        shape: LayerShape,
    ) -> list[Tensor]:
        """One gradient ``[I, T, D]`` a signature; skipped tokens get zeros, rows that share an image add in order."""
        if _mixes_fp64(grad_rows.dtype, shape.dtype):
            grad_rows = grad_rows.to(shape.dtype)
        size = (shape.num_images, shape.num_tokens, shape.width)
        grads = [grad_rows.new_empty(size, dtype=shape.dtype) for _ in signatures]
        entries = [[(g, -1 if column is None else column, scale) for g, column, scale in s] for s in signatures]
        _module().layer_grads(
            _dtype(grad_rows.dtype), _dtype(shape.dtype), grad_rows.shape[0], shape.num_images, grad_rows.shape[1],
            skip_tokens, shape.width, *_address(grad_rows), _weights(mix_weights), _data(image_index), entries,
            [_data(grad) for grad in grads], torch.get_num_threads(),
        )  # fmt: skip
        return grads

    # ---- the operator ----------------------------------------------------------------------------------------------

    def project(
        self,
        args: MixArgs,
        norm: Norm | None,
        weights: ProjectorWeights,
        activation: str | None,
        keep: Keep,
        keep_z: bool,
    ) -> tuple[Tensor, Mixed, Tensor | None]:
        """As in ``Backend``, on blocks of rows: A, Z and Y exist whole only where they are kept."""
        weight1, bias1, weight2, bias2 = weights
        first, dtype = args.layers[0], weight1.dtype
        # The sums of an image that several rows read are written once, which blocks of rows cannot see to.
        if _mixes_fp64(dtype, first.dtype) or (keep == Keep.SOURCES and args.image_index is not None):
            return super().project(args, norm, weights, activation, keep, keep_z)
        batch, patches, total = args.num_rows, args.num_patches, args.num_rows * args.num_patches
        row_width, hidden = weight1.shape[1], weight1.shape[0]
        width = hidden if weight2 is None else weight2.shape[0]
        out = weight1.new_empty((total, width))
        z = weight1.new_empty((total, hidden)) if keep_z else None
        kept_rows = weight1.new_empty((total, row_width)) if keep == Keep.ROWS else None
        sums = _empty_sums(args) if keep == Keep.SOURCES else []
        stats = _empty_stats(args, norm)

        # Where products are emulated, a block of inference stays in fp32 from the mix to the output.
        block_dtype = torch.float32 if gemm.is_emulated(dtype) and keep == Keep.NOTHING and not keep_z else dtype
        size, own = block_dtype.itemsize, kept_rows is None or norm is not None
        # Mixed rows that are not kept lie where the output of their block will, if it is as large: nobody reads them
        # any more when it is written, and every page of fresh memory takes time.
        lent = own and weight2 is not None and row_width * size <= width * dtype.itemsize
        row_bytes = size * (hidden + (0 if lent else row_width))
        step = gemm.block_rows(total, max(16, SCRATCH_BYTES // max(1, row_bytes)))
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
            _linear(x, weight1, bias1, activation, y, None if z is None else z[rows])
            if weight2 is not None:
                _linear(y, weight2, bias2, None, out[rows])
        whole = None if kept_rows is None else kept_rows.view(batch, patches, row_width)
        raw = [whole] if whole is not None and norm is not None else sums
        return out.view(batch, patches, width), Mixed(whole if norm is None else None, raw, *stats), z


# ---- calls of the C++ module ---------------------------------------------------------------------------------------

Stats = tuple[Tensor | None, Tensor | None]


def _mix_rows(
    args: MixArgs, rows: slice, out: Tensor, sums: Sequence[Tensor], norm: Norm | None, raw_rows: Tensor | None,
    stats: Stats | None = None,
) -> Stats:  # fmt: skip
    """Mix the rows ``b * P + p`` of the slice into ``out`` (and ``raw_rows``: before the norm); returns the stats."""
    first, module, threads = args.layers[0], _module(), torch.get_num_threads()
    mean, rstd = stats = _empty_stats(args, norm) if stats is None else stats
    native_norm = None
    if norm is not None:
        assert mean is not None
        # Named, so that they live until the call returns.
        weight, bias = (None if p is None else p.to(mean.dtype) for p in norm[:2])
        native_norm = module.Norm(_data(weight), _data(bias), norm[2], _data(raw_rows), _data(mean), _data(rstd))
    # A norm needs whole rows in the accumulation dtype, a mix alone one block at a time.
    row = args.width if norm is None else args.width * args.plan.num_blocks
    scratch = first.new_empty((threads, module.mix_scratch(row)), dtype=accumulation_dtype(first.dtype))
    module.mix(
        _program(args.plan, bool(sums)), [_address(layer) for layer in args.layers], _dtype(first.dtype),
        _dtype(out.dtype), _weights(args.mix_weights), _data(args.image_index), first.shape[0], args.num_rows,
        args.skip_tokens, args.num_patches, args.width, rows.start, rows.stop, _data(out),
        [_data(each) for each in sums], native_norm, _data(scratch), row,
        out.nbytes > STREAM_BYTES, threads,
    )  # fmt: skip
    return stats


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, y: Tensor, z: Tensor | None = None
) -> None:
    """``act(x @ weight.T + bias)`` into ``y``, and before the activation into ``z``."""
    for rows, columns, block in gemm.products(x, weight, bias, out=y if z is None else z):
        y_block, z_block = y[rows, columns], None if z is None else z[rows, columns]
        if z_block is not None and z_block.data_ptr() == block.data_ptr():
            z_block = None
        if activation is not None or z_block is not None or y_block.data_ptr() != block.data_ptr():
            _epilogue(block, activation, y_block, z_block)


def _epilogue(x: Tensor, activation: str | None, y: Tensor, z: Tensor | None) -> None:
    _module().epilogue(
        _dtype(x.dtype), _dtype(y.dtype), *x.shape, _data(x), x.stride(0), _activation(activation), _data(y),
        y.stride(0), _data(z), 0 if z is None else z.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def _activation_grad(grad_y: Tensor, z: Tensor, activation: str, grad_z: Tensor, y: Tensor | None) -> None:
    _module().activation_grad(
        _dtype(grad_y.dtype), _dtype(z.dtype), *z.shape, _data(grad_y), grad_y.stride(0), _data(z), z.stride(0),
        _activation(activation), _data(grad_z), grad_z.stride(0), _data(y), 0 if y is None else y.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip


def _empty_sums(args: MixArgs) -> list[Tensor]:
    first = args.layers[0]
    shape = (first.shape[0], args.num_patches, args.width)
    return [first.new_empty(shape) for block in args.plan.reduced()[0].blocks if not is_tap(block)]


def _empty_stats(args: MixArgs, norm: Norm | None) -> Stats:
    if norm is None:
        return None, None
    shape, dtype = (args.num_rows, args.num_patches), accumulation_dtype(args.layers[0].dtype)
    return args.layers[0].new_empty(shape, dtype=dtype), args.layers[0].new_empty(shape, dtype=dtype)


def _mixes_fp64(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether fp64 meets a narrower dtype: no kernel takes the pair."""
    return (a == torch.float64) != (b == torch.float64)


def _data(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _address(tensor: Tensor) -> tuple[int, int, int]:
    """Address and the first two strides, in elements."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _weights(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """The same of ``[B, C]``, and C; zeros where there is no tensor."""
    return (0, 0, 0, 0) if tensor is None else (*_address(tensor), tensor.shape[1])


def _module() -> Any:
    module, reason = native.load()
    if module is None:
        raise NotImplementedError(f"impl='cpu': {reason}")
    return module


@cache
def _dtype(dtype: torch.dtype) -> Any:
    return getattr(_module().DType, DTYPES[dtype])


@cache
def _activation(name: str | None) -> Any:
    return getattr(_module().Activation, name or "none")


@cache
def _program(plan: MixPlan, with_sums: bool) -> Any:
    """The plan in the tables of the C++ module."""
    sums = [block for block in plan.reduced()[0].blocks if not is_tap(block)] if with_sums else []
    return _module().Program(_table(plan.blocks), _table(sums))


def _table(blocks: Sequence[Block]) -> list[list[tuple[int, float, tuple[int, ...]]]]:
    return [
        [(-1 if column is None else column, scale, layers) for column, scale, layers in terms(block)]
        for block in blocks
    ]
