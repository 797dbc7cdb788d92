"""The LLaVA repository (haotian-liu): its model reads one layer, and a plan gives it more to read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.integrations.lazy import set_method
from igva_kernels.integrations.research import (
    Instructions,
    check_host,
    check_mlp,
    encode,
    find_host,
    num_states,
    patch_mlp,
    rows_of_images,
)
from igva_kernels.nn import balance_loss, column_summaries, widen
from igva_kernels.ops.weighted_mix import MixPlan

DESCRIPTION = "the LLaVA repository (with plan=..., allocator=...)"
ALLOCATOR = "weight_allocator"


def matches(model: nn.Module) -> bool:
    """Whether ``model`` contains a model of the repository; asked last, as the other repositories grew out of it."""
    return find_host(model) is not None


def apply(
    model: nn.Module,
    edits: PatchHandle,
    plan: MixPlan | None = None,
    allocator: nn.Module | None = None,
    balance_coefficient: float = 0.0,
    impl: str = "auto",
) -> None:
    """Attach a plan to a plain LLaVA, whose answers at first stay the same.

    ``mm_projector[0]`` is replaced by a wider Linear: the old weight where the plan has the layer that LLaVA reads,
    zeros elsewhere. The allocator becomes a part of ``mm_projector``, so that scripts which select ``mm_projector`` by
    name, to train it, to save it or to exclude it from LoRA, select the allocator too. ``forward`` and ``generate``
    take ``sentence_embeds`` ``[B, E]``, one row per sample; ``forward`` returns ``layer_weights`` and adds the balance
    loss.

    Args:
        model: a LLaVA with vision tower and projector loaded, before an optimizer or an engine holds its parameters.
        edits: the handle of the patch.
        plan: which layers it shall read; None for the one that it reads now.
        allocator: computes the weights of the plan's columns as ``allocator(sentence_embeds, summaries)``, like
            ``igva_kernels.nn.WeightAllocator``.
        balance_coefficient: factor of ``balance_loss`` in the training loss.
        impl: as in ``layer_mix``.

    Raises:
        ValueError: a plan with columns and no allocator, or the reverse; a plan without the layer that LLaVA reads; a
            vision tower that is not loaded.
        NotImplementedError: an unknown projector or version of the repository, or partitioned weights (ZeRO-3).
    """
    host = find_host(model)
    tower = check_host(host, "images")
    core = host.get_model()
    projector = core.mm_projector
    check_mlp(projector, "model.mm_projector")
    plan = (MixPlan.concat([tower.select_layer]) if plan is None else plan).resolve(num_states(tower))
    if (plan.num_columns > 0) != (allocator is not None):
        raise ValueError(
            f"allocator: got {type(allocator).__name__}, the plan has {plan.num_columns} weight columns; a plan with "
            f"columns needs an allocator, a plan without columns none"
        )
    skip_tokens = 1 if tower.select_feature == "patch" else 0
    if plan.num_blocks > 1 or allocator is not None:
        children = {**projector._modules, "0": _widened(projector[0], tower.select_layer % num_states(tower), plan)}
        if allocator is not None:
            children[ALLOCATOR] = allocator.to(projector[0].weight.device)
        edits.set(projector, "_modules", children)
    patch_mlp(edits, projector, "model.mm_projector", impl)
    edits.set(host, "instructions", Instructions())
    set_method(edits, host, "encode_images", _encoder(plan, skip_tokens))
    set_method(edits, host, "prepare_inputs_labels_for_multimodal", _prepare(type(host)))
    set_method(edits, host, "forward", _forward(type(host), balance_coefficient))
    set_method(edits, host, "generate", _generate(type(host)))


def _widened(linear: nn.Module, layer: int, plan: MixPlan) -> nn.Linear:
    if type(linear) is not nn.Linear or linear.weight.numel() != linear.in_features * linear.out_features:
        raise NotImplementedError(
            f"model.mm_projector[0]: got a {type(linear).__name__} with weights {tuple(linear.weight.shape)}, need a "
            f"whole nn.Linear; patch before LoRA, quantisation or ZeRO-3 change it"
        )
    with torch.no_grad():
        weight = widen(linear.weight, [layer], plan)
    wide = nn.Linear(weight.shape[1], linear.out_features, bias=False, device="meta")
    wide.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    wide.bias = linear.bias
    return wide.train(linear.training)


def _encoder(plan: MixPlan, skip_tokens: int) -> Callable[[Any, Tensor], Tensor]:
    def encode_images(self: Any, images: Tensor) -> Tensor:
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        mixed = encode(tower, images, plan, skip_tokens)
        if plan.num_columns:
            sentence_embeds = self.instructions.sentence_embeds
            if sentence_embeds is None:
                raise ValueError("sentence_embeds: got None, need [B, E]: images are weighted by their instructions")
            has_cls = tower.config.model_type != "siglip_vision_model"
            summaries = column_summaries(mixed.hidden_states, mixed.plan, has_cls)
            weights = getattr(projector, ALLOCATOR)(sentence_embeds.to(summaries.device), summaries)
            self.instructions.layer_weights = weights
            mixed = mixed._replace(mix_weights=weights)
        return projector(mixed)

    return encode_images


def _prepare(host_class: Any) -> Callable[..., Any]:
    method = host_class.prepare_inputs_labels_for_multimodal
    signature = inspect.signature(method)

    @wraps(method)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        instructions = self.instructions
        given = instructions.sentence_embeds
        arguments = signature.bind(self, *args, **kwargs).arguments
        if given is not None and arguments["images"] is not None:
            instructions.sentence_embeds = rows_of_images(given, arguments)
        try:
            return method(self, *args, **kwargs)
        finally:
            instructions.sentence_embeds = given

    return prepare


def _forward(host_class: Any, balance_coefficient: float) -> Callable[..., Any]:
    method = host_class.forward

    def forward(self: Any, *args: Any, sentence_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        instructions = self.instructions
        try:
            if sentence_embeds is not None:  # inside generate they are set already
                instructions.sentence_embeds = sentence_embeds
            outputs = method(self, *args, **kwargs)
            weights = instructions.layer_weights
            if weights is not None and isinstance(outputs, dict):
                outputs["layer_weights"] = weights
                if balance_coefficient and outputs.get("loss") is not None:
                    outputs["loss"] = outputs["loss"] + balance_coefficient * balance_loss(weights)
            return outputs
        finally:
            instructions.sentence_embeds = instructions.layer_weights = None

    forward.__signature__ = _with_sentence_embeds(method)  # type: ignore[attr-defined]
    return forward


def _generate(host_class: Any) -> Callable[..., Any]:
    method = host_class.generate

    def generate(self: Any, *args: Any, sentence_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        self.instructions.sentence_embeds = sentence_embeds
        try:
            return method(self, *args, **kwargs)
        finally:
            self.instructions.sentence_embeds = self.instructions.layer_weights = None

    return generate


def _with_sentence_embeds(method: Callable[..., Any]) -> inspect.Signature:
    """The method's signature with ``sentence_embeds``, a column that the Trainer would otherwise drop."""
    signature = inspect.signature(method)
    extra = inspect.Parameter("sentence_embeds", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    return signature.replace(parameters=[*parameters[:at], extra, *parameters[at:]])
