"""What the demo measures: the connector on the real hidden states of the image, and the whole model around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from igva_kernels.integrations import patched
from igva_kernels.models import LlavaIgvaForConditionalGeneration
from igva_kernels.ops.weighted_mix.cases import KINK, OUTPUT, Case, Inputs
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.testing import ENOUGH_ELEMENTS, Verdict, judge, measure_memory, relative_error

T = TypeVar("T")

CONNECTORS = {"plain": "reference", "fused": "auto"}
"""The demo's connectors and the ``impl`` of each."""

ROUNDS = 3
"""Timed calls per connector, of which the median counts."""
NEW_TOKENS = 12
"""The most tokens of one answer."""
LEARNING_RATE = 3e-4
"""AdamW's learning rate for everything but the allocator."""
ALLOCATOR_RATE = 1e-5
"""AdamW's learning rate for the allocator: at a higher rate it settles on one layer group before the projector can read
any."""


@dataclass
class Answers:
    """What a model answers, decoded greedily."""

    texts: list[str]
    tokens: Tensor
    """``[B, N]``"""
    logits: Tensor
    """``[B, N, vocabulary]``; each token has the largest logit at its place."""

    def gap(self, other: Answers, row: int) -> float:
        """How clearly this model preferred its own token where the other model's answer first differs.

        Returns:
            The logit of its own token less that of the other's, in standard deviations of its logits; 0 where the
            answers are the same.
        """
        length = min(self.tokens.shape[1], other.tokens.shape[1])
        differ = (self.tokens[row, :length] != other.tokens[row, :length]).nonzero()
        if not len(differ):
            return 0.0
        at = int(differ[0])
        logits = self.logits[row, at].float()
        return float((logits[self.tokens[row, at]] - logits[other.tokens[row, at]]) / logits.std())


@dataclass
class Run:
    """The whole model with one connector."""

    answers: Answers
    answer_seconds: float
    logits: Tensor
    """Those of the first training step."""
    grads: dict[str, Tensor]
    """By parameter, those of the first training step."""
    layer_weights: list[Tensor]
    """``[B, K]`` of every training step; empty if the model weighs no layers."""
    losses: list[float]
    step_seconds: list[float]
    trained_answers: Answers | None
    """After the training steps, if there were any."""


@dataclass
class ConnectorFigures:
    """One connector by itself."""

    errors: dict[str, float]
    """The relative error of every result against fp64."""
    verdicts: list[Verdict]
    """One per result that one draw can judge: it says little about few numbers (the gradient of mix_weights)."""
    forward_ms: float
    training_ms: float
    inference_bytes: int
    """Peak of a forward beyond inputs and output."""
    saved_bytes: int
    """Kept for the backward beyond inputs and output."""


class Conversation:
    """Several instructions about one image: what a model is given, and what it should learn to answer.

    Args:
        processor: of the model.
        image: a picture.
        instructions: what the model is asked.
        answers: one per instruction.
        sentence_dim: width of the sentence embeddings that the model needs; None if it reads none.

    Raises:
        ValueError: the processor makes no inputs for the model.
    """

    def __init__(
        self, processor: Any, image: Any, instructions: Sequence[str], answers: Sequence[str], sentence_dim: int | None
    ) -> None:
        self.processor = processor
        self.sentence_dim = sentence_dim
        prompts = [f"USER: {processor.image_token}\n{instruction} ASSISTANT:" for instruction in instructions]
        end = processor.tokenizer.eos_token or ""
        self.prompts = self._inputs(image, prompts, instructions, "left")
        self.training = self._inputs(
            image, [f"{prompt} {answer}{end}" for prompt, answer in zip(prompts, answers, strict=True)],
            instructions, "right",
        )  # fmt: skip
        labels = self.training["input_ids"].masked_fill(self.training["attention_mask"] == 0, -100)
        for row, length in zip(labels, self.prompts["attention_mask"].sum(dim=1), strict=True):
            row[:length] = -100  # answers are learned, prompts are not
        self.training["labels"] = labels

    def _inputs(self, image: Any, texts: list[str], instructions: Sequence[str], side: str) -> dict[str, Tensor]:
        self.processor.tokenizer.padding_side = side
        sentences = {} if self.sentence_dim is None else {"instructions": list(instructions)}
        inputs = self.processor(images=[image] * len(texts), text=texts, **sentences, padding=True, return_tensors="pt")
        if sentences and (dim := inputs["sentence_embeds"].shape[1]) != self.sentence_dim:
            raise ValueError(
                f"sentence_encoder: got {self.processor.sentence_encoder!r}, whose embeddings have {dim} numbers, need "
                f"one with {self.sentence_dim}"
            )
        # The image is seen once, whatever the number of instructions about it.
        return {
            **inputs,
            "pixel_values": inputs["pixel_values"][:1],
            "image_index": torch.zeros(len(texts), dtype=torch.int64),
        }

    def decode(self, tokens: Tensor) -> list[str]:
        """The answers, printable."""
        return [repr(text.strip())[1:-1] for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]


def run_model(
    model: LlavaIgvaForConditionalGeneration,
    conversation: Conversation,
    impl: str,
    steps: int,
    advance: Callable[[], None],
) -> Run:
    """Asks, trains and asks again; the weights are restored before it returns.

    Args:
        model: the model.
        conversation: its inputs.
        impl: of the connector, as in ``layer_mix``.
        steps: how many training steps; 0 for one forward and backward that changes nothing.
        advance: called after the answers and after every step.
    """
    learned = {name: param for name, param in model.named_parameters() if param.requires_grad}
    before = [param.detach().clone() for param in learned.values()] if steps else []
    allocator = [param for name, param in learned.items() if "weight_allocator" in name]
    others = [param for name, param in learned.items() if "weight_allocator" not in name]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": allocator, "lr": ALLOCATOR_RATE}], lr=LEARNING_RATE)

    def step() -> Any:
        outputs = model(**conversation.training)
        outputs.loss.backward()
        if steps:
            optimizer.step()
        return outputs

    with patched(model, impl=impl):
        answers, answer_seconds = _timed(lambda: _answer(model, conversation))
        run = Run(answers, answer_seconds, torch.empty(0), {}, [], [], [], None)
        advance()
        for _ in range(max(steps, 1)):
            outputs, seconds = _timed(step)
            if not run.grads:
                run.logits = outputs.logits.detach()
                run.grads = {name: param.grad for name, param in learned.items() if param.grad is not None}
            optimizer.zero_grad()
            if outputs.layer_weights is not None:
                run.layer_weights.append(outputs.layer_weights.detach())
            run.losses.append(outputs.loss.item())
            run.step_seconds.append(seconds)
            advance()
        if steps:
            run.trained_answers = _answer(model, conversation)
            advance()
    with torch.no_grad():
        for param, old in zip(learned.values(), before, strict=bool(steps)):
            param.copy_(old)
    return run


def _answer(model: LlavaIgvaForConditionalGeneration, conversation: Conversation) -> Answers:
    said = model.generate(
        **conversation.prompts, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    tokens = said.sequences[:, conversation.prompts["input_ids"].shape[1] :]
    return Answers(conversation.decode(tokens), tokens, torch.stack(said.logits, dim=1))


def run_connector(
    model: LlavaIgvaForConditionalGeneration, conversation: Conversation, layer_weights: Tensor | None
) -> dict[str, ConnectorFigures]:
    """Error against fp64, time and memory of each connector, on the hidden states of the image."""
    case, inputs = _connector_case(model, conversation, layer_weights)
    oracle = case.run(inputs.double(), "reference")
    results = {name: case.run(inputs, impl) for name, impl in CONNECTORS.items()}
    errors = {
        name: {key: relative_error(value, oracle[key]) for key, value in result.items()}
        for name, result in results.items()
    }
    judged = [key for key, value in oracle.items() if value.numel() >= ENOUGH_ELEMENTS]
    if _has_kink(model.model.multi_modal_projector.activation):
        # One entry that a rounding moves across the kink weighs more in the gradients before it than all roundings.
        judged = [key for key in judged if key in (OUTPUT, "grad weight2", "grad bias2")]
    verdicts = {
        name: [judge(result[key], oracle[key], results["plain"][key], result[key].dtype, key) for key in judged]
        for name, result in results.items()
    }
    del oracle, results

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONNECTORS}
    for _ in range(ROUNDS):
        for name, impl in CONNECTORS.items():
            with torch.no_grad():
                _, inference = _timed(lambda: case.forward(inputs, impl))  # noqa: B023
            _, training = _timed(lambda: case.run(inputs, impl))  # noqa: B023
            seconds[name].append((inference, training))

    figures = {}
    for name, impl in CONNECTORS.items():
        with torch.no_grad():
            out, inference_memory = measure_memory(lambda: case.forward(inputs, impl))  # noqa: B023
        learning = inputs.detached()
        for leaf in (learning.mix_weights, *learning.params.values()):
            if leaf is not None:
                leaf.requires_grad_()
        _, training_memory = measure_memory(lambda: case.forward(learning, impl))  # noqa: B023
        figures[name] = ConnectorFigures(
            errors[name],
            verdicts[name],
            1e3 * median(inference for inference, _ in seconds[name]),
            1e3 * median(training for _, training in seconds[name]),
            inference_memory.peak - out.nbytes,
            training_memory.kept - out.nbytes,
        )
    return figures


def _has_kink(activation: str) -> bool:
    """Whether the slope jumps at zero, as ReLU's does."""
    z = torch.tensor([-KINK, KINK], requires_grad=True)
    (slopes,) = torch.autograd.grad(ACTIVATIONS[activation](z).sum(), z)
    return abs(float(slopes[1] - slopes[0])) > 0.1


@torch.no_grad()
def _connector_case(
    model: LlavaIgvaForConditionalGeneration, conversation: Conversation, layer_weights: Tensor | None
) -> tuple[Case, Inputs]:
    """The model's call of its connector, as a case like those of ``verify``."""
    config, projector = model.config, model.model.multi_modal_projector
    prompts = conversation.prompts
    layers = model.model.vision_tower(prompts["pixel_values"], output_hidden_states=True).hidden_states
    first, second, norm = projector.linear_1, projector.linear_2, projector.projector_layernorm
    params = {"weight1": first.weight, "bias1": first.bias, "weight2": second.weight, "bias2": second.bias}
    if norm is not None:
        params |= {"norm weight": norm.weight, "norm bias": norm.bias}
    params = {name: param for name, param in params.items() if param is not None}
    images, tokens, width = layers[0].shape
    case = Case(
        "demo", "layer_mix_mlp", projector.plan.resolve(len(layers)), images, tokens, width, second.out_features,
        config.skip_tokens, tuple(prompts["image_index"].tolist()), projector.activation,
        None if norm is None else norm.eps,
    )  # fmt: skip
    grad_out = torch.randn(len(prompts["image_index"]), tokens - config.skip_tokens, second.out_features)
    inputs = Inputs(list(layers), layer_weights, params, grad_out.to(first.weight.dtype))
    return case, inputs.detached()


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start
