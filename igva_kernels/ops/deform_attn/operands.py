"""What both compiled modules take of a call (csrc/deform_attn/operands.h)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from igva_kernels.ops.deform_attn.geometry import BOXES, GRID, IMAGE, POINTS, Geometry
from igva_kernels.runtime.operands import address

ORIGINS = {GRID: 0, IMAGE: 1, POINTS: 2, BOXES: 3}
"""``Origin``."""


def level_table(levels: Sequence[Tensor] | None, geometry: Geometry) -> list[tuple]:
    """``Level`` of each; without an address where there are no tensors."""
    table = []
    for i, ((height, width), first, points) in enumerate(
        zip(geometry.shapes, geometry.firsts, geometry.points, strict=True)
    ):
        tensor = None if levels is None else levels[i]
        strides = (0, 0, 0, 1) if tensor is None else tensor.stride()
        table.append((address(tensor), strides, (height, width, first, points)))
    return table
