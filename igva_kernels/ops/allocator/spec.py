"""The specification of the weight allocator (IGVA, arXiv 2501.08443, section 4, sizes as in its authors' code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from igva_kernels.ops.allocator.weights import AllocatorWeights


def allocate(
    sentences: Tensor, summaries: Tensor, weights: AllocatorWeights, num_heads: int, eps: Sequence[float]
) -> Tensor:
    """``[B, K]``: the sentence ``[B, E]`` asks the summaries ``[B, K, D]`` of the layer groups, block by block.

    Args:
        sentences: ``[B, E]`` in the dtype of the weights.
        summaries: ``[B, K, D]``, in the same dtype.
        weights: those of an allocator with at least one block.
        num_heads: attention heads of every block.
        eps: two numbers per block, the eps of its norms.
    """
    query = F.linear(sentences, weights.sentence_weight, weights.sentence_bias)  # [B, C]
    keys = F.linear(summaries, weights.cls_weight, weights.cls_bias)  # [B, K, C]
    for block, eps1, eps2 in zip(weights.blocks, eps[::2], eps[1::2], strict=True):
        wq, wk, wv = block.in_proj_weight.chunk(3)
        bq, bk, bv = block.in_proj_bias.chunk(3)
        q = F.linear(query, wq, bq).unflatten(-1, (num_heads, 1, -1))  # [B, heads, 1, C / heads]
        k = F.linear(keys, wk, bk).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, heads, K, C / heads]
        v = F.linear(keys, wv, bv).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        attended = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v  # [B, heads, 1, C / heads]
        attended = F.linear(attended.flatten(1), block.out_proj_weight, block.out_proj_bias)
        query = F.layer_norm(query + attended, query.shape[-1:], block.norm1_weight, block.norm1_bias, eps1)
        hidden = F.linear(query, block.ffn1_weight, block.ffn1_bias).relu()
        hidden = F.linear(hidden, block.ffn2_weight, block.ffn2_bias)
        query = F.layer_norm(query + hidden, query.shape[-1:], block.norm2_weight, block.norm2_bias, eps2)
    scores = F.linear(query, weights.head_weight, weights.head_bias)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
