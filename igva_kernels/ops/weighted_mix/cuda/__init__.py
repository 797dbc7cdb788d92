"""The mix on a GPU by CUDA kernels, and on Hopper inside the first product. See ``WeightedMix`` for every method."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.cuda import gemm
from igva_kernels.ops.weighted_mix.cuda.program import DOT_CHUNK, mix_program, norm_row_fits
from igva_kernels.ops.weighted_mix.operands import batch, layer_shape, layers, serves_pair, weights
from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import TERM, Shares, dots, lower
from igva_kernels.ops.weighted_mix.program import shares as shares_of
from igva_kernels.ops.weighted_mix.steps import Keep, LayerShape, MixArgs, Mixed, Projector, WeightedMix
from igva_kernels.runtime import operands
from igva_kernels.runtime.config import ProductSize
from igva_kernels.runtime.cuda import launch
from igva_kernels.runtime.cuda.dense import CudaDense, allow_vectors_at, allows_vectors, chunks
from igva_kernels.runtime.dense import Norm, accumulation_dtype
from igva_kernels.runtime.operands import activations, address, adjacent, dtype_of, view
from igva_kernels.runtime.routes import took


class CudaWeightedMix(CudaDense, WeightedMix):
    """The operator by CUDA kernels and cuBLAS."""

    def activations(self) -> Collection[str]:
        return activations(launch.module())

    def why_not_plan(self, plan: MixPlan) -> str | None:
        program, limits = lower(plan), launch.module().LIMITS
        of_layers, _ = shares_of(plan, (True,) * (1 + max(plan.layers)))
        counts = {
            "layers": (1 + max(plan.layers), "layers"),
            "entries": (len(program.steps.layers), "layers in all blocks together"),
            "terms": (sum(end >= TERM for end in program.steps.ends), "sums of layers"),
            "sums": (program.num_sums, "kept sums"),
            "dots": (len(dots(program.reduced, program.weighted_blocks).layers), "weighted entries"),
            "grads": (of_layers.num_grads, "different gradients of layers"),
            "shares": (len(of_layers.blocks), "entries in all gradients of layers together"),
        }
        for name, (count, what) in counts.items():
            if count > limits[name]:
                return f"its kernels take at most {limits[name]} {what}, the plan has {count}"
        return None

    def notes(self) -> list[str]:
        index = torch.cuda.current_device()
        reason = gemm.why_not_device(index)
        if reason is not None:
            return [f"fused GEMM: no: {reason}"]
        least = None if os.environ.get(gemm.SWITCH) == "1" else gemm.least_size(index)
        since = f"{gemm.SWITCH}=1" if least is None else f"from {least.rows} rows and {least.columns} columns on"
        return [f"fused GEMM: yes, {since}"]

    def mix(self, args: MixArgs, dtype: torch.dtype, norm: Norm | None = None, keep: Keep = Keep.NOTHING) -> Mixed:
        """The mixed rows, rounded once to ``dtype``; ``norm`` is applied to the unrounded rows."""
        first = args.layers[0]
        if not serves_pair(first.dtype, dtype):
            return self.mix(args, accumulation_dtype(first.dtype), norm, keep).to(dtype)
        if norm is not None and not norm_row_fits(args.plan.num_blocks * args.width, first.dtype):
            return self._mix_wide_norm(args, dtype, norm, keep)
        sums = args.new_sums() if keep == Keep.SOURCES else []
        if sums and args.image_index is not None:
            # Sums belong to images, rows to the batch: with an index the two need launches of their own.
            _launch_mix(MixArgs(args.layers, args.plan, None, None, args.skip_tokens), None, sums)
        along, rows = sums if args.image_index is None else [], args.new_rows(dtype)
        if norm is None:
            _launch_mix(args, rows, along)
            return Mixed(rows, None, sums)
        raw_rows, (mean, rstd) = torch.empty_like(rows) if keep == Keep.ROWS else None, args.new_stats(norm)
        _launch_mix(args, rows, along, norm, raw_rows, mean, rstd)
        return Mixed(rows, raw_rows, sums, mean, rstd)

    def _mix_wide_norm(self, args: MixArgs, dtype: torch.dtype, norm: Norm, keep: Keep) -> Mixed:
        """``mix`` for a row too wide for a multiprocessor's shared memory: stored unrounded, then torch's LayerNorm."""
        wide = accumulation_dtype(args.layers[0].dtype)
        mixed = self.mix(args, wide, None, keep)
        assert mixed.rows is not None
        params = [None if param is None else param.to(wide) for param in norm[:2]]
        rows, mean, rstd = torch.native_layer_norm(mixed.rows, mixed.rows.shape[-1:], *params, norm[2])
        raw_rows = mixed.rows.to(dtype) if keep == Keep.ROWS else None
        return Mixed(rows.to(dtype), raw_rows, mixed.sums, mean.squeeze(-1), rstd.squeeze(-1))

    def mix_weights_grad(self, grad_rows: Tensor, blocks: Sequence[int], args: MixArgs) -> Tensor:
        """``dw[b, c]``, summed in an order that depends on the shapes only."""
        assert args.mix_weights is not None
        first = args.layers[0]
        grad_rows = _readable(grad_rows, first.dtype)
        grad = first.new_empty(args.mix_weights.shape, dtype=accumulation_dtype(first.dtype))
        wanted, columns = dots(args.plan, tuple(blocks)), grad.shape[1]
        partials = first.new_empty(
            (args.num_rows, chunks(args.num_patches, DOT_CHUNK), len(wanted.layers)), dtype=torch.float64
        )
        vector = allows_vectors(args.width, [grad_rows, *args.layers])
        native = launch.module()
        with launch.on_device_of(first) as stream:
            native.mix_weights_grad(
                view(native, grad_rows), wanted, layers(dtype_of(native, first.dtype), args),
                batch(args.image_index, args.num_rows),
                native.WeightsGrad(columns, grad.data_ptr(), partials.data_ptr(), DOT_CHUNK), vector, stream,
            )  # fmt: skip
        return grad

    def layer_grads(
        self, grad_rows: Tensor, shares: Shares, mix_weights: Tensor | None, image_index: Tensor | None,
        shape: LayerShape,
    ) -> list[Tensor]:  # fmt: skip
        """One gradient ``[I, T, D]`` per signature; rows that share an image add in row order."""
        grad_rows = _readable(grad_rows, shape.dtype)
        grads, native = shape.new_grads(grad_rows, shares.num_grads), launch.module()
        vector = allows_vectors(shape.width, [grad_rows, *grads])
        with launch.on_device_of(grad_rows) as stream:
            native.layer_grads(
                view(native, grad_rows), shares, weights(mix_weights), batch(image_index, grad_rows.shape[0]),
                layer_shape(native, shape), [grad.data_ptr() for grad in grads], vector, stream,
            )  # fmt: skip
        return grads

    def why_not_fused(self, args: MixArgs, projector: Projector, keep: Keep) -> str | None:
        """None if one kernel mixes and multiplies at once, otherwise why ``mix_linear`` takes two."""
        first = args.layers[0]
        index, size = first.device.index, ProductSize(first.shape[0] * first.shape[1], projector.weight1.shape[0])
        return gemm.why_not_device(-1 if index is None else index, size) or gemm.why_not(args, projector, keep)

    def mix_linear(
        self, args: MixArgs, projector: Projector, keep: Keep, keep_z: bool
    ) -> tuple[Tensor, Tensor | None, Mixed]:
        reason = self.why_not_fused(args, projector, keep)
        if reason is not None:
            took("weighted_mix, cuda: first product", "the mix kernel, cuBLAS and the activation", reason)
            return super().mix_linear(args, projector, keep, keep_z)
        took("weighted_mix, cuda: first product", "one kernel that mixes and multiplies", gemm.why_taken)
        sums = args.new_sums() if keep == Keep.SOURCES else []
        y, z = gemm.run(args, projector.weight1, projector.bias1, projector.activation, keep_z, sums)
        return y, z, Mixed(None, None, sums)


def _launch_mix(
    args: MixArgs, rows: Tensor | None, sums: Sequence[Tensor], norm: Norm | None = None, raw: Tensor | None = None,
    mean: Tensor | None = None, rstd: Tensor | None = None,
) -> None:  # fmt: skip
    """Rows and sums in one launch; without ``rows`` the sums alone."""
    first, native = args.layers[0], launch.module()
    of_layers = layers(dtype_of(native, first.dtype), args)
    addresses, layouts = zip(*of_layers[-1], strict=True)
    vector = allow_vectors_at(args.width, first.element_size(), addresses, layouts) and allows_vectors(
        args.width, [*sums, *(norm[:2] if norm else ())]
    )
    out = native.MixOutput(
        dtype_of(native, torch.float32 if rows is None else rows.dtype), address(rows), address(raw),
        [kept.data_ptr() for kept in sums],
    )  # fmt: skip
    native_norm = None
    if norm is not None:
        assert mean is not None and rstd is not None
        native_norm = operands.norm(native, *norm, mean, rstd)
    with launch.on_device_of(first) as stream:
        native.mix(
            mix_program(args.plan, bool(sums)), of_layers, weights(args.mix_weights),
            batch(args.image_index, args.num_rows), out, native_norm, vector, stream,
        )  # fmt: skip


def _readable(grad_rows: Tensor, layers: torch.dtype) -> Tensor:
    """The gradient of the mixed row as the kernels read it: adjacent channels, fp64 beside fp64 layers only."""
    if not serves_pair(layers, grad_rows.dtype):
        grad_rows = grad_rows.to(layers)
    return adjacent(grad_rows)


IMPLEMENTATION = CudaWeightedMix()
