"""The checks of the operators' arguments: every error names the argument, what was given and what is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.backends.base import accumulation_dtype, check_image_range
from igva_kernels.context import has_storage, has_values


def check_layers(hidden_states: Sequence[Tensor | None], used: tuple[int, ...]) -> list[Tensor]:
    layers: list[Tensor] = []
    for index in used:
        layer = hidden_states[index]
        if not isinstance(layer, Tensor):
            if layer is None:
                raise ValueError(f"hidden_states[{index}]: the plan reads this layer, got None")
            raise TypeError(f"hidden_states[{index}]: need a tensor [I, T, D], got {type(layer).__name__}")
        first = layers[0] if layers else layer
        if layer.dim() != 3 or layer.shape != first.shape:
            expected = "[I, T, D]" if layer is first or first.dim() != 3 else f"{list(first.shape)} as the others"
            raise ValueError(f"hidden_states[{index}]: need shape {expected}, got {list(layer.shape)}")
        if not layer.is_floating_point() or layer.dtype != first.dtype:
            raise TypeError(f"hidden_states[{index}]: need one floating dtype for all layers, got {layer.dtype}")
        if layer.device != first.device:
            raise ValueError(f"hidden_states[{index}]: need all layers on {first.device}, got {layer.device}")
        layers.append(layer)
    return layers


def check_image_index(image_index: Tensor, device: torch.device, num_images: int, check_range: bool) -> None:
    if not isinstance(image_index, Tensor) or image_index.dtype != torch.int64:
        given = image_index.dtype if isinstance(image_index, Tensor) else type(image_index).__name__
        raise TypeError(f"image_index: need an int64 tensor [B], got {given}")
    if image_index.dim() != 1:
        raise ValueError(f"image_index: need shape [B], got {list(image_index.shape)}")
    if image_index.device != device:
        raise ValueError(f"image_index: need device {device} as the hidden states, got {image_index.device}")
    if image_index.shape[0] and not num_images:
        raise ValueError(f"image_index: got {image_index.shape[0]} rows, but the hidden states hold no image")
    # The kernels check the range themselves, so that compiled code does too; torch's indexing would wrap negatives.
    if check_range and device.type == "cpu" and has_values(image_index):
        check_image_range(image_index, num_images)


def check_mix_weights(mix_weights: Tensor | None, num_columns: int, num_rows: int, first: Tensor) -> Tensor | None:
    """The weights as ``[B, C]`` in the accumulation dtype."""
    if mix_weights is None:
        if num_columns:
            raise ValueError(f"mix_weights: the plan has {num_columns} weight columns, got None")
        return None
    if not isinstance(mix_weights, Tensor) or not mix_weights.is_floating_point():
        given = mix_weights.dtype if isinstance(mix_weights, Tensor) else type(mix_weights).__name__
        raise TypeError(f"mix_weights: need a floating tensor [B, C] or [1, C], got {given}")
    if not num_columns:
        raise ValueError("mix_weights: the plan has no weight column, need None")
    if mix_weights.dim() != 2 or mix_weights.shape[1] != num_columns or mix_weights.shape[0] not in (1, num_rows):
        raise ValueError(
            f"mix_weights: need shape [{num_rows}, {num_columns}] or [1, {num_columns}] "
            f"(rows of the batch, columns of the plan), got {list(mix_weights.shape)}"
        )
    if mix_weights.device != first.device:
        raise ValueError(f"mix_weights: need device {first.device} as the hidden states, got {mix_weights.device}")
    return mix_weights.to(accumulation_dtype(first.dtype)).expand(num_rows, num_columns)


def check_weight(
    name: str, weight: Tensor | None, device: torch.device, like: Tensor | None, shape: tuple[int | None, ...]
) -> None:
    """A weight of the projector: its shape (None for any size), its dtype like ``like``'s, its device, its storage."""
    if weight is None:
        if name.startswith("weight"):
            raise TypeError(f"{name}: need a tensor, got None")
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: need a floating tensor, got {given}")
    if hasattr(weight, "device_mesh"):
        raise TypeError(
            f"{name}: got a DTensor; call the module that owns it, whose forward gathers it, or pass a local tensor"
        )
    if weight.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, weight.shape, strict=True)):
        wanted = ["any" if n is None else n for n in shape]
        hint = " (G * D, the mixed row)" if name in ("weight", "weight1") else ""
        gathered = "; a sharded weight is empty outside its owner's forward" if weight.numel() == 0 else ""
        raise ValueError(f"{name}: need shape {wanted}{hint}, got {list(weight.shape)}{gathered}")
    assert like is not None
    if weight.dtype != like.dtype:
        raise TypeError(f"{name}: need dtype {like.dtype} as the first weight, got {weight.dtype}")
    if weight.device != device:
        raise ValueError(f"{name}: need device {device} as the hidden states, got {weight.device}")
    if not torch.compiler.is_compiling():
        check_storage(name, weight)


def check_storage(name: str, weight: Tensor) -> None:
    """A kernel that is given a pointer would read memory which is no longer the weight's."""
    if weight.numel() and not has_storage(weight):
        raise ValueError(
            f"{name}: its storage has been freed, as sharded training does outside the forward of the module that owns "
            f"it; read the weight inside that forward"
        )
