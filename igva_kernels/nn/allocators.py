"""Where the layer weights come from: the instruction and the image, the instruction alone, or parameters."""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igva_kernels.nn.sharding import is_untouched
from igva_kernels.ops.allocator import AllocatorWeights, Parts, fused
from igva_kernels.runtime.context import saveable


class WeightAllocator(nn.Module):
    """Layer weights from an instruction and an image: ``w = softmax(allocator(sentence, summaries of G_1..G_K))``.

    IGVA (arXiv 2501.08443, section 4; sizes as in its code): the projected sentence asks the projected summaries
    of the K layer groups in a chain of cross-attention blocks, and a last Linear scores the groups. IGVA's parameters
    map onto these by name: ``transformers.`` is ``blocks.`` here, ``linear.`` is ``head.``, other names are the same.

    On a GPU, where no gradient is asked for, a few fused kernels compute what the modules would, as long as the modules
    are plain (``nn.sharding``), of one dtype, and not under autocast.

    Args:
        sentence_dim: E (all-mpnet-base-v2: 768).
        vision_dim: D (CLIP ViT-L: 1024).
        num_weights: K.
        hidden_dim: width of the blocks.
        num_blocks: number of blocks.
        num_heads: attention heads of a block; must divide ``hidden_dim``.
        impl: "auto"; "reference", the modules themselves; or "triton", which serves inference only.

    Raises:
        ValueError: ``num_heads`` does not divide ``hidden_dim``.
    """

    def __init__(
        self,
        sentence_dim: int,
        vision_dim: int,
        num_weights: int,
        hidden_dim: int = 1024,
        num_blocks: int = 4,
        num_heads: int = 4,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, need a divisor of hidden_dim={hidden_dim}")
        self.impl = impl
        self.sentence_proj = nn.Linear(sentence_dim, hidden_dim)
        self.cls_proj = nn.Linear(vision_dim, hidden_dim)
        self.blocks = nn.ModuleList(_AllocatorBlock(hidden_dim, num_heads) for _ in range(num_blocks))
        self.head = nn.Linear(hidden_dim, num_weights)

    def forward(self, sentence_embeds: Tensor, summaries: Tensor, *, impl: str | None = None) -> Tensor:
        """The weights ``[B, K]``, rows that sum to one, in fp32 (fp64 for an fp64 module) whatever the dtypes.

        Args:
            sentence_embeds: ``[B, E]``, any floating dtype; tensors made under inference mode are accepted.
            summaries: ``[B, K, D]``, one vector per group: its CLS, or the mean of its tokens (``column_summaries``).
            impl: in place of the module's own.

        Raises:
            ValueError: shapes that do not fit, or no such ``impl``.
            NotImplementedError: an explicit ``impl`` that cannot serve the call.
        """
        width, dim = self.sentence_proj.in_features, self.cls_proj.in_features
        batch, columns = summaries.shape[0], self.head.out_features
        if sentence_embeds.shape != (batch, width):
            raise ValueError(f"sentence_embeds: got shape {tuple(sentence_embeds.shape)}, need {(batch, width)}")
        if summaries.shape != (batch, columns, dim):
            raise ValueError(f"summaries: got shape {tuple(summaries.shape)}, need {(batch, columns, dim)}")
        sentence_embeds = _as_input_of(self.sentence_proj, sentence_embeds)
        summaries = _as_input_of(self.cls_proj, summaries)
        sizes = (self.head.in_features, columns)
        weights = fused(self.impl if impl is None else impl, sentence_embeds, summaries, sizes, self._find_parts)
        if weights is not None:
            return weights
        if torch.is_grad_enabled():
            sentence_embeds, summaries = saveable(sentence_embeds), saveable(summaries)
        query = self.sentence_proj(sentence_embeds).unsqueeze(1)
        keys = self.cls_proj(summaries)
        for block in self.blocks:
            query = block(query, keys)
        scores = self.head(query).squeeze(1)
        return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def extra_repr(self) -> str:
        return f"impl={self.impl!r}"

    def _find_parts(self) -> Parts | str:
        """The modules as kernels take them, or why they cannot be taken."""
        modules = list(self.modules())[1:]
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        if not self._is_plain(modules, len(parameters)):
            return "a submodule is hooked, sharded, quantised or replaced"
        eps = [norm.eps for block in self.blocks for norm in (block.norm1, block.norm2)]
        return Parts(parameters, self.blocks[0].cross_attention.num_heads, eps)

    def _is_plain(self, modules: list[nn.Module], num_parameters: int) -> bool:
        """Whether the modules are as the constructor made them, and their forwards run nothing but their own code."""
        attentions = [block.cross_attention for block in self.blocks if type(block) is _AllocatorBlock]
        kinds = [nn.Linear, nn.Linear, nn.ModuleList, *_BLOCK_TYPES * len(attentions), nn.Linear]
        options = {(a.num_heads, a.dropout, a.add_zero_attn) for a in attentions}
        return (
            [type(module) for module in modules] == kinds
            and num_parameters == AllocatorWeights.num_parameters(len(attentions))
            and len(options) == 1
            and options.pop()[1:] == (0.0, False)
            and all(map(is_untouched, modules))
        )


class _CrossAttention(nn.MultiheadAttention):
    """Calls ``out_proj``, where torch's own forward reads its weight.

    That weight may be quantised, adapted by peft, or not there before accelerate's hook has fetched it.
    """

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """``[B, 1, dim]``: the query ``[B, 1, dim]`` asks the keys ``[B, K, dim]``, which are the values as well."""
        weight, bias, dim = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        query, keys = query.to(weight.dtype), keys.to(weight.dtype)
        queries = F.linear(query, weight[:dim], bias[:dim])
        keys, values = F.linear(keys, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (queries, keys, values))
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class _AllocatorBlock(nn.Module):
    """Cross-attention, add and norm, FFN, add and norm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.cross_attention = _CrossAttention(dim, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """``[B, 1, dim]`` from the query ``[B, 1, dim]`` and the keys ``[B, K, dim]``."""
        query = self.norm1(query + self.cross_attention(query, keys))
        return self.norm2(query + self.ffn(query))


with torch.device("meta"):  # so that an import does not advance the random state
    _BLOCK_TYPES = tuple(type(module) for module in _AllocatorBlock(1, 1).modules())


class TextAllocator(nn.Module):
    """Layer weights from the instruction alone: ``w = softmax(W2 relu(W1 t + b1) + b2)`` (TGIF, arXiv 2601.03100).

    Args:
        sentence_dim: E, the width of the text embedding (TGIF: the mean of the prompt's token embeddings, 4096).
        num_weights: K.
        hidden_dim: width of the hidden layer (TGIF: 512).
    """

    def __init__(self, sentence_dim: int, num_weights: int, hidden_dim: int = 512) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(sentence_dim, hidden_dim)
        self.linear_2 = nn.Linear(hidden_dim, num_weights)

    def forward(self, sentence_embeds: Tensor) -> Tensor:
        """The weights ``[B, K]`` of ``sentence_embeds`` ``[B, E]``, rows that sum to one, at least in fp32.

        Raises:
            ValueError: ``sentence_embeds`` has another shape.
        """
        if sentence_embeds.ndim != 2 or sentence_embeds.shape[1] != self.linear_1.in_features:
            raise ValueError(
                f"sentence_embeds: got shape {tuple(sentence_embeds.shape)}, need [B, {self.linear_1.in_features}]"
            )
        sentence_embeds = _as_input_of(self.linear_1, sentence_embeds)
        if torch.is_grad_enabled():
            sentence_embeds = saveable(sentence_embeds)
        scores = self.linear_2(self.linear_1(sentence_embeds).relu())
        return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


class LearnedWeights(nn.Module):
    """Layer weights that are parameters, the same for every image: ``w = softmax(scores)`` (COMM, arXiv 2310.08825).

    Args:
        num_weights: K. All weights start equal.
    """

    def __init__(self, num_weights: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(num_weights))

    def forward(self, rows: int) -> Tensor:
        """The weights ``[rows, K]``, all rows the same, at least in fp32."""
        dtype = torch.promote_types(self.scores.dtype, torch.float32)
        return self.scores.softmax(dim=-1, dtype=dtype).expand(rows, -1)


def _as_input_of(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the dtype that a module's parameters are kept in.

    Quantised ones are kept as integers or in fp8, in which nothing is computed: the bias or the scales beside them tell
    the dtype, and without those ``x`` stays as it is.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            return x.to(tensor.dtype)
    return x
