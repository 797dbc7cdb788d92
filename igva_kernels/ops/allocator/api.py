"""The operator as a function, and what ``nn.WeightAllocator`` asks before kernels stand in for its modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.ops.allocator import spec
from igva_kernels.ops.allocator.op import OPERATOR
from igva_kernels.ops.allocator.weights import AllocatorWeights
from igva_kernels.registry import REFERENCE
from igva_kernels.runtime.context import autocast_dtype, saveable, why_only_torch
from igva_kernels.runtime.torch_op import OPS


def select(impl: str, sentences: Tensor, summaries: Tensor, sizes: tuple[int, int]) -> str:
    """The backend that serves ``impl`` for an allocator of these ``(hidden width, K)``, or "reference".

    Raises:
        ValueError: no such ``impl``.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    return OPERATOR.select(impl, summaries.device, summaries.dtype, (sentences, summaries), *sizes)


def why_not(sentences: Tensor, summaries: Tensor, parameters: Sequence[Tensor]) -> str | None:
    """None if kernels can serve a call with these tensors, otherwise the reason why not."""
    tensors = (sentences, summaries, *parameters)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "its kernels are for inference and a gradient is asked for"
    reason = why_only_torch(tensors)
    if reason is not None:
        return reason
    device, dtype = sentences.device, sentences.dtype
    if autocast_dtype(device) is not None:
        return "autocast is on"
    if any(tensor.device != device or tensor.dtype != dtype for tensor in tensors):
        return "its inputs and parameters are not all of one dtype on one device"
    return None


def refused(impl: str, reason: str) -> NotImplementedError:
    """What an explicit ``impl`` raises where it cannot serve a call."""
    return NotImplementedError(f"impl={impl!r} cannot serve this call of the allocator: {reason}")


def allocate(
    sentences: Tensor, summaries: Tensor, parameters: Sequence[Tensor], num_heads: int, eps: Sequence[float],
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """What ``nn.WeightAllocator`` computes: ``[B, K]`` in fp32 (fp64 for fp64 weights), rows that sum to one.

    Args:
        sentences: ``[B, E]`` in the dtype of the parameters.
        summaries: ``[B, K, D]``, in the same dtype.
        parameters: in the order of ``nn.WeightAllocator.parameters()``; one that is shared appears once per use.
        num_heads: attention heads of every block.
        eps: two numbers per block, the eps of its norms.
        impl: "auto", "reference" or "triton", which serves inference only.

    Raises:
        ValueError: no such ``impl``, or shapes and numbers that do not fit.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    weights = AllocatorWeights.of(parameters)
    (num_weights, width), batch = weights.head_weight.shape, summaries.shape[0]
    needed = {
        "sentences": (tuple(sentences.shape), (batch, weights.sentence_weight.shape[1])),
        "summaries": (tuple(summaries.shape), (batch, num_weights, weights.cls_weight.shape[1])),
        "eps": (len(eps), 2 * len(weights.blocks)),
    }
    for name, (given, need) in needed.items():
        if given != need:
            raise ValueError(f"{name}: got {given}, need {need}")
    if width % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, need a divisor of the hidden width {width}")
    backend = select(impl, sentences, summaries, (width, num_weights))
    reason = None if backend == REFERENCE else why_not(sentences, summaries, parameters)
    if reason is not None and impl != "auto":
        raise refused(impl, reason)
    if backend == REFERENCE or reason is not None:
        if torch.is_grad_enabled():
            sentences, summaries = saveable(sentences), saveable(summaries)
        return spec.allocate(sentences, summaries, weights, num_heads, eps)
    return OPS.allocate(sentences, summaries, list(parameters), num_heads, list(eps), backend)
