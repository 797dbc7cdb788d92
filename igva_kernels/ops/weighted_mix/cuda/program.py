"""What the CUDA kernels of the mix take: the plan as an object of the C++ module, and what fits them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import BLOCK, PART, TERM, Steps, lower
from igva_kernels.runtime.cuda import launch

DOT_CHUNK = 32
"""Patches that one block of threads sums in the first stage of the gradient of the mix weights."""

NORM_ROW_BYTES = 96 << 10
"""The most bytes of shared memory for one unrounded row: what every architecture from 8.0 on can give a block."""


Part = tuple[int, int, list[tuple[float, list[int]]]]
"""(column or -1, kept sum or -1, terms as (scale, layers)): one weight column's share of a block."""


@cache
def program(plan: MixPlan, keep_sums: bool) -> Any:
    """The plan as the module's object; with ``keep_sums`` its sums are by-products."""
    return launch.module().MixProgram(_table(lower(plan).steps, keep_sums))


def _table(steps: Steps, keep_sums: bool) -> list[list[Part]]:
    blocks, block, part, layers = [], [], [], []
    for layer, end, scale, column, kept in zip(*steps, strict=True):
        layers.append(layer)
        if end >= TERM:
            part.append((scale, layers))
            layers = []
        if end >= PART:
            block.append((column, kept if keep_sums else -1, part))
            part = []
        if end == BLOCK:
            blocks.append(block)
            block = []
    return blocks


def norm_row_fits(width: int, layers: torch.dtype) -> bool:
    """Whether the kernel with LayerNorm can hold an unrounded row of this width."""
    return width * (8 if layers == torch.float64 else 4) <= NORM_ROW_BYTES


def dtype_pair_is_served(layers: torch.dtype, rows: torch.dtype) -> bool:
    """fp64 is mixed with fp64 only; the other dtypes freely."""
    return (layers == torch.float64) == (rows == torch.float64)
