"""DenseConnector (arXiv 2405.13800): a base layer beside two layers (sci) or two means of layers (dci)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.integrations.lazy import set_method
from igva_kernels.integrations.research import check_host, encode, find_host, has_host, num_states, patch_mlp
from igva_kernels.ops.weighted_mix import MixPlan

DESCRIPTION = "the DenseConnector repository (sci, dci)"


def matches(model: nn.Module) -> bool:
    """Whether ``model`` contains a model of the repository."""
    return has_host(model, "mm_dense_connector_type")


def apply(model: nn.Module, edits: PatchHandle, impl: str = "auto") -> None:
    """Let the projector mix what ``dense_connector`` stacks, averages and concatenates."""
    host = find_host(model)
    tower = check_host(host, "images")
    kind = host.config.mm_dense_connector_type
    if kind not in ("sci", "dci"):
        raise NotImplementedError(
            f"mm_dense_connector_type: got {kind!r}, need 'sci' or 'dci' ('sti' adds tokens, not layers)"
        )
    siglip = host.is_siglip()
    if not siglip and tower.select_feature != "patch":
        raise NotImplementedError(f"mm_vision_select_feature: got {tower.select_feature!r}, need 'patch'")
    dense = MixPlan.dense_connector(kind, "siglip" if siglip else "clip").blocks[1:]
    base = MixPlan.concat([-1 if siglip else tower.select_layer]).blocks
    plan = MixPlan((*base, *dense)).resolve(num_states(tower))
    patch_mlp(edits, host.get_model().mm_projector, "model.mm_projector", impl)
    set_method(edits, host, "encode_images", _encoder(plan, siglip))


def _encoder(plan: MixPlan, siglip: bool) -> Callable[[Any, Tensor], Tensor]:
    def encode_images(self: Any, images: Tensor) -> Tensor:
        core = self.get_model()
        # Its SigLIP tower has no CLS token and, unlike its CLIP tower, runs with gradients.
        tokens = core.mm_projector(encode(self.get_vision_tower(), images, plan, 0 if siglip else 1, not siglip))
        return self.temporal_aggregation(tokens) if core.config.is_video else tokens

    return encode_images
