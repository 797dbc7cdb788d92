"""Tiny random models of transformers with DeepStack, and inputs for them, for every version that is tested."""

import inspect
from typing import NamedTuple

import pytest
import torch
import transformers
from hosts import liven
from seeds import seeded

IMAGE, VIDEO, START, END, AUDIO, PAD = 90, 91, 92, 93, 94, 0
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96,
)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1)
TOWER = dict(
    depth=5, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0, 2, 4],
)  # fmt: skip
"""The taps 0, 2, 4 feed the layers 0, 1, 2 of the language model."""
TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


class Host(NamedTuple):
    """A model, the module whose method injects, and the mergers of DeepStack."""

    model: torch.nn.Module
    language_model: torch.nn.Module
    mergers: torch.nn.ModuleList


def deepstack_host(name, seed=0):
    """The model in eval mode; skips where this version of transformers lacks it."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(seeded(seed))
    model = HOSTS[name]()
    model = liven(model.eval())
    language_model = next(module for module in model.modules() if hasattr(type(module), "_deepstack_process"))
    if name == "GraniteDocling":
        return Host(model, language_model, model.model.vision_model.connector.coarse.deepstack_mergers)
    tower = next(module for module in model.modules() if hasattr(module, "deepstack_merger_list"))
    return Host(model, language_model, tower.deepstack_merger_list)


def _qwen3_vl():
    text = transformers.Qwen3VLTextConfig(**TEXT, head_dim=8, **_rope())
    config = transformers.Qwen3VLConfig(text_config=text.to_dict(), vision_config=dict(TOWER), **TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen3_vl_moe():
    text = transformers.Qwen3VLMoeTextConfig(**TEXT, head_dim=8, **EXPERTS, **_rope())
    config = transformers.Qwen3VLMoeConfig(text_config=text.to_dict(), vision_config=dict(TOWER), **TOKENS)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def _qwen3_omni():
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerForConditionalGeneration

    audio = dict(
        num_mel_bins=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, d_model=16, output_dim=32,
        n_window=2, downsample_hidden_size=8, max_source_positions=64,
    )  # fmt: skip
    text = dict(**TEXT, head_dim=8, **EXPERTS, **_rope())
    config = Qwen3OmniMoeThinkerConfig(
        audio_config=audio, vision_config=dict(TOWER, image_size=16), text_config=text, audio_token_id=AUDIO,
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return Qwen3OmniMoeThinkerForConditionalGeneration(config)


def _cohere_compass():
    from transformers.models.cohere_compass.modeling_cohere_compass import CohereCompassForConditionalGeneration

    kinds = ("sliding_attention", "full_attention")
    text = dict(
        **TEXT, layer_types=[*kinds] * 2, sliding_window=64, rope_parameters={kind: dict(ROPE) for kind in kinds},
        eos_token_id=2,
    )  # fmt: skip
    config = transformers.CohereCompassConfig(text_config=text, vision_config=dict(TOWER), **TOKENS)
    return CohereCompassForConditionalGeneration(config)


def _granite_docling():
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=16, patch_size=4,
        out_hidden_size=32, scale_factor=2, deepstack_visual_indexes=[0, 1, 3],
    )  # fmt: skip
    config = transformers.GraniteDoclingConfig(
        text_config=dict(**TEXT, pad_token_id=PAD, bos_token_id=1, eos_token_id=2), vision_config=vision,
        image_token_id=IMAGE, pad_token_id=PAD,
    )  # fmt: skip
    return transformers.GraniteDoclingForConditionalGeneration(config)


def _rope():
    """transformers 4 calls them otherwise."""
    if int(transformers.__version__.partition(".")[0]) < 5:
        return {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    return {"rope_parameters": dict(ROPE)}


HOSTS = {
    "Qwen3VL": _qwen3_vl,
    "Qwen3VLMoe": _qwen3_vl_moe,
    "Qwen3OmniMoe": _qwen3_omni,
    "CohereCompass": _cohere_compass,
    "GraniteDocling": _granite_docling,
}


def deepstack_inputs(host, images=((1, 4, 4), (1, 4, 8)), videos=(), labels=False, padding="left", seed=0):
    """Two rows of a batch: the first holds all images and videos ``(frames, height, width)``, the second has only text
    and is padded."""
    generator = torch.Generator().manual_seed(seeded(seed))
    docling = type(host.model).__name__.startswith("GraniteDocling")
    row, inputs = [_text(4, generator)], {}
    for token, grids in ((IMAGE, images), (VIDEO, videos)):
        for frames, height, width in grids:
            for _ in range(frames):  # transformers 5 places the frames of a video apart
                row += [torch.tensor([START]), torch.full((4 if docling else height * width // 4,), token)]
                row += [torch.tensor([END]), _text(2, generator)]
        if grids and not docling:
            names = ("pixel_values", "image_grid_thw") if token == IMAGE else ("pixel_values_videos", "video_grid_thw")
            patches = sum(frames * height * width for frames, height, width in grids)
            inputs[names[0]] = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
            inputs[names[1]] = torch.tensor(grids)
    if videos and "video_second_per_grid" in inspect.signature(host.model.forward).parameters:
        inputs["video_second_per_grid"] = torch.ones(len(videos))
    rows = [torch.cat(row), _text(5, generator)]
    if docling and images:
        inputs["pixel_values"] = torch.randn(2, len(images), 3, 16, 16, generator=generator)
        inputs["pixel_attention_mask"] = torch.tensor([[True] * len(images), [False] * len(images)])
    length = max(len(each) for each in rows)
    ids, mask = torch.full((2, length), PAD), torch.zeros(2, length, dtype=torch.long)
    for i, each in enumerate(rows):
        at = slice(length - len(each), length) if padding == "left" else slice(0, len(each))
        ids[i, at], mask[i, at] = each, 1
    inputs |= {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in _parameters(host.model):
        inputs["mm_token_type_ids"] = ((ids == IMAGE) + 2 * (ids == VIDEO)).int()
    if labels:
        inputs["labels"] = ids.masked_fill((mask == 0) | (ids >= IMAGE), -100)
    return inputs


def _parameters(model):
    return inspect.signature(model.model.forward).parameters


def _text(count, generator):
    return torch.randint(3, IMAGE, (count,), generator=generator)
