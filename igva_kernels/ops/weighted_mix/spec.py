"""The specification, and the plain torch code that people write.

``layer_mix`` is the formula of the README, entry by entry; in fp64 it is the oracle of every test. What everybody
writes instead (IGVA, arXiv 2501.08443, section 4, with the order of the concat from its authors' code) is
``layer_mix_as_published``: stack, mean, multiply, sum, concat. It is what ``impl="reference"`` runs, and its error in
the same dtype sets the error budget of a kernel. Both run on any device and dtype and differentiate through torch's own
autograd; ``project`` follows either of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from igva_kernels.ops.weighted_mix.plan import Block, MixPlan, terms
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.runtime.dense import Norm, accumulation_dtype


def layer_mix(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None = None,
    *,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
) -> Tensor:
    """The mixed row A ``[B, P, G*D]`` of a resolved plan, accumulated in fp32 and rounded once to the layers' dtype."""
    blocks: list[Tensor] = []
    for block in plan.blocks:
        mixed: Tensor | float = 0.0
        for layer, column, scale in block:
            h = hidden_states[layer]
            assert h is not None
            h = h[:, skip_tokens:] if image_index is None else h[image_index, skip_tokens:]
            w = 1.0 if column is None else mix_weights[:, column, None, None]  # type: ignore[index]
            mixed = mixed + scale * w * h.to(accumulation_dtype(h.dtype))
        blocks.append(mixed.to(h.dtype))  # type: ignore[union-attr]
    return torch.cat(blocks, dim=-1)


def layer_mix_as_published(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None = None,
    *,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
) -> Tensor:
    """The same as the published code computes it, in the layers' dtype throughout."""
    blocks = [_block_as_published(hidden_states, block, mix_weights, image_index) for block in plan.blocks]
    return torch.cat([block[:, skip_tokens:] for block in blocks], dim=-1)


def project(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    activation: str | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """``act(norm?(rows) @ weight1.T + bias1)``, and ``@ weight2.T + bias2`` where there is a second Linear."""
    rows = rows.to(weight1.dtype)
    if norm is not None:
        rows = F.layer_norm(rows, rows.shape[-1:], *norm)
    out = F.linear(rows, weight1, bias1)
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out if weight2 is None else F.linear(out, weight2, bias2)


def _block_as_published(
    hidden_states: Sequence[Tensor | None], block: Block, mix_weights: Tensor | None, image_index: Tensor | None
) -> Tensor:
    """One block with all T tokens, ``[B, T, D]``."""
    weighted, constant = [], []
    for term in terms(block):
        group = _mean_or_sum([hidden_states[layer] for layer in term.layers], term.scale, term.is_mean)
        group = group if image_index is None else group[image_index]
        if term.column is None:
            constant.append(group)
        else:
            weighted.append((term.column, group))
    if weighted:
        assert mix_weights is not None
        columns = [column for column, _ in weighted]
        groups = torch.stack([group for _, group in weighted], dim=1)  # [B, K, T, D]
        # Indexed by a list, a tensor on a GPU waits for a copy of it, which no CUDA graph can hold.
        if columns != list(range(mix_weights.shape[1])):
            mix_weights = torch.stack([mix_weights[:, column] for column in columns], dim=1)
        constant.append((groups * mix_weights.to(groups.dtype)[:, :, None, None]).sum(dim=1))
    return constant[0] if len(constant) == 1 else torch.stack(constant).sum(dim=0)


def _mean_or_sum(layers: Sequence[Tensor | None], scale: float, is_mean: bool) -> Tensor:
    if len(layers) == 1:
        (layer,) = layers
        return layer if scale == 1.0 else layer * scale  # type: ignore[operator]
    stacked = torch.stack(layers)
    return stacked.mean(dim=0) if is_mean else stacked.sum(dim=0) * scale
