"""MMFuser (arXiv 2410.11829): a late state reads earlier ones by deformable attention, in front of the MLP.

The projector is ``nn.Sequential(MSCrossAttnBlock, Linear, GELU, Linear)``. It is given the tower's states where they
lie, in place of a stack of them. Layer_Select_Fuse's external modular fusion has the same projector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.integrations.lazy import (
    activation_of,
    check_patch_impl,
    explain,
    let_take_layers,
    served_by,
    set_forward,
    set_method,
    unknown_host,
)
from igva_kernels.integrations.research import check_host, encode, find_host, num_states
from igva_kernels.nn import Connector, DeformableAttention, MixInput, connect, fuse
from igva_kernels.nn.sharding import below_adapter, is_watched
from igva_kernels.ops.deform_attn.op import OPERATOR
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.ops.weighted_mix import op as mix

DESCRIPTION = "the MMFuser repository"
BLOCK = "MSCrossAttnBlock"
"""The class of the block, in both repositories."""
NORMS, ATTENTIONS = ("query_norm", "feat_norm", "norm1"), ("cross_attn", "self_attn")
PARTS = (*NORMS, *ATTENTIONS, "gamma1", "gamma2", "select_layer", "query_layer")
"""Its attributes."""
LINEARS = ("value_proj", "sampling_offsets", "attention_weights")
"""Those Linears of an attention that read states."""


def matches(model: nn.Module) -> bool:
    """Whether ``model`` contains a model of the repository."""
    host = find_host(model)
    return host is not None and _is_block(_first(getattr(host.get_model(), "mm_projector", None)))


def apply(model: nn.Module, edits: PatchHandle, impl: str = "auto") -> None:
    """Let the block and the MLP behind it be computed by operators, from the states that the tower returns.

    Args:
        model: contains a model of the repository.
        edits: the handle of the patch.
        impl: as in ``deform_attn``, ``layer_project`` and ``layer_mix_mlp``.

    Raises:
        NotImplementedError: a setting with which the repository cannot run, another projector, or an ``impl`` that
            nothing here can serve.
    """
    host = find_host(model)
    tower = check_host(host, "images")
    selected = tower.select_layer
    if not isinstance(selected, list):
        raise NotImplementedError(f"mm_vision_select_layer: got {selected!r}, need a list, the query last")
    if tower.select_feature != "patch":
        raise NotImplementedError(f"mm_vision_select_feature: got {tower.select_feature!r}, need 'patch'")
    patch_projector(edits, host.get_model().mm_projector, "model.mm_projector", len(selected), impl)
    plan = MixPlan.concat(selected, num_states(tower))
    set_method(edits, host, "encode_images", encoder("mm_projector", plan, skip_tokens=1, no_grad=True))


def encoder(projector: str, plan: MixPlan, *, skip_tokens: int, no_grad: bool) -> Callable[[Any, Tensor], Tensor]:
    """An ``encode_images`` whose projector is given the taps of ``plan``; see ``research.encode``."""

    def encode_images(self: Any, images: Tensor) -> Tensor:
        taps = encode(self.get_vision_tower(), images, plan, skip_tokens, no_grad)
        return getattr(self.get_model(), projector)(taps)

    return encode_images


def patch_projector(edits: PatchHandle, projector: Any, name: str, selected: int, impl: str) -> None:
    """Let ``nn.Sequential(MSCrossAttnBlock, Linear, activation, Linear)`` take layers.

    Args:
        edits: the handle of the patch.
        projector: the module.
        name: what to call it.
        selected: how many states the tower returns, levels and query.
        impl: as in ``apply``.

    Raises:
        NotImplementedError: the projector has another form, or reads other states than there are.
        ValueError: it is patched already.
    """
    if not isinstance(projector, nn.Sequential) or len(projector) != 4 or not _is_block(projector[0]):
        raise NotImplementedError(
            f"{name}: got a {type(projector).__name__} of {len(projector._modules)} modules, need {BLOCK}, Linear, "
            f"activation, Linear"
        )
    block: Any = projector[0]
    missing = [part for part in PARTS if not hasattr(block, part)]
    if missing:
        raise unknown_host(block, "forward", f"it lacks {', '.join(missing)}")
    if max(block.select_layer, default=0) >= selected or len(block.select_layer) != block.cross_attn.n_levels:
        raise NotImplementedError(
            f"{name}[0]: it reads {len(block.select_layer)} of {selected} states and the last, for {BLOCK} of "
            f"{block.cross_attn.n_levels} levels; need {block.cross_attn.n_levels + 1} states"
        )
    activation = activation_of(projector[2], f"{name}[2]")
    weight = getattr(below_adapter(projector[1]), "weight", None)
    check_patch_impl(mix.OPERATOR, impl, weight, activation)
    check_patch_impl(OPERATOR, impl, weight)
    set_forward(edits, projector, _projector_forward(activation, impl))
    set_forward(edits, block, _block_forward(impl))
    for attention in (getattr(block, part) for part in ATTENTIONS):
        set_forward(edits, attention, DeformableAttention.forward)
        let_take_layers(edits, *(getattr(attention, linear) for linear in LINEARS))
    let_take_layers(edits, *(getattr(block, norm) for norm in NORMS), projector[1])
    edits.note(lambda: f"{name}[0]: deformable attention {served_by(OPERATOR, impl, block.gamma1)[1]}")
    edits.note(lambda: f"{name}: {explain(_mlp(projector), activation, impl)}")


def _first(projector: Any) -> Any:
    return projector[0] if isinstance(projector, nn.Sequential) and len(projector) else None


def _is_block(module: Any) -> bool:
    return type(module).__name__ == BLOCK


def _mlp(projector: Any) -> Connector:
    return Connector(None, projector[1], projector[2], projector[3])


_TAP = MixPlan.concat([0])


def _projector_forward(activation: str, impl: str) -> Callable[..., Tensor]:
    def forward(self: Any, states: MixInput | Sequence[Tensor] | Tensor) -> Tensor:
        # The patched encode_images hands over taps alone.
        fused = _of_taps(self[0], states) if isinstance(states, MixInput) else self[0](states)
        return connect(MixInput((fused,), None, None, None, _TAP, 0, activation, impl), _mlp(self))

    return forward


def _of_taps(block: nn.Module, taps: MixInput) -> Any:
    states: Any = [taps.hidden_states[part[0].layer] for part in taps.plan.blocks]
    if is_watched(block):  # its hooks would not expect CLS
        return block([state[:, taps.skip_tokens :] for state in states])
    return block(states, skip_tokens=taps.skip_tokens)


def _block_forward(impl: str) -> Callable[..., Tensor]:
    def forward(
        self: Any, srcs: Sequence[Tensor] | Tensor, masks: Any = None, pos_embeds: Any = None, skip_tokens: int = 0
    ) -> Tensor:
        states = [srcs[level] for level in (*self.select_layer, self.query_layer)]
        return fuse(self, states, skip_tokens=skip_tokens, impl=impl)

    return forward
