"""Processor of LLaVA-IGVA: Llava's, with sentence embeddings of the instructions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature, LlavaProcessor

from igva_kernels.models.llava_igva.configuration_llava_igva import AUTO_CLASSES, LlavaIgvaConfig
from igva_kernels.models.llava_igva.remote_code import CarriesRemoteCode, auto_map
from igva_kernels.models.llava_igva.sentence_encoder import encode_instructions

REMEMBERED_PROMPTS = 1024
"""Rendered chats whose instructions a processor remembers: more than the batches that clients render at a time."""


class LlavaIgvaProcessor(CarriesRemoteCode, LlavaProcessor):
    """Turns prompts, images and instructions into the model's inputs.

    The instruction of a sample is, in this order:

    1. what ``instructions`` says;
    2. the text of the user in the chat: of the last message, or of all of them where the chat ends with an answer, as
       samples for training do; the embedding is then the mean over the questions, as IGVA's authors make it;
    3. the same of the chat that ``apply_chat_template(tokenize=False)`` has rendered to this very prompt.

    A prompt of another origin has none, because the question cannot be told from the template around it: the model then
    asks for ``sentence_embeds`` or ``instructions``.

    Args:
        sentence_encoder: name or directory of the sentence-transformers model that embeds instructions.
        reads_instructions: whether the model's layer weights depend on the instruction, so that it is looked for in
            chats with images. Otherwise instructions are embedded only where they are given.

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
        reads_instructions: bool = False,
        **kwargs: Any,
    ) -> None:
        self.sentence_encoder = sentence_encoder
        self.reads_instructions = reads_instructions
        self.auto_map = auto_map({"AutoProcessor": AUTO_CLASSES["AutoProcessor"]})
        self._rendered: OrderedDict[str, list[str]] = OrderedDict()
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
            reads_instructions=config.reads_instructions, **kwargs,
        )  # fmt: skip

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        instructions: str | Sequence[str | Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """``LlavaProcessor``'s inputs and, with instructions, ``sentence_embeds [B, E]`` in fp32.

        Args:
            images: the images of all prompts, in order.
            text: one prompt or B prompts, each with one image token per image.
            instructions: one bare instruction per prompt, without chat template or image tokens; or a list of them, of
                whose embeddings the mean is taken.
            kwargs: as in ``LlavaProcessor``.

        Raises:
            ValueError: there are instructions, but the processor has no ``sentence_encoder``.
            ImportError: there are instructions, but sentence-transformers is not installed.
        """
        inputs = super().__call__(images=images, text=text, **kwargs)
        if instructions is None and self.reads_instructions and "pixel_values" in inputs:
            instructions = self._recall([text] if isinstance(text, str) else text)
        if instructions is not None:
            given = [instructions] if isinstance(instructions, str) else instructions
            inputs["sentence_embeds"] = encode_instructions(self.sentence_encoder, given)
        return inputs

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        instructions: str | Sequence[str | Sequence[str]] | None = None,
        tokenize: bool = False,
        continue_final_message: bool | str = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """``LlavaProcessor.apply_chat_template``; tokenised with ``return_dict``, it has ``sentence_embeds [B, E]``.

        Args:
            conversation: a chat or B chats: messages with "role" and "content".
            instructions: as in ``__call__``; None to take them from the chats, if the model reads them.
            tokenize: whether to make the model's inputs of the prompts.
            continue_final_message: whether the model is to go on with an answer that has begun.
            processor_kwargs: for ``__call__``, which may also name the ``instructions``.
            kwargs: as in ``LlavaProcessor``.

        Raises:
            ValueError: the instructions are to be taken from a chat in which the user shows an image and says nothing,
                or the processor has no ``sentence_encoder``.
            ImportError: sentence-transformers is not installed.
        """
        chats = [conversation] if isinstance(conversation[0], Mapping) else conversation
        chats = [getattr(chat, "messages", chat) for chat in chats]
        for_call = dict(processor_kwargs or {})
        given = for_call.pop("instructions", None) if instructions is None else instructions
        found: list[list[str]] = []
        if given is None and self.reads_instructions and ("images" in for_call or any(map(self._shows_image, chats))):
            found = [self._questions(chat, bool(continue_final_message)) for chat in chats]
        if tokenize:
            for row, (chat, questions) in enumerate(zip(chats, found, strict=False)):
                if not questions and self._shows_image(chat):
                    raise ValueError(
                        f"conversation: chat {row} shows an image and has no text of the user, by which its layers "
                        f"are weighted; need one, or instructions"
                    )
            if given is not None or found:
                for_call["instructions"] = found if given is None else given
        rendered = super().apply_chat_template(
            conversation, chat_template, tokenize=tokenize, continue_final_message=continue_final_message,
            processor_kwargs=for_call, **kwargs,
        )  # fmt: skip
        if not tokenize:
            for prompt, questions in zip([rendered] if isinstance(rendered, str) else rendered, found, strict=False):
                self._remember(prompt, questions)
        return rendered

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "sentence_embeds"]

    def _questions(self, chat: Sequence[Mapping[str, Any]], answer_goes_on: bool) -> list[str]:
        """What the user says in the chat; only the last of it, if the model is to answer."""
        said = [self._text(message.get("content")) for message in chat if message["role"] == "user"]
        said = [text for text in said if text]
        is_answered = chat[-1]["role"] == "assistant" and not answer_goes_on
        return said if is_answered else said[-1:]

    def _shows_image(self, chat: Sequence[Mapping[str, Any]]) -> bool:
        parts = [part for message in chat for part in _parts(message.get("content"))]
        return any(
            part.get("type", "").startswith("image") or self.image_token in part.get("text", "") for part in parts
        )

    def _text(self, content: Any) -> str:
        texts = [part["text"] for part in _parts(content) if part.get("type") == "text"]
        texts = [text.replace(self.image_token, "").strip() for text in texts]
        return "\n".join(filter(None, texts))

    def _remember(self, prompt: str, questions: list[str]) -> None:
        self._rendered[prompt] = questions
        self._rendered.move_to_end(prompt)
        while len(self._rendered) > REMEMBERED_PROMPTS:
            self._rendered.popitem(last=False)

    def _recall(self, prompts: Sequence[str] | None) -> list[list[str]] | None:
        """The questions of prompts that this processor has rendered, if it has rendered all of them."""
        found = [self._rendered.get(prompt) for prompt in prompts or [] if isinstance(prompt, str)]
        return [questions or [] for questions in found] if found and all(found) else None


def _parts(content: Any) -> Sequence[Mapping[str, Any]]:
    """The parts of a message, each with its type; a string is one of text."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []
