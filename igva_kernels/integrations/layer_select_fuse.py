"""Layer_Select_Fuse (arXiv 2503.06063), external direct fusion: layers or means of layers, the base last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.integrations.lazy import set_method
from igva_kernels.integrations.research import check_host, encode, find_host, has_host, num_states, patch_mlp
from igva_kernels.ops.weighted_mix import MixPlan

DESCRIPTION = "the Layer_Select_Fuse repository (E_D)"


def matches(model: nn.Module) -> bool:
    """Whether ``model`` contains a model of the repository."""
    return has_host(model, "layer_fusing_strategy")


def apply(model: nn.Module, edits: PatchHandle, impl: str = "auto") -> None:
    """Let the projector mix what ``encode_images`` stacks, averages and concatenates."""
    host = find_host(model)
    tower = check_host(host, "images")
    fusing, using = host.config.layer_fusing_strategy, host.config.layer_using_strategy
    if fusing != "E_D":
        raise NotImplementedError(
            f"layer_fusing_strategy: got {fusing!r}, need 'E_D' (the others do not mix layers in front of one MLP)"
        )
    siglip = "clip" not in tower.vision_tower_name  # the repository's own test
    if siglip and using not in ("3-18-23", "latter"):
        raise NotImplementedError(f"layer_using_strategy: got {using!r}, its SigLIP tower has '3-18-23' and 'latter'")
    plan = MixPlan.layer_select(using, "siglip" if siglip else "clip").resolve(num_states(tower))
    # 'patch' drops token 0 of SigLIP too, although that is no CLS token.
    skip_tokens = 1 if tower.select_feature == "patch" else 0
    patch_mlp(edits, host.get_model().mm_projector_f, "model.mm_projector_f", impl)
    set_method(edits, host, "encode_images", _encoder(plan, skip_tokens))


def _encoder(plan: MixPlan, skip_tokens: int) -> Callable[[Any, Tensor], Tensor]:
    def encode_images(self: Any, images: Tensor) -> Tensor:
        mixed = encode(self.get_vision_tower(), images, plan, skip_tokens, no_grad=False)
        return self.get_model().mm_projector_f(mixed)

    return encode_images
