"""The calls by which implementations of the mix are judged, at small and at real shapes.

Inputs are drawn, rounded to the dtype, and then given alike to the oracle (the specification in fp64), to plain torch
(the published code in the dtype) and to the implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix import api, spec
from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.testing import OUTPUT, SPECIFICATION, results

LINEARS = {
    "layer_mix": (),
    "layer_mix_linear": ("weight1", "bias1"),
    "layer_mix_mlp": ("weight1", "bias1", "weight2", "bias2"),
}
"""The weights and biases that each public function takes, in the order of its arguments."""
MIX_WEIGHTS_GRAD = "grad mix_weights"

KINK = 2.0**-17
"""Where z is nearer to zero than this (64 rounding units of fp32 at 1), two correct kernels may be on different sides
of a ReLU's kink."""


@dataclass(frozen=True)
class Case:
    """One call of one operator, drawn at random."""

    name: str
    op: str
    plan: MixPlan
    images: int
    tokens: int
    width: int
    hidden: int = 0
    """H; 0 for ``layer_mix``, which has none."""
    skip: int = 1
    image_index: tuple[int, ...] | None = None
    activation: str | None = None
    norm_eps: float | None = None
    trainable_tower: bool = False

    @property
    def batch(self) -> int:
        """See ``testing.Case``."""
        return len(self.image_index) if self.image_index else self.images

    @property
    def demands(self) -> tuple[str | None, str]:
        """See ``testing.Case``."""
        return self.activation, self.plan.compact()[1].code

    @property
    def is_large(self) -> bool:
        """See ``testing.Case``."""
        return self.tokens > 100

    def draw(self, seed: int, dtype: torch.dtype, device: str) -> Inputs:
        """Inputs rounded to ``dtype``; a seed gives the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

        plan = self.plan
        rows = self.batch
        row_width = plan.num_blocks * self.width
        assert plan.num_states is not None
        layers = {layer: normal(self.images, self.tokens, self.width) for layer in plan.layers}
        params: dict[str, Tensor] = {}
        if self.op != "layer_mix":
            params["weight1"] = normal(self.hidden, row_width, scale=row_width**-0.5)
            params["bias1"] = normal(self.hidden)
        if self.op == "layer_mix_mlp":
            params["weight2"] = normal(self.hidden, self.hidden, scale=self.hidden**-0.5)
            params["bias2"] = normal(self.hidden)
        if self.norm_eps is not None:
            params["norm weight"] = 1 + normal(row_width, scale=0.1)
            params["norm bias"] = normal(row_width, scale=0.1)
        weights = torch.randn(rows, plan.num_columns, generator=generator).softmax(-1) if plan.num_columns else None
        inputs = Inputs(
            layers=[layers.get(layer) for layer in range(plan.num_states)],
            mix_weights=None if weights is None else weights.to(device),
            params=params,
            grad_out=normal(rows, self.tokens - self.skip, self.hidden or row_width),
        )
        if self.op != "layer_mix_linear" or self.activation is None:
            return inputs
        # An activation may have a kink at zero, as ReLU has. In fp32 one entry of z that changes sides there weighs
        # more than all roundings together, and is too rare to even out over the draws. Entries near zero therefore get
        # no gradient; behind a second Linear nothing could hold a gradient from them.
        z = replace(self, activation=None).forward(inputs.double(), SPECIFICATION)
        return inputs._replace(grad_out=inputs.grad_out.masked_fill(z.abs() < KINK, 0.0))

    def forward(self, inputs: Inputs, impl: str) -> Tensor:
        """The output of the operator."""
        params, device = inputs.params, inputs.grad_out.device
        linears: list[Any] = [params.get(name) for name in LINEARS[self.op]]
        index = None if self.image_index is None else torch.tensor(self.image_index, device=device)
        mix: dict[str, Any] = {"skip_tokens": self.skip, "image_index": index}
        options: dict[str, Any] = {} if self.op == "layer_mix" else {"activation": self.activation}
        if self.norm_eps is not None:
            options["norm"] = (params["norm weight"], params["norm bias"], self.norm_eps)
        if impl != SPECIFICATION:
            return getattr(api, self.op)(
                inputs.layers, self.plan, inputs.mix_weights, *linears, **options, **mix, impl=impl
            )  # fmt: skip
        rows = spec.layer_mix(inputs.layers, self.plan, inputs.mix_weights, **mix)
        return spec.project(rows, *linears, **options) if linears else rows

    def is_rounded_once(self, result: str) -> bool:
        """See ``testing.Case``."""
        return self.op == "layer_mix" and result == OUTPUT

    def run(self, inputs: Inputs, impl: str, only: Collection[str] = ()) -> dict[str, Tensor]:
        """The output and the gradients by name: all of them, or ``only`` some."""
        inputs = inputs.detached()
        leaves = {f"grad {name}": param for name, param in inputs.params.items()}
        if self.trainable_tower:
            leaves |= {f"grad layer {i}": layer for i, layer in enumerate(inputs.layers) if layer is not None}
        if inputs.mix_weights is not None:
            leaves[MIX_WEIGHTS_GRAD] = inputs.mix_weights
        return results(lambda: self.forward(inputs, impl), leaves, inputs.grad_out, only)


class Inputs(NamedTuple):
    """The tensors of one draw."""

    layers: list[Tensor | None]
    mix_weights: Tensor | None
    params: dict[str, Tensor]
    """Weights and, where there are any, biases."""
    grad_out: Tensor

    def double(self) -> Inputs:
        """The same numbers in fp64."""
        return self.map(Tensor.double)

    def detached(self) -> Inputs:
        """The same tensors, none of them part of a graph."""
        return self.map(Tensor.detach)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        return Inputs(
            [None if layer is None else change(layer) for layer in self.layers],
            None if self.mix_weights is None else change(self.mix_weights),
            {name: change(param) for name, param in self.params.items()},
            change(self.grad_out),
        )


VIP_LLAVA = [-2, -5, -8, -11, 6]

SMALL_CASES = [
    Case("igva, trainable tower", "layer_mix_mlp", MixPlan.igva(6, 3), 2, 17, 64, 96,
         activation="gelu", trainable_tower=True),
    Case("odd sizes", "layer_mix_mlp", MixPlan.igva(5, [[1, 2], [3], [4, 5]]), 3, 38, 59, 97,
         activation="gelu", trainable_tower=True),
    Case("several instructions an image", "layer_mix_mlp", MixPlan.igva(6, 2), 2, 17, 32, 48,
         image_index=(1, 0, 1, 1), activation="gelu", trainable_tower=True),
    Case("concat + LayerNorm", "layer_mix_mlp", MixPlan.concat([-2, -3, 1], 6), 2, 19, 40, 56,
         activation="gelu", norm_eps=1e-5, trainable_tower=True),
    Case("weighted sum + norm", "layer_mix_linear", MixPlan.weighted_sum(range(1, 6), -1, 7), 2, 16, 48, 64,
         skip=0, norm_eps=1e-5, trainable_tower=True),
    Case("igva + norm", "layer_mix_linear", MixPlan.igva(4, 2), 2, 18, 32, 40,
         activation="silu", norm_eps=1e-5, trainable_tower=True),
    Case("constant weights", "layer_mix_linear", MixPlan.igva_uniform(4, 2), 1, 18, 32, 40),
    # Larger: a rounding near a kink flips a whole gradient entry, which evens out over many entries.
    *(Case(f"activation {name}", "layer_mix_linear", MixPlan.igva(4, 2), 2, 66, 64, 160, activation=name)
      for name in ACTIVATIONS),
    Case("mix alone", "layer_mix", MixPlan.igva(6, 3), 3, 17, 72, trainable_tower=True),
    Case("mix alone, DenseConnector dci", "layer_mix", MixPlan.dense_connector("dci"), 1, 17, 72, trainable_tower=True),
]  # fmt: skip

REAL_CASES = [
    Case("CLIP-L/336 igva, B 1", "layer_mix_mlp", MixPlan.igva(), 1, 577, 1024, 4096, activation="gelu"),
    Case("CLIP-L/336 igva, B 2", "layer_mix_mlp", MixPlan.igva(), 2, 577, 1024, 4096, activation="gelu"),
    Case("CLIP-L/336 igva, mix alone", "layer_mix", MixPlan.igva(), 2, 577, 1024),
    Case("CLIP-L/336 igva, 3 rows of 1 image", "layer_mix_linear", MixPlan.igva(), 1, 577, 1024, 4096,
         image_index=(0, 0, 0), activation="gelu"),
    Case("SigLIP-L igva", "layer_mix_mlp", MixPlan.igva(27, 3), 1, 729, 1152, 4096, skip=0, activation="gelu"),
    Case("VipLlava concat + LayerNorm", "layer_mix_mlp", MixPlan.concat(VIP_LLAVA, 25), 1, 577, 1024, 4096,
         activation="gelu", norm_eps=1e-5),
    Case("TGIF weighted sum + norm", "layer_mix_mlp", MixPlan.weighted_sum(range(1, 25), -2, 25), 1, 577, 1024, 4096,
         activation="gelu", norm_eps=1e-5),
]  # fmt: skip

CASES = (*SMALL_CASES, *REAL_CASES)
