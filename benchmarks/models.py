"""The tasks of the reference model, with random weights: vision side at full size, language model of one layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks.workloads import CLIP_L, DISTINCT_IMAGES, HIDDEN, Model
from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaForConditionalGeneration, LlavaIgvaModel
from igva_kernels.nn import column_summaries
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.streaming import stream_hidden_states

_CLIP_L: dict[str, Any] = {
    "hidden_size": CLIP_L.width, "intermediate_size": 4 * CLIP_L.width, "num_hidden_layers": CLIP_L.layers,
    "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "head_dim": 128,
}

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "clip-l-336": (_CLIP_L | {"image_size": 336}, _LLAMA, {}),
    "clip-l-224": (_CLIP_L | {"image_size": 224}, _LLAMA, {}),
    "tiny": (
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2,
         "image_size": 28, "patch_size": 14},
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        {"sentence_embed_dim": 12, "allocator_hidden_dim": 16, "allocator_num_blocks": 2, "allocator_num_heads": 2},
    ),
}  # fmt: skip
"""By size: fields of the vision config, of the text config, and of ``LlavaIgvaConfig``."""

IMAGE = 60
"""The id of the image token."""
TEXT_TOKENS = 64
"""Tokens of text per sample in a training step."""

Results = dict[str, Tensor]


class ModelInputs(NamedTuple):
    """A model and what it is asked."""

    model: LlavaIgvaForConditionalGeneration
    pixels: Tensor
    sentences: Tensor
    optimizer: torch.optim.Optimizer
    states: Sequence[Tensor]
    """The tower's hidden states, if the task begins with them."""
    encoded: Any
    """The encoded image, if the task begins with it."""

    def double(self) -> ModelInputs:
        """The same numbers in fp64."""
        model = copy.deepcopy(self.model).double()
        states = [state.double() for state in self.states]
        return ModelInputs(model, self.pixels.double(), self.sentences.double(), _optimizer(model), states, None)


@lru_cache(maxsize=1)
def _model(size: str, dtype: torch.dtype, device: str) -> LlavaIgvaForConditionalGeneration:
    """A random model, kept for the workloads that follow: no task changes it, and drawing it takes seconds."""
    torch.manual_seed(0)
    vision, language, fields = SIZES[size]
    config = LlavaIgvaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**language, vocab_size=64),
        image_token_index=IMAGE, **fields,
    )  # fmt: skip
    return LlavaIgvaForConditionalGeneration(config).eval().to(device, dtype)


def draw(workload: Model, device: str) -> ModelInputs:
    """A random model on ``device`` and its inputs."""
    model = _model(workload.size, workload.torch_dtype, device)
    config = model.config
    torch.manual_seed(1)
    side = config.vision_config.image_size
    rows = max(workload.batch, workload.questions)
    few = min(workload.batch, DISTINCT_IMAGES)
    pixels = torch.randn(few, 3, side, side).repeat(workload.batch // few, 1, 1, 1).to(device, workload.torch_dtype)
    sentences = torch.randn(rows, config.sentence_embed_dim).to(device, workload.torch_dtype)
    states: Sequence[Tensor] = ()
    encoded = None
    if workload.task == "connector":
        with torch.no_grad():
            states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    elif workload.task == "another question":
        encoded = model.encode_images(pixels)
    return ModelInputs(model, pixels, sentences, _optimizer(model), states, encoded)


def _optimizer(model: LlavaIgvaForConditionalGeneration) -> torch.optim.Optimizer:
    # With a learning rate of zero it does all its work, and the next round starts from the same weights.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)


def _tell(model: LlavaIgvaForConditionalGeneration, impl: str, streams: bool = True) -> LlavaIgvaModel:
    model.model.multi_modal_projector.impl = impl
    model.model.config.stream_hidden_states = streams
    return model.model


@torch.no_grad()
def tower_alone(inputs: ModelInputs) -> Tensor:
    """The vision tower without a connector: the floor."""
    return inputs.model.model.vision_tower(inputs.pixels).last_hidden_state


@torch.no_grad()
def tower(inputs: ModelInputs, impl: str, mode: str | None = "group") -> Results:
    """From pixels to visual tokens; ``mode`` as in ``stream_hidden_states``, None if all states are kept."""
    model = _tell(inputs.model, impl, mode is not None)
    if mode != "layer":
        tokens = model.get_image_features(inputs.pixels, inputs.sentences).pooler_output
        return {"visual tokens": torch.stack(list(tokens))}
    with stream_hidden_states(model.vision_tower, model.multi_modal_projector.plan, mode=mode, impl=impl) as stream:
        model.vision_tower(inputs.pixels)
    return _connect(model, stream.sources, stream.plan, inputs.sentences, impl)


@torch.no_grad()
def connector(inputs: ModelInputs, impl: str) -> Results:
    """From the tower's states to visual tokens: group CLS, allocator, connector."""
    model = _tell(inputs.model, impl)
    plan = model.multi_modal_projector.plan.resolve(len(inputs.states))
    return _connect(model, inputs.states, plan, inputs.sentences, impl)


def _connect(
    model: LlavaIgvaModel, states: Sequence[Tensor], plan: MixPlan, sentences: Tensor, impl: str
) -> Results:  # fmt: skip
    assert model.weight_allocator is not None
    summaries = column_summaries(states, plan, model.config.vision_has_cls, impl)
    weights = model.weight_allocator(sentences, summaries, impl="reference" if impl == "reference" else "auto")
    return {"visual tokens": model.multi_modal_projector(states, weights, plan=plan)}


@torch.no_grad()
def questions(inputs: ModelInputs, impl: str) -> Results:
    """Visual tokens for several instructions about one image: a forward for each, or the image encoded once."""
    model, sentences = _tell(inputs.model, impl), inputs.sentences
    if impl == "reference":
        tokens = [model.get_image_features(inputs.pixels, sentences[i : i + 1]).pooler_output[0]
                  for i in range(len(sentences))]  # fmt: skip
    else:
        index = torch.zeros(len(sentences), dtype=torch.int64, device=sentences.device)
        encoded = model.encode_images(inputs.pixels)
        tokens = model.get_image_features(
            sentence_embeds=sentences, image_features=encoded, image_index=index
        ).pooler_output  # fmt: skip
    return {"visual tokens": torch.stack(list(tokens))}


@torch.no_grad()
def another_question(inputs: ModelInputs, impl: str) -> Results:
    """One more instruction about an image that was encoded before; plain torch runs the tower again."""
    model = _tell(inputs.model, impl)
    if impl == "reference":
        found = model.get_image_features(inputs.pixels, inputs.sentences)
    else:
        found = model.get_image_features(sentence_embeds=inputs.sentences, image_features=inputs.encoded)
    return {"visual tokens": torch.stack(list(found.pooler_output))}


def training_step(inputs: ModelInputs, impl: str) -> Results:
    """Forward, backward and AdamW; the tower is frozen. Returns the gradients of the projector."""
    model = inputs.model.train()
    _tell(model, impl)
    config, batch, device = model.config, len(inputs.pixels), inputs.pixels.device
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    text = torch.arange(TEXT_TOKENS, device=device).remainder(50).expand(batch, -1)
    ids = torch.cat([text.new_full((batch, patches), IMAGE), text], dim=1)
    labels = ids.masked_fill(ids == IMAGE, -100)
    out = model(input_ids=ids, pixel_values=inputs.pixels, sentence_embeds=inputs.sentences, labels=labels)
    out.loss.backward()
    inputs.optimizer.step()
    projector = model.model.multi_modal_projector
    grads = {f"grad {name}": param.grad for name, param in projector.named_parameters()}
    inputs.optimizer.zero_grad()
    model.eval()
    return grads


TASKS = {
    "tower": tower, "connector": connector, "questions": questions, "another question": another_question,
    "training step": training_step,
}  # fmt: skip
