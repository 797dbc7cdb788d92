"""The injection on the CPU: addresses and strides of torch tensors go to the C++ module, which checks the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from igva_kernels.ops.inject_tokens.op import Injection
from igva_kernels.ops.inject_tokens.positions import is_one, new_row_dots
from igva_kernels.runtime.cpu.dense import is_streamed, module
from igva_kernels.runtime.operands import address, matrix, view


class CpuInjection(Injection):
    """``Injection`` by the C++ module. A row out of range, or taken twice, is a ValueError."""

    def inject(
        self, hidden: Tensor, features: Tensor | None, rows: Tensor, gate: Tensor | None, replace: bool
    ) -> Tensor:
        """As in ``Injection``."""
        native, out = module(), hidden.new_empty(hidden.shape)
        positions = None if features is None else _positions(rows, features.shape[0])
        native.inject(
            hidden.shape, view(native, hidden), matrix(native, features), address(rows), address(positions),
            address(gate), is_one(gate), replace, is_streamed(out), address(out), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def features_grad(
        self, grad: Tensor, features: Tensor | None, rows: Tensor, gate: Tensor | None, num_features: int,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """As in ``Injection``."""
        native, (need_features, need_gate) = module(), needs
        positions = _positions(rows, num_features)
        out = grad.new_empty(num_features, grad.shape[2]) if need_features else None
        row_dots = new_row_dots(gate, num_features, need_gate)
        gate_sum = torch.empty_like(gate) if row_dots is not None and is_one(gate) else None
        native.features_grad(
            grad.shape, view(native, grad), matrix(native, features), num_features, address(rows),
            address(positions), address(gate), is_one(gate),
            out is not None and is_streamed(out), address(out), address(row_dots), address(gate_sum),
            torch.get_num_threads(),
        )  # fmt: skip
        return out, row_dots if gate_sum is None else gate_sum


def _positions(rows: Tensor, num_features: int) -> Tensor:
    """Memory for the token that takes each row; an empty one would have no address."""
    return rows.new_empty(max(num_features, 1))


IMPLEMENTATION = CpuInjection()
