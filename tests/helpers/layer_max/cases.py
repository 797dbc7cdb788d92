"""The calls by which the operator is judged."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from igva_kernels.testing import SPECIFICATION
from layer_max import spec
from layer_max.api import layer_max


class Inputs(NamedTuple):
    layers: list[Tensor]
    grad: Tensor

    def double(self) -> "Inputs":
        return Inputs([layer.double() for layer in self.layers], self.grad.double())


@dataclass(frozen=True)
class MaxCase:
    name: str
    batch: int
    shape: tuple[int, int]
    is_large: bool = False
    demands: tuple[()] = ()

    def draw(self, seed: int, dtype: torch.dtype, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(self.batch, *self.shape, generator=generator).to(device, dtype) for _ in range(4)]
        return Inputs(drawn[:3], drawn[3])

    def run(self, inputs: Inputs, impl: str, only: Collection[str] = ()) -> dict[str, Tensor]:
        layers = [layer.detach().requires_grad_() for layer in inputs.layers]
        out = spec.layer_max(layers) if impl == SPECIFICATION else layer_max(layers, impl=impl)
        grads = torch.autograd.grad(out, layers, inputs.grad) if torch.is_grad_enabled() else ()
        return {"output": out.detach()} | {f"grad layer {i}": grad for i, grad in enumerate(grads)}

    def is_rounded_once(self, result: str) -> bool:
        return False


CASES = (MaxCase("maximum", 2, (7, 13)), MaxCase("maximum at a real shape", 2, (577, 1024), is_large=True))
