"""MixPlan: which layers go where in the mixed row.

A plan is a tuple of G blocks, each a tuple of entries ``(layer, column, scale)``; block ``g`` of the mixed row is

    A[m, g*D + d] = sum over entries (l, c, s) of block g of  s * w[b(m), c] * h_l[image(b(m)), skip + p(m), d]

where a column of None stands for the constant weight 1. Plans are immutable and hashable, so that a kernel can
specialise on one, and plain data, so that a config file can hold one.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from igva_kernels.runtime.context import cached_constant, constant_under_compile


class Entry(NamedTuple):
    """One layer's share of a block: ``scale * mix_weights[:, column] * hidden_states[layer]``."""

    layer: int
    column: int | None = None
    scale: float = 1.0


class Term(NamedTuple):
    """Entries of a block that share column and scale: ``scale * mix_weights[:, column] * sum of the layers``.

    Kernels execute terms: the layers are summed first and scaled once.
    """

    column: int | None
    scale: float
    layers: tuple[int, ...]

    @property
    def is_mean(self) -> bool:
        """Whether the scale is that of a mean, ``1 / len(layers)`` as the constructors compute it."""
        return self.scale == 1.0 / len(self.layers)


Block = tuple[Entry, ...]


def terms(block: Block) -> tuple[Term, ...]:
    """The terms of a block, in the order in which their first entries stand."""
    layers: dict[tuple[int | None, float], list[int]] = {}
    for entry in block:
        layers.setdefault((entry.column, entry.scale), []).append(entry.layer)
    return tuple(Term(column, scale, tuple(group)) for (column, scale), group in layers.items())


def is_tap(block: Block) -> bool:
    """Whether the block is one layer as it is."""
    return len(block) == 1 and block[0].column is None and block[0].scale == 1.0


@dataclass(frozen=True)
class MixPlan:
    """Which hidden states go into which block of the mixed row, with which weights.

    Args:
        blocks: G blocks, each a sequence of entries ``(layer, column or None, scale)``. A negative layer counts from
            the last hidden state, as in ``hidden_states[-2]``.
        num_states: the length of ``hidden_states`` the plan is made for (layers of the tower + 1), or None. With it,
            negative layers are resolved at once and a list of another length is refused.

    Raises:
        ValueError: no block, an empty block, a negative column, a scale that is not finite, or a layer
            outside ``num_states``.
        TypeError: an entry that is not ``(int, int or None, float)``.
    """

    blocks: tuple[Block, ...]
    num_states: int | None = None

    def __post_init__(self) -> None:
        blocks, code, number = _checked(_constants(self.blocks), self.num_states)
        object.__setattr__(self, "blocks", blocks)
        # Attributes, not fields: FSDP2 rebuilds a dataclass from its fields.
        object.__setattr__(self, "_code", code)
        object.__setattr__(self, "_hash", number)  # a plan is looked up in every call

    def __reduce__(self) -> Any:
        """Without the hash, which another process may compute differently."""
        return type(self), (self.blocks, self.num_states)

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __str__(self) -> str:
        """The formula: ``[h23 | w_0·mean(h1..h6) + w_1·mean(h7..h12)]``; bars separate the blocks."""
        return f"[{' | '.join(map(_formula, self.blocks))}]"

    @property
    def code(self) -> str:
        """The blocks as a string, the form in which a registered op takes them; ``MixPlan.from_code`` reads it back."""
        return self._code  # type: ignore[attr-defined]

    @property
    def num_blocks(self) -> int:
        """G: the mixed row is G * D wide."""
        return len(self.blocks)

    @property
    def num_columns(self) -> int:
        """C: the columns that ``mix_weights [B, C]`` must have; 0 where the plan takes no weights."""
        return 1 + max([-1, *(e.column for block in self.blocks for e in block if e.column is not None)])

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden states the plan reads, sorted, each once (negative ones first where the plan is unresolved)."""
        return tuple(sorted({e.layer for block in self.blocks for e in block}))

    @property
    def weighted_blocks(self) -> tuple[int, ...]:
        """The blocks that have a weight column."""
        return tuple(g for g, block in enumerate(self.blocks) if any(e.column is not None for e in block))

    def resolve(self, num_states: int) -> MixPlan:
        """The same plan for ``num_states`` hidden states: negative layers become indices.

        Raises:
            ValueError: the plan was made for another number of states, or reads a layer that is not there.
        """
        if self.num_states is not None and self.num_states != num_states:
            raise ValueError(
                f"hidden_states: the plan was made for {self.num_states} hidden states, got {num_states}; "
                f"a tower with n layers returns n + 1 states"
            )
        return _made(_resolve(self.code, num_states), num_states)

    def compact(self) -> tuple[tuple[int, ...], MixPlan]:
        """``(layers, plan)``: the layers in use and the plan over ``[hidden_states[l] for l in layers]``."""
        return self.layers, _made(_compact(self.code), len(self.layers))

    def reduced(self) -> tuple[MixPlan, MixPlan]:
        """``(sources, plan)``: the weight-free sources of this plan, and the same mix over them.

        ``sources`` has one block per block and column of this plan (scales inside) and its taps as they are; ``plan``
        mixes the outputs of those blocks. IGVA: 5 sources instead of 24 layers.
        """
        sources, blocks = _reduced(self.code)
        return _made(sources, self.num_states), _made(blocks, len(sources))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON config; ``MixPlan.from_dict`` reads it back."""
        return {"blocks": [[list(e) for e in block] for block in self.blocks], "num_states": self.num_states}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MixPlan:
        """The plan that ``to_dict`` wrote, or that a constructor makes: ``{"layer_select": {"strategy": "18"}}``.

        Raises:
            ValueError: neither of the two.
            TypeError: arguments that the constructor does not take.
        """
        if "blocks" in data:
            return cls(data["blocks"], data.get("num_states"))
        if len(data) != 1 or next(iter(data)) not in CONSTRUCTORS:
            raise ValueError(
                f"mix_plan: got {data!r}, need what MixPlan.to_dict writes, or one of {', '.join(CONSTRUCTORS)} with "
                f"its arguments: {{'layer_select': {{'strategy': '18'}}}}"
            )
        ((name, arguments),) = data.items()
        return getattr(cls, name)(**arguments)

    @staticmethod
    def from_code(code: str) -> MixPlan:
        """The plan whose ``code`` this is."""
        return _from_code(code)

    @classmethod
    def igva(cls, num_layers: int = 24, groups: int | Sequence[Sequence[int]] = 4, base: int = -2) -> MixPlan:
        """``[base] [sum_k w_k * mean of group k]``, the weights per instruction (IGVA, arXiv 2501.08443, stage 2).

        Args:
            num_layers: layers of the tower (CLIP ViT-L: 24), which returns ``num_layers + 1`` hidden states.
            groups: a number of equal groups over layers 1..num_layers, or the layers of each group.
            base: the layer of the first block.

        Raises:
            ValueError: ``groups`` does not divide ``num_layers``, a group is empty, or the tower lacks a layer.
        """
        members = _groups(num_layers, groups)
        mixed = [Entry(layer, k, 1.0 / len(group)) for k, group in enumerate(members) for layer in group]
        return cls((_tap(base), tuple(mixed)), num_layers + 1)

    @classmethod
    def igva_uniform(cls, num_layers: int = 24, groups: int | Sequence[Sequence[int]] = 4, base: int = -2) -> MixPlan:
        """``[base] [mean over k of the mean of group k]``, IGVA's stage 1. Arguments as in ``igva``."""
        members = _groups(num_layers, groups)
        mixed = [Entry(layer, None, 1.0 / (len(members) * len(group))) for group in members for layer in group]
        return cls((_tap(base), tuple(mixed)), num_layers + 1)

    @classmethod
    def concat(cls, layers: Iterable[int], num_states: int | None = None) -> MixPlan:
        """One tap per block: the channel concat of VipLlava, Granite Vision and of LLaVA models with a layer list."""
        return cls(tuple(_tap(layer) for layer in layers), num_states)

    @classmethod
    def dense_connector(cls, kind: str, tower: str = "clip") -> MixPlan:
        """DenseConnector (arXiv 2405.13800), layer sets as its code has them.

        Args:
            kind: "sci" ``[base] [h7] [h15]`` or "dci" ``[base] [mean of the first half] [mean of the second half]``
                (the halves start at ``hidden_states[0]``, the embeddings).
            tower: "clip" (25 states, base 23) or "siglip" (27 states, base 26: that repo cuts SigLIP's last layer).

        Raises:
            ValueError: an unknown kind or tower.
        """
        _check_choice("tower", tower, ("clip", "siglip"))
        _check_choice("kind", kind, ("sci", "dci"))
        num_states, base, half = (25, 23, 12) if tower == "clip" else (27, 26, 13)
        if kind == "sci":
            return cls.concat((base, 7, 15), num_states)
        return cls((_tap(base), _mean(range(half)), _mean(range(half, 2 * half))), num_states)

    @classmethod
    def layer_select(cls, strategy: str, tower: str = "clip") -> MixPlan:
        """External direct fusion of Layer_Select_Fuse (arXiv 2503.06063), base last, as its code has it.

        Args:
            strategy: "18" ``[h18] [base]``, "3-18-23" ``[h3] [h18] [base]`` ("siglip": ``[h3] [h20] [base]``), "former"
                ``[mean of h1..h12] [base]``, "latter" ``[mean of h13..h24] [base]`` ("siglip": h15..h26) or "all"
                ``[mean of h1..h12] [mean of h13..h24] [base]``.
            tower: "clip" (base 23) or "siglip" (base 25).

        Raises:
            ValueError: an unknown strategy or tower.
        """
        _check_choice("tower", tower, ("clip", "siglip"))
        base, deep, late = (23, (3, 18), 13) if tower == "clip" else (25, (3, 20), 15)
        former, latter = _mean(range(1, 13)), _mean(range(late, late + 12))
        blocks: dict[str, tuple[Block, ...]] = {
            "18": (_tap(18),),
            "3-18-23": tuple(_tap(layer) for layer in deep),
            "former": (former,),
            "latter": (latter,),
            "all": (former, _mean(range(13, 25))),
        }
        _check_choice("strategy", strategy, tuple(blocks))
        return cls((*blocks[strategy], _tap(base)))

    @classmethod
    def weighted_sum(cls, layers: Iterable[int], residual: int | None = None, num_states: int | None = None) -> MixPlan:
        """One block ``sum_i w_i * h_layers[i] (+ h_residual)``: TGIF, COMM, learned static weights."""
        block = [Entry(layer, column, 1.0) for column, layer in enumerate(layers)]
        if residual is not None:
            block.extend(_tap(residual))
        return cls((tuple(block),), num_states)


CONSTRUCTORS = ("igva", "igva_uniform", "concat", "dense_connector", "layer_select", "weighted_sum")
"""The constructors of ``MixPlan`` that a config can name."""


def _constants(blocks: Any) -> tuple[Any, ...]:
    """The blocks as tuples of plain values, whatever sequences they were."""
    try:
        if torch.compiler.is_compiling():
            # Each value goes through a set, which looks at it: with dynamic=True a number in a plan that is made while
            # it is traced would be a symbol, and a plan is a constant of the graph.
            return tuple(tuple(tuple(next(iter({value})) for value in entry) for entry in block) for block in blocks)
        plain = tuple(tuple(map(tuple, block)) for block in blocks)
        hash(plain)  # fails for what is no plain value
        return plain
    except TypeError:
        raise TypeError(f"blocks: need sequences of entries (layer, column or None, scale), got {blocks!r}") from None


@constant_under_compile
def _checked(blocks: tuple[Any, ...], num_states: int | None) -> tuple[tuple[Block, ...], str, int]:
    """The blocks of a plan, their code, and the plan's hash."""
    checked = tuple(tuple(_entry(e, num_states) for e in block) for block in blocks)
    if not checked or any(not block for block in checked):
        raise ValueError(f"blocks: a MixPlan needs at least one block and one entry per block, got {blocks!r}")
    code = repr(tuple(tuple(tuple(e) for e in block) for block in checked))
    return checked, code, hash((checked, num_states))


def _entry(entry: Sequence[Any], num_states: int | None) -> Entry:
    try:
        layer, column, scale = entry
        if isinstance(layer, bool) or layer != int(layer) or (column is not None and column != int(column)):
            raise TypeError
        layer, column, scale = int(layer), None if column is None else int(column), float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"blocks: an entry is (layer: int, column: int or None, scale: float), got {entry!r}") from None
    if not math.isfinite(scale):
        raise ValueError(f"blocks: scales are finite numbers, got {scale} for layer {layer}")
    if column is not None and column < 0:
        raise ValueError(f"blocks: columns count from 0, got column {column} for layer {layer}")
    if num_states is not None:
        if not -num_states <= layer < num_states:
            raise ValueError(
                f"blocks: layer {layer} is not among {num_states} hidden states; "
                f"layers run from {-num_states} to {num_states - 1}"
            )
        layer %= num_states
    return Entry(layer, column, scale)


def _formula(block: Block) -> str:
    weighted = [(term.column, _term(term)) for term in terms(block) if term.column is not None]
    parts = [f"w_{column}·{text}" for column, text in weighted]
    singles = [text[1:] for _, text in weighted if text[1:].isdigit()]
    if len(parts) > 2 and [column for column, _ in weighted] == list(range(len(parts))):
        texts = [text for _, text in weighted]
        listed = _ranges(list(map(int, singles))) if len(singles) == len(parts) else ", ".join(texts)
        parts = [f"Σ_k w_k·{{{listed}}}"]
    return " + ".join([*parts, *(_term(term) for term in terms(block) if term.column is None)])


def _term(term: Term) -> str:
    layers, scale = term.layers, term.scale
    if len(layers) == 1:
        return f"h{layers[0]}" if scale == 1.0 else f"{scale:g}·h{layers[0]}"
    if term.is_mean:
        return f"mean({_ranges(layers)})"
    return f"sum({_ranges(layers)})" if scale == 1.0 else f"{scale:g}·sum({_ranges(layers)})"


def _ranges(layers: Sequence[int]) -> str:
    """``h1..h6, h9``: three or more layers in a row by their ends."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts = (f"h{run[0]}..h{run[-1]}" if len(run) > 2 else ", ".join(f"h{layer}" for layer in run) for run in runs)
    return ", ".join(texts)


def _tap(layer: int) -> Block:
    return (Entry(layer, None, 1.0),)  # of a default value, torch.compile(dynamic=True) would make a symbol


def _mean(layers: Sequence[int]) -> Block:
    return tuple(Entry(layer, None, 1.0 / len(layers)) for layer in layers)


def _groups(num_layers: int, groups: int | Sequence[Sequence[int]]) -> list[list[int]]:
    if not isinstance(groups, int):
        members = [list(group) for group in groups]
        if not members or any(not group for group in members):
            raise ValueError(f"groups: every group needs at least one layer, got {groups!r}")
        return members
    if groups < 1 or num_layers % groups:
        divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - groups))
        raise ValueError(
            f"groups: {groups} does not divide num_layers={num_layers}; try groups={nearest} "
            f"(one of {divisors}) or pass the layers of each group"
        )
    size = num_layers // groups
    return [list(range(1 + k * size, 1 + (k + 1) * size)) for k in range(groups)]


def _check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{name}: got {given!r}, need one of {', '.join(map(repr, choices))}")


@cached_constant
def _from_code(code: str) -> MixPlan:
    return MixPlan(ast.literal_eval(code))


def _made(blocks: tuple[Block, ...], num_states: int | None) -> MixPlan:
    """The plan of these blocks; it is made once, as every call asks for it."""
    return MixPlan(blocks, num_states) if torch.compiler.is_compiling() else _made_once(blocks, num_states)


@cache
def _made_once(blocks: tuple[Block, ...], num_states: int | None) -> MixPlan:
    return MixPlan(blocks, num_states)


# Functions of the code of a plan that return blocks, because torch.compile takes these as constants, but not a plan.


@cached_constant
def _resolve(code: str, num_states: int) -> tuple[Block, ...]:
    plan = _from_code(code)
    missing = [layer for layer in plan.layers if not -num_states <= layer < num_states]
    if missing:
        raise ValueError(
            f"hidden_states: the plan reads layer {missing[0]}, got {num_states} hidden states; "
            f"layers run from {-num_states} to {num_states - 1}"
        )
    return _renumbered(plan, {layer: layer % num_states for layer in plan.layers})


@cached_constant
def _compact(code: str) -> tuple[Block, ...]:
    plan = _from_code(code)
    return _renumbered(plan, {layer: i for i, layer in enumerate(plan.layers)})


def _renumbered(plan: MixPlan, index: dict[int, int]) -> tuple[Block, ...]:
    return tuple(tuple(Entry(index[e.layer], e.column, e.scale) for e in block) for block in plan.blocks)


@cached_constant
def _reduced(code: str) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    sources: dict[Block, int] = {}
    blocks = []
    for block in _from_code(code).blocks:
        columns = {e.column: None for e in block}
        entries = []
        for column in columns:
            share = tuple(Entry(e.layer, None, e.scale) for e in block if e.column == column)
            # A single layer stays a tap, read where it lies; its scale moves to the outer plan.
            scale = share[0].scale if len(share) == 1 else 1.0
            source = _tap(share[0].layer) if len(share) == 1 else share
            entries.append(Entry(sources.setdefault(source, len(sources)), column, scale))
        blocks.append(tuple(entries))
    return tuple(sources), tuple(blocks)
