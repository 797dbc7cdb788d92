"""Dense steps by CUDA kernels around torch's products."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from igva_kernels.runtime import operands
from igva_kernels.runtime.cuda import launch
from igva_kernels.runtime.dense import Dense, Norm, NormGrads, accumulation_dtype, norm_param_grads
from igva_kernels.runtime.operands import activation_of, address, matrix

VECTOR_BYTES = 16
"""The widest access of one thread, in bytes."""

BIAS_CHUNK = 64
"""Rows that one block of threads sums for the gradient of the bias: few enough for one image to fill a card."""

NORM_CHUNK = 128
"""Rows that one block of threads sums for the gradients of the norm's parameters."""


class CudaDense(Dense):
    """``Dense`` with the small steps of a backward in CUDA kernels."""

    def linear_grad_input(
        self, grad_out: Tensor, weight: Tensor | None, z: Tensor | None, activation: str | None, need_y: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The product by torch, everything else in one kernel. See ``Dense``."""
        if activation is None:
            return super().linear_grad_input(grad_out, weight, z, activation, need_y, need_bias)
        assert z is not None
        grad_y = grad_out if weight is None else self.matmul(grad_out, weight)
        grad_y, z = grad_y.contiguous(), z.contiguous()
        grad_z = torch.empty_like(z) if weight is None else grad_y  # the caller's gradient is not ours to overwrite
        y = torch.empty_like(z) if need_y else None
        (rows, columns), chunk = z.shape, BIAS_CHUNK
        partials = None
        if need_bias:
            partials = z.new_empty((chunks(rows, chunk), columns), dtype=accumulation_dtype(z.dtype))
        native = launch.module()
        with launch.on_device_of(z) as stream:
            native.activation_grad(
                matrix(native, grad_y), matrix(native, z), activation_of(native, activation), matrix(native, grad_z),
                matrix(native, y), native.ColumnSums(address(partials), chunk),
                allows_vectors(columns, [grad_y, z]), stream,
            )  # fmt: skip
        return grad_z, y, None if partials is None else partials.sum(0).to(z.dtype)

    def norm_backward(
        self, grad_out: Tensor, rows: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, need_params: bool
    ) -> NormGrads:
        """LayerNorm's gradients by one kernel. See ``Dense``."""
        if mean.dtype != accumulation_dtype(rows.dtype) or grad_out.dtype != rows.dtype:
            return super().norm_backward(grad_out, rows, norm, mean, rstd, need_params)
        grad_out, rows = grad_out.contiguous(), rows.contiguous()
        grad_rows = torch.empty_like(rows)
        (count, width), chunk = rows.shape, NORM_CHUNK
        partials = mean.new_empty((chunks(count, chunk), 2, width)) if need_params else None
        native = launch.module()
        with launch.on_device_of(rows) as stream:
            native.norm_grad(
                matrix(native, grad_out), matrix(native, rows), operands.norm(native, *norm, mean, rstd),
                matrix(native, grad_rows), native.ColumnSums(address(partials), chunk),
                allows_vectors(width, [grad_out, rows, norm[0]]), stream,
            )  # fmt: skip
        return NormGrads(grad_rows, *norm_param_grads(None if partials is None else partials.sum(0), norm))


def allows_vectors(width: int, tensors: Iterable[Tensor | None]) -> bool:
    """Whether rows of ``width`` elements of all tensors can be read in 16-byte pieces: all addresses and strides are
    multiples."""
    present = [x for x in tensors if x is not None]
    return all(allow_vectors_at(width, x.element_size(), (x.data_ptr(),), (x.stride(),)) for x in present)


def allow_vectors_at(
    width: int, element_size: int, addresses: Iterable[int], strides: Iterable[tuple[int, ...]]
) -> bool:
    """``allows_vectors`` of tensors whose elements have one size, by their addresses and strides."""
    lengths = {width, *(stride for of_tensor in {*strides} for stride in of_tensor[:-1])}
    return not (
        any([length * element_size % VECTOR_BYTES for length in lengths])
        or any([address % VECTOR_BYTES for address in addresses])
    )


def chunks(count: int, size: int) -> int:
    """Chunks of ``size`` that cover ``count``."""
    return -(-count // size)
