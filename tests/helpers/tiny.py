"""Tiny random models of the real classes, and batches for them."""

import torch
from harness import quick_impls
from hosts import liven
from seeds import seeded
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, SiglipVisionConfig

from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaForConditionalGeneration

IMAGE, PAD, EMBED, VISION, TEXT = 60, 0, 12, 16, 32
PATCHES = 4
"""Visual tokens per image: 28 / 14 squared."""

FUSED = quick_impls("weighted_mix")
"""Backends whose kernels serve CPU tensors here."""


def vision_config(tower="clip", **overrides):
    sizes = {"hidden_size": VISION, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower]
    return config(**{**sizes, "image_size": 28, "patch_size": 14, **overrides})


def text_config():
    return LlamaConfig(
        hidden_size=TEXT, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def llava_config(tower="clip", **overrides):
    return LlavaConfig(
        vision_config=vision_config(tower), text_config=text_config(), image_token_index=IMAGE, **overrides
    )


SMALL = {
    "mix_groups": 2,
    "sentence_embed_dim": EMBED,
    "allocator_hidden_dim": 16,
    "allocator_num_blocks": 2,
    "allocator_num_heads": 2,
    "impl": "reference",
}


def igva_config(tower="clip", **overrides):
    fields = {"vision_config": vision_config(tower), "text_config": text_config(), "image_token_index": IMAGE}
    return LlavaIgvaConfig(**{**fields, **SMALL, **overrides})


def igva_model(tower="clip", seed=0, **overrides):
    torch.manual_seed(seeded(seed))
    return liven(LlavaIgvaForConditionalGeneration(igva_config(tower, **overrides)).eval())


def prompts(images_per_sample, padding="right", seed=0):
    """``input_ids`` and ``attention_mask`` of samples with these numbers of images; lengths differ by sample."""
    generator = torch.Generator().manual_seed(seeded(seed))
    rows = []
    for sample, images in enumerate(images_per_sample):
        row = torch.randint(3, 60, (4 + sample,), generator=generator)
        for _ in range(images):
            text = torch.randint(3, 60, (2,), generator=generator)
            row = torch.cat([row, torch.full((PATCHES,), IMAGE), text])
        rows.append(row)
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if padding == "right" else slice(length - len(row), length)
        ids[i, at], mask[i, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def batch(images_per_sample=(1, 1), padding="right", seed=0, labels=False):
    """Inputs of the model, images included."""
    generator = torch.Generator().manual_seed(seeded(seed))
    inputs = prompts(images_per_sample, padding, seed)
    if sum(images_per_sample):
        inputs["pixel_values"] = torch.randn(sum(images_per_sample), 3, 28, 28, generator=generator)
    inputs["sentence_embeds"] = torch.randn(len(images_per_sample), EMBED, generator=generator)
    if labels:
        supervised = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != IMAGE)
        inputs["labels"] = inputs["input_ids"].masked_fill(~supervised, -100)
    return inputs
