"""The operator as a function, and the one place that decides whether kernels serve it or ``nn.WeightAllocator``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.allocator import spec
from igva_kernels.ops.allocator.op import OPERATOR
from igva_kernels.ops.allocator.weights import AllocatorWeights
from igva_kernels.registry import REFERENCE
from igva_kernels.runtime.context import autocast_dtype, saveable, why_only_torch
from igva_kernels.runtime.dense import why_no_float
from igva_kernels.runtime.torch_op import OPS


class Parts(NamedTuple):
    """An allocator as kernels take it: arguments of ``allocate``."""

    parameters: list[Tensor]
    num_heads: int
    eps: list[float]


def fused(
    impl: str, sentences: Tensor, summaries: Tensor, sizes: tuple[int, int], find_parts: Callable[[], Parts | str]
) -> Tensor | None:
    """The weights ``[B, K]`` by kernels; None where plain torch computes them.

    Args:
        impl: as in ``allocate``.
        sentences: ``[B, E]``.
        summaries: ``[B, K, D]``.
        sizes: of the allocator: its hidden width and K.
        find_parts: returns the allocator, or the reason why kernels cannot take it. It is called only where a backend
            would serve the sizes, because a module has to look through all of its submodules for it.

    Raises:
        ValueError: no such ``impl``.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    backend = OPERATOR.select(impl, summaries.device, summaries.dtype, (sentences, summaries), *sizes)
    if backend == REFERENCE:
        return None
    parts = find_parts()
    if isinstance(parts, str):
        reason: str | None = parts
    else:
        reason = _why_not(sentences, summaries, parts, sizes)
        if reason is None:
            return OPS.allocate(sentences, summaries, *parts, backend)
    if impl != "auto":
        raise NotImplementedError(f"impl={impl!r} cannot serve this call of the allocator: {reason}")
    return None


def _why_not(sentences: Tensor, summaries: Tensor, parts: Parts, sizes: tuple[int, int]) -> str | None:
    tensors = (sentences, summaries, *parts.parameters)
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
    return AllocatorWeights.of(parts.parameters).misfit(*sizes, sentences.shape[1], summaries.shape[2])


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
        TypeError: a tensor of another dtype than fp32, bf16, fp16 and fp64.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    named = {"sentences": sentences, "summaries": summaries}
    named |= {f"parameters[{i}]": parameter for i, parameter in enumerate(parameters)}
    for name, tensor in named.items():
        reason = why_no_float(tensor)
        if reason is not None:
            raise TypeError(f"{name}: {reason}")
    weights = AllocatorWeights.of(parameters)
    (num_weights, width), batch = weights.head_weight.shape, summaries.shape[0]
    needed = {
        "sentences": (tuple(sentences.shape), (batch, weights.sentence_weight.shape[1])),
        "summaries": (tuple(summaries.shape), (batch, num_weights, weights.cls_weight.shape[1])),
    }
    for name, (given, need) in needed.items():
        if given != need:
            raise ValueError(f"{name}: got shape {given}, need {need}")
    if len(eps) != 2 * len(weights.blocks):
        raise ValueError(f"eps: got {len(eps)} numbers, need {2 * len(weights.blocks)}, two per block")
    if width % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, need a divisor of the hidden width {width}")
    parts = Parts(list(parameters), num_heads, list(eps))
    out = fused(impl, sentences, summaries, (width, num_weights), lambda: parts)
    if out is not None:
        return out
    if torch.is_grad_enabled():
        sentences, summaries = saveable(sentences), saveable(summaries)
    return spec.allocate(sentences, summaries, weights, num_heads, eps)
