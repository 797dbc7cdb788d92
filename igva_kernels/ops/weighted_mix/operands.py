"""What both compiled modules take of a mix: tuples of addresses, shapes, strides (csrc/weighted_mix/operands.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.steps import LayerShape, MixArgs
from igva_kernels.runtime.operands import dtype_of


def layers(dtype: Any, args: MixArgs, chosen: Sequence[int] | None = None) -> tuple:
    """``Layers``: all hidden states, or those that were chosen; ``dtype`` is the module's name of their dtype."""
    views = list(zip(map(Tensor.data_ptr, args.layers), args.strides, strict=True))
    if chosen is not None:
        views = [views[layer] for layer in chosen]
    return dtype, args.layers[0].shape, args.skip_tokens, views


def weights(mix_weights: Tensor | None) -> tuple | None:
    """``MixWeights``; None where the plan has no columns."""
    if mix_weights is None:
        return None
    return mix_weights.data_ptr(), mix_weights.stride(), mix_weights.shape[1]


def batch(image_index: Tensor | None, rows: int) -> tuple:
    """``Batch``: which image each row reads."""
    return 0 if image_index is None else image_index.data_ptr(), rows


def layer_shape(module: Any, shape: LayerShape) -> tuple:
    """``LayerShape``: of the gradients of the layers."""
    return dtype_of(module, shape.dtype), shape[:3], shape.skip_tokens


def serves_pair(layers: torch.dtype, rows: torch.dtype) -> bool:
    """Whether kernels take this pair: fp64 is mixed with fp64 only, the other dtypes freely."""
    return (layers == torch.float64) == (rows == torch.float64)
