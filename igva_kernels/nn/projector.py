"""The connector as modules: layers mixed, an optional LayerNorm, Linear, activation, Linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from igva_kernels.nn.sharding import has_plain_weights, is_untouched, is_watched, runs
from igva_kernels.ops.weighted_mix import Entry, MixPlan, is_tap, layer_mix, layer_mix_linear, layer_mix_mlp
from igva_kernels.runtime.activations import ACTIVATIONS, check_activation
from igva_kernels.runtime.dense import Norm


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
    activation: str | None
    impl: str


class LayerMixLinear(nn.Linear):
    """An ``nn.Linear`` that also takes layers: it mixes, multiplies, and applies the activation in one operator."""

    def forward(self, input: Tensor | MixInput) -> Tensor:
        """``input @ weight.T + bias`` of a tensor; ``act(norm?(A) @ weight.T + bias)`` ``[B, P, H]`` of a MixInput."""
        if not isinstance(input, MixInput):
            return nn.Linear.forward(self, input)  # not super(): a patch lends this function to an nn.Linear
        if not has_plain_weights(self):  # quantised
            rows = _mixed_row(input)
            if input.norm is not None:
                weight, bias, eps = input.norm
                rows = nn.functional.layer_norm(rows, rows.shape[-1:], weight, bias, eps)
            return _activated(nn.Linear.forward(self, rows), input.activation)
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
        weight, bias = (None if param is None else param.clone() for param in (self.weight, self.bias))
        return input._replace(norm=(weight, bias, self.eps))


_LAYER_FORWARDS = (LayerMixLinear.forward, LayerMixNorm.forward)
_PLAIN_TYPES = (nn.Linear, LayerMixLinear, nn.LayerNorm, LayerMixNorm)


def takes_layers(module: nn.Module) -> bool:
    """Whether the forward of a Linear or LayerNorm takes a ``MixInput``, whatever accelerate has put around it."""
    return runs(module, *_LAYER_FORWARDS)


def is_plain(module: nn.Module) -> bool:
    """Whether a Linear or LayerNorm may be read from outside its own forward, which may be one that a patch bound."""
    return type(module) in _PLAIN_TYPES and is_untouched(module, *_LAYER_FORWARDS)


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
        layernorm_eps: if given, a LayerNorm over the mixed row with this eps comes before ``linear_1``.
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
        check_activation(activation, optional=False)
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
            plan: a plan with as many blocks that replaces the module's own, such as the second one of
                ``plan.reduced()`` where ``hidden_states`` are the sources.
            image_index: int64 ``[B]``, the image that each row reads; None where row b reads image b.

        Raises:
            ValueError, TypeError, NotImplementedError: as in ``layer_mix_mlp``.
        """
        return connect(self.mix_input(hidden_states, mix_weights, plan, image_index), self.connector)

    def mix_input(
        self, hidden_states: Sequence[Tensor | None], mix_weights: Tensor | None, plan: MixPlan | None,
        image_index: Tensor | None,
    ) -> MixInput:  # fmt: skip
        """The arguments of a call, as ``connect`` takes them."""
        return MixInput(
            _as_tuple(hidden_states), mix_weights, image_index, None, self.plan if plan is None else plan,
            self.skip_tokens, self.activation, self.impl,
        )  # fmt: skip

    @property
    def connector(self) -> Connector:
        """Its modules, as ``connect`` takes them."""
        return Connector(self.projector_layernorm, self.linear_1, None, self.linear_2)

    def extra_repr(self) -> str:
        return f"plan={self.plan}, activation={self.activation!r}, skip_tokens={self.skip_tokens}, impl={self.impl!r}"


def widen(weight: Tensor, layers: Sequence[int], plan: MixPlan) -> Tensor:
    """The weight ``[H, G*D]`` that computes the same as ``weight`` ``[H, len(layers)*D]``: new columns are zero.

    Args:
        weight: of a first Linear that reads a concat of ``layers``.
        layers: the layers of that concat, in its order.
        plan: a resolved plan in which each of these layers is a tap.

    Raises:
        ValueError: one of the layers is not a tap of the plan.
    """
    width = weight.shape[1] // len(layers)
    taps = {block[0].layer: g for g, block in enumerate(plan.blocks) if is_tap(block)}
    wide = weight.new_zeros(weight.shape[0], plan.num_blocks * width)
    for i, layer in enumerate(layers):
        block = taps.get(layer if layer >= 0 or plan.num_states is None else layer + plan.num_states)
        if block is None:
            raise ValueError(f"plan: the model reads layer {layer}, need a block of that layer alone, got {plan}")
        wide[:, block * width : (block + 1) * width] += weight[:, i * width : (i + 1) * width]  # a layer may come twice
    return wide


class Connector(NamedTuple):
    """The modules of a connector, and how far they can be run together."""

    norm: nn.Module | None
    """A LayerNorm over the mixed row."""
    linear_1: nn.Module
    act: nn.Module | None
    """The activation, where the host has a module for it."""
    linear_2: nn.Module

    def explain(self) -> str:
        """In words: what runs as one, and why not everything does."""
        if is_one_operator(self):
            return "one operator for layers, Linears and activation"
        names = ("the norm", "linear_1", "the activation", "linear_2")
        present = [(name, module) for name, module in zip(names, self, strict=True) if module is not None]
        if mixes_in_linear(self):
            touched = (name for name, m in present if not (is_untouched(m) if m is self.act else is_plain(m)))
            return f"linear_1 mixes in its own forward: {', '.join(touched)} sharded, offloaded or quantised"
        for name, module in present:
            if is_watched(module):
                return f"the layers are concatenated for {name}, which has hooks"
            if module in (self.norm, self.linear_1) and not takes_layers(module):
                return f"the layers are concatenated for {name}, a {type(module).__module__}.{type(module).__name__}"
        return ""


# Functions, because torch 2.8 cannot trace a property of a NamedTuple.


def is_one_operator(modules: Connector) -> bool:
    """Whether nothing happens in a module's forward but what its class does."""
    norm, linear_1, act, linear_2 = modules
    plain = all(is_plain(module) for module in (norm, linear_1, linear_2) if module is not None)
    return plain and (act is None or is_untouched(act))


def mixes_in_linear(modules: Connector) -> bool:
    """Whether norm and ``linear_1`` take layers, so that ``linear_1`` mixes in its own forward, as sharding and offload
    need it.

    Otherwise the modules are given tensors: stand-ins (LoRA's, quantised ones) and hooks expect them.
    """
    norm, linear_1, _, _ = modules
    takers = (linear_1,) if norm is None else (norm, linear_1)
    return all(map(takes_layers, takers)) and not any(is_watched(module) for module in modules if module is not None)


def connect(mixed: MixInput, modules: Connector) -> Tensor:
    """Layers through norm, ``linear_1``, activation and ``linear_2``: ``[B, P, H]``."""
    norm, linear_1, act, linear_2 = modules
    if is_one_operator(modules):
        return layer_mix_mlp(
            mixed.hidden_states, mixed.plan, mixed.mix_weights,
            linear_1.weight, linear_1.bias, linear_2.weight, linear_2.bias, activation=mixed.activation,
            norm=None if norm is None else (norm.weight, norm.bias, norm.eps),
            skip_tokens=mixed.skip_tokens, image_index=mixed.image_index, impl=mixed.impl,
        )  # fmt: skip
    if mixes_in_linear(modules):
        return linear_2(linear_1(mixed if norm is None else norm(mixed)))
    rows = _mixed_row(mixed)
    rows = linear_1(rows if norm is None else norm(rows))
    return linear_2(_activated(rows, mixed.activation) if act is None else act(rows))


def _activated(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else ACTIVATIONS[activation](x)


def _mixed_row(mixed: MixInput) -> Tensor:
    return layer_mix(
        mixed.hidden_states, mixed.plan, mixed.mix_weights,
        skip_tokens=mixed.skip_tokens, image_index=mixed.image_index, impl=mixed.impl,
    )  # fmt: skip


def column_plan(plan: MixPlan) -> MixPlan:
    """One weight-free block per weight column: what that column weighs (IGVA: the group means ``G_1..G_K``).

    Raises:
        ValueError: the plan has no column, or one below ``plan.num_columns`` that no entry uses.
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
    """What the allocator sees of an image: one vector per weight column of the plan.

    Args:
        hidden_states: L states ``[I, T, D]``; those that no column uses may be None.
        plan: a plan with weight columns.
        has_cls: whether token 0 is a CLS token, which then is the summary; otherwise the mean of all tokens is.
        impl: as in ``layer_mix``.

    Returns:
        ``[I, K, D]`` in the layers' dtype.

    Raises:
        ValueError, TypeError, NotImplementedError: as in ``layer_mix`` and ``column_plan``.
    """
    states = _as_tuple(hidden_states)
    columns = column_plan(plan.resolve(len(states)))
    tokens: list[Tensor | None] = [None] * len(states)
    for layer in columns.layers:
        state = states[layer]
        if state is not None:
            tokens[layer] = state[:, :1] if has_cls else state.mean(dim=1, keepdim=True)
    return layer_mix(tokens, columns, impl=impl).squeeze(1).unflatten(-1, (columns.num_blocks, -1))


def _as_tuple(hidden_states: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    # Any object with __getitem__ can be iterated, and for ever if no index is out of its range.
    if not isinstance(hidden_states, Sequence):
        raise TypeError(
            f"hidden_states: need a sequence of tensors [I, T, D], got {type(hidden_states).__name__}; "
            f"pass the states as they are, not stacked"
        )
    return tuple(hidden_states)
