"""The calls by which implementations of the bank of projectors are judged, at small and at real shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.layer_project import spec
from igva_kernels.ops.layer_project.api import layer_project
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.ops.weighted_mix.steps import Projector
from igva_kernels.testing import SPECIFICATION, results

LINEARS = ("weight1", "bias1", "weight2", "bias2")


class Inputs(NamedTuple):
    """The tensors of one draw."""

    layers: list[Tensor | None]
    mix_weights: list[Tensor | None]
    """One per member; None for a plan without columns."""
    params: dict[str, list[Tensor]]
    """The weights and biases, and the parameters of the norms: one for all members, or one per member."""
    grad_out: Tensor

    def double(self) -> Inputs:
        """The same numbers in fp64."""
        return self.map(Tensor.double)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        return Inputs(
            [None if layer is None else change(layer) for layer in self.layers],
            [None if weights is None else change(weights) for weights in self.mix_weights],
            {name: [change(param) for param in params] for name, params in self.params.items()},
            change(self.grad_out),
        )


@dataclass(frozen=True)
class BankCase:
    """One call, drawn at random."""

    name: str
    plans: tuple[MixPlan, ...]
    """Over as many states."""
    images: int
    tokens: int
    width: int
    hidden: int
    skip: int = 1
    image_index: tuple[int, ...] | None = None
    activation: str | None = "gelu"
    norm_eps: float | None = None
    is_shared: bool = False
    """Whether the members share their weights, biases and norm."""
    is_linear: bool = False
    """Whether each member is a single Linear."""
    trainable_tower: bool = False
    is_large: bool = False

    @property
    def batch(self) -> int:
        """See ``testing.Case``."""
        return len(self.image_index) if self.image_index else self.images

    @property
    def demands(self) -> tuple[str | None, ...]:
        """See ``testing.Case``."""
        return self.activation, *(plan.compact()[1].code for plan in self.plans)

    def draw(self, seed: int, dtype: torch.dtype, device: str) -> Inputs:
        """See ``testing.Case``."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return (mean + torch.randn(*shape, generator=generator) * scale).to(device, dtype)

        states = self.plans[0].num_states
        assert states is not None
        used = {layer for plan in self.plans for layer in plan.layers}
        layers = [normal(self.images, self.tokens, self.width) if i in used else None for i in range(states)]
        weights: list[Tensor | None] = [None] * len(self.plans)
        for j, plan in enumerate(self.plans):
            if plan.num_columns:
                weights[j] = torch.randn(self.batch, plan.num_columns, generator=generator).softmax(-1).to(device)
        params: dict[str, list[Tensor]] = {}
        for plan in self.plans[:1] if self.is_shared else self.plans:
            row = plan.num_blocks * self.width
            drawn = {"weight1": normal(self.hidden, row, scale=row**-0.5), "bias1": normal(self.hidden)}
            if not self.is_linear:
                drawn["weight2"] = normal(self.hidden, self.hidden, scale=self.hidden**-0.5)
                drawn["bias2"] = normal(self.hidden)
            if self.norm_eps is not None:
                drawn["norm_weight"] = normal(row, scale=0.1, mean=1.0)
                drawn["norm_bias"] = normal(row, scale=0.1)
            for name, param in drawn.items():
                params.setdefault(name, []).append(param)
        shape = (len(self.plans), self.batch, self.tokens - self.skip, self.hidden)
        return Inputs(layers, weights, params, normal(*shape))

    def run(self, inputs: Inputs, impl: str, only: Collection[str] = ()) -> dict[str, Tensor]:
        """See ``testing.Case``."""
        inputs = inputs.map(Tensor.detach)
        leaves = {f"grad {name}[{j}]": p for name, params in inputs.params.items() for j, p in enumerate(params)}
        leaves |= {f"grad mix_weights[{j}]": w for j, w in enumerate(inputs.mix_weights) if w is not None}
        if self.trainable_tower:
            leaves |= {f"grad layer {i}": layer for i, layer in enumerate(inputs.layers) if layer is not None}
        return results(lambda: self.forward(inputs, impl), leaves, inputs.grad_out, only)

    def forward(self, inputs: Inputs, impl: str) -> Tensor:
        """The output of the operator."""
        device, params = inputs.grad_out.device, inputs.params
        index = None if self.image_index is None else torch.tensor(self.image_index, device=device)
        mix: dict[str, Any] = {"skip_tokens": self.skip, "image_index": index}
        norms: list[Any] = [None]
        if self.norm_eps is not None:
            norms = [(w, b, self.norm_eps) for w, b in zip(params["norm_weight"], params["norm_bias"], strict=True)]
        if impl == SPECIFICATION:
            count = len(self.plans)
            linears = [params.get(name, [None]) for name in LINEARS]
            members = zip(*(own if len(own) == count else own * count for own in [*linears, norms]), strict=True)
            projectors = [Projector(w1, b1, w2, b2, n, self.activation) for w1, b1, w2, b2, n in members]
            return spec.layer_project(inputs.layers, self.plans, inputs.mix_weights, projectors, **mix)
        named = {name: params[name][0] if self.is_shared else params[name] for name in LINEARS if name in params}
        options: dict[str, Any] = named | mix | {"activation": self.activation}
        options["norm"] = norms[0] if self.is_shared or self.norm_eps is None else norms
        return layer_project(inputs.layers, self.plans, inputs.mix_weights, **options, impl=impl)

    def is_rounded_once(self, result: str) -> bool:
        """See ``testing.Case``."""
        return False


IGVA, TAPS = MixPlan.igva(4, 2), MixPlan.concat([-2, 1], 5)
DIRECT = tuple(MixPlan.concat([layer], 25) for layer in (3, 18, 23))
"""Internal direct fusion: a layer of CLIP-L for each of three layers of the language model."""

CASES = (
    BankCase("bank, own weights", (IGVA, TAPS, IGVA), 2, 9, 24, 40, trainable_tower=True),
    BankCase("bank, shared weights", (IGVA, TAPS), 2, 9, 19, 24, is_shared=True, trainable_tower=True),
    BankCase("bank, norms", (IGVA, TAPS), 2, 9, 24, 33, norm_eps=1e-5, activation="silu", trainable_tower=True),
    BankCase("bank, shared norm, taps", (TAPS, TAPS), 1, 9, 24, 32, skip=0, norm_eps=1e-5, is_shared=True),
    BankCase("bank, Linears", (IGVA, TAPS), 2, 9, 24, 32, activation=None, is_linear=True, trainable_tower=True),
    BankCase("bank, several rows of an image", (IGVA, TAPS), 2, 9, 16, 24, image_index=(1, 0, 1),
             trainable_tower=True),
    BankCase("bank of one", (IGVA,), 2, 9, 24, 32),
    BankCase("I_D, CLIP-L/336 and Vicuna-7B", DIRECT, 1, 577, 1024, 4096, is_large=True),
)  # fmt: skip
