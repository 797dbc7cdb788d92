"""The calls by which implementations of the injection are judged."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.inject_tokens import spec
from igva_kernels.ops.inject_tokens.api import inject_tokens
from igva_kernels.testing import SPECIFICATION, results


class Inputs(NamedTuple):
    """The tensors of one draw."""

    hidden_states: Tensor
    features: Tensor
    token_rows: Tensor
    gate: Tensor | None
    grad_out: Tensor

    def double(self) -> Inputs:
        """The same numbers in fp64."""
        gate = None if self.gate is None else self.gate.double()
        doubled = (self.hidden_states.double(), self.features.double(), self.token_rows, gate)
        return Inputs(*doubled, self.grad_out.double())


@dataclass(frozen=True)
class InjectionCase:
    """One call, drawn at random."""

    name: str
    batch: int
    tokens: int
    width: int
    features: int
    """V, of which some take no part where there are fewer tokens."""
    gate: str | None = None
    """None, "one" or "rows"."""
    mode: str = "add"
    in_order: bool = True
    """Whether the tokens take the rows in order, as ``token_rows`` has them."""
    is_large: bool = False
    demands: tuple[()] = ()

    def draw(self, seed: int, dtype: torch.dtype, device: str) -> Inputs:
        """See ``testing.Case``."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        places = torch.randperm(self.batch * self.tokens, generator=generator)[: self.features]
        taken = torch.randperm(self.features, generator=generator)[: len(places)]
        if self.in_order:
            places, taken = places.sort().values, taken.sort().values
        rows = torch.full((self.batch * self.tokens,), -1, dtype=torch.int32 if self.in_order else torch.int64)
        rows[places] = taken.to(rows.dtype)
        gate = None
        if self.gate is not None:
            gate = torch.randn(1 if self.gate == "one" else self.features, generator=generator)
        return Inputs(
            normal(self.batch, self.tokens, self.width), normal(self.features, self.width),
            rows.view(self.batch, self.tokens).to(device), None if gate is None else gate.to(device),
            normal(self.batch, self.tokens, self.width),
        )  # fmt: skip

    def run(self, inputs: Inputs, impl: str, only: Collection[str] = ()) -> dict[str, Tensor]:
        """See ``testing.Case``."""
        trained = {"hidden_states": inputs.hidden_states, "features": inputs.features, "gate": inputs.gate}
        leaves = {name: tensor.detach() for name, tensor in trained.items() if tensor is not None}
        hidden, features, gate = leaves["hidden_states"], leaves["features"], leaves.get("gate")

        def forward() -> Tensor:
            if impl == SPECIFICATION:
                return spec.inject_tokens(hidden, features, inputs.token_rows, gate, self.mode)
            return inject_tokens(hidden, features, inputs.token_rows, gate=gate, mode=self.mode, impl=impl)

        return results(forward, {f"grad {name}": leaf for name, leaf in leaves.items()}, inputs.grad_out, only)

    def is_rounded_once(self, result: str) -> bool:
        """See ``testing.Case``."""
        return True


CASES = (
    InjectionCase("injection", 2, 11, 24, 9),
    InjectionCase("injection, gated, any order", 3, 7, 37, 30, gate="rows", in_order=False),
    InjectionCase("injection, one gate", 2, 9, 40, 12, gate="one"),
    InjectionCase("injection, replacing", 2, 11, 33, 10, mode="replace"),
    InjectionCase("injection, replacing, gated", 1, 13, 16, 7, gate="rows", mode="replace"),
    InjectionCase("injection, no feature", 1, 5, 16, 0),
    InjectionCase("DeepStack's injection", 1, 4096, 4096, 3000, is_large=True),
)
