"""A plan as flat arrays, the one form in which every kernel takes it.

Kernel languages take tuples of numbers, but nested ones badly (Triton before 3.7 not at all). So the nesting of a plan,
block > column > term > layer, becomes a list of steps, one per layer read, each of which says what ends with it. The
gradients have arrays of their own: dots for the weights, shares for the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from torch import Tensor

from igva_kernels.ops.weighted_mix.plan import Block, Entry, MixPlan, is_tap, terms

TERM, PART, BLOCK = 1, 2, 3
"""What ends with a step. A part is one weight column's share of a block; each end includes the ones before it."""


class Steps(NamedTuple):
    """``sum += layer``; at a term's end ``part += scale * sum``; at a part's end ``block += w[column] * part``."""

    layers: tuple[int, ...]
    ends: tuple[int, ...]
    """0, TERM, PART or BLOCK."""
    scales: tuple[float, ...]
    columns: tuple[int, ...]
    """-1 for the constant weight 1."""
    sums: tuple[int, ...]
    """At a part's end: which of the program's kept sums it is, or -1."""


class Dots(NamedTuple):
    """The entries that have a weight: ``dw[column] += scale * <grad of the block, layer>``."""

    blocks: tuple[int, ...]
    """Positions among the blocks that were asked for."""
    layers: tuple[int, ...]
    columns: tuple[int, ...]
    scales: tuple[float, ...]


class Shares(NamedTuple):
    """Gradients of layers, one after the other: ``grad += scale * w[column] * grad of the block``.

    A layer's signature is its set of ``(block, column, scale)``. Layers with the same signature have the same gradient,
    which is computed once: IGVA's 24 layers need 5.
    """

    blocks: tuple[int, ...]
    columns: tuple[int, ...]
    """-1 for the constant weight 1."""
    scales: tuple[float, ...]
    ends: tuple[int, ...]
    """1 where a signature ends."""

    @property
    def num_grads(self) -> int:
        """The number of different gradients."""
        return sum(self.ends)


@dataclass(frozen=True, eq=False)
class Program:
    """A plan lowered once; ``lower`` makes it."""

    weighted_blocks: tuple[int, ...]
    steps: Steps
    """The steps of the mixed row."""
    sum_steps: Steps
    """The steps of the kept sums, each a block without weights; empty where every source is a tap."""
    sources: tuple[int | None, ...]
    """The sources of ``plan.reduced()``: the layer of a tap, None for a sum."""
    num_sums: int
    reduced: MixPlan
    """The plan over the sources."""

    def gather(self, layers: Sequence[Tensor], sums: Sequence[Tensor]) -> list[Tensor]:
        """The sources: taps are the layers themselves; the forward kept the sums."""
        rest = iter(sums)
        return [next(rest) if layer is None else layers[layer] for layer in self.sources]


@cache
def lower(plan: MixPlan) -> Program:
    """The program of a plan; kernels refuse one that is not resolved."""
    sources, reduced = plan.reduced()
    sums = tuple(block for block in sources.blocks if not is_tap(block))
    return Program(
        plan.weighted_blocks, _steps(plan.blocks, {block: i for i, block in enumerate(sums)}), _steps(sums, {}),
        tuple(block[0].layer if is_tap(block) else None for block in sources.blocks), len(sums), reduced,
    )  # fmt: skip


@cache
def dots(plan: MixPlan, blocks: tuple[int, ...]) -> Dots:
    """The weighted entries of these blocks, in their order."""
    rows = [
        (i, e.layer, e.column, e.scale) for i, g in enumerate(blocks) for e in plan.blocks[g] if e.column is not None
    ]
    return Dots(*_columns(rows, len(Dots._fields)))


@cache
def shares(plan: MixPlan, needs: tuple[bool, ...]) -> tuple[Shares, tuple[int | None, ...]]:
    """The different gradients of the layers that need one, and for each layer the index of its own, or None."""
    found: dict[tuple[tuple[int, int, float], ...], int] = {}
    own: list[int | None] = []
    for layer, need in enumerate(needs):
        entries = [(g, e) for g, block in enumerate(plan.blocks) for e in block if e.layer == layer]
        signature = tuple(sorted((g, -1 if e.column is None else e.column, e.scale) for g, e in entries))
        own.append(found.setdefault(signature, len(found)) if need and signature else None)
    rows = [(*share, int(i == len(signature) - 1)) for signature in found for i, share in enumerate(signature)]
    return Shares(*_columns(rows, len(Shares._fields))), tuple(own)


def _steps(blocks: Sequence[Block], sums: dict[Block, int]) -> Steps:
    slots = dict(sums)
    steps: list[list] = []
    for block in blocks:
        for column in dict.fromkeys(entry.column for entry in block):
            part = tuple(entry for entry in block if entry.column == column)
            # A sum that several blocks use is kept by the first of them.
            slot = slots.pop(tuple(Entry(e.layer, None, e.scale) for e in part), -1)
            for term in terms(part):
                steps += ([layer, 0, term.scale, -1 if column is None else column, slot] for layer in term.layers)
                steps[-1][1] = TERM
            steps[-1][1] = PART
        steps[-1][1] = BLOCK
    return Steps(*_columns(steps, len(Steps._fields)))


def _columns(rows: Sequence[Sequence], count: int) -> tuple[tuple, ...]:
    return tuple(zip(*rows, strict=True)) if rows else ((),) * count
