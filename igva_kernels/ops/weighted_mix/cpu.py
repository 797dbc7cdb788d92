"""The mix on the CPU: addresses and strides of torch tensors go to the C++ module."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.operands import batch, layer_shape, layers, serves_pair, weights
from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import Shares, Steps, dots, lower
from igva_kernels.ops.weighted_mix.steps import (
    Keep,
    LayerShape,
    MixArgs,
    Mixed,
    Needs,
    Projector,
    Saved,
    WeightedMix,
    take_blocks,
)
from igva_kernels.runtime import operands
from igva_kernels.runtime.cpu.dense import (
    PRODUCT_BYTES,
    CpuDense,
    Operand,
    dense_fp32,
    floats,
    is_streamed,
    linear_grad,
    linear_into,
    module,
    multiplies,
    scratch,
)
from igva_kernels.runtime.dense import Norm, accumulation_dtype
from igva_kernels.runtime.operands import activation_of, activations, address, dtype_of, matrix, view
from igva_kernels.runtime.routes import took

BLOCK_BYTES = 40 << 20
"""The most bytes of the row blocks that ``project`` works on. Blocks are as large as that allows, because a product
packs the weight again for every block, which takes as long as multiplying a hundred rows."""

TRAINING_BYTES = 12 << 20
"""The most bytes that a product works in while a training step keeps Z and sources: what plain torch would need."""

Stats = tuple[Tensor | None, Tensor | None]
"""The mean and rstd of the rows of a norm ``[B, P]``, or None."""


class _Kept(NamedTuple):
    """What a forward keeps for its backward, to be written."""

    rows: Tensor | None
    """The mixed rows ``[M, G*D]``, before the norm."""
    sums: Sequence[Tensor]
    stats: Stats


class CpuWeightedMix(CpuDense, WeightedMix):
    """Mixing, activations and the gradients of the mix in C++, inside our own products or around torch's."""

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
        _mix_rows(args, slice(0, args.num_rows * args.num_patches), rows, sums, norm, raw_rows, stats, dtype)
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

    def mix_weights_grad_of_linear(
        self, grad_z: Tensor, weight1: Tensor, blocks: Sequence[int], args: MixArgs, lent: Tensor | None = None
    ) -> Tensor:
        """As in ``WeightedMix``; our own product takes the dots of its sums, which are not written to memory."""
        if not self._multiplies(args, weight1):
            return super().mix_weights_grad_of_linear(grad_z, weight1, blocks, args)
        assert args.mix_weights is not None
        native, threads = module(), torch.get_num_threads()
        weight = take_blocks(weight1, blocks, args.width)
        grad = grad_z.new_empty(args.mix_weights.shape, dtype=torch.float32)
        memory = scratch((grad_z.shape[0], weight.shape[1]), threads, TRAINING_BYTES, lent)
        native.linear_mix_weights_grad(
            Operand(grad_z).native(native), Operand(weight.t()).native(native), dots(args.plan, tuple(blocks)),
            layers(dtype_of(native, args.layers[0].dtype), args), batch(args.image_index, args.num_rows),
            grad.shape[1], address(grad), floats(memory), threads,
        )  # fmt: skip
        return grad

    def project(
        self, args: MixArgs, projector: Projector, keep: Keep, keep_z: bool, out: Tensor | None = None
    ) -> tuple[Tensor, Mixed, Tensor | None]:
        """As in ``WeightedMix``; of A, Y and Z, only what is kept exists whole."""
        weight1, _, weight2, _, norm, _ = projector
        own = self._multiplies(args, weight1) and (weight2 is None or weight2.numel() > 0)
        # The sums of an image that several rows read must be written once, which work by blocks of rows cannot ensure.
        shares_sums = keep == Keep.SOURCES and args.image_index is not None
        if not serves_pair(args.layers[0].dtype, weight1.dtype) or (shares_sums and not own):
            return super().project(args, projector, keep, keep_z, out)
        total, (hidden, row_width) = args.num_rows * args.num_patches, weight1.shape
        if out is None:
            out = weight1.new_empty((total, hidden if weight2 is None else weight2.shape[0]))
        z = weight1.new_empty((total, hidden)) if keep_z else None
        kept = _Kept(
            weight1.new_empty((total, row_width)) if keep == Keep.ROWS else None,
            args.new_sums() if keep == Keep.SOURCES else [],
            args.new_stats(norm),
        )
        took("weighted_mix, cpu: mixed rows", *_how_mixed(own, kept.rows is None or norm is not None))
        (self._project if own else self._project_by_library)(args, projector, kept, out, z)
        rows = None if kept.rows is None else kept.rows.view(args.num_rows, args.num_patches, row_width)
        mixed = Mixed(rows if norm is None else None, None if norm is None else rows, kept.sums, *kept.stats)
        # Not a view for autograd, see WeightedMix.project.
        return torch.ops.aten._unsafe_view(out, (args.num_rows, args.num_patches, out.shape[1])), mixed, z

    def _multiplies(self, args: MixArgs, weight: Tensor) -> bool:
        """Whether our own products multiply the mixed rows with the weight, and not torch's library."""
        return args.num_rows * args.num_patches > 0 and multiplies(args.layers[0], weight)

    def _project(self, args: MixArgs, projector: Projector, kept: _Kept, out: Tensor, z: Tensor | None) -> None:
        """``project`` by our own products, which compute A, and Y from a kept Z, as they read it."""
        weight1, bias1, weight2, bias2, norm, activation = projector
        total, hidden = out.shape[0], weight1.shape[0]
        most = PRODUCT_BYTES if z is None else TRAINING_BYTES
        if kept.sums or kept.rows is not None or norm is not None:
            # What a product cannot write, or must know of the rows beforehand.
            rows, raw_rows = (kept.rows, None) if norm is None else (None, kept.rows)
            _mix_rows(args, slice(0, total), rows, kept.sums, norm, raw_rows, kept.stats, weight1.dtype)

        def first(rows: slice, activation: str | None, y: Tensor, z: Tensor | None) -> None:
            if kept.rows is not None and norm is None:
                linear_into(kept.rows[rows], weight1, bias1, activation, y, z, most)
            else:
                _mixed_linear(args, rows, norm, kept.stats, weight1, bias1, activation, y, z, most)

        if weight2 is None:
            first(slice(0, total), activation, out, z)
        elif z is not None:
            first(slice(0, total), None, z, None)
            linear_into(Operand(z, activation), weight2, bias2, None, out, most=most)
        else:
            # Y is in fp32, in which it is added up anyway, a block of rows at a time.
            step = _block_rows(total, BLOCK_BYTES // (4 * hidden))
            block = weight1.new_empty((min(step, total), hidden), dtype=torch.float32)
            for start in range(0, total, step):
                rows = slice(start, min(start + step, total))
                y = block[: rows.stop - start]
                first(rows, activation, y, None)
                linear_into(y, weight2, bias2, None, out[rows], most=most)

    def _project_by_library(
        self, args: MixArgs, projector: Projector, kept: _Kept, out: Tensor, z: Tensor | None
    ) -> None:
        """``project`` by torch's products, on blocks of rows that a cache may hold between one step and the next."""
        weight1, bias1, weight2, bias2, norm, activation = projector
        (hidden, row_width), total = weight1.shape, out.shape[0]
        own = kept.rows is None or norm is not None
        # Mixed rows that are not kept borrow the memory of their block's output, if it is large enough: they have been
        # read by the time the output is written, and every page of fresh memory takes time.
        lent = own and weight2 is not None and row_width <= out.shape[1]
        row_bytes = weight1.element_size() * (hidden + (0 if lent else row_width))
        step = _block_rows(total, BLOCK_BYTES // max(1, row_bytes))
        x_rows = weight1.new_empty((min(step, total), row_width)) if own and not lent else None
        y_rows = None if weight2 is None else weight1.new_empty((min(step, total), hidden))
        for start in range(0, total, step):
            rows = slice(start, min(start + step, total))
            count, kept_rows = rows.stop - start, None if kept.rows is None else kept.rows[rows]
            if lent:
                x = out[rows].view(-1)[: count * row_width].view(count, row_width)
            else:
                x = kept_rows if x_rows is None else x_rows[:count]
            assert x is not None
            _mix_rows(args, rows, x, kept.sums, norm, kept_rows if own else None, kept.stats, x.dtype)
            y = out[rows] if y_rows is None else y_rows[:count]
            linear_into(x, weight1, bias1, activation, y, None if z is None else z[rows])
            if weight2 is not None:
                linear_into(y, weight2, bias2, None, out[rows])

    def project_backward(
        self, grad_out: Tensor, saved: Saved, projector: Projector, needs: Needs
    ) -> dict[str, Tensor | None]:
        """As in ``WeightedMix``; our own products compute A and Y as they read them.

        The gradient of ``weight2`` comes last: until then, the other products work in its memory.
        """
        weight2, activation, grad = projector.weight2, projector.activation, grad_out.flatten(0, 1)
        if weight2 is None or not (needs.z and multiplies(grad, weight2)):
            return super().project_backward(grad_out, saved, projector, needs)
        of_weight2 = weight2.new_empty(weight2.shape) if needs.weight2 else None
        grads: dict[str, Tensor | None] = {"bias2": grad.sum(0)} if needs.bias2 else {}
        grad_z, grads["bias1"] = linear_grad(grad, weight2, saved.z, activation, needs.bias1, of_weight2)
        rows, of_first = self._first_linear_backward(grad_z, saved, projector, needs, of_weight2)
        grads |= of_first
        if needs.rows and projector.norm is None and not needs.layers:
            assert saved.sources is not None
            blocks = saved.sources.program.weighted_blocks
            grads["mix_weights"] = self.mix_weights_grad_of_linear(
                grad_z, projector.weight1, blocks, saved.sources, of_weight2
            )
        elif needs.rows:
            grads |= self._rows_backward(grad_z, rows, grad_out.shape[:2], saved, projector, needs)
        if of_weight2 is not None:
            assert saved.z is not None
            most = grad_z.nbytes
            del grad_z
            grads["weight2"] = of_weight2
            linear_into(grad.t(), Operand(saved.z.t(), activation), None, None, of_weight2, most=most)
        return grads

    def _first_linear_backward(
        self, grad_z: Tensor, saved: Saved, projector: Projector, needs: Needs, lent: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        """As in ``WeightedMix``; our own product computes the mixed rows as it reads them."""
        weight1, norm, sources = projector.weight1, projector.norm, saved.sources
        if not needs.weight1 or sources is None or not self._multiplies(sources, weight1):
            return super()._first_linear_backward(grad_z, saved, projector, needs)
        rows = self.mix(sources, weight1.dtype).rows if norm is not None and needs.rows else None
        grad, native, threads = weight1.new_empty(weight1.shape), module(), torch.get_num_threads()
        native_norm, _parameters = _native_norm(norm, (saved.mean, saved.rstd))
        memory = scratch(grad, threads, TRAINING_BYTES, lent)
        native.mixed_linear_grad(
            Operand(grad_z.t()).native(native), *_source(sources, with_sums=False), native_norm, matrix(native, grad),
            floats(memory), threads,
        )  # fmt: skip
        return rows, {"weight1": grad}


def _how_mixed(own: bool, inside: bool) -> tuple[str, str]:
    """What ``explain`` tells of the mixed rows, where our products multiply them or torch's."""
    if not own:
        return "mixed a block at a time", "torch's products read them from the cache"
    if inside:
        return "mixed inside the product", "nothing needs them whole"
    return "mixed first", "the backward needs them whole"


def _block_rows(rows: int, limit: int) -> int:
    """Rows of equal blocks that hold ``limit`` rows at most, or 16; a multiple of 16 where there are several."""
    blocks = -(-rows // max(16, limit))
    return max(rows, 1) if blocks <= 1 else -(-rows // (16 * blocks)) * 16


# ---- calls of the C++ module ---------------------------------------------------------------------------------------


def _mix_rows(
    args: MixArgs, rows: slice, out: Tensor | None, sums: Sequence[Tensor], norm: Norm | None,
    raw_rows: Tensor | None, stats: Stats, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Mix the rows ``b * P + p`` of the slice, in ``dtype``, into ``out`` and, before the norm, into ``raw_rows``.

    Either may be None. The sums and the statistics of the norm are written in any case.
    """
    first, native, threads = args.layers[0], module(), torch.get_num_threads()
    native_norm, _parameters = _native_norm(norm, stats)
    program, *source = _source(args, bool(sums))
    memory = first.new_empty(
        (threads, program.scratch(args.width, norm is not None)), dtype=accumulation_dtype(first.dtype)
    )
    stream = out is not None and is_streamed(out)
    block = native.RowBlock(
        dtype_of(native, dtype), address(out), address(raw_rows), (rows.start, rows.stop),
        [s.data_ptr() for s in sums], stream,
    )  # fmt: skip
    native.mix(program, *source, block, native_norm, address(memory), threads)


def _mixed_linear(
    args: MixArgs, rows: slice, norm: Norm | None, stats: Stats, weight: Tensor, bias: Tensor | None,
    activation: str | None, y: Tensor, z: Tensor | None, most: int,
) -> None:  # fmt: skip
    """The Linear of the mixed rows ``b * P + p`` of the slice, which are computed as it reads them."""
    native, threads = module(), torch.get_num_threads()
    native_norm, _parameters = _native_norm(norm, stats)
    bias = None if bias is None else dense_fp32(bias)
    memory = scratch(y, threads, most)
    native.mixed_linear(
        *_source(args, with_sums=False), native_norm, rows.start, Operand(weight).native(native), address(bias),
        activation_of(native, activation), matrix(native, y), matrix(native, z), floats(memory), threads,
    )  # fmt: skip


def _source(args: MixArgs, with_sums: bool) -> tuple:
    """The program of the mix, and what it reads."""
    native = module()
    return (
        _program(args.plan, with_sums), layers(dtype_of(native, args.layers[0].dtype), args),
        weights(args.mix_weights), batch(args.image_index, args.num_rows),
    )  # fmt: skip


def _native_norm(norm: Norm | None, stats: Stats) -> tuple[Any, list[Tensor | None]]:
    """The norm, and its parameters in the accumulation dtype, which must live until the call has returned."""
    mean, rstd = stats
    if norm is None or mean is None:
        return None, []
    weight, bias = (None if p is None else p.to(mean.dtype).contiguous() for p in norm[:2])
    return operands.norm(module(), weight, bias, norm[2], mean, rstd), [weight, bias]


@cache
def _program(plan: MixPlan, with_sums: bool) -> Any:
    """The plan in the tables of the C++ module."""
    program = lower(plan)
    return module().Program(program.steps, program.sum_steps if with_sums else Steps((), (), (), (), ()))


IMPLEMENTATION = CpuWeightedMix()
