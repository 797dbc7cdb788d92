"""Dense steps on the CPU: products by torch's libraries, activations in C++, block by block, in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igva_kernels.runtime import native
from igva_kernels.runtime.cpu import products
from igva_kernels.runtime.dense import Dense
from igva_kernels.runtime.operands import activation_of, matrix


class CpuDense(Dense):
    """``Dense`` with products by ``products`` and activations by the C++ module."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``y = act(z)`` and, if asked for and not ``y`` itself, ``z = x @ weight.T + bias``; x is ``[M, K]``."""
        z = x.new_empty((x.shape[0], weight.shape[0])) if keep_z and activation is not None else None
        y = x.new_empty((x.shape[0], weight.shape[0]), dtype=weight.dtype)
        linear_into(x, weight, bias, activation, y, z)
        return y, z

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` in the dtype of both, accumulated in fp32 or fp64; either may be a transposed view."""
        product = b.new_empty((a.shape[0], b.shape[1]))
        linear_into(a, b.t(), None, None, product)
        return product

    def linear_grad_input(
        self, grad_out: Tensor, weight: Tensor | None, z: Tensor | None, activation: str | None, need_y: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """As in ``Dense``, a block at a time."""
        if activation is None:
            return super().linear_grad_input(grad_out, weight, z, activation, need_y, need_bias)
        assert z is not None
        grad_z = torch.empty_like(z)
        y = torch.empty_like(z) if need_y else None
        if weight is None:
            activation_grad(grad_out, z, activation, grad_z, y)
        else:
            for rows, columns, grad_y in products.products(grad_out, weight.t(), out=grad_z):
                at = (rows, columns)
                activation_grad(grad_y, z[at], activation, grad_z[at], None if y is None else y[at])
        return grad_z, y, grad_z.sum(0) if need_bias else None


def linear_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, y: Tensor, z: Tensor | None = None
) -> None:
    """``act(x @ weight.T + bias)`` into ``y``, and its value before the activation into ``z``."""
    for rows, columns, block in products.products(x, weight, bias, out=y if z is None else z):
        y_block, z_block = y[rows, columns], None if z is None else z[rows, columns]
        if z_block is not None and z_block.data_ptr() == block.data_ptr():
            z_block = None
        if activation is not None or z_block is not None or y_block.data_ptr() != block.data_ptr():
            epilogue(block, activation, y_block, z_block)


def epilogue(x: Tensor, activation: str | None, y: Tensor, z: Tensor | None) -> None:
    """``act(x)`` into ``y`` and, where it is given, ``x`` into ``z``; all ``[rows, columns]``."""
    compiled = module()
    compiled.epilogue(
        matrix(compiled, x), activation_of(compiled, activation), matrix(compiled, y), matrix(compiled, z),
        torch.get_num_threads(),
    )  # fmt: skip


def activation_grad(grad_y: Tensor, z: Tensor, activation: str, grad_z: Tensor, y: Tensor | None) -> None:
    """``grad_y * act'(z)`` into ``grad_z`` and, where it is given, ``act(z)`` into ``y``; all ``[rows, columns]``."""
    compiled = module()
    compiled.activation_grad(
        matrix(compiled, grad_y), matrix(compiled, z), activation_of(compiled, activation),
        matrix(compiled, grad_z), matrix(compiled, y), torch.get_num_threads(),
    )  # fmt: skip


def module() -> Any:
    """The compiled module.

    Raises:
        NotImplementedError: there is none.
    """
    found, reason = native.load()
    if found is None:
        raise NotImplementedError(f"impl='cpu': {reason}")
    return found
