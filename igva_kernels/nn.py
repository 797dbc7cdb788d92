"""Modules: the weight allocator, the projector over mixed layers, and the loss that keeps the weights balanced.

Symbols: B rows of the batch, I images, T tokens, P patches, D vision width, K weight columns, G blocks of a mixed row,
H language-model width, E width of the sentence embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from igva_kernels import dispatch
from igva_kernels.context import autocast_dtype, has_storage, saveable, why_only_torch
from igva_kernels.library import OPS
from igva_kernels.ops import layer_mix, layer_mix_linear, layer_mix_mlp
from igva_kernels.plan import Entry, MixPlan, is_tap
from igva_kernels.reference import ACTIVATIONS, Norm


class WeightAllocator(nn.Module):
    """Layer weights from an instruction and an image: ``w = softmax(allocator(sentence, summaries of G_1..G_K))``.

    IGVA (arXiv 2501.08443, section 4; sizes as in its code): the projected sentence asks the projected summaries
    of the K layer groups in a row of cross-attention blocks, and a last Linear scores the groups. Their parameters map
    onto these by name: ``transformers.`` is ``blocks.`` here, ``linear.`` is ``head.``, the others are called alike.

    Where no gradient is asked for, on a GPU, a few fused kernels do what the modules would, as long as these are plain
    (``is_plain``), of one dtype, and not under autocast.

    Args:
        sentence_dim: E (all-mpnet-base-v2: 768).
        vision_dim: D (CLIP ViT-L: 1024).
        num_weights: K.
        hidden_dim: width of the blocks.
        num_blocks: how many there are.
        num_heads: attention heads of a block; must divide ``hidden_dim``.
        impl: "auto"; "reference", the modules themselves; or "triton", which serves nothing but inference.
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
            sentence_embeds: ``[B, E]``, any floating dtype; tensors made under inference mode are welcome.
            summaries: ``[B, K, D]``, one vector a group: its CLS, or the mean of its tokens (``column_summaries``).
            impl: in place of the module's own.

        Raises:
            ValueError: shapes that do not fit.
            NotImplementedError: an explicit ``impl`` that cannot serve the call.
        """
        width, dim = self.sentence_proj.in_features, self.cls_proj.in_features
        batch, columns = summaries.shape[0], self.head.out_features
        if sentence_embeds.shape != (batch, width):
            raise ValueError(f"sentence_embeds: got shape {tuple(sentence_embeds.shape)}, need {(batch, width)}")
        if summaries.shape != (batch, columns, dim):
            raise ValueError(f"summaries: got shape {tuple(summaries.shape)}, need {(batch, columns, dim)}")
        sentence_embeds = sentence_embeds.to(self.sentence_proj.weight.dtype)
        summaries = summaries.to(self.cls_proj.weight.dtype)
        fused = self._fused(self.impl if impl is None else impl, sentence_embeds, summaries)
        if fused is not None:
            return fused
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

    def _fused(self, impl: str, sentence_embeds: Tensor, summaries: Tensor) -> Tensor | None:
        """The weights by a backend's own kernels; None where they are left to the modules."""
        sizes = (self.head.in_features, self.head.out_features)
        backend = dispatch.select(impl, summaries.device, summaries.dtype, allocator=sizes)
        if backend == "reference":
            return None
        reason = dispatch.why_not_allocate(backend, *sizes)
        if reason is None:
            modules = list(self.modules())[1:]
            weights = [p for module in modules for p in module._parameters.values() if p is not None]
            reason = self._why_not_fused(modules, weights, sentence_embeds, summaries)
            if reason is None:
                heads = self.blocks[0].cross_attention.num_heads
                eps = [norm.eps for block in self.blocks for norm in (block.norm1, block.norm2)]
                return OPS.allocate(sentence_embeds, summaries, weights, heads, eps, backend)
        if impl != "auto":
            raise NotImplementedError(f"impl={impl!r} cannot serve this call of the allocator: {reason}")
        return None

    def _why_not_fused(self, modules: list[nn.Module], weights: list[Tensor], *inputs: Tensor) -> str | None:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *weights)):
            return "its kernels are for inference and a gradient is asked for"
        reason = why_only_torch(*inputs, *weights)
        if reason is not None:
            return reason
        device, dtype = inputs[0].device, inputs[0].dtype
        if autocast_dtype(device) is not None:
            return "autocast is on"
        if any(tensor.device != device or tensor.dtype != dtype for tensor in (*inputs, *weights)):
            return "its inputs and parameters are not all of one dtype on one device"
        # As the constructor made them, and nothing would happen in the forward of any.
        attentions = [block.cross_attention for block in self.blocks if type(block) is _AllocatorBlock]
        kinds = [nn.Linear, nn.Linear, nn.ModuleList, *_BLOCK_TYPES * len(attentions), nn.Linear]
        options = {(a.num_heads, a.dropout, a.add_zero_attn) for a in attentions}
        if (
            [type(module) for module in modules] != kinds
            or len(weights) != 6 + 12 * len(attentions)
            or len(options) != 1
            or options.pop()[1:] != (0.0, False)
            or not all(map(_is_untouched, modules))
        ):
            return "a submodule is hooked, sharded, quantised or replaced"
        return None


class _AllocatorBlock(nn.Module):
    """Cross-attention, add and norm, FFN, add and norm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.cross_attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """``[B, 1, dim]`` from the query ``[B, 1, dim]`` and the keys ``[B, K, dim]``."""
        attended, _ = self.cross_attention(query, keys, keys, need_weights=False)
        query = self.norm1(query + attended)
        return self.norm2(query + self.ffn(query))


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
            ValueError: another shape.
        """
        if sentence_embeds.ndim != 2 or sentence_embeds.shape[1] != self.linear_1.in_features:
            raise ValueError(
                f"sentence_embeds: got shape {tuple(sentence_embeds.shape)}, need [B, {self.linear_1.in_features}]"
            )
        sentence_embeds = sentence_embeds.to(self.linear_1.weight.dtype)
        if torch.is_grad_enabled():
            sentence_embeds = saveable(sentence_embeds)
        scores = self.linear_2(self.linear_1(sentence_embeds).relu())
        return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


class LearnedWeights(nn.Module):
    """Layer weights that are parameters, the same for every image: ``w = softmax(scores)`` (COMM, arXiv 2310.08825).

    Args:
        num_weights: K. All start equal.
    """

    def __init__(self, num_weights: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(num_weights))

    def forward(self, rows: int) -> Tensor:
        """The weights ``[rows, K]``, all rows the same, at least in fp32."""
        dtype = torch.promote_types(self.scores.dtype, torch.float32)
        return self.scores.softmax(dim=-1, dtype=dtype).expand(rows, -1)


def column_plan(plan: MixPlan) -> MixPlan:
    """One weight-free block a weight column: what that column weighs (IGVA: the group means ``G_1..G_K``).

    Raises:
        ValueError: a column below ``plan.num_columns`` that no entry uses.
    """
    entries = [entry for block in plan.blocks for entry in block if entry.column is not None]
    blocks = (
        tuple(Entry(e.layer, None, e.scale) for e in entries if e.column == column)
        for column in range(len({e.column for e in entries}))
    )
    return MixPlan(tuple(blocks), plan.num_states)


def column_summaries(
    hidden_states: Sequence[Tensor | None], plan: MixPlan, has_cls: bool = True, impl: str = "auto"
) -> Tensor:
    """What the allocator sees of an image: one vector a weight column of the plan.

    Args:
        hidden_states: L states ``[I, T, D]``; those that no column uses may be None.
        plan: a plan with weight columns.
        has_cls: whether token 0 is a CLS token, the summary of its state; else the mean of all tokens is.
        impl: as in ``layer_mix``.

    Returns:
        ``[I, K, D]`` in the layers' dtype.
    """
    columns = column_plan(plan.resolve(len(hidden_states)))
    tokens: list[Tensor | None] = [None] * len(hidden_states)
    for layer in columns.layers:
        state = hidden_states[layer]
        if state is not None:
            tokens[layer] = state[:, :1] if has_cls else state.mean(dim=1, keepdim=True)
    return layer_mix(tokens, columns, impl=impl).squeeze(1).unflatten(-1, (columns.num_blocks, -1))


class MixInput(NamedTuple):
    """Layers on their way to the Linear that reads their mix.

    A tuple, so that wrappers which hook a module (FSDP2, DeepSpeed) find the tensors in its argument.
    """

    hidden_states: tuple[Tensor | None, ...]
    mix_weights: Tensor | None
    image_index: Tensor | None
    norm: Norm | None
    plan: MixPlan
    skip_tokens: int
    activation: str
    impl: str


class LayerMixLinear(nn.Linear):
    """An ``nn.Linear`` that also takes layers: it mixes, multiplies, and applies the activation in one operator."""

    def forward(self, input: Tensor | MixInput) -> Tensor:
        """``input @ weight.T + bias`` of a tensor; ``act(norm?(A) @ weight.T + bias)`` ``[B, P, H]`` of a MixInput."""
        if not isinstance(input, MixInput):
            return nn.Linear.forward(self, input)  # not super(): a patch lends this function to an nn.Linear
        return layer_mix_linear(
            input.hidden_states, input.plan, input.mix_weights, self.weight, self.bias, activation=input.activation,
            norm=input.norm, skip_tokens=input.skip_tokens, image_index=input.image_index, impl=input.impl,
        )  # fmt: skip


class LayerMixNorm(nn.LayerNorm):
    """An ``nn.LayerNorm`` over the mixed row: given layers, it leaves the work to the Linear behind it."""

    def forward(self, input: Tensor | MixInput) -> Tensor | MixInput:
        """The normalised tensor, or the same MixInput with this norm in it."""
        if not isinstance(input, MixInput):
            return nn.LayerNorm.forward(self, input)
        # Copies: a sharded norm releases its parameters when this forward returns, before the Linear reads them.
        return input._replace(norm=(self.weight.clone(), self.bias.clone(), self.eps))


class LayerMixProjector(nn.Module):
    """The connector: mixed layers, optional LayerNorm, Linear, activation, Linear.

    ``linear_1``, ``linear_2`` and ``projector_layernorm`` are named as in transformers' Llava and VipLlava, and so are
    the keys of the ``state_dict``. The whole connector is one operator while its children are plain; a child that is
    hooked, sharded on its own, quantised, or replaced (LoRA) is called as the module it is.

    Args:
        plan: which layers make the mixed row.
        vision_dim: D.
        hidden_dim: H.
        bias: whether both Linears have a bias.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        layernorm_eps: with a number, a LayerNorm over the mixed row, with this eps, comes before ``linear_1``.
        skip_tokens: tokens left out at the start of every state (1 for CLIP's CLS).
        impl: "auto", "reference", "cpu", "triton" or "cuda", as in ``layer_mix_mlp``.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        plan: MixPlan,
        vision_dim: int,
        hidden_dim: int,
        *,
        bias: bool = True,
        activation: str = "gelu",
        layernorm_eps: float | None = None,
        skip_tokens: int = 0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, need one of {', '.join(map(repr, ACTIVATIONS))}")
        self.plan, self.activation, self.skip_tokens, self.impl = plan, activation, skip_tokens, impl
        width = plan.num_blocks * vision_dim
        self.projector_layernorm = None if layernorm_eps is None else LayerMixNorm(width, eps=layernorm_eps)
        self.linear_1 = LayerMixLinear(width, hidden_dim, bias=bias)
        self.linear_2 = nn.Linear(hidden_dim, hidden_dim, bias=bias)

    def forward(
        self,
        hidden_states: Sequence[Tensor | None],
        mix_weights: Tensor | None = None,
        *,
        plan: MixPlan | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """The visual tokens ``[B, P, H]`` in the dtype of the weights (or autocast's).

        Args:
            hidden_states: L states ``[I, T, D]``; those that the plan does not use may be None.
            mix_weights: ``[B, K]`` or ``[1, K]``; None where the plan has no columns.
            plan: in place of the module's own, one of as many blocks: what ``plan.reduced()`` leaves to do where
                ``hidden_states`` are its sources.
            image_index: int64 ``[B]``, the image that each row reads; None where row b reads image b.

        Raises:
            ValueError, TypeError, NotImplementedError: as in ``layer_mix_mlp``.
        """
        mixed = MixInput(
            tuple(hidden_states), mix_weights, image_index, None, self.plan if plan is None else plan,
            self.skip_tokens, self.activation, self.impl,
        )  # fmt: skip
        return connect(mixed, self.projector_layernorm, self.linear_1, self.linear_2)

    def extra_repr(self) -> str:
        return f"plan={self.plan}, activation={self.activation!r}, skip_tokens={self.skip_tokens}, impl={self.impl!r}"


def widen(weight: Tensor, layers: Sequence[int], plan: MixPlan) -> Tensor:
    """The weight ``[H, G*D]`` that answers at first as ``weight`` ``[H, len(layers)*D]`` does: zeros for what is new.

    Args:
        weight: of a first Linear that reads a concat of ``layers``.
        layers: which they are.
        plan: a resolved plan, of which each of the layers is a block.

    Raises:
        ValueError: one of the layers is no block of the plan.
    """
    width = weight.shape[1] // len(layers)
    taps = {block[0].layer: g for g, block in enumerate(plan.blocks) if is_tap(block)}
    wide = weight.new_zeros(weight.shape[0], plan.num_blocks * width)
    for i, layer in enumerate(layers):
        block = taps.get(layer if layer >= 0 or plan.num_states is None else layer + plan.num_states)
        if block is None:
            raise ValueError(f"plan: the model reads layer {layer}, need a block of that layer alone, got {plan}")
        wide[:, block * width : (block + 1) * width] = weight[:, i * width : (i + 1) * width]
    return wide


def connect(mixed: MixInput, norm: nn.Module | None, linear_1: nn.Module, linear_2: nn.Module) -> Tensor:
    """Layers through ``norm``, ``linear_1``, the activation of ``mixed`` and ``linear_2``: ``[B, P, H]``.

    One operator while the modules are plain. Else each reads its weights in its own forward, as sharding and offload
    need it: ``linear_1`` mixes if it takes layers, and is called with the mixed row if it is a stand-in (LoRA's).
    """
    if all(is_plain(module) for module in (norm, linear_1, linear_2) if module is not None):
        return layer_mix_mlp(
            mixed.hidden_states, mixed.plan, mixed.mix_weights,
            linear_1.weight, linear_1.bias, linear_2.weight, linear_2.bias, activation=mixed.activation,
            norm=None if norm is None else (norm.weight, norm.bias, norm.eps),
            skip_tokens=mixed.skip_tokens, image_index=mixed.image_index, impl=mixed.impl,
        )  # fmt: skip
    if takes_layers(linear_1) and (norm is None or takes_layers(norm)):
        return linear_2(linear_1(mixed if norm is None else norm(mixed)))
    rows = layer_mix(
        mixed.hidden_states, mixed.plan, mixed.mix_weights,
        skip_tokens=mixed.skip_tokens, image_index=mixed.image_index, impl=mixed.impl,
    )  # fmt: skip
    rows = rows if norm is None else norm(rows)
    return linear_2(ACTIVATIONS[mixed.activation](linear_1(rows)))


_PLAIN_TYPES = (nn.Linear, LayerMixLinear, nn.LayerNorm, LayerMixNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def takes_layers(module: nn.Module) -> bool:
    """Whether the forward of a Linear or LayerNorm, under the hooks it may have, takes a ``MixInput``."""
    own = module.__dict__  # torch 2.8 cannot trace vars()
    return _takes_layers(own.get("_old_forward", own.get("forward", type(module).forward)))  # accelerate's name


def _takes_layers(forward: Any) -> bool:
    function = getattr(forward, "__func__", forward)
    return function is LayerMixLinear.forward or function is LayerMixNorm.forward  # torch 2.11 cannot trace `in`


def is_plain(module: nn.Module) -> bool:
    """Whether a Linear or LayerNorm may be read from outside its own forward: nothing would happen in that forward.

    False for subclasses (FSDP2 makes one of a unit, parametrisation and quantisation too), wrappers, hooked or rebound
    forwards (DeepSpeed ZeRO-3, accelerate), and weights that are tensor subclasses or whose storage was released. A
    forward that a patch bound is plain.
    """
    return type(module) in _PLAIN_TYPES and _is_untouched(module)


def _is_untouched(module: nn.Module) -> bool:
    own = module.__dict__.get("forward")
    rebound = own is not None and not _takes_layers(own)
    if rebound or any(getattr(module, name) for name in _HOOKS):
        return False
    parameters = (p for p in module._parameters.values() if p is not None)
    return all(type(p) in (Tensor, nn.Parameter) and _has_storage(p) for p in parameters)


def _has_storage(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or (tensor.numel() > 0 and has_storage(tensor))


def negative_entropy(mix_weights: Tensor) -> Tensor:
    """``sum_k w_k log w_k`` of weights ``[..., K]`` that sum to one: from -log K (uniform) to 0 (one-hot)."""
    return (mix_weights * mix_weights.clamp_min(1e-12).log()).sum(dim=-1)


def balance_loss(mix_weights: Tensor, share: Tensor | None = None) -> Tensor:
    """Negative entropy of the layer weights: the lower, the more evenly the layers are used (IGVA, stage 2).

    The weights are what the softmax returned and are not softmaxed again (the published code does so twice).

    Args:
        mix_weights: ``[B, K]``, rows that sum to one.
        share: ``[B]``, how much each row counts; None for the mean over the rows. Over every micro-batch of a step the
            shares must sum to one, as the terms of the language loss do, or the sum depends on how a batch is split.

    Returns:
        A scalar in fp32.
    """
    entropies = negative_entropy(mix_weights)
    return entropies.mean() if share is None else (entropies * share).sum()
