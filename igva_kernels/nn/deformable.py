"""A late state of the vision tower that reads earlier ones by deformable attention (MMFuser, arXiv 2410.11829).

With L levels ``h_l``, the query ``h`` and the two attentions over them,

    a = attention(LN_q(h); LN_f(h_1) .. LN_f(h_L))        a2 = attention(LN_1(a); LN_1(a))
    out = h + gamma1 * (a + gamma2 * a2)

where an attention of queries q over maps f takes values, offsets and logits from four Linears and adds up what its
queries find in the maps: ``output_proj(deform_attn(value_proj(f), sampling_offsets(q), attention_weights(q)))``.

The states are read where they lie. A Linear that is given layers (``MixInput``) normalises them itself, so that neither
a concat of the levels nor a normalised copy exists; for the backward there remain the values, offsets and logits, what
was read, and the two attentions' results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.nn.projector import LayerMixLinear, LayerMixNorm, MixInput, is_plain, takes_layers
from igva_kernels.nn.sharding import is_watched
from igva_kernels.ops.deform_attn import deform_attn
from igva_kernels.ops.layer_project import layer_project
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.runtime.context import saveable

Rows = MixInput | list[Tensor]
"""What a Linear reads: layers with the norm that is still to be applied, each a block of the plan, or tensors."""


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention between grids of patches: the parameters of Deformable DETR's ``MSDeformAttn``.

    Args:
        d_model: D.
        n_levels: L, the number of maps.
        n_heads: heads; must divide D.
        n_points: points that a head reads of every map.

    Raises:
        ValueError: a number is not positive, or ``n_heads`` does not divide D.
    """

    def __init__(self, d_model: int, n_levels: int, n_heads: int, n_points: int) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "n_levels": n_levels, "n_heads": n_heads, "n_points": n_points}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, need 1 or more")
        if d_model % n_heads:
            raise ValueError(f"n_heads: got {n_heads}, need a divisor of d_model={d_model}")
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        points = n_heads * n_levels * n_points
        self.sampling_offsets = LayerMixLinear(d_model, 2 * points)
        self.attention_weights = LayerMixLinear(d_model, points)
        self.value_proj = LayerMixLinear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in Deformable DETR: each head looks in a direction of its own, point n at n pixels, all of equal weight.

        All points then lie on kinks of the interpolation, where implementations differ in the gradient of the offsets.
        """
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * steps[:, None]
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).flatten())

    def forward(self, query: Rows, maps: Rows, grid: tuple[int, int], impl: str = "auto") -> Tensor:
        """``[B, P, D]``: what the queries, of one state, read of L maps of the same grid.

        The rows are what ``normalised`` returns, or lists of tensors ``[B, P, D]``; ``impl`` is as in ``deform_attn``.
        """
        values = [value.unflatten(-1, (self.n_heads, -1)) for value in _outputs(self.value_proj, maps)]
        (offsets,), (logits,) = _outputs(self.sampling_offsets, query), _outputs(self.attention_weights, query)
        points = (self.n_heads, self.n_levels, self.n_points)
        offsets, logits = offsets.unflatten(-1, (*points, 2)), logits.unflatten(-1, points)
        return self.output_proj(deform_attn(values, [grid] * self.n_levels, offsets, logits, impl=impl))


class DeformableFuser(nn.Module):
    """MMFuser's ``MSCrossAttnBlock``: a state to which deformable attention adds what it finds in L others.

    Parameters have the names of that block (``cross_attn.value_proj.weight``, ``gamma1``, ...), and its initial values:
    as ``gamma1`` and ``gamma2`` are zero, the block at first returns its query.

    While its children are plain or only sharded, the Linears normalise and multiply the states where they lie, all
    levels in one operator where nothing stands between; a child that is hooked or replaced (LoRA) is called as the
    module it is, with tensors, and so are those beside it that read the same.

    Args:
        d_model: D, the width of the states.
        n_levels: L, how many states are read beside the query.
        n_heads: attention heads; must divide D.
        n_points: points that each head reads of each level.
        norm_eps: eps of the LayerNorms.
        init_values: initial value of ``gamma1`` and ``gamma2``.
        skip_tokens: tokens left out at the start of every state (1 for CLIP's CLS).
        impl: "auto", "reference", "cpu", "triton" or "cuda", as in ``deform_attn`` and ``layer_project``.

    Raises:
        ValueError: a number is not positive, or ``n_heads`` does not divide D.
    """

    def __init__(
        self,
        d_model: int,
        n_levels: int,
        n_heads: int = 16,
        n_points: int = 4,
        *,
        norm_eps: float = 1e-6,
        init_values: float = 0.0,
        skip_tokens: int = 0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.init_values, self.skip_tokens, self.impl = init_values, skip_tokens, impl
        self.cross_attn = DeformableAttention(d_model, n_levels, n_heads, n_points)
        self.query_norm = LayerMixNorm(d_model, eps=norm_eps)
        self.feat_norm = LayerMixNorm(d_model, eps=norm_eps)
        self.gamma1 = nn.Parameter(torch.full((d_model,), init_values))
        self.norm1 = LayerMixNorm(d_model, eps=norm_eps)
        self.self_attn = DeformableAttention(d_model, 1, n_heads, n_points)
        self.gamma2 = nn.Parameter(torch.full((d_model,), init_values))

    def reset_parameters(self) -> None:
        """The initial values of all parameters."""
        for module in (self.cross_attn, self.self_attn, self.query_norm, self.feat_norm, self.norm1):
            module.reset_parameters()
        for gamma in (self.gamma1, self.gamma2):
            nn.init.constant_(gamma, self.init_values)

    def forward(self, hidden_states: Sequence[Tensor], *, grid: tuple[int, int] | None = None) -> Tensor:
        """The fused state ``[I, P, D]``, without the skipped tokens.

        Args:
            hidden_states: the L levels and, last, the query, ``[I, T, D]`` each, any batch and token strides.
            grid: (height, width) of the patches; None where they are a square.

        Raises:
            ValueError: another number of states, states of unlike shapes, or a grid that is not that of the patches.
            TypeError, NotImplementedError: as in ``layer_project`` and ``deform_attn``.
        """
        return fuse(self, hidden_states, skip_tokens=self.skip_tokens, grid=grid, impl=self.impl)

    def extra_repr(self) -> str:
        return f"skip_tokens={self.skip_tokens}, impl={self.impl!r}"


def fuse(
    block: Any,
    hidden_states: Sequence[Tensor],
    *,
    skip_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """What a ``DeformableFuser`` returns, computed by the modules of any block that has the same ones.

    Args:
        block: has the attributes of a ``DeformableFuser`` by their names; the forward of its ``cross_attn`` and
            ``self_attn`` is that of ``DeformableAttention``, which a patch may have lent them.
        hidden_states, grid: as in ``DeformableFuser.forward``.
        skip_tokens, impl: as in ``DeformableFuser``.

    Raises:
        ValueError, TypeError, NotImplementedError: as in ``DeformableFuser.forward``.
    """
    *levels, query = _check_states(hidden_states, block.cross_attn.n_levels + 1)
    patches = query[:, skip_tokens:]
    grid = _check_grid(grid, patches.shape[1])
    cross, own = block.cross_attn, block.self_attn
    asks = normalised(block.query_norm, (cross.sampling_offsets, cross.attention_weights), [query], skip_tokens, impl)
    maps = normalised(block.feat_norm, (cross.value_proj,), levels, skip_tokens, impl)
    attended = cross(asks, maps, grid, impl)
    linears = (own.value_proj, own.sampling_offsets, own.attention_weights)
    rows = normalised(block.norm1, linears, [attended], 0, impl)
    # Not gamma1 * (a + gamma2 * a2), for whose gradients the sum would be kept beside both.
    gamma1, gamma2 = block.gamma1, block.gamma2
    return patches + torch.addcmul(gamma1 * attended, gamma1 * gamma2, own(rows, rows, grid, impl))


def normalised(
    norm: nn.Module, linears: Sequence[nn.Module], states: Sequence[Tensor], skip_tokens: int, impl: str
) -> Rows:
    """States ``[I, T, D]`` through a LayerNorm, for Linears that all read the same.

    Layers and the norm's numbers, where these Linears can do the work of the norm; otherwise a tensor ``[I, P, D]`` for
    each state.
    """
    if all(map(_works_on_layers, (norm, *linears))):
        plan = MixPlan.concat(range(len(states)), len(states))
        layers = MixInput(tuple(states), None, None, None, plan, skip_tokens, None, impl)
        if is_plain(norm):
            return layers._replace(norm=(norm.weight, norm.bias, norm.eps))
        return norm(layers)
    return [norm(saveable(state[:, skip_tokens:])) for state in states]


def _works_on_layers(module: nn.Module) -> bool:
    """Whether a Linear or LayerNorm may be read where it is plain, or else takes layers in its own forward."""
    return is_plain(module) or (takes_layers(module) and not is_watched(module))


def _outputs(linear: nn.Module, rows: Rows) -> list[Tensor]:
    """What a Linear returns for each state ``[B, P, N]``."""
    if not isinstance(rows, MixInput):
        return [linear(state) for state in rows]
    plans = [MixPlan((block,), rows.plan.num_states) for block in rows.plan.blocks]
    if not is_plain(linear):
        return [linear(rows._replace(plan=plan)) for plan in plans]
    out = layer_project(
        rows.hidden_states, plans, None, linear.weight, linear.bias, activation=None, norm=rows.norm,
        skip_tokens=rows.skip_tokens, impl=rows.impl,
    )  # fmt: skip
    return list(out.unbind())  # not by an index, whose gradient would be as large as the whole


def _check_states(hidden_states: Sequence[Tensor], count: int) -> list[Tensor]:
    if isinstance(hidden_states, Tensor) or not isinstance(hidden_states, Sequence):
        raise TypeError(
            f"hidden_states: need a sequence of tensors [I, T, D], got {type(hidden_states).__name__}; "
            f"pass the states as they are, not stacked"
        )
    states = list(hidden_states)
    if len(states) != count:
        raise ValueError(f"hidden_states: need {count - 1} levels and the query, got {len(states)} states")
    for i, state in enumerate(states):
        if state.dim() != 3 or state.shape != states[-1].shape:
            raise ValueError(
                f"hidden_states[{i}]: need a state [I, T, D] of the query's shape {list(states[-1].shape)}, got "
                f"{list(state.shape)}"
            )
    return states


def _check_grid(grid: tuple[int, int] | None, num_patches: int) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(num_patches)
        grid = side, side
    height, width = grid
    if height * width != num_patches or min(grid) < 1:
        raise ValueError(
            f"grid: need (height, width) of the {num_patches} patches that skip_tokens leaves, or None where they are "
            f"a square, got {height} x {width}"
        )
    return height, width
