"""The checks of the arguments: every error names the argument, what was given and what is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.ops.weighted_mix.checks import Mix, check_layers, check_mix, check_projector
from igva_kernels.ops.weighted_mix.steps import Projector

LINEARS = ("weight1", "bias1", "weight2", "bias2")


class Own(NamedTuple):
    """An argument that the members share, or of which each has its own."""

    name: str
    values: list[Any]
    """None, one for all members, or one per member."""
    is_shared: bool


class Bank(NamedTuple):
    """The checked arguments."""

    layers: list[Tensor]
    """The layers that any member reads."""
    reads: list[int]
    """For one member after the other, which of these layers it reads."""
    mixes: list[Mix]
    projectors: list[Projector]
    linears: dict[str, list[Tensor]]
    """The weights and biases by the names in ``LINEARS``: none, one for all members, or one per member."""
    norms: dict[str, list[Any]]
    """The same of what the norms are made of: "norm_weight", "norm_bias", "norm_eps"."""


def check_bank(
    hidden_states: Sequence[Tensor | None], plans: Sequence[MixPlan], mix_weights: Any, linears: Sequence[Any],
    norm: Any, activation: str | None, skip_tokens: int, image_index: Tensor | None,
) -> Bank:  # fmt: skip
    """The arguments of ``layer_project``; ``linears`` are those named in ``LINEARS``."""
    if isinstance(plans, MixPlan) or not isinstance(plans, Sequence):
        raise TypeError(f"plans: need a sequence of MixPlans, one per member, got {type(plans).__name__}")
    count = len(plans)
    if not count:
        raise ValueError("plans: need at least one MixPlan, got none")
    for j, plan in enumerate(plans):
        if not isinstance(plan, MixPlan):
            raise TypeError(f"plans[{j}]: need a MixPlan, got {type(plan).__name__}")
    weights = _own("mix_weights", mix_weights, count, isinstance(mix_weights, Tensor))
    of_linears = [
        _all_or_none(_own(name, given, count, isinstance(given, Tensor)))
        for name, given in zip(LINEARS, linears, strict=True)
    ]
    of_norm = _all_or_none(_own("norm", norm, count, _is_norm(norm)))
    weight1, _, weight2, bias2 = of_linears
    if not weight1.values:
        raise TypeError(f"weight1: need a tensor for all members or a sequence of {count}, got None")
    if bias2.values and not weight2.values:
        raise ValueError("bias2: need None where weight2 is None, got a bias")
    mixes: list[Mix] = []
    projectors: list[Projector] = []
    present = of_linears if weight2.values else of_linears[:2]
    for j, plan in enumerate(plans):
        mix = check_mix(hidden_states, plan, _value(weights, j), skip_tokens, image_index, _name(weights, j))
        first, bias, second, bias_of_second = (_value(own, j) for own in of_linears)
        projector = Projector(first, bias, second, bias_of_second, _value(of_norm, j), activation)
        names = [_name(own, j) for own in present]
        mixes.append(mix)
        projectors.append(check_projector(mix, projector, names, _name(of_norm, j)))
    _check_alike(weight1, present[-2])
    used = tuple(sorted({layer for mix in mixes for layer in mix.used}))
    reads = [used.index(layer) for mix in mixes for layer in mix.used]
    values = {own.name: own.values for own in of_linears}
    return Bank(check_layers(hidden_states, used), reads, mixes, projectors, values, _parts(of_norm))


def _own(name: str, given: Any, count: int, is_shared: bool) -> Own:
    if is_shared or given is None:
        return Own(name, [] if given is None else [given], True)
    if isinstance(given, (Tensor, str)) or not isinstance(given, Sequence):
        one = "(weight or None, bias or None, eps)" if name == "norm" else "a tensor"
        raise TypeError(
            f"{name}: need None, {one} for all members, or a sequence of {count}, got {type(given).__name__}"
        )
    if len(given) != count:
        raise ValueError(f"{name}: need {count} entries, one for each plan, got {len(given)}")
    return Own(name, list(given), False)


def _all_or_none(own: Own, part: str = "") -> Own:
    """The same without values if all of them are None; it is an error if some of them are. ``part`` follows the name
    of each."""
    absent = [j for j, value in enumerate(own.values) if value is None]
    if absent and len(absent) < len(own.values):
        raise ValueError(f"{own.name}[{absent[0]}]{part}: got None, need one for every member or for none")
    return Own(own.name, [] if absent else own.values, own.is_shared)


def _parts(norm: Own) -> dict[str, list[Any]]:
    """What norms that have been checked are made of."""
    parts: dict[str, list[Any]] = {"norm_eps": [float(eps) for _, _, eps in norm.values]}
    for i, name in enumerate(("norm_weight", "norm_bias")):
        own = Own(norm.name, [each[i] for each in norm.values], norm.is_shared)
        parts[name] = _all_or_none(own, f"[{i}]").values
    return parts


def _is_norm(norm: Any) -> bool:
    """Whether it is one norm, and not a sequence of them."""
    return isinstance(norm, (tuple, list)) and len(norm) == 3 and isinstance(norm[2], (int, float))


def _value(own: Own, member: int) -> Any:
    return own.values[0 if own.is_shared else member] if own.values else None


def _name(own: Own, member: int) -> str:
    return own.name if own.is_shared else f"{own.name}[{member}]"


def _check_alike(first: Own, last: Own) -> None:
    """The members' results lie in one tensor: one width, and one dtype."""
    for j, weight in enumerate(first.values):
        if weight.dtype != first.values[0].dtype:
            raise TypeError(
                f"{first.name}[{j}]: need dtype {first.values[0].dtype} as {first.name}[0], got {weight.dtype}"
            )
    for j, weight in enumerate(last.values):
        width, given = last.values[0].shape[0], weight.shape[0]
        if given != width:
            raise ValueError(
                f"{last.name}[{j}]: need {width} rows, the width of the result, as {last.name}[0], got {given}"
            )
