"""TGIF (arXiv 2601.03100): a sum of all layers, weighted by the text, plus the penultimate one, under a LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.integrations.lazy import activation_of, patch_projector, set_method
from igva_kernels.integrations.research import check_host, check_mlp, encode, find_host, has_host, num_states
from igva_kernels.nn import Connector
from igva_kernels.ops.weighted_mix import MixPlan

DESCRIPTION = "the TGIF repository (layer_selector)"


def matches(model: nn.Module) -> bool:
    """Whether ``model`` contains a model of the repository."""
    return has_host(model, "mm_projector_type") and find_host(model).config.mm_projector_type == "layer_selector"


def apply(model: nn.Module, edits: PatchHandle, impl: str = "auto") -> None:
    """Let the projector mix and normalise what the tower stacks and the layer selector sums."""
    host = find_host(model)
    tower = check_host(host, "images", "text_embeddings")
    states = num_states(tower)
    plan = MixPlan.weighted_sum(range(1, states), residual=-2, num_states=states)
    projector = host.get_model().mm_projector
    check_mlp(projector.mlp, "model.mm_projector.mlp")
    activation = activation_of(projector.mlp[1], "model.mm_projector.mlp[1]")
    patch_projector(edits, projector, _children, activation, impl, "model.mm_projector")
    has_cls = tower.config.model_type != "siglip_vision_model"
    set_method(edits, host, "encode_images", _encoder(plan, 1 if has_cls and tower.select_feature == "patch" else 0))


def _children(projector: Any) -> Connector:
    return Connector(projector.layer_selector.norm, projector.mlp[0], projector.mlp[1], projector.mlp[2])


def _encoder(plan: MixPlan, skip_tokens: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def encode_images(self: Any, images: Tensor, text_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        projector = self.get_model().mm_projector
        weights = projector.layer_selector.layer_weights_projection(text_embeddings).softmax(dim=-1)
        mixed = encode(self.get_vision_tower(), images, plan, skip_tokens)
        return projector(mixed._replace(mix_weights=weights)), weights

    return encode_images
