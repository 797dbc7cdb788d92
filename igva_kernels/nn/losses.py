"""The loss that keeps the layer weights balanced."""

from __future__ import annotations

from torch import Tensor


def negative_entropy(mix_weights: Tensor) -> Tensor:
    """``sum_k w_k log w_k`` of weights ``[..., K]`` that sum to one: from -log K (uniform) to 0 (one-hot)."""
    return (mix_weights * mix_weights.clamp_min(1e-12).log()).sum(dim=-1)


def balance_loss(mix_weights: Tensor, share: Tensor | None = None) -> Tensor:
    """Negative entropy of the layer weights: the lower, the more evenly the layers are used (IGVA, stage 2).

    The weights are what the softmax returned; no second softmax is applied (the published code applies one).

    Args:
        mix_weights: ``[B, K]``, rows that sum to one.
        share: ``[B]``, how much each row counts; None for the mean over the rows. Over all micro-batches of a step the
            shares must sum to one, as those of the language loss do, or the loss depends on how a batch is split.

    Returns:
        A scalar in the dtype of the weights.
    """
    entropies = negative_entropy(mix_weights)
    return entropies.mean() if share is None else (entropies * share).sum()
