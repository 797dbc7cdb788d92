"""The checks of the operators' arguments: every error names the argument, what was given and what is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.plan import Block, MixPlan
from igva_kernels.ops.weighted_mix.program import lower
from igva_kernels.ops.weighted_mix.steps import Projector
from igva_kernels.runtime.activations import check_activation
from igva_kernels.runtime.context import cached_constant, check_storage, has_values, is_distributed, records_gradients
from igva_kernels.runtime.dense import accumulation_dtype, why_no_float

Compact = tuple[tuple[int, ...], str, int, int, bool]
"""A plan over the layers that it reads: which of the hidden states these are, the plan's code over them, its columns
and blocks, and whether all blocks are taps. A plain tuple, since torch 2.11 cannot unpack a constant named tuple."""


class Mix(NamedTuple):
    """The checked arguments of a mix."""

    layers: list[Tensor]
    """The layers in use."""
    used: tuple[int, ...]
    """Which of the hidden states they are."""
    mix_weights: Tensor | None
    """``[B, C]`` in the accumulation dtype."""
    image_index: Tensor | None
    skip_tokens: int
    code: str
    """The code of the plan over these layers."""
    row_width: int
    """``G * D``."""
    only_taps: bool
    weights_need_grad: bool


def plan_of(mix: Mix) -> MixPlan:
    """The plan over the layers of a mix. A function, because torch 2.8 traces no property of a named tuple."""
    if torch.compiler.is_compiling():  # blocks are constants for it; a plan is none in torch 2.8
        return MixPlan(_blocks(mix.code))
    return MixPlan.from_code(mix.code)


@cached_constant
def _blocks(code: str) -> tuple[Block, ...]:
    return MixPlan.from_code(code).blocks


@cached_constant
def compact(code: str, num_states: int | None, length: int) -> Compact:
    used, plan = MixPlan(MixPlan.from_code(code).blocks, num_states).resolve(length).compact()
    return used, plan.code, plan.num_columns, plan.num_blocks, not lower(plan).num_sums


def check_mix(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None,
    skip_tokens: int,
    image_index: Tensor | None,
    weights_name: str = "mix_weights",
) -> Mix:
    """The arguments that every public operator has, without the layers that the plan does not use; errors call the mix
    weights by ``weights_name``."""
    if not isinstance(plan, MixPlan):
        raise TypeError(f"plan: need a MixPlan, got {type(plan).__name__}")
    if isinstance(hidden_states, Tensor) or not isinstance(hidden_states, Sequence):
        raise TypeError(
            f"hidden_states: need a sequence of tensors [I, T, D], got {type(hidden_states).__name__}; "
            f"pass the states as they are, not stacked"
        )
    used, code, num_columns, num_blocks, only_taps = compact(plan.code, plan.num_states, len(hidden_states))
    layers = check_layers(hidden_states, used)
    num_images, num_tokens, width = layers[0].shape
    if isinstance(skip_tokens, bool) or not isinstance(skip_tokens, int):
        raise TypeError(f"skip_tokens: need an int, got {type(skip_tokens).__name__}")
    if not 0 <= skip_tokens <= num_tokens:
        raise ValueError(f"skip_tokens: got {skip_tokens}, need 0 to {num_tokens}, the tokens of a hidden state")
    num_rows = num_images
    if image_index is not None:
        check_image_index(image_index, layers[0].device, num_images)
        num_rows = image_index.shape[0]
    mix_weights = check_mix_weights(mix_weights, num_columns, num_rows, layers[0], weights_name)
    need_grad = mix_weights is not None and mix_weights.requires_grad and records_gradients()
    return Mix(layers, used, mix_weights, image_index, skip_tokens, code, num_blocks * width, only_taps, need_grad)


def check_projector(mix: Mix, projector: Projector, names: Sequence[str], norm_name: str = "norm") -> Projector:
    """The projector with its eps as a float; errors call its weights and biases by ``names``."""
    check_activation(projector.activation)
    device, width, dtype, hint = mix.layers[0].device, mix.row_width, None, " (G * D, the mixed row)"
    linears = ((projector.weight1, projector.bias1), (projector.weight2, projector.bias2))
    for i, (given, bias) in enumerate(linears[: len(names) // 2]):
        weight = check_weight(names[2 * i], given, device, dtype, (None, width), hint)
        width, dtype, hint = weight.shape[0], weight.dtype, ""
        if bias is not None:
            check_weight(names[2 * i + 1], bias, device, dtype, (width,))
    if projector.norm is None:
        return projector
    if not isinstance(projector.norm, (tuple, list)) or len(projector.norm) != 3:
        raise TypeError(f"{norm_name}: need None or (weight or None, bias or None, eps), got {projector.norm!r}")
    norm_weight, norm_bias, eps = projector.norm
    for i, param in enumerate((norm_weight, norm_bias)):
        if param is not None:
            check_weight(f"{norm_name}[{i}]", param, device, None, (mix.row_width,))
    weight1, bias1, weight2, bias2, _, activation = projector  # torch 2.8 can trace this, and no _replace
    return Projector(weight1, bias1, weight2, bias2, (norm_weight, norm_bias, float(eps)), activation)


def check_layers(hidden_states: Sequence[Tensor | None], used: tuple[int, ...]) -> list[Tensor]:
    """The layers in use, checked to have one shape, dtype and device."""
    found: list[Any] = [hidden_states[index] for index in used]
    if _are_alike(found):
        return found
    layers: list[Tensor] = []
    for index, layer in zip(used, found, strict=True):
        if not isinstance(layer, Tensor):
            if layer is None:
                raise ValueError(f"hidden_states[{index}]: the plan reads this layer, got None")
            raise TypeError(f"hidden_states[{index}]: need a tensor [I, T, D], got {type(layer).__name__}")
        first = layers[0] if layers else layer
        if layer.dim() != 3 or layer.shape != first.shape:
            expected = "[I, T, D]" if layer is first or first.dim() != 3 else f"{list(first.shape)} as the others"
            raise ValueError(f"hidden_states[{index}]: need shape {expected}, got {list(layer.shape)}")
        if layer is first or layer.dtype != first.dtype:
            reason = why_no_float(layer)
            if reason is None and layer.dtype != first.dtype:
                reason = f"need one dtype for all layers, got {layer.dtype} beside {first.dtype}"
            if reason is not None:
                raise TypeError(f"hidden_states[{index}]: {reason}")
        if layer.device != first.device:
            raise ValueError(f"hidden_states[{index}]: need all layers on {first.device}, got {layer.device}")
        layers.append(layer)
    return layers


def _are_alike(layers: Sequence[Any]) -> bool:
    """Whether these are plain tensors ``[I, T, D]`` of one shape, float dtype and device.

    A call has many layers, so what is usually true is found out in the fewest steps; what is wrong with the others is
    found out by ``check_layers``.
    """
    first = layers[0]
    if type(first) is not Tensor or first.dim() != 3 or why_no_float(first) is not None:
        return False
    shape, dtype, device = first.shape, first.dtype, first.device
    return all([
        type(layer) is Tensor and layer.shape == shape and layer.dtype is dtype and layer.device == device
        for layer in layers
    ])  # fmt: skip


def check_image_index(image_index: Tensor, device: torch.device, num_images: int) -> None:
    """Checks everything but the values, which ``check_image_range`` and the kernels check."""
    if not isinstance(image_index, Tensor) or image_index.dtype != torch.int64:
        given = image_index.dtype if isinstance(image_index, Tensor) else type(image_index).__name__
        raise TypeError(f"image_index: need an int64 tensor [B], got {given}")
    if image_index.dim() != 1:
        raise ValueError(f"image_index: need shape [B], got {list(image_index.shape)}")
    if image_index.device != device:
        raise ValueError(f"image_index: need device {device} as the hidden states, got {image_index.device}")
    if image_index.shape[0] and not num_images:
        raise ValueError(f"image_index: got {image_index.shape[0]} rows, but the hidden states hold no image")


def check_image_range(image_index: Tensor, num_images: int) -> None:
    """For plain torch, where a negative index would wrap around; kernels check their own, in compiled code too."""
    if image_index.device.type != "cpu" or not has_values(image_index) or not image_index.numel():
        return
    lowest, highest = int(image_index.min()), int(image_index.max())
    if not 0 <= lowest <= highest < num_images:
        raise ValueError(
            f"image_index: need values from 0 to {num_images - 1}, the images of the hidden states, got values from "
            f"{lowest} to {highest}"
        )


def check_mix_weights(
    mix_weights: Tensor | None, num_columns: int, num_rows: int, first: Tensor, name: str = "mix_weights"
) -> Tensor | None:
    """The weights as ``[B, C]`` in the accumulation dtype; errors call them by ``name``."""
    if mix_weights is None:
        if num_columns:
            raise ValueError(
                f"{name}: got None, need a tensor [B, {num_columns}] or [1, {num_columns}]: the plan has "
                f"{num_columns} weight columns"
            )
        return None
    reason = why_no_float(mix_weights)
    if reason is not None:
        raise TypeError(f"{name}: {reason}")
    if not num_columns:
        raise ValueError(
            f"{name}: got a tensor of shape {list(mix_weights.shape)}, need None: the plan has no weight column"
        )
    fits = mix_weights.dim() == 2 and mix_weights.shape[1] == num_columns
    # Two comparisons and not ``in``, of which torch.compile makes a comparison of symbols, not of what they stand for.
    if not fits or (mix_weights.shape[0] != 1 and mix_weights.shape[0] != num_rows):
        raise ValueError(
            f"{name}: need shape [{num_rows}, {num_columns}] or [1, {num_columns}] "
            f"(rows of the batch, columns of the plan), got {list(mix_weights.shape)}"
        )
    if mix_weights.device != first.device:
        raise ValueError(f"{name}: need device {first.device} as the hidden states, got {mix_weights.device}")
    if not torch.compiler.is_compiling():  # compiled code has no storage to look at
        check_storage(name, mix_weights)
    wide = accumulation_dtype(first.dtype)
    if mix_weights.dtype == wide and mix_weights.shape[0] == num_rows:
        return mix_weights
    return mix_weights.to(wide).expand(num_rows, num_columns)


def check_weight(
    name: str, weight: Any, device: torch.device, dtype: torch.dtype | None, shape: tuple[int | None, ...],
    hint: str = "",
) -> Tensor:  # fmt: skip
    """A weight of the projector, checked: its shape (None for any size), dtype (None for any), device and storage.

    ``hint`` says of what the shape's last size is made.
    """
    reason = why_no_float(weight)
    if reason is not None:
        raise TypeError(f"{name}: {reason}")
    if is_distributed(weight):
        raise TypeError(
            f"{name}: got a DTensor; call the module that owns it, whose forward gathers it, or pass a local tensor"
        )
    if weight.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, weight.shape, strict=True)):
        wanted = ["any" if n is None else n for n in shape]
        gathered = "; a sharded weight is empty outside its owner's forward" if weight.numel() == 0 else ""
        raise ValueError(f"{name}: need shape {wanted}{hint}, got {list(weight.shape)}{gathered}")
    if dtype not in (None, weight.dtype):
        raise TypeError(f"{name}: need dtype {dtype} as the first weight, got {weight.dtype}")
    if weight.device != device:
        raise ValueError(f"{name}: need device {device} as the hidden states, got {weight.device}")
    if not torch.compiler.is_compiling():
        check_storage(name, weight)
    return weight
