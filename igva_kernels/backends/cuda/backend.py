"""CudaBackend: which kernel serves which step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
from igva_kernels.backends.cuda import gemm, grad_gemm, launch, programs
from igva_kernels.reference import Norm


class CudaBackend(Backend):
    """The operator by CUDA kernels and cuBLAS, on NVIDIA GPUs from compute capability 8.0 on."""

    name = "cuda"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if tensors of this device and dtype can be served, otherwise the reason why not."""
        if device.type != "cuda":
            return f"it serves CUDA tensors, not {device.type!r}"
        if dtype not in launch.DTYPES:
            return f"it serves {', '.join(str(d) for d in launch.DTYPES)}, not {dtype}"
        return launch.load()[1] or launch.why_not_device(device)

    # ---- kernels ---------------------------------------------------------------------------------------------------

    def mix(self, args: MixArgs, dtype: torch.dtype, norm: Norm | None = None, keep: Keep = Keep.NOTHING) -> Mixed:
        """The mixed rows, rounded once to ``dtype``; ``norm`` is applied to the unrounded rows."""
        first = args.layers[0]
        if not programs.dtype_pair_is_served(first.dtype, dtype):
            mixed = self.mix(args, first.dtype, norm, keep)
            assert mixed.rows is not None
            kept = [raw.to(dtype) for raw in mixed.kept] if keep == Keep.ROWS else mixed.kept
            return Mixed(mixed.rows.to(dtype), kept, mixed.mean, mixed.rstd)
        if norm is not None and not programs.norm_row_fits(args.plan.num_blocks * args.width, first.dtype):
            return self._mix_wide_norm(args, dtype, norm, keep)
        sums: list[Tensor] = []
        if keep == Keep.SOURCES:
            sums = _new_sums(args)
            if sums and args.image_index is not None:
                # Sums belong to images and rows to the batch: with an index they are two grids.
                _launch_mix(MixArgs(args.layers, args.plan, None, None, args.skip_tokens), None, sums)
        along = sums if args.image_index is None else []
        rows = first.new_empty((args.num_rows, args.num_patches, args.plan.num_blocks * args.width), dtype=dtype)
        if norm is None:
            _launch_mix(args, rows, along)
            return Mixed(rows, sums, None, None)
        raw = torch.empty_like(rows) if keep == Keep.ROWS else None
        wide = accumulation_dtype(first.dtype)
        mean, rstd = (first.new_empty(rows.shape[:2], dtype=wide) for _ in range(2))
        _launch_mix(args, rows, along, norm, raw, mean, rstd)
        return Mixed(rows, sums if raw is None else [raw], mean, rstd)

    def _mix_wide_norm(self, args: MixArgs, dtype: torch.dtype, norm: Norm, keep: Keep) -> Mixed:
        """``mix`` where a row is too wide for a multiprocessor: unrounded to memory, then torch's LayerNorm."""
        wide = accumulation_dtype(args.layers[0].dtype)
        mixed = self.mix(args, wide, None, keep)
        assert mixed.rows is not None
        params = [None if param is None else param.to(wide) for param in norm[:2]]
        rows, mean, rstd = torch.native_layer_norm(mixed.rows, mixed.rows.shape[-1:], *params, norm[2])
        kept = [mixed.rows.to(dtype)] if keep == Keep.ROWS else mixed.kept
        return Mixed(rows.to(dtype), kept, mean.squeeze(-1), rstd.squeeze(-1))

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``y = act(z)`` and, if asked for and not ``y`` itself, ``z = x @ weight.T + bias``; x is ``[M, K]``."""
        z = F.linear(x, weight, bias)
        if activation is None:
            return z, None
        y = torch.empty_like(z) if keep_z else z
        with launch.on_device_of(z) as stream:
            launch.module().activation(
                launch.dtype(z), launch.activation(activation), z.numel(), z.data_ptr(), y.data_ptr(), stream
            )
        return y, z if keep_z else None

    def linear_grad_input(
        self,
        grad_out: Tensor,
        weight: Tensor | None,
        z: Tensor | None,
        activation: str | None,
        need_y: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The product by torch, everything else in one kernel. See ``Backend``."""
        if activation is None:
            return super().linear_grad_input(grad_out, weight, z, activation, need_y, need_bias)
        assert z is not None
        grad_y = grad_out if weight is None else self.matmul(grad_out, weight)
        grad_y, z = grad_y.contiguous(), z.contiguous()
        grad_z = torch.empty_like(z) if weight is None else grad_y  # the caller's gradient is not ours to overwrite
        y = torch.empty_like(z) if need_y else None
        (rows, columns), chunk = z.shape, programs.BIAS_CHUNK
        partials = None
        if need_bias:
            partials = z.new_empty((programs.chunks(rows, chunk), columns), dtype=accumulation_dtype(z.dtype))
        with launch.on_device_of(z) as stream:
            launch.module().activation_grad(
                launch.dtype(z), launch.activation(activation), rows, columns, grad_y.data_ptr(), z.data_ptr(),
                grad_z.data_ptr(), launch.data(y), launch.data(partials), chunk,
                programs.allows_vectors(columns, [grad_y, z]), stream,
            )  # fmt: skip
        return grad_z, y, None if partials is None else partials.sum(0).to(z.dtype)

    def mix_weights_grad(self, grad_rows: Tensor, blocks: Sequence[int], args: MixArgs) -> Tensor:
        """``dw[b, c]``, summed in an order that depends on the shapes only. See ``Backend``."""
        assert args.mix_weights is not None
        first = args.layers[0]
        grad_rows = _readable(grad_rows, first.dtype)
        grad = first.new_empty(args.mix_weights.shape, dtype=accumulation_dtype(first.dtype))
        dots = programs.dots(args.plan, blocks)
        partials = first.new_empty(
            (args.num_rows, programs.chunks(args.num_patches, programs.DOT_CHUNK), len(dots)), dtype=torch.float64
        )
        vector = programs.allows_vectors(args.width, [grad_rows, *args.layers])
        with launch.on_device_of(first) as stream:
            launch.module().mix_weights_grad(
                launch.dtype(grad_rows), launch.dtype(first), launch.view(grad_rows),
                launch.views([layer[:, args.skip_tokens :] for layer in args.layers]), dots,
                launch.data(args.image_index), first.shape[0], args.num_rows, args.num_patches, args.width,
                programs.DOT_CHUNK, grad.shape[1], partials.data_ptr(), grad.data_ptr(), vector, stream,
            )  # fmt: skip
        return grad

    def mix_weights_grad_of_linear(
        self, grad_z: Tensor, weight1: Tensor, blocks: Sequence[int], args: MixArgs
    ) -> Tensor:
        """``mix_weights_grad`` of ``grad_rows = grad_z @ weight1``, which one kernel never stores. See ``Backend``."""
        if _why_not_device(grad_z) is not None or grad_gemm.why_not(grad_z, weight1, blocks, args) is not None:
            return super().mix_weights_grad_of_linear(grad_z, weight1, blocks, args)
        return grad_gemm.run(grad_z, weight1, blocks, args)

    def layer_grads(
        self,
        grad_rows: Tensor,
        signatures: Sequence[Signature],
        mix_weights: Tensor | None,
        image_index: Tensor | None,
        skip_tokens: int,
        shape: LayerShape,
    ) -> list[Tensor]:
        """One gradient ``[I, T, D]`` a signature; rows that share an image add in row order. See ``Backend``."""
        grad_rows = _readable(grad_rows, shape.dtype)
        size = (shape.num_images, shape.num_tokens, shape.width)
        grads = [grad_rows.new_empty(size, dtype=shape.dtype) for _ in signatures]
        entries = [[(g, -1 if column is None else column, scale) for g, column, scale in s] for s in signatures]
        with launch.on_device_of(grad_rows) as stream:
            launch.module().layer_grads(
                launch.dtype(grad_rows), launch.dtype(grads[0]), launch.view(grad_rows), entries,
                launch.weights(mix_weights), launch.data(image_index), grad_rows.shape[0], *size[:2],
                skip_tokens, shape.width, [grad.data_ptr() for grad in grads],
                programs.allows_vectors(shape.width, [grad_rows, *grads]), stream,
            )  # fmt: skip
        return grads

    def norm_backward(
        self, grad_out: Tensor, rows: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, need_params: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """LayerNorm's gradients: ``(grad_rows, grad_weight, grad_bias)``; all matrices ``[M, G*D]``, stats ``[M]``."""
        if mean.dtype != accumulation_dtype(rows.dtype) or grad_out.dtype != rows.dtype:
            return super().norm_backward(grad_out, rows, norm, mean, rstd, need_params)
        grad_out, rows = grad_out.contiguous(), rows.contiguous()
        grad_rows = torch.empty_like(rows)
        (count, width), chunk = rows.shape, programs.NORM_CHUNK
        partials = mean.new_empty((programs.chunks(count, chunk), 2, width)) if need_params else None
        weight = norm[0]
        with launch.on_device_of(rows) as stream:
            launch.module().norm_grad(
                launch.dtype(rows), count, width, grad_out.data_ptr(), rows.data_ptr(), mean.data_ptr(),
                rstd.data_ptr(), launch.data(weight), launch.dtype(weight), grad_rows.data_ptr(),
                launch.data(partials), chunk, programs.allows_vectors(width, [grad_out, rows]), stream,
            )  # fmt: skip
        if partials is None:
            return grad_rows, None, None
        grads = partials.sum(0)
        return grad_rows, *(None if p is None else grad.to(p.dtype) for grad, p in zip(grads, norm[:2], strict=True))

    # ---- the operator ----------------------------------------------------------------------------------------------

    def why_not_fused(
        self,
        args: MixArgs,
        norm: Norm | None,
        weights: ProjectorWeights,
        activation: str | None,
        keep: Keep,
    ) -> str | None:
        """None if one kernel mixes and multiplies at once, otherwise why ``project`` takes two."""
        return _why_not_device(args.layers[0]) or gemm.why_not(
            args, norm, weights.weight1, weights.bias1, activation, keep
        )

    def project(
        self,
        args: MixArgs,
        norm: Norm | None,
        weights: ProjectorWeights,
        activation: str | None,
        keep: Keep,
        keep_z: bool,
    ) -> tuple[Tensor, Mixed, Tensor | None]:
        """``(out [B, P, H], mixed, z [M, H] if kept)``."""
        if self.why_not_fused(args, norm, weights, activation, keep) is not None:
            return super().project(args, norm, weights, activation, keep, keep_z)
        sums = _new_sums(args) if keep == Keep.SOURCES else []
        out, z = gemm.run(args, weights.weight1, weights.bias1, activation, keep_z, sums)
        if weights.weight2 is not None:
            if keep_z and z is None:
                z = out
            out = F.linear(out, weights.weight2, weights.bias2)
        return out.view(args.num_rows, args.num_patches, out.shape[-1]), Mixed(None, sums, None, None), z


def _why_not_device(tensor: Tensor) -> str | None:
    """None if the fused GEMMs run where the tensor is, otherwise why not."""
    index = tensor.device.index
    return gemm.why_not_device(-1 if index is None else index)


def _new_sums(args: MixArgs) -> list[Tensor]:
    first = args.layers[0]
    shape = (first.shape[0], args.num_patches, args.width)
    return [first.new_empty(shape) for _ in programs.kept_sums(args.plan)]


def _launch_mix(
    args: MixArgs, rows: Tensor | None, sums: Sequence[Tensor], norm: Norm | None = None, raw: Tensor | None = None,
    mean: Tensor | None = None, rstd: Tensor | None = None,
) -> None:  # fmt: skip
    """Rows and sums in one launch; without ``rows`` the sums alone."""
    first = args.layers[0]
    vector = programs.allows_vectors(args.width, [*args.layers, *sums])
    call = [
        programs.program(args.plan, bool(sums)), launch.views(args.layers), args.skip_tokens, launch.dtype(first),
        launch.weights(args.mix_weights), launch.data(args.image_index), first.shape[0], args.num_rows,
        args.num_patches, args.width, launch.data(rows), launch.dtype(rows), [out.data_ptr() for out in sums],
    ]  # fmt: skip
    with launch.on_device_of(first) as stream:
        if norm is None:
            launch.module().mix(*call, vector, stream)
            return
        weight, bias, eps = norm
        launch.module().mix_norm(
            *call, launch.data(weight), launch.dtype(weight), launch.data(bias), launch.dtype(bias), eps,
            launch.data(raw), launch.data(mean), launch.data(rstd), vector, stream,
        )  # fmt: skip


def _readable(grad_rows: Tensor, layers: torch.dtype) -> Tensor:
    """The gradient of the mixed row as the kernels read it: adjacent channels, fp64 beside fp64 layers only."""
    if not programs.dtype_pair_is_served(layers, grad_rows.dtype):
        grad_rows = grad_rows.to(layers)
    return grad_rows if grad_rows.stride(-1) == 1 else grad_rows.contiguous()
