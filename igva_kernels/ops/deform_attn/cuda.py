"""Deformable attention by CUDA kernels: addresses and strides of torch tensors go to the module, and its launches to
the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igva_kernels.ops.deform_attn.geometry import Geometry
from igva_kernels.ops.deform_attn.op import DeformAttn
from igva_kernels.ops.deform_attn.operands import ORIGINS, level_table
from igva_kernels.runtime.cuda import launch
from igva_kernels.runtime.cuda.dense import VECTOR_BYTES, allows_vectors
from igva_kernels.runtime.operands import address, dtype_of, view

MAX_LEVELS = 64
"""``max_levels`` of the kernels."""

POINTS_AT_A_TIME = 1 << 22
"""Points that are sorted at once, if an image has no more: 40 bytes of scratch each beside those of the sort."""


class CudaDeformAttn(DeformAttn):
    """``DeformAttn`` by the CUDA module.

    Where a head of a level fits the shared memory of a block, as those of a ViT do, nothing but the results is
    allocated; otherwise the gradients of the levels take scratch for the points of a few images at a time.
    """

    def why_not(self, *demands: int) -> str | None:
        """See ``Implementation.why_not``; the demand is the number of levels."""
        levels = demands[0] if demands else 1
        return None if levels <= MAX_LEVELS else f"its kernels take at most {MAX_LEVELS} levels, not {levels}"

    def attend(
        self, levels: Sequence[Tensor], sampling: Tensor, logits: Tensor, reference: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """As in ``DeformAttn``."""
        native, (_, _, heads, width) = launch.module(), levels[0].shape
        levels = [_aligned(level, width) for level in levels]
        out = levels[0].new_empty(*sampling.shape[:2], heads * width)
        given = _sampling(native, out, width, levels, sampling, logits, reference, geometry)
        with launch.on_device_of(out) as stream:
            native.attend(given, level_table(levels, geometry), address(out), stream)
        return out

    def attend_grad(
        self, grad: Tensor, levels: Sequence[Tensor] | None, sampling: Tensor, logits: Tensor,
        reference: Tensor | None, geometry: Geometry, grad_levels: Sequence[Tensor] | None, needs: tuple[bool, bool],
        in_pixels: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """As in ``DeformAttn``."""
        native = launch.module()
        width = grad.shape[2] // (logits.shape[2] // geometry.num_points)
        grad = _aligned(grad, width)
        grad_sampling = sampling.new_empty(sampling.shape) if needs[0] else None
        grad_logits = logits.new_empty(logits.shape) if needs[1] else None
        with launch.on_device_of(grad) as stream:
            if any(needs):
                assert levels is not None
                levels = [_aligned(level, width) for level in levels]
                given = _sampling(native, grad, width, levels, sampling, logits, reference, geometry)
                native.places_grad(
                    given, level_table(levels, geometry), view(native, grad), in_pixels, address(grad_sampling),
                    address(grad_logits), stream,
                )  # fmt: skip
            if grad_levels is not None:
                given = _sampling(native, grad, width, grad_levels, sampling, logits, reference, geometry)
                table = level_table(grad_levels, geometry)
                if not native.levels_grad(given, table, view(native, grad), stream):
                    _sorted_grad(native, grad, width, grad_levels, sampling, logits, reference, geometry, stream)
        return grad_sampling, grad_logits


def _aligned(tensor: Tensor, width: int) -> Tensor:
    """The tensor, or a copy if its rows do not begin where vectors may although rows of this width are made of them.
    The order of a sum, and so its last bit, would otherwise depend on the strides."""
    if width * tensor.element_size() % VECTOR_BYTES or allows_vectors(width, [tensor]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _sampling(
    native: Any, out: Tensor, width: int, levels: Sequence[Tensor], sampling: Tensor, logits: Tensor,
    reference: Tensor | None, geometry: Geometry,
) -> tuple:  # fmt: skip
    """``Sampling`` without its levels; ``out`` is what the output or its gradient is."""
    reason = IMPLEMENTATION.why_not(len(levels))
    if reason is not None:
        raise NotImplementedError(f"shapes: {reason}")
    sizes = (*sampling.shape[:2], out.shape[2] // width, width, geometry.num_points)
    vector = allows_vectors(width, [out, *levels])
    return (
        dtype_of(native, out.dtype), sizes, ORIGINS[geometry.origin], geometry.softmax, vector, view(native, sampling),
        view(native, logits), None if reference is None else view(native, reference),
    )  # fmt: skip


def _sorted_grad(
    native: Any, grad: Tensor, width: int, grad_levels: Sequence[Tensor], sampling: Tensor, logits: Tensor,
    reference: Tensor | None, geometry: Geometry, stream: int,
) -> None:  # fmt: skip
    """Writes the gradients of the levels, a few images at a time: torch's stable sort brings the points of a cell
    together."""
    batch, queries, per_query = logits.shape
    cells = sum((height + 1) * (width + 1) for height, width in geometry.shapes)
    cells *= per_query // geometry.num_points
    images = max(1, POINTS_AT_A_TIME // max(queries * per_query, cells))
    for first in range(0, batch, images):
        part = slice(first, first + images)
        own_grad, own_levels = grad[part], [level[part] for level in grad_levels]
        own_reference = None if reference is None else reference[part]
        given = _sampling(
            native, own_grad, width, own_levels, sampling[part], logits[part], own_reference, geometry
        )  # fmt: skip
        table, count = level_table(own_levels, geometry), len(own_grad)
        cell = torch.empty(count * queries * per_query, dtype=torch.int32, device=grad.device)
        entries = sampling.new_empty(len(cell), 4)
        native.points(given, table, address(cell), address(entries), stream)
        ordered, order = cell.sort(stable=True)
        every = torch.arange(count * cells + 1, dtype=torch.int32, device=grad.device)
        starts = torch.searchsorted(ordered, every, out_int32=True)
        native.sorted_grad(
            given, table, view(native, own_grad), address(order), address(starts), address(entries), stream
        )


IMPLEMENTATION = CudaDeformAttn()
