"""The specification: ``max over l of h_l[i, t, d]``."""

import torch
from torch import Tensor


def layer_max(layers: list[Tensor]) -> Tensor:
    """``[I, T, D]``; its gradient goes to every layer that attains the maximum, in equal parts."""
    return torch.stack(layers).amax(dim=0)
