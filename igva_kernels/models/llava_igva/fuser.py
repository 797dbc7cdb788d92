"""Deformable fusion (MMFuser, arXiv 2410.11829; E_M of Layer_Select_Fuse, arXiv 2503.06063): which states are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from igva_kernels.models.llava_igva.injection import integers
from igva_kernels.ops.weighted_mix import MixPlan

EXTERNAL_STRATEGIES = ("18", "3-18-23", "former", "latter", "all")
"""The choices of layers in Layer_Select_Fuse's E_M."""
HEADS, POINTS = 16, 4
"""Of both repositories."""

_FIELDS = "{'mmfuser': {}}, {'layer_select': {'strategy': '3-18-23'}} or {'levels': [3, 8, 13, 18]}"
_OPTIONS = {"heads": HEADS, "points": POINTS}
_MMFUSER_LEVELS = (-22, -17, -12, -7)


class FuserPlan(NamedTuple):
    """Which states of the vision tower the base state reads by deformable attention, and with how many points."""

    levels: tuple[int, ...]
    heads: int
    points: int
    """Of each head and level."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON config; ``from_dict`` reads it back."""
        return {"levels": list(self.levels), "heads": self.heads, "points": self.points}

    @classmethod
    def from_dict(cls, data: Any, tower_layers: int, tower_width: int, tower: str = "clip") -> FuserPlan:
        """The plan of ``LlavaIgvaConfig(fuser=...)``.

        Args:
            data: ``{"mmfuser": {...}}``, ``{"layer_select": {"strategy": ...}}`` or ``{"levels": [...]}``; "heads" and
                "points" may stand beside the strategy or the levels, which "mmfuser" may have as well.
            tower_layers: layers of the vision tower, which has one more state; negative levels count from the last one.
            tower_width: D.
            tower: "clip" or "siglip", of which the strategies read other states.

        Raises:
            TypeError: not of these types.
            ValueError: other fields, an unknown strategy, a level that there is not, or heads that do not divide D.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"fuser: need a dict such as {_FIELDS}, got {type(data).__name__}")
        kind = next(iter(data)) if len(data) == 1 and "levels" not in data else None
        fields = data if kind is None else data[kind]
        choice = {None: "levels", "mmfuser": "levels", "layer_select": "strategy"}.get(kind)
        if choice is None or not isinstance(fields, Mapping) or set(fields) - {choice, *_OPTIONS}:
            raise ValueError(f"fuser: need {_FIELDS}, with or without 'heads' and 'points', got {dict(data)!r}")
        if kind != "mmfuser" and choice not in fields:
            raise ValueError(f"fuser: need {choice!r} in {dict(fields)!r}, as in {_FIELDS}")
        if kind == "layer_select":
            levels = _layer_select(fields["strategy"], tower_layers, tower)
        else:
            levels = integers("fuser", "levels", fields.get("levels", _MMFUSER_LEVELS))
        heads, points = (fields.get(name, default) for name, default in _OPTIONS.items())
        for name, value in (("heads", heads), ("points", points)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"fuser: need an integer as {name}, got {value!r}")
            if value < 1:
                raise ValueError(f"fuser: need 1 or more {name}, got {value}")
        if tower_width % heads:
            raise ValueError(f"fuser: got {heads} heads, need a divisor of the tower's width {tower_width}")
        states = tower_layers + 1
        if not levels or not all(-states <= level < states for level in levels):
            raise ValueError(
                f"fuser: need one or more levels from {-states} to {states - 1}, got {list(levels)}; give levels"
            )
        return cls(tuple(level % states for level in levels), heads, points)


def _layer_select(strategy: Any, tower_layers: int, tower: str) -> tuple[int, ...]:
    """The levels of E_M as the code of Layer_Select_Fuse has them: the layers that its E_D reads beside the base."""
    if strategy == "3-18":
        raise ValueError(
            "fuser: got strategy '3-18', which Layer_Select_Fuse makes no module for in its external fusions; need "
            "'3-18-23', which reads the same levels"
        )
    if strategy not in EXTERNAL_STRATEGIES:
        raise ValueError(f"fuser: got strategy {strategy!r}, need one of {', '.join(EXTERNAL_STRATEGIES)}")
    if (tower, tower_layers) not in (("clip", 24), ("siglip", 26)):
        raise ValueError(
            f"fuser: the strategy {strategy!r} is not defined for a {tower} tower of {tower_layers} layers; give levels"
        )
    blocks = MixPlan.layer_select(strategy, tower).blocks
    return tuple(entry.layer for block in blocks[:-1] for entry in block)
