"""LLaVA's training data for LLaVA-IGVA: its JSON, its prompts with the answers supervised, sentence embeddings.

A sample is what LLaVA's scripts read: ``{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat
is this?"}, {"from": "gpt", "value": "A cat."}, ...]}``. "image" may be missing (text only) or a list of names, one per
``<image>`` in the conversation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from igva_kernels.models import LlavaIgvaProcessor
from igva_kernels.models.llava_igva.sentence_encoder import encode_instructions

IMAGE = "<image>"

_ROLES = {"human": "user", "gpt": "assistant"}


class LlavaDataset(Dataset):
    """Samples of a LLaVA JSON file, read when they are asked for.

    Args:
        data_path: the JSON file.
        image_folder: the folder that the images' names are relative to.
        sentence_encoder: the sentence-transformers model that embeds the instructions; None to have no embeddings.
        sentence_embeds: a safetensors file with one row per sample, which is made if it does not exist; None to embed
            every sample when it is read.
        image_aspect_ratio: "pad" to pad images to squares with ``pad_colour``, "square" to leave them as they are.
        pad_colour: red, green and blue, each from 0 to 255.
    """

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        image_folder: str | os.PathLike[str] = "",
        sentence_encoder: str | None = None,
        sentence_embeds: str | os.PathLike[str] | None = None,
        image_aspect_ratio: str = "square",
        pad_colour: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        self.samples = json.loads(Path(data_path).read_text())
        self.image_folder = Path(image_folder)
        self.sentence_encoder = sentence_encoder
        self.image_aspect_ratio, self.pad_colour = image_aspect_ratio, pad_colour
        self.embeds: Tensor | None = None
        if sentence_embeds is not None and sentence_encoder is not None:
            with PartialState().local_main_process_first():
                if not os.path.exists(sentence_embeds):
                    embeds = embed_instructions(self.samples, sentence_encoder)
                    unfinished = f"{os.fspath(sentence_embeds)}.{os.getpid()}"  # another run may be reading
                    save_file({"embeds": embeds}, unfinished, metadata={"encoder": sentence_encoder})
                    os.replace(unfinished, sentence_embeds)
            self.embeds = load_file(sentence_embeds)["embeds"]
            if len(self.embeds) != len(self.samples):
                raise ValueError(
                    f"sentence_embeds: {os.fspath(sentence_embeds)!r} has {len(self.embeds)} rows for "
                    f"{len(self.samples)} samples; delete it to have it made again"
                )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``messages``, ``images`` and, with an encoder, ``sentence_embeds [E]`` of a sample."""
        sample = self.samples[index]
        names = sample.get("image") or []
        images = [self._open(name) for name in ([names] if isinstance(names, str) else names)]
        turns = sample["conversations"]
        item = {"messages": [{"role": _ROLES[t["from"]], "content": t["value"]} for t in turns], "images": images}
        if self.embeds is not None:
            item["sentence_embeds"] = self.embeds[index]
        elif self.sentence_encoder is not None:
            item["sentence_embeds"] = embed_instructions([sample], self.sentence_encoder)[0]
        return item

    def _open(self, name: str) -> Image.Image:
        image = Image.open(self.image_folder / name).convert("RGB")
        if self.image_aspect_ratio == "pad":
            side = max(image.size)
            image = ImageOps.pad(image, (side, side), color=self.pad_colour)
        return image


def embed_instructions(samples: Sequence[dict[str, Any]], encoder: str) -> Tensor:
    """One embedding per sample ``[N, E]``: the mean over its questions, as IGVA's authors make them."""
    questions = [
        [t["value"].replace(IMAGE, "").strip() for t in sample["conversations"] if t["from"] == "human"]
        for sample in samples
    ]
    return encode_instructions(encoder, questions)


@dataclass
class LlavaCollator:
    """A batch of the model's inputs, with labels: answers are supervised, everything else is -100.

    Args:
        processor: its chat template marks the answers (``{% generation %}``).
        max_length: longer prompts are cut at the end.
    """

    processor: LlavaIgvaProcessor
    max_length: int | None = None

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` and, where there are any, ``pixel_values`` and
        ``sentence_embeds``."""
        images = [image for item in items for image in item["images"]]
        batch: dict[str, Tensor] = {}
        if images:
            batch["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        if "sentence_embeds" in items[0]:
            batch["sentence_embeds"] = torch.stack([item["sentence_embeds"] for item in items])
        places = IMAGE * self.tokens_per_image
        tokens = self.processor.tokenizer.apply_chat_template(
            [[{**m, "content": m["content"].replace(IMAGE, places)} for m in item["messages"]] for item in items],
            chat_template=self.processor.chat_template,
            tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt",
            padding=True, truncation=self.max_length is not None, max_length=self.max_length,
        )  # fmt: skip
        supervised = torch.as_tensor(tokens["assistant_masks"], dtype=torch.bool) & tokens["attention_mask"].bool()
        labels = tokens["input_ids"].masked_fill(~supervised, -100)
        return {**batch, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}

    @property
    def tokens_per_image(self) -> int:
        """Image tokens in the prompt for each image."""
        size = self.processor.image_processor.crop_size or self.processor.image_processor.size
        grid = (size["height"] // self.processor.patch_size) * (size["width"] // self.processor.patch_size)
        dropped = self.processor.vision_feature_select_strategy == "default"
        return grid + self.processor.num_additional_image_tokens - dropped
