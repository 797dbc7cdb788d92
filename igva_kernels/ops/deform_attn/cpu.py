"""Deformable attention on the CPU: addresses and strides of torch tensors go to the C++ module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.ops.deform_attn.geometry import Geometry
from igva_kernels.ops.deform_attn.op import DeformAttn
from igva_kernels.ops.deform_attn.operands import ORIGINS, level_table
from igva_kernels.runtime.cpu.dense import module
from igva_kernels.runtime.operands import address, dtype_of, view


class CpuDeformAttn(DeformAttn):
    """``DeformAttn`` by the C++ module. Beside the results, the weights and some rows per thread are in memory."""

    def attend(
        self, levels: Sequence[Tensor], sampling: Tensor, logits: Tensor, reference: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """As in ``DeformAttn``."""
        native, threads = module(), torch.get_num_threads()
        (batch, queries, _), (_, _, heads, width) = sampling.shape, levels[0].shape
        sizes = (batch, queries, heads, width, geometry.num_points)
        given = (dtype_of(native, levels[0].dtype), sizes, ORIGINS[geometry.origin])
        table = level_table(levels, geometry)
        scratch = sampling.new_empty(native.attend_scratch(given, table, threads))
        weights = logits.new_empty(logits.shape) if geometry.softmax else None
        out = levels[0].new_empty(batch, queries, heads * width)
        native.attend(
            given, table, view(native, sampling), view(native, logits),
            None if reference is None else view(native, reference), address(weights), address(scratch), address(out),
            threads,
        )  # fmt: skip
        return out

    def attend_grad(
        self, grad: Tensor, levels: Sequence[Tensor] | None, sampling: Tensor, logits: Tensor,
        reference: Tensor | None, geometry: Geometry, grad_levels: Sequence[Tensor] | None, needs: tuple[bool, bool],
        in_pixels: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """As in ``DeformAttn``."""
        native, threads = module(), torch.get_num_threads()
        heads = logits.shape[2] // geometry.num_points
        sizes = (*grad.shape[:2], heads, grad.shape[2] // heads, geometry.num_points)
        given = (dtype_of(native, grad.dtype), sizes, ORIGINS[geometry.origin])
        table = level_table(levels, geometry)
        into = [] if grad_levels is None else level_table(grad_levels, geometry)
        scratch = sampling.new_empty(native.attend_grad_scratch(given, table, any(needs), bool(into), threads))
        weights = logits.new_empty(logits.shape) if geometry.softmax else None
        grad_sampling = sampling.new_empty(sampling.shape) if needs[0] else None
        grad_logits = logits.new_empty(logits.shape) if needs[1] else None
        native.attend_grad(
            given, table, view(native, sampling), view(native, logits),
            None if reference is None else view(native, reference), address(weights), address(scratch),
            view(native, grad), into, in_pixels, address(grad_sampling), address(grad_logits), threads,
        )  # fmt: skip
        return grad_sampling, grad_logits


IMPLEMENTATION = CpuDeformAttn()
