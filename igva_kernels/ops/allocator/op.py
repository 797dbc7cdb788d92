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


def _no_backward(*_: object) -> NoReturn:
    raise NotImplementedError("igva_kernels::allocate is for inference; nn.WeightAllocator trains by torch's own code")


define(
    "allocate(Tensor sentences, Tensor summaries, Tensor[] weights, int num_heads, float[] eps, str impl) -> Tensor",
    _allocate, _allocate_fake, None, _no_backward,
)  # fmt: skip
