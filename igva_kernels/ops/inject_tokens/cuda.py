"""The injection by CUDA kernels: addresses and strides of torch tensors go to the module, and its launches to the
stream."""

from __future__ import annotations

from torch import Tensor

from igva_kernels.ops.inject_tokens.op import Injection
from igva_kernels.ops.inject_tokens.positions import gate_grad, is_one, new_row_dots, positions
from igva_kernels.runtime.cuda import launch
from igva_kernels.runtime.cuda.dense import allows_vectors
from igva_kernels.runtime.operands import address, matrix, view


class CudaInjection(Injection):
    """``Injection`` by the CUDA module. A row out of range gives NaN, and so does the gradient of one taken twice."""

    def inject(
        self, hidden: Tensor, features: Tensor | None, rows: Tensor, gate: Tensor | None, replace: bool
    ) -> Tensor:
        """As in ``Injection``."""
        native, out = launch.module(), hidden.new_empty(hidden.shape)
        vector = allows_vectors(hidden.shape[2], [hidden, features, out])
        with launch.on_device_of(hidden) as stream:
            native.inject(
                hidden.shape, view(native, hidden), matrix(native, features), address(rows), address(gate),
                is_one(gate), replace, vector, address(out), stream,
            )  # fmt: skip
        return out

    def features_grad(
        self, grad: Tensor, features: Tensor | None, rows: Tensor, gate: Tensor | None, num_features: int,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """As in ``Injection``."""
        native, (need_features, need_gate) = launch.module(), needs
        found, width = positions(rows, num_features), grad.shape[2]
        out = grad.new_empty(num_features, width) if need_features else None
        row_dots = new_row_dots(gate, num_features, need_gate)
        vector = allows_vectors(width, [grad, features, out])
        with launch.on_device_of(grad) as stream:
            native.features_grad(
                grad.shape, view(native, grad), matrix(native, features), num_features, address(found), address(gate),
                is_one(gate), vector, address(out), address(row_dots), stream,
            )  # fmt: skip
        return out, gate_grad(row_dots, gate)


IMPLEMENTATION = CudaInjection()
