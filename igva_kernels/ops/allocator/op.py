"""The allocator as torch sees it: for inference only, since ``nn.WeightAllocator`` trains by torch's own code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NoReturn

import torch
from torch import Tensor

from igva_kernels.ops.allocator.weights import AllocatorWeights
from igva_kernels.registry import Operator
from igva_kernels.runtime.torch_op import define

OPERATOR = Operator("allocator", __package__)


def _allocate(given: SimpleNamespace) -> Tensor:
    weights = AllocatorWeights.of([weight.contiguous() for weight in given.weights])
    return OPERATOR.implementation(given.impl).allocate(
        given.sentences.contiguous(), given.summaries.contiguous(), weights, given.num_heads, given.eps
    )  # fmt: skip


def _allocate_fake(given: SimpleNamespace) -> Tensor:
    return given.summaries.new_empty(given.summaries.shape[:2], dtype=torch.float32)


def _flops(given: SimpleNamespace) -> int:
    """Of the modules' products. The query is one row per sample; keys and values are one per layer group."""
    weights, (batch, groups, _) = AllocatorWeights.of(given.weights), given.summaries.shape
    per_sample = weights.sentence_weight.numel() + groups * weights.cls_weight.numel() + weights.head_weight.numel()
    for block in weights.blocks:
        square = block.out_proj_weight.numel()
        per_sample += (2 + 2 * groups) * square + 2 * groups * block.out_proj_weight.shape[0]
        per_sample += block.ffn1_weight.numel() + block.ffn2_weight.numel()
    return 2 * batch * per_sample


def _no_backward(*_: object) -> NoReturn:
    raise NotImplementedError("igva_kernels::allocate is for inference; nn.WeightAllocator trains by torch's own code")


define(
    "allocate(Tensor sentences, Tensor summaries, Tensor[] weights, int num_heads, float[] eps, str impl) -> Tensor",
    _allocate, _allocate_fake, None, _no_backward, flops=_flops,
)  # fmt: skip
