"""Dense steps that several operators are made of: a Linear with its activation, its gradient, LayerNorm's gradient.

``Dense`` is plain torch and right on every device; a backend's subclass overrides the steps for which it has kernels.
Nothing here is differentiated by autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from igva_kernels.runtime.activations import ACTIVATIONS

Norm = tuple[Tensor | None, Tensor | None, float]
"""LayerNorm over a whole row: (weight or None, bias or None, eps)."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of layers and weights. Plain torch cannot add or multiply in the others (float8, float4)."""

NORM_ROWS = 1024
"""Rows of a LayerNorm that plain torch differentiates at a time, so that its fp32 temporaries stay small."""


class NormGrads(NamedTuple):
    """LayerNorm's gradients; those of the parameters are None where they were not asked for."""

    rows: Tensor
    weight: Tensor | None
    bias: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 data."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def why_no_float(tensor: object) -> str | None:
    """None for a tensor whose dtype is one of ``FLOATS``, otherwise what is needed and what came, for an error."""
    if isinstance(tensor, Tensor) and tensor.dtype in FLOATS:
        return None
    given = tensor.dtype if isinstance(tensor, Tensor) else None if tensor is None else type(tensor).__name__
    return f"need a floating tensor ({', '.join(str(dtype)[6:] for dtype in FLOATS)}), got {given}"


class Dense:
    """Products and what belongs to them. All matrices are ``[M, ...]``; products accumulate in fp32 (fp64 for fp64)."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``y = act(z)`` and, if asked for and not ``y`` itself, ``z = x @ weight.T + bias``."""
        z = F.linear(x, weight, bias)
        if activation is None:
            return z, None
        # In place where nothing else needs z, so that no second [M, H] stands beside it.
        return (ACTIVATIONS[activation](z), z) if keep_z else (ACTIVATIONS[activation].forward_(z), None)

    def linear_into(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``x @ weight.T + bias`` into ``out``, where the elements of a row lie together."""
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` in the dtype of both; either may be a transposed view."""
        return a @ b

    def linear_grad_input(
        self, grad_out: Tensor, weight: Tensor | None, z: Tensor | None, activation: str | None, need_y: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """``grad_z = (grad_out @ weight) * act'(z)`` and, if asked for, ``y = act(z)`` again and ``grad_z.sum(0)``.

        ``weight`` is None for the identity. The sum accumulates in fp32, in a fixed order.
        """
        grad_z = grad_out if weight is None else self.matmul(grad_out, weight)
        y = z
        if activation is not None:
            assert z is not None
            grad_z = ACTIVATIONS[activation].backward(grad_z, z)
            y = ACTIVATIONS[activation](z) if need_y else None
        return grad_z, y, grad_z.sum(0) if need_bias else None

    def norm_backward(
        self, grad_out: Tensor, rows: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, need_params: bool
    ) -> NormGrads:
        """LayerNorm's gradients from its input ``rows`` ``[M, N]`` and its statistics ``[M]``."""
        grad_rows = torch.empty_like(grad_out)
        weight = norm[0]
        param_grads = mean.new_zeros(2, rows.shape[-1])
        for start in range(0, rows.shape[0], NORM_ROWS):
            at = slice(start, start + NORM_ROWS)
            grad = grad_out[at].to(mean.dtype)
            normal = (rows[at].to(mean.dtype) - mean[at, None]) * rstd[at, None]
            if need_params:
                param_grads += torch.stack([(grad * normal).sum(0), grad.sum(0)])
            grad = grad if weight is None else grad * weight.to(mean.dtype)
            projected = normal * (grad * normal).mean(-1, keepdim=True)
            grad_rows[at] = (rstd[at, None] * (grad - grad.mean(-1, keepdim=True) - projected)).to(grad_rows.dtype)
        return NormGrads(grad_rows, *norm_param_grads(param_grads if need_params else None, norm))


def layer_norm(rows: Tensor, norm: Norm) -> Tensor:
    """LayerNorm of rows ``[..., N]`` whose dtype its parameters need not have: autocast rounds rows, not parameters."""
    weight, bias, eps = norm
    if all(param is None or param.dtype == rows.dtype for param in (weight, bias)):
        return F.layer_norm(rows, rows.shape[-1:], weight, bias, eps)
    # CUDA's LayerNorm takes one dtype only. Some rows at a time, so that their wider copy stays small.
    wide, normal = accumulation_dtype(rows.dtype), torch.empty_like(rows)
    weight, bias = (None if param is None else param.to(wide) for param in (weight, bias))
    for some, out in zip(rows.flatten(0, -2).split(NORM_ROWS), normal.flatten(0, -2).split(NORM_ROWS), strict=True):
        out.copy_(F.layer_norm(some.to(wide), rows.shape[-1:], weight, bias, eps))
    return normal


def norm_param_grads(sums: Tensor | None, norm: Norm) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a norm's weight and bias from their sums ``[2, N]``, each in its parameter's dtype."""
    if sums is None:
        return None, None
    # Copies: an operator's results must not share memory.
    weight, bias = (None if p is None else grad.to(p.dtype, copy=True) for grad, p in zip(sums, norm[:2], strict=True))
    return weight, bias
