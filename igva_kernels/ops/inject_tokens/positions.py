"""What kernels need beside their launches: which token takes a row, and the gradient of a gate."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(rows: Tensor, num_features: int) -> Tensor:
    """``[V]`` int32: the token ``b * T + t`` that takes each row; -1 for none, -2 where several take it.

    Minima and maxima of integers are the same in any order, and nothing waits for the device.

    Args:
        rows: ``[B, T]`` int32; what is out of range takes no row.
        num_features: V.
    """
    # All that take no row share one that is added at the end: -1 is V modulo V + 1.
    taken = rows.flatten().clamp(-1, num_features).remainder(num_features + 1).long()
    tokens = torch.arange(taken.shape[0], dtype=torch.int32, device=rows.device)
    last = tokens.new_full((num_features + 1,), -1).scatter_reduce_(0, taken, tokens, "amax")
    first = last.scatter_reduce(0, taken, tokens, "amin")
    return torch.where(first == last, last, -2)[:num_features]


def is_one(gate: Tensor | None) -> bool:
    """Whether one number is the gate of all rows."""
    return gate is not None and gate.shape[0] == 1


def new_row_dots(gate: Tensor | None, num_features: int, needed: bool) -> Tensor | None:
    """Memory for what each row adds to the gradient of the gate, if it is needed."""
    return gate.new_empty(num_features) if needed and gate is not None else None


def gate_grad(row_dots: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """The gradient of a gate ``[1]`` or ``[V]`` in its own dtype, the sum in fp64 and in a fixed order."""
    if row_dots is None or gate is None or not is_one(gate):
        return row_dots
    return row_dots.sum(0, keepdim=True, dtype=torch.float64).to(gate.dtype)
