"""LLaVA-IGVA as lmms-eval runs a model: ``pip install igva-kernels[eval]``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.models.chat.huggingface import Huggingface
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from transformers import AutoProcessor

from igva_kernels.models import LlavaIgvaForConditionalGeneration

MAX_NEW_TOKENS = 1024
"""Of an answer, where the task does not say."""


class LlavaIgva(Huggingface):
    """``lmms-eval --model llava_igva --model_args pretrained=DIR --tasks mme``.

    The instruction by which a sample's layers are weighted is the question as the task puts it, with the sentence on
    the form of the answer ("Answer the question using a single word or phrase."), as in LLaVA's training data.

    Args:
        pretrained: name or directory of a checkpoint with its processor.
        revision: of a checkpoint on the hub.
        dtype: of the weights; "auto" for that of the checkpoint.
        device: None for the process's own accelerator.
        batch_size: prompts that are answered together.
        attn_implementation: as in transformers.
        impl: which implementation the connector uses, as in ``layer_mix``.
        chat_template: a file with the template; None for that of the processor.
        system_prompt: put in front of every chat; the text, or a file with it.
        max_batch_size: ignored; lmms-eval passes it to every model.

    Raises:
        ValueError: neither the processor nor ``chat_template`` has a chat template.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
        impl: str = "auto",
        chat_template: str | os.PathLike[str] | None = None,
        system_prompt: str | None = None,
        max_batch_size: int | str | None = None,
    ) -> None:
        super(Huggingface, self).__init__()  # Huggingface's own loads classes that it knows, in bfloat16
        self.accelerator = Accelerator()
        several = self.accelerator.num_processes > 1
        self._device = self.accelerator.device if several or device is None else torch.device(device)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size_per_gpu = int(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else None
        model = LlavaIgvaForConditionalGeneration.from_pretrained(
            pretrained, revision=revision, dtype=dtype, attn_implementation=attn_implementation, impl=impl
        )
        self._model = model.to(self._device).eval()
        self._config = model.config
        self.processor = AutoProcessor.from_pretrained(pretrained, revision=revision)
        self._tokenizer = self.processor.tokenizer
        self._tokenizer.padding_side = "left"
        if chat_template is not None:
            self.processor.chat_template = Path(chat_template).read_text()
        if self.processor.chat_template is None:
            raise ValueError(f"chat_template: {pretrained!r} has none; need the file of one")

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """The answers to the requests, in their order."""
        order = Collator(
            [request.args for request in requests], lambda args: -len(args[0]), group_fn=lambda args: args[2],
            grouping=True,
        )  # fmt: skip
        answers = [answer for batch in order.get_batched(n=self.batch_size) for answer in self._answers(batch)]
        return order.get_original(answers)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Not there: LLaVA's benchmarks are about generated answers.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("loglikelihood: LLaVA-IGVA answers tasks of the type 'generate_until' only")

    def _answers(self, batch: Sequence[Sequence[Any]]) -> list[GenerationResult]:
        asked, to_messages, settings, rows, tasks, splits = zip(*batch, strict=True)
        docs = [self.task_dict[task][split][row] for task, split, row in zip(tasks, splits, rows, strict=True)]
        inputs = self.processor.apply_chat_template(
            [self._chat(messages(doc)) for messages, doc in zip(to_messages, docs, strict=True)],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
            processor_kwargs={"padding": True},
        ).to(self._device)  # fmt: skip
        said = settings[0]  # the same for all: the batches are grouped by it
        sampled = said.get("do_sample", said.get("temperature", 0) > 0)
        options = {name: said[name] for name in ("temperature", "top_p") if sampled and name in said}
        out = self.model.generate(
            **inputs, do_sample=sampled, num_beams=said.get("num_beams", 1),
            max_new_tokens=said.get("max_new_tokens", MAX_NEW_TOKENS), pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
        ends = said.get("until", [])
        answers = []
        for context, tokens in zip(asked, out, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            for end in filter(None, [ends] if isinstance(ends, str) else ends):
                text = text.split(end)[0]
            self.cache_hook.add_partial("generate_until", (context, said), text)
            count = int((tokens != self.tokenizer.pad_token_id).sum())
            answers.append(GenerationResult(text=text, token_counts=TokenCounts(output_tokens=count)))
        return answers

    def _chat(self, messages: Any) -> list[dict[str, Any]]:
        if self.system_prompt:
            messages = self._apply_system_prompt(list(messages), self.system_prompt)
        chat = ChatMessages(messages=messages)
        _, videos, audios = chat.extract_media()
        if videos or audios:
            raise NotImplementedError(f"LLaVA-IGVA reads images: got {len(videos)} videos and {len(audios)} sounds")
        return chat.to_hf_messages()
