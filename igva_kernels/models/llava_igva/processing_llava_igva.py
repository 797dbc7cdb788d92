"""Processor of LLaVA-IGVA: Llava's, with sentence embeddings of the instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, LlavaProcessor

from igva_kernels.models.llava_igva.configuration_llava_igva import LlavaIgvaConfig
from igva_kernels.models.llava_igva.sentence_encoder import encode_sentences


class LlavaIgvaProcessor(LlavaProcessor):
    """Turns prompts, images and instructions into the model's inputs.

    Args:
        sentence_encoder: name or directory of the sentence-transformers model that embeds ``instructions``.

    The other arguments are those of ``LlavaProcessor``; ``from_config`` sets them as a model needs them.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        sentence_encoder: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.sentence_encoder = sentence_encoder
        super().__init__(
            image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
            num_additional_image_tokens, **kwargs,
        )  # fmt: skip

    @classmethod
    def from_config(
        cls, config: LlavaIgvaConfig, image_processor: Any, tokenizer: Any, **kwargs: Any
    ) -> LlavaIgvaProcessor:
        """The processor of a model with this config."""
        return cls(
            image_processor, tokenizer, config.vision_config.patch_size, config.vision_feature_select_strategy,
            num_additional_image_tokens=int(bool(config.vision_has_cls)), sentence_encoder=config.sentence_encoder,
            **kwargs,
        )  # fmt: skip

    def __call__(
        self, images: Any = None, text: Any = None, *, instructions: str | Sequence[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """``LlavaProcessor``'s inputs and, with instructions, ``sentence_embeds [B, E]``.

        Args:
            images: the images of all prompts, in order.
            text: one prompt or B prompts, each with one image token per image.
            instructions: one bare instruction per prompt, without chat template or image tokens.
            kwargs: as in ``LlavaProcessor``.

        Raises:
            ValueError: there are instructions, but the processor has no ``sentence_encoder``.
            ImportError: there are instructions, but sentence-transformers is not installed.
        """
        inputs = super().__call__(images=images, text=text, **kwargs)
        if instructions is not None:
            texts = [instructions] if isinstance(instructions, str) else instructions
            inputs["sentence_embeds"] = encode_sentences(self.sentence_encoder, texts)
        return inputs

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "sentence_embeds"]
