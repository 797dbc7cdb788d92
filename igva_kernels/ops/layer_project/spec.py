"""The specification: each member is the specification of ``weighted_mix``, and the results are stacked.

Several projectors that read the same tower are what internal direct fusion has (I_D of arXiv 2503.06063: one per
layer of the language model that takes features), and DeepStack (Qwen3-VL, arXiv 2511.21631) in its mergers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.ops.weighted_mix import spec as member
from igva_kernels.ops.weighted_mix.steps import Projector


def layer_project(
    hidden_states: Sequence[Tensor | None],
    plans: Sequence[MixPlan],
    mix_weights: Sequence[Tensor | None],
    projectors: Sequence[Projector],
    *,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
) -> Tensor:
    """``[J, B, P, H]``: member j projects the mix of ``plans[j]``, which is resolved, by ``projectors[j]``."""
    outs: list[Tensor] = []
    for plan, weights, (*linears, norm, activation) in zip(plans, mix_weights, projectors, strict=True):
        rows = member.layer_mix(hidden_states, plan, weights, skip_tokens=skip_tokens, image_index=image_index)
        outs.append(member.project(rows, *linears, activation=activation, norm=norm))
    return torch.stack(outs)
