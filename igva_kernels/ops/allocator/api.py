"""The public face of the operator, which ``nn.WeightAllocator`` calls where its modules are plain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.ops.allocator import spec
from igva_kernels.ops.allocator.op import OPERATOR
from igva_kernels.ops.allocator.weights import AllocatorWeights
from igva_kernels.registry import REFERENCE
from igva_kernels.runtime.context import autocast_dtype
from igva_kernels.runtime.torch_op import OPS


def select(
    impl: str, sentences: Tensor, summaries: Tensor, parameters: Sequence[Tensor], sizes: tuple[int, int]
) -> str:
    """The backend that serves ``impl`` for an allocator of these ``(hidden width, K)``, or "reference".

    Raises:
        ValueError: no such ``impl``.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    tensors = (sentences, summaries, *parameters)
    backend = OPERATOR.select(impl, summaries.device, summaries.dtype, tensors, *sizes)
    reason = None if backend == REFERENCE else why_not(tensors)
    if reason is not None and impl != "auto":
        raise NotImplementedError(f"impl={impl!r} cannot serve this call of the allocator: {reason}")
    return backend if reason is None else REFERENCE


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """None if kernels can serve a call with these inputs and parameters, otherwise the reason why not."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "its kernels are for inference and a gradient is asked for"
    device, dtype = tensors[0].device, tensors[0].dtype
    if autocast_dtype(device) is not None:
        return "autocast is on"
    if any(tensor.device != device or tensor.dtype != dtype for tensor in tensors):
        return "its inputs and parameters are not all of one dtype on one device"
    return None


def allocate(
    sentences: Tensor, summaries: Tensor, parameters: Sequence[Tensor], num_heads: int, eps: Sequence[float],
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """What ``nn.WeightAllocator`` computes: ``[B, K]`` in fp32 (fp64 for fp64 weights), rows that sum to one.

    Args:
        sentences: ``[B, E]`` in the dtype of the parameters.
        summaries: ``[B, K, D]``, likewise.
        parameters: in the order of ``nn.WeightAllocator.parameters()``.
        num_heads: of every block.
        eps: of every block's two norms.
        impl: "auto", "reference" or "triton", which serves inference only.

    Raises:
        ValueError: no such ``impl``.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    weights = AllocatorWeights.of(parameters)
    num_weights, width = weights.head_weight.shape
    backend = select(impl, sentences, summaries, parameters, (width, num_weights))
    if backend == REFERENCE:
        return spec.allocate(sentences, summaries, weights, num_heads, eps)
    return OPS.allocate(sentences, summaries, list(parameters), num_heads, list(eps), backend)
