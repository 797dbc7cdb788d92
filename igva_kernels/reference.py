"""The specification: multi-layer visual feature fusion in plain torch, as everybody writes it.

Stack, mean, multiply, sum, concat, Linear, GELU, Linear (IGVA, arXiv 2501.08443, section 4, and its authors' code for
the order of the concat). Runs on any device and dtype, fp64 included, differentiates through torch's own autograd, and
is what every kernel is compared with. It is the one place where the formula is written out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from igva_kernels.plan import Block, MixPlan, terms

Norm = tuple[Tensor | None, Tensor | None, float]
"""LayerNorm over the whole mixed row: (weight or None, bias or None, eps)."""

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def layer_mix(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None = None,
    *,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
) -> Tensor:
    """The mixed row A ``[B, P, G*D]`` of a resolved plan, in the layers' dtype."""
    blocks = [_mix_block(hidden_states, block, mix_weights, image_index) for block in plan.blocks]
    return torch.cat([block[:, skip_tokens:] for block in blocks], dim=-1)


def layer_mix_linear(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    norm: Norm | None = None,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
) -> Tensor:
    """``act(norm?(A) @ weight.T + bias)`` ``[B, P, H]``."""
    rows = layer_mix(hidden_states, plan, mix_weights, skip_tokens=skip_tokens, image_index=image_index)
    rows = rows.to(weight.dtype)
    if norm is not None:
        norm_weight, norm_bias, eps = norm
        rows = F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps)
    out = F.linear(rows, weight, bias)
    return out if activation is None else ACTIVATIONS[activation](out)


def layer_mix_mlp(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str | None = "gelu",
    norm: Norm | None = None,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
) -> Tensor:
    """``act(norm?(A) @ weight1.T + bias1) @ weight2.T + bias2`` ``[B, P, H]``."""
    hidden = layer_mix_linear(
        hidden_states, plan, mix_weights, weight1, bias1,
        activation=activation, norm=norm, skip_tokens=skip_tokens, image_index=image_index,
    )  # fmt: skip
    return F.linear(hidden, weight2, bias2)


def _mix_block(
    hidden_states: Sequence[Tensor | None], block: Block, mix_weights: Tensor | None, image_index: Tensor | None
) -> Tensor:
    """One block with all T tokens, ``[B, T, D]``."""
    weighted, constant = [], []
    for column, scale, layers in terms(block):
        group = _sum_of_layers([hidden_states[layer] for layer in layers], scale)
        group = group if image_index is None else group[image_index]
        if column is None:
            constant.append(group)
        else:
            weighted.append((column, group))
    if weighted:
        assert mix_weights is not None
        columns = [column for column, _ in weighted]
        groups = torch.stack([group for _, group in weighted], dim=1)  # [B, K, T, D]
        weights = mix_weights[:, columns].to(groups.dtype)
        constant.append((groups * weights[:, :, None, None]).sum(dim=1))
    return constant[0] if len(constant) == 1 else torch.stack(constant).sum(dim=0)


def _sum_of_layers(layers: Sequence[Tensor | None], scale: float) -> Tensor:
    if len(layers) == 1:
        (layer,) = layers
        return layer if scale == 1.0 else layer * scale  # type: ignore[operator]
    stacked = torch.stack(layers)
    return stacked.mean(dim=0) if scale == 1.0 / len(layers) else stacked.sum(dim=0) * scale
