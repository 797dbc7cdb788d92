"""A MixPlan as flat tuples, the form in which a kernel unrolls it.

Triton (before 3.7) takes a constexpr tuple of numbers but no tuple of tuples, so the nesting block > column > term >
layer becomes a list of steps, one a layer, each saying what ends with it.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from igva_kernels.backends.base import Signature
from igva_kernels.plan import Block, Entry, MixPlan, is_tap, terms

TERM, PART, BLOCK = 1, 2, 3
"""What ends with a step; each includes the ones before it."""


class MixProgram(NamedTuple):
    """Steps: ``sum += layer``; at a term's end ``part += scale * sum``; at a part's end ``block += w * part``."""

    layers: tuple[int, ...]
    ends: tuple[int, ...]
    scales: tuple[float, ...]
    columns: tuple[int, ...]
    """-1 for the constant weight 1."""
    keeps: tuple[int, ...]
    """At a part's end: which kept sum it is, -1 for none."""


class DotProgram(NamedTuple):
    """The entries of one block that have a weight: ``dw[column] += scale * <grad, layer>``."""

    layers: tuple[int, ...]
    scales: tuple[float, ...]
    columns: tuple[int, ...]


class GradProgram(NamedTuple):
    """Shares of the layer gradients: ``grad += scale * w[column] * grad_A[block]``; ``ends`` closes a signature."""

    blocks: tuple[int, ...]
    ends: tuple[int, ...]
    scales: tuple[float, ...]
    columns: tuple[int, ...]


class Run(NamedTuple):
    """Adjacent blocks that a GEMM reads in one loop: ``taps`` blocks that are taps, or (taps = 0) one mixed block."""

    start: int
    """The first step."""
    stop: int
    block: int
    """The first block."""
    taps: int


@cache
def mix_program(plan: MixPlan, keep_sums: bool) -> MixProgram:
    """The steps of a resolved plan; with ``keep_sums`` the sums of ``plan.reduced()`` are by-products."""
    slots: dict[Block, int] = {}
    if keep_sums:
        sums = [block for block in plan.reduced()[0].blocks if not is_tap(block)]
        slots = {block: slot for slot, block in enumerate(sums)}
    steps = []
    for block in plan.blocks:
        parts = list(dict.fromkeys(entry.column for entry in block))
        for column in parts:
            part = [entry for entry in block if entry.column == column]
            # A sum that several blocks use is written by the first one.
            slot = slots.pop(tuple(Entry(e.layer, None, e.scale) for e in part), -1)
            part_terms = terms(tuple(part))
            for term in part_terms:
                for layer in term.layers:
                    steps.append([layer, 0, term.scale, -1 if column is None else column, slot])
                steps[-1][1] = TERM
            steps[-1][1] = PART
        steps[-1][1] = BLOCK
    return MixProgram(*(tuple(step) for step in zip(*steps, strict=True)))


@cache
def dot_program(plan: MixPlan, block: int) -> DotProgram:
    """The weighted entries of one block."""
    entries = [entry for entry in plan.blocks[block] if entry.column is not None]
    return DotProgram(
        tuple(e.layer for e in entries), tuple(e.scale for e in entries), tuple(e.column or 0 for e in entries)
    )


@cache
def grad_program(signatures: tuple[Signature, ...]) -> GradProgram:
    """The shares of every signature, one after the other."""
    shares = [
        (block, int(i == len(signature) - 1), scale, -1 if column is None else column)
        for signature in signatures
        for i, (block, column, scale) in enumerate(signature)
    ]
    return GradProgram(*(tuple(share) for share in zip(*shares, strict=True)))


@cache
def runs(plan: MixPlan) -> tuple[Run, ...]:
    """The runs of a plan, in the order of its blocks and steps."""
    found: list[Run] = []
    step = 0
    for index, block in enumerate(plan.blocks):
        stop = step + len(block)
        if is_tap(block) and found and found[-1].taps:
            found[-1] = found[-1]._replace(stop=stop, taps=found[-1].taps + 1)
        else:
            found.append(Run(step, stop, index, int(is_tap(block))))
        step = stop
    return tuple(found)
