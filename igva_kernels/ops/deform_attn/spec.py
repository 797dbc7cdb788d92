"""The specification: what every query reads from the maps (Deformable DETR, arXiv 2010.04159, equations 2 and 3).

    out[b, q, h] = sum over l, n of  a[b, q, h, l, n] * bilinear(value_l[b, :, h], position[b, q, h, l, n])

A position (x, y) is in pixels, the centre of the first one being (0, 0), and stands in the cell whose corners are floor
and floor + 1. A corner outside the map counts as zero (``grid_sample`` with zero padding, ``align_corners=False``). The
sum is continuous in the position, but has a kink where it is an integer: there the derivative is that of the cell on
the right, or below. A NaN makes its sums NaN; a position that is infinite is outside every map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.ops.deform_attn.geometry import BOXES, GRID, Geometry
from igva_kernels.runtime.dense import accumulation_dtype


def deform_attn(
    levels: Sequence[Tensor],
    sampling: Tensor,
    logits: Tensor,
    reference: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """``[B, Q, Hd * dh]``.

    Args:
        levels: ``[B, H*W, Hd, dh]`` each.
        sampling: ``[B, Q, Hd, S, 2]``, (x, y) counted from ``geometry.origin``; in the accumulation dtype, as are the
            next two.
        logits: ``[B, Q, Hd, S]``.
        reference: ``[B, Q, L, 2]`` points or ``[B, Q, L, 4]`` boxes, or None where they are not counted from one.
        geometry: the constants.
    """
    dtype = levels[0].dtype
    weights = logits.softmax(-1) if geometry.softmax else logits
    out = sampling.new_zeros((*sampling.shape[:3], levels[0].shape[-1]))
    of_levels = zip(levels, geometry.of_levels(sampling, 3), geometry.of_levels(weights, 3), strict=True)
    for level, (value, offsets, weight) in enumerate(of_levels):
        size = geometry.shapes[level]
        own = None if reference is None else reference[:, :, None, level, None]
        cell, fraction = _place(offsets, own, size, geometry.origin)
        sampled = _bilinear(value.to(accumulation_dtype(dtype)), cell, fraction, size)
        out = out + (weight.unsqueeze(-1) * sampled).sum(-2)
    return out.flatten(2).to(dtype)


def _place(offsets: Tensor, reference: Tensor | None, size: tuple[int, int], origin: str) -> tuple[Tensor, Tensor]:
    """The upper left corner of the cell of each position, a whole number, and the position within the cell."""
    if origin == GRID:  # the query's own pixel is a whole number, so that nothing is rounded
        pixel = torch.arange(offsets.shape[1], device=offsets.device)
        own = torch.stack([pixel % size[1], pixel // size[1]], -1).to(offsets.dtype)[:, None, None]
        floor = offsets.detach().floor()
        return own + floor, offsets - floor
    position = _in_pixels(offsets if reference is None else reference[..., :2], size)
    if reference is not None:
        boxes = reference[..., 2:]
        step = (_in_pixels(boxes, size) + 0.5) * (0.5 / max(offsets.shape[3], 1)) if origin == BOXES else 1
        position = position + step * offsets
    floor = position.detach().floor()
    return floor, position - floor


def _in_pixels(places: Tensor, size: tuple[int, int]) -> Tensor:
    """Places in the image, from 0 to 1, in pixels of a level."""
    height, width = size
    x, y = places.unbind(-1)
    return torch.stack([x * width, y * height], -1) - 0.5


def _bilinear(value: Tensor, cell: Tensor, fraction: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, Q, Hd, N, dh]`` from a level ``[B, H*W, Hd, dh]`` and cells and fractions ``[B, Q, Hd, N, 2]``."""
    height, width = size
    inside = torch.isfinite(fraction)  # of an infinite position it is NaN
    fraction = torch.where(inside | torch.isnan(cell), fraction, 0)
    x, y = cell.unbind(-1)
    right, down = fraction.unbind(-1)
    batch, heads = value.shape[0], value.shape[2]
    b = torch.arange(batch, device=value.device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=value.device).view(-1, 1)
    total = value.new_zeros(())
    for dy, along_y in ((0, 1 - down), (1, down)):
        for dx, along_x in ((0, 1 - right), (1, right)):
            column, row = x + dx, y + dy
            exists = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            at = torch.where(exists, row.long() * width + column.long(), 0)
            corner = torch.where(exists.unsqueeze(-1), value[b, at, h], 0)  # also where pixel 0 is NaN
            total = total + (along_x * along_y).unsqueeze(-1) * corner
    return total
