"""The calls by which implementations of the allocator are judged: the weights ``[B, K]``, at inference."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.allocator import spec
from igva_kernels.ops.allocator.api import allocate
from igva_kernels.ops.allocator.weights import AllocatorWeights
from igva_kernels.testing import SPECIFICATION

OUTPUT = "weights"
EPS = 1e-5


class Inputs(NamedTuple):
    """The tensors of one draw."""

    sentences: Tensor
    summaries: Tensor
    parameters: list[Tensor]

    def double(self) -> Inputs:
        """The same numbers in fp64."""
        return Inputs(self.sentences.double(), self.summaries.double(), [p.double() for p in self.parameters])


@dataclass(frozen=True)
class AllocatorCase:
    """One call, drawn at random. Sizes as in ``nn.WeightAllocator``."""

    name: str
    batch: int
    num_weights: int
    hidden_dim: int
    num_heads: int
    num_blocks: int = 2
    sentence_dim: int = 20
    vision_dim: int = 24
    is_large: bool = False

    @property
    def demands(self) -> tuple[int, int]:
        """See ``testing.Case``."""
        return self.hidden_dim, self.num_weights

    def draw(self, seed: int, dtype: torch.dtype, device: str) -> Inputs:
        """See ``testing.Case``."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale + mean).to(device, dtype)

        def linear(rows: int, columns: int) -> list[Tensor]:
            return [normal(rows, columns, scale=columns**-0.5), normal(rows, scale=0.3)]

        c = self.hidden_dim
        parameters = [*linear(c, self.sentence_dim), *linear(c, self.vision_dim)]
        for _ in range(self.num_blocks):
            parameters += [*linear(3 * c, c), *linear(c, c), normal(c, scale=0.3, mean=1.0), normal(c, scale=0.3)]
            parameters += [*linear(c, c), *linear(c, c), normal(c, scale=0.3, mean=1.0), normal(c, scale=0.3)]
        parameters += linear(self.num_weights, c)
        summaries = normal(self.batch, self.num_weights, self.vision_dim)
        return Inputs(normal(self.batch, self.sentence_dim), summaries, parameters)

    def run(self, inputs: Inputs, impl: str, only: Collection[str] = ()) -> dict[str, Tensor]:
        """See ``testing.Case``."""
        eps = [EPS] * (2 * self.num_blocks)
        if impl == SPECIFICATION:
            weights = AllocatorWeights.of(inputs.parameters)
            return {OUTPUT: spec.allocate(inputs.sentences, inputs.summaries, weights, self.num_heads, eps)}
        return {OUTPUT: allocate(*inputs, self.num_heads, eps, impl)}

    def is_rounded_once(self, result: str) -> bool:
        """See ``testing.Case``."""
        return False


CASES = (
    AllocatorCase("allocator, IGVA's four groups", 2, 4, 32, 2),
    AllocatorCase("allocator, odd sizes", 3, 3, 33, 3),
    AllocatorCase("IGVA's allocator", 8, 4, 1024, 4, 4, sentence_dim=768, vision_dim=1024, is_large=True),
)
