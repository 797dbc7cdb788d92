"""Gradients without a graph, for code that has an autograd function of its own around forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.ops.deform_attn import op
from igva_kernels.ops.deform_attn.api import deform_attn
from igva_kernels.ops.deform_attn.geometry import IMAGE
from igva_kernels.registry import REFERENCE
from igva_kernels.runtime.dense import accumulation_dtype
from igva_kernels.runtime.torch_op import OPS


def deform_attn_grads(
    grad: Tensor,
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    sampling: Tensor,
    weights: Tensor,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``deform_attn(value, shapes, sampling, weights, reference=None, softmax=False)``.

    Args:
        grad: the gradient of the output ``[B, Q, Hd * dh]``.
        value: ``[B, sum of H*W, Hd, dh]``.
        shapes: (H, W) of each level, as Python integers.
        sampling: ``[B, Q, Hd, L, N, 2]``, from 0 to 1.
        weights: ``[B, Q, Hd, L, N]``.
        impl: as in ``deform_attn``.

    Returns:
        The gradients of ``value``, ``sampling`` and ``weights``, each in the dtype of its tensor.

    Raises:
        ValueError, NotImplementedError: as in ``deform_attn``.
    """
    given = [tensor.detach() for tensor in (value, sampling, weights)]
    backend = op.OPERATOR.select(impl, value.device, value.dtype, given, len(shapes))
    if backend == REFERENCE:
        leaves = [tensor.requires_grad_() for tensor in given]
        with torch.enable_grad():
            out = deform_attn(leaves[0], shapes, *leaves[1:], reference=None, softmax=False, impl=REFERENCE)
            return torch.autograd.grad(out, leaves, grad.to(out.dtype))
    wide = accumulation_dtype(value.dtype)
    levels, points = sampling.shape[3:5]
    grads = OPS.deform_attn_backward(
        grad.to(value.dtype), [given[0]], given[1].flatten(3, 4).to(wide), given[2].flatten(3, 4).to(wide), None,
        [side for size in shapes for side in size], [points] * levels, IMAGE, False, 1, [True, True, True, False],
        backend,
    )  # fmt: skip
    of_value, of_sampling, of_weights = grads
    return (
        of_value,
        of_sampling.view(sampling.shape).to(sampling.dtype),
        of_weights.view(weights.shape).to(weights.dtype),
    )
