"""From a Llava checkpoint to LLaVA-IGVA: the config, and the weights with ``linear_1`` widened."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from igva_kernels.models.llava_igva.configuration_llava_igva import LlavaIgvaConfig
from igva_kernels.plan import is_tap


def upgraded_config(llava: LlavaConfig, overrides: dict[str, Any]) -> LlavaIgvaConfig:
    """The Llava's config with the fields of ``LlavaIgvaConfig`` at their defaults or as overridden."""
    fields = llava.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        fields.pop(name, None)
    return LlavaIgvaConfig(**{**fields, **overrides})


def upgraded_state_dict(llava: LlavaForConditionalGeneration, config: LlavaIgvaConfig) -> dict[str, Tensor]:
    """The Llava's weights; ``linear_1`` reads each of its layers in the plan's block for it and zeros elsewhere.

    Raises:
        ValueError: a layer that the Llava reads is no block of the plan.
    """
    state_dict = llava.state_dict()
    name = "model.multi_modal_projector.linear_1.weight"
    narrow = state_dict[name]
    plan, width = config.plan, config.vision_config.hidden_size
    num_states = config.vision_config.num_hidden_layers + 1
    taps = {block[0].layer: g for g, block in enumerate(plan.blocks) if is_tap(block)}
    layers = llava.config.vision_feature_layer
    wide = narrow.new_zeros(narrow.shape[0], plan.num_blocks * width)
    for i, layer in enumerate([layers] if isinstance(layers, int) else layers):
        block = taps.get(layer % num_states)
        if block is None:
            raise ValueError(f"mix_plan: the Llava reads layer {layer}, need a block of that layer alone, got {plan}")
        wide[:, block * width : (block + 1) * width] = narrow[:, i * width : (i + 1) * width]
    return {**state_dict, name: wide}
