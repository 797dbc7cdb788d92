"""The specification: which row of the features each token takes, and what it does with it.

DeepStack (Qwen3-VL, arXiv 2511.21631) adds features to the states between the layers of the language model, and so does
internal direct fusion (I_D of arXiv 2503.06063). LLaVA puts features in the place of the embeddings of image tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from igva_kernels.runtime.dense import accumulation_dtype


def token_rows(mask: Tensor) -> Tensor:
    """``[B, T]`` int32: the number of each True, counted row by row from 0, and -1 elsewhere."""
    numbers = mask.flatten().cumsum(0, dtype=torch.int32).view(mask.shape) - 1
    return torch.where(mask, numbers, -1)


def inject_tokens(hidden_states: Tensor, features: Tensor, rows: Tensor, gate: Tensor | None, mode: str) -> Tensor:
    """``[B, T, H]``: where ``rows[b, t] >= 0``, ``hidden[b, t] + gate * features[rows[b, t]]``, or that without
    ``hidden`` (mode "replace"); elsewhere ``hidden[b, t]``.

    Args:
        hidden_states: ``[B, T, H]``.
        features: ``[V, H]`` in the dtype of ``hidden_states``.
        rows: ``[B, T]``; -1 for none.
        gate: ``[1]`` or ``[V]``, or None for 1.
        mode: "add" or "replace".
    """
    if gate is not None:
        features = gate.unsqueeze(-1) * features.to(accumulation_dtype(features.dtype))
    # A row of zeros at the end stands for "none", so that there is a row to read even if there is no feature.
    taken = F.pad(features, (0, 0, 0, 1))[torch.where(rows < 0, features.shape[0], rows).long()]
    changed = hidden_states + taken if mode == "add" else taken
    return torch.where((rows >= 0).unsqueeze(-1), changed, hidden_states).to(hidden_states.dtype)
