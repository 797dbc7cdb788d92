"""What the CUDA kernels of the mix take: the plan as an object of the C++ module, and what fits them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import lower
from igva_kernels.ops.weighted_mix.steps import MixArgs
from igva_kernels.runtime.cuda import launch

DOT_CHUNK = 32
"""Patches that one block of threads sums in the first stage of the gradient of the mix weights."""

NORM_ROW_BYTES = 96 << 10
"""The most bytes of shared memory for one unrounded row: what every architecture from 8.0 on can give a block."""


@cache
def program(plan: MixPlan, keep_sums: bool) -> Any:
    """The plan as the module's object; with ``keep_sums`` its sums are by-products."""
    return launch.module().MixProgram(lower(plan).steps, keep_sums)


def layers(args: MixArgs, chosen: Sequence[int] | None = None) -> tuple:
    """The hidden states, all of them or those that were chosen, as ``Layers`` of the module."""
    tensors = args.layers if chosen is None else [args.layers[layer] for layer in chosen]
    views = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
    return launch.dtype(args.layers[0]), args.layers[0].shape, args.skip_tokens, views


def weights(tensor: Tensor | None) -> tuple | None:
    """``MixWeights`` of the module."""
    return None if tensor is None else (tensor.data_ptr(), tensor.stride(), tensor.shape[1])


def batch(image_index: Tensor | None, rows: int) -> tuple:
    """``Batch`` of the module: which image each row reads."""
    return launch.data(image_index), rows


def norm_row_fits(width: int, layers: torch.dtype) -> bool:
    """Whether the kernel with LayerNorm can hold an unrounded row of this width."""
    return width * (8 if layers == torch.float64 else 4) <= NORM_ROW_BYTES


def dtype_pair_is_served(layers: torch.dtype, rows: torch.dtype) -> bool:
    """fp64 is mixed with fp64 only; the other dtypes freely."""
    return (layers == torch.float64) == (rows == torch.float64)
