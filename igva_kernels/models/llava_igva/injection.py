"""Internal direct fusion (I_D of Layer_Select_Fuse, arXiv 2503.06063): which layers go where, and what is injected.

A state of the vision tower has a projector of its own, and what it returns is added to the image tokens of the hidden
states in front of a layer of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

STRATEGIES = ("18", "3-18", "3-18-23", "former", "latter", "all")
"""The choices of layers in Layer_Select_Fuse."""
TIMES = ("encode", "inject")

_FIELDS = "{'strategy': '3-18-23'} or {'taps': [3, 18], 'layers': [3, 23]}, each with or without 'when'"


class InjectionPlan(NamedTuple):
    """Which states of the vision tower are injected before which layers of the language model."""

    taps: tuple[int, ...]
    layers: tuple[int, ...]
    when: str
    """"encode": features are projected with the visual tokens; "inject": right in front of their layer."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON config; ``from_dict`` reads it back."""
        return {"taps": list(self.taps), "layers": list(self.layers), "when": self.when}

    @classmethod
    def from_dict(cls, data: Any, tower_layers: int, text_layers: int, tower: str = "clip") -> InjectionPlan:
        """The plan of ``LlavaIgvaConfig(injection=...)``.

        Args:
            data: ``{"strategy": ...}`` or ``{"taps": [...], "layers": [...]}``, each with an optional "when".
            tower_layers: layers of the vision tower, which has one more state; negative taps count from the last one.
            text_layers: layers of the language model.
            tower: "clip" or "siglip", of which the strategies read other states.

        Raises:
            TypeError: not of these types.
            ValueError: other fields, unknown names, lists of two lengths, a layer that there is not, or one twice.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"injection: need a dict such as {_FIELDS}, got {type(data).__name__}")
        fields = set(data) - {"when"}
        if fields not in ({"strategy"}, {"taps", "layers"}):
            raise ValueError(f"injection: need {_FIELDS}, got {dict(data)!r}")
        when = data.get("when", "encode")
        if when not in TIMES:
            raise ValueError(f"injection: got 'when' {when!r}, need 'encode' or 'inject'")
        if "strategy" in fields:
            taps, layers = _layer_select(data["strategy"], tower_layers, text_layers, tower)
        else:
            taps, layers = (integers("injection", name, data[name]) for name in ("taps", "layers"))
        if len(taps) != len(layers) or not taps:
            raise ValueError(f"injection: need a layer for each tap, got {len(taps)} taps and {len(layers)} layers")
        states = tower_layers + 1
        for name, values, lowest, count in (("taps", taps, -states, states), ("layers", layers, 0, text_layers)):
            if not all(lowest <= value < count for value in values):
                raise ValueError(f"injection: need {name} from {lowest} to {count - 1}, got {list(values)}")
        if len(set(layers)) != len(layers):
            raise ValueError(f"injection: need each layer of the language model once, got {list(layers)}")
        return cls(tuple(tap % states for tap in taps), layers, when)


@dataclass(frozen=True)
class InjectedImages:
    """What is injected into a batch of prompts: an image's states or features, and the tokens that take them."""

    members: tuple[Tensor, ...]
    """One per injection: features ``[R, P, H]``, or states ``[I, T, D]`` that have still to be projected."""
    is_projected: bool
    image_index: Tensor | None
    """int64 ``[R]``, the image that each place reads, for states; None where place r reads image r."""
    token_rows: Tensor
    """int32 ``[B, S]``: the row of the features that each token takes, -1 for none."""

    def part(self, start: int, length: int) -> InjectedImages:
        """For this many tokens from ``start`` on, some of which may be behind the prompt."""
        rows = self.token_rows[:, start : start + length]
        return replace(self, token_rows=torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=-1))

    def last(self, length: int) -> InjectedImages:
        """For the last tokens of the prompt."""
        return self.part(self.token_rows.shape[1] - length, length)


def rows_of_copies(token_rows: Tensor, copies: int, num_features: int) -> Tensor:
    """``[B * copies, S]``: rows of ``copies`` times as many features, for batches that repeat each sample.

    Beams and several answers to one prompt read the same images, but no two tokens may take the same row.
    """
    rows = token_rows.repeat_interleave(copies, dim=0)
    offsets = torch.arange(copies, dtype=rows.dtype, device=rows.device).repeat(len(token_rows)) * num_features
    return torch.where(rows < 0, rows, rows + offsets[:, None])


def _layer_select(
    strategy: Any, tower_layers: int, text_layers: int, tower: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Taps and layers as the code of Layer_Select_Fuse has them, for CLIP-L and for SigLIP without its last layer."""
    if strategy not in STRATEGIES:
        raise ValueError(f"injection: got strategy {strategy!r}, need one of {', '.join(STRATEGIES)}")
    first, last = tuple(range(12)), tuple(range(text_layers - 12, text_layers))
    taps: dict[str, tuple[int, ...]]
    if (tower, tower_layers) == ("clip", 24):
        former, latter = tuple(range(1, 13)), tuple(range(13, 25))
        taps = {"18": (18,), "3-18": (3, 18), "3-18-23": (3, 18, 23)}
        taps |= {"former": former, "latter": latter, "all": former + latter}
    elif (tower, tower_layers) == ("siglip", 26):
        taps = {"3-18-23": (3, 20, 25), "latter": tuple(range(15, 27))}
    else:
        taps = {}
    if strategy not in taps:
        raise ValueError(
            f"injection: the strategy {strategy!r} is not defined for a {tower} tower of {tower_layers} layers; give "
            f"taps and layers"
        )
    layers = {"former": first, "latter": last, "all": first + last}
    if strategy in layers:
        need, chosen = len(layers[strategy]), layers[strategy]
    else:
        need, chosen = 24, tuple(int(int(n) * text_layers / 24 - 1) for n in strategy.split("-"))
    if text_layers < need:
        raise ValueError(
            f"injection: the strategy {strategy!r} needs a language model of at least {need} layers, got "
            f"{text_layers}; give taps and layers"
        )
    return taps[strategy], chosen


def integers(field: str, name: str, values: Any) -> tuple[int, ...]:
    """A list of integers of a field of the config, as a tuple; a TypeError names both if it is none."""
    wrong = isinstance(values, str) or not isinstance(values, Sequence)
    if wrong or any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise TypeError(f"{field}: need a list of integers as {name}, got {values!r}")
    return tuple(values)
