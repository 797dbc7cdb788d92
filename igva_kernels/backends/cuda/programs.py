"""Plans as the CUDA kernels take them, and what a kernel may assume of its tensors: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from igva_kernels.backends.cuda import launch
from igva_kernels.plan import Block, Entry, MixPlan, is_tap, terms

Part = tuple[int, int, list[tuple[float, list[int]]]]
"""(column or -1, kept sum or -1, terms as (scale, layers)): one weight column's share of a block."""

VECTOR_BYTES = 16

DOT_CHUNK = 32
"""Patches of a block of the weight gradient's first stage."""

BIAS_CHUNK = 64
"""Rows of a block of the column sums for the bias: few enough for one image to fill a card."""

NORM_CHUNK = 128
"""Rows of a block of the column sums for the norm's parameters."""


NORM_ROW_BYTES = 96 << 10
"""Of shared memory for an unrounded row: what a multiprocessor of every architecture from 8.0 on can give."""


@lru_cache(maxsize=256)
def mix_blocks(plan: MixPlan, keep_sums: bool) -> list[list[Part]]:
    """The blocks of a plan in parts; with ``keep_sums`` the sums of ``plan.reduced()`` are by-products."""
    slots: dict[Block, int] = {}
    if keep_sums:
        slots = {block: slot for slot, block in enumerate(kept_sums(plan))}
    blocks = []
    for block in plan.blocks:
        parts: list[Part] = []
        for column in dict.fromkeys(entry.column for entry in block):
            part = tuple(entry for entry in block if entry.column == column)
            # A sum that several blocks use is written by the first of them.
            slot = slots.pop(tuple(Entry(e.layer, None, e.scale) for e in part), -1)
            share = [(term.scale, list(term.layers)) for term in terms(part)]
            parts.append((-1 if column is None else column, slot, share))
        blocks.append(parts)
    return blocks


@lru_cache(maxsize=256)
def program(plan: MixPlan, keep_sums: bool) -> Any:
    """The module's object for ``mix_blocks``."""
    return launch.module().MixProgram(mix_blocks(plan, keep_sums))


def kept_sums(plan: MixPlan) -> list[Block]:
    """The sources of the plan that are sums, in the order of ``plan.reduced()``."""
    return [block for block in plan.reduced()[0].blocks if not is_tap(block)]


def dots(plan: MixPlan, blocks: Sequence[int]) -> list[tuple[int, int, int, float]]:
    """``(position of the block, layer, column, scale)`` of every weighted entry of ``blocks``."""
    return [
        (position, e.layer, e.column, e.scale)
        for position, g in enumerate(blocks)
        for e in plan.blocks[g]
        if e.column is not None
    ]


def allows_vectors(width: int, tensors: Iterable[Tensor]) -> bool:
    """Whether rows of ``width`` elements can be read in 16-byte pieces: every address and stride is a multiple."""
    return all(
        width * tensor.element_size() % VECTOR_BYTES == 0
        and tensor.data_ptr() % VECTOR_BYTES == 0
        and all(stride * tensor.element_size() % VECTOR_BYTES == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def chunks(count: int, size: int) -> int:
    """Chunks of ``size`` that cover ``count``."""
    return -(-count // size)


def norm_row_fits(width: int, layers: torch.dtype) -> bool:
    """Whether the kernel with LayerNorm can hold an unrounded row of this width."""
    return width * (8 if layers == torch.float64 else 4) <= NORM_ROW_BYTES


def dtype_pair_is_served(layers: torch.dtype, rows: torch.dtype) -> bool:
    """fp64 is mixed with fp64 only; the other dtypes freely."""
    return (layers == torch.float64) == (rows == torch.float64)
