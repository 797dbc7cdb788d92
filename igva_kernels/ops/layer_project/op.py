"""The operator as torch sees it.

A member is a call of ``weighted_mix``'s ``projector``, as far as arguments, what is kept, and gradients go: only the
memory of the result is shared. Its backward is that operator's, so that a gradient does not depend on the grouping.

The arguments that members may have of their own are lists: empty for none, of one tensor that all share, or of one per
member; ``mix_weights`` has one per plan with columns. ``reads`` says for one plan after the other which ``layers`` its
layers are.
"""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from igva_kernels.ops.layer_project.steps import LayerProject
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.ops.weighted_mix import op as projector
from igva_kernels.ops.weighted_mix.steps import Shapes
from igva_kernels.registry import Operator
from igva_kernels.runtime.torch_op import define

OPERATOR = Operator("layer_project", __package__)

PARAMETERS = ("weight1", "bias1", "norm_weight", "norm_bias", "weight2", "bias2")


class Member(NamedTuple):
    """What a member reads of the lists."""

    number: int
    plan: MixPlan
    layers: list[int]
    mix_weights: int | None

    def places(self, lists: SimpleNamespace) -> dict[str, int]:
        """By name, where in the lists its own is found, beside the layers."""
        lengths = {name: len(getattr(lists, name)) for name in PARAMETERS}
        places = {name: min(self.number, length - 1) for name, length in lengths.items() if length}
        return places if self.mix_weights is None else places | {"mix_weights": self.mix_weights}

    def pick(self, lists: SimpleNamespace) -> dict[str, Any]:
        """Its own of the lists, by name: tensors, or what is said of each tensor. None of a list without its own."""
        own = {name: getattr(lists, name)[place] for name, place in self.places(lists).items()}
        layers = {"layers": [lists.layers[layer] for layer in self.layers]}
        return dict.fromkeys(("mix_weights", *PARAMETERS)) | own | layers


def _members(given: SimpleNamespace) -> list[Member]:
    members: list[Member] = []
    reads, column = iter(given.reads), 0
    for number, code in enumerate(given.plans):
        plan = MixPlan.from_code(code)
        has_columns = plan.num_columns > 0
        layers = list(islice(reads, len(plan.layers)))
        members.append(Member(number, plan, layers, column if has_columns else None))
        column += has_columns
    return members


def _calls(given: SimpleNamespace) -> list[SimpleNamespace]:
    """The arguments of ``projector`` for each member."""
    common = {name: getattr(given, name) for name in ("image_index", "skip_tokens", "activation", "impl")}
    eps = given.norm_eps or [None]
    return [
        SimpleNamespace(
            **common, **member.pick(given), plan=member.plan.code, norm_eps=eps[min(member.number, len(eps) - 1)],
            keep=given.keep[member.number], keep_z=given.keep_z[member.number],
        )
        for member in _members(given)
    ]  # fmt: skip


def _forward(given: SimpleNamespace, implementation: LayerProject) -> tuple[Tensor, list[Tensor]]:
    calls = [projector.projection(call) for call in _calls(given)]
    args, first = calls[0].args, calls[0].projector
    last = first.weight1 if first.weight2 is None else first.weight2
    out = last.new_empty((len(calls), args.num_rows, args.num_patches, last.shape[0]))
    results = implementation.project(calls, out)
    return out, [x for call, result in zip(calls, results, strict=True) for x in projector.kept(call, *result)]


def _run(given: SimpleNamespace) -> tuple[Tensor, list[Tensor]]:
    return _forward(given, OPERATOR.serving(given.impl, given.layers[0]))


def _save(given: SimpleNamespace, output: tuple[Tensor, list[Tensor]]) -> dict[str, Any]:
    """What ``projector`` saves for each member, its names after the member's number, and what ``_members`` reads."""
    rest = iter(output[1])
    values: dict[str, Any] = {"plans": given.plans, "reads": given.reads}
    for number, call in enumerate(_calls(given)):
        values |= {f"{number} {name}": value for name, value in projector.save(call, (output[0], rest)).items()}
    return values


def _differentiate(grad: Tensor, needs: SimpleNamespace, saved: SimpleNamespace) -> dict[str, Any]:
    """The gradients of the members; what several of them read gets the sum, in their order."""
    grads: dict[str, list[Tensor | None]] = {
        name: [None] * len(getattr(needs, name)) for name in ("layers", "mix_weights", *PARAMETERS)
    }

    def add(name: str, place: int, found: Tensor | None) -> None:
        before = grads[name][place]
        grads[name][place] = found if before is None or found is None else before + found

    for member, part in zip(_members(saved), grad.unbind(), strict=True):
        asked = SimpleNamespace(**{name: need or False for name, need in member.pick(needs).items()})
        if not any((*asked.layers, *(getattr(asked, name) for name in ("mix_weights", *PARAMETERS)))):
            continue
        found = projector.differentiate_projector(part, asked, _saved_of(member.number, saved))
        for name, place in member.places(needs).items():
            add(name, place, found.get(name))
        for layer, of_layer in zip(member.layers, found.get("layers", ()), strict=False):
            add("layers", layer, of_layer)
    return grads


def _saved_of(number: int, saved: SimpleNamespace) -> SimpleNamespace:
    prefix = f"{number} "
    return SimpleNamespace(**{n.removeprefix(prefix): v for n, v in vars(saved).items() if n.startswith(prefix)})


def _flops(given: SimpleNamespace) -> int:
    return sum(map(projector.flops, _calls(given)))


layer_project = define(
    "layer_project(Tensor[] layers, Tensor[] mix_weights, Tensor? image_index, Tensor[] weight1, Tensor[] bias1,"
    " Tensor[] norm_weight, Tensor[] norm_bias, Tensor[] weight2, Tensor[] bias2, str[] plans, int[] reads,"
    " int skip_tokens, float[] norm_eps, str? activation, str[] keep, bool[] keep_z, str impl) -> (Tensor, Tensor[])",
    _run, lambda given: _forward(given, LayerProject(Shapes())), _save, _differentiate, flops=_flops,
)  # fmt: skip
