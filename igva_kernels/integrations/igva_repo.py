"""The IGVA repository (arXiv 2501.08443): both of its modes, and several images, with which its own code fails."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.integrations.lazy import set_forward, set_method
from igva_kernels.integrations.research import (
    Instructions,
    add_to_outputs,
    check_host,
    encode,
    find_host,
    has_host,
    num_states,
    patch_mlp,
    rows_of_images,
)
from igva_kernels.nn import column_summaries
from igva_kernels.ops.weighted_mix import MixPlan

DESCRIPTION = "the IGVA repository"


def matches(model: nn.Module) -> bool:
    """Whether ``model`` contains a model of the repository."""
    return has_host(model, "vit_aggregate_groups")


def apply(model: nn.Module, edits: PatchHandle, impl: str = "auto") -> None:
    """Let the projector mix what ``encode_images`` stacks, averages, weighs and concatenates.

    ``forward`` returns the layer weights as ``weights``, which the repository's loss needs but its model omits.
    """
    host = find_host(model)
    tower = check_host(host, "images", "sentence_embeds")
    core = host.get_model()
    config = core.config
    make_plan = MixPlan.igva_uniform if config.aggregate_by_average else MixPlan.igva
    groups = ast.literal_eval(config.vit_aggregate_groups)
    plan = make_plan(num_states(tower) - 1, groups, config.vit_base_layer)
    patch_mlp(edits, core.mm_projector, "model.mm_projector", impl)
    edits.set(host, "instructions", Instructions())
    edits.set(core, "aggregate_layers", None)  # the branch for several images reads it, nothing sets it
    set_method(edits, host, "encode_images", _encoder(plan, len(groups)))
    set_method(edits, host, "prepare_inputs_labels_for_multimodal", _prepare(type(host)))
    set_forward(edits, host, _forward(type(host)))


def _encoder(plan: MixPlan, num_groups: int) -> Callable[..., Tensor]:
    def encode_images(self: Any, images: Tensor, *rest: Tensor | None, sentence_embeds: Tensor | None = None) -> Tensor:
        core = self.get_model()
        mixed = encode(self.get_vision_tower(), images, plan, 1)
        if plan.num_columns:
            if rest:
                sentence_embeds = rest[-1]  # the branch for several images passes aggregate_layers first
            if sentence_embeds is None:
                raise ValueError("sentence_embeds: got None, need [B, E]: images are weighted by their instructions")
            # In fp32 its script keeps the tower in fp16, with which the aggregator's own code would fail.
            like = next(core.vision_aggregator.parameters())
            summaries = column_summaries(mixed.hidden_states, mixed.plan).to(like.dtype)
            weights = core.vision_aggregator(cls_features=summaries, sentence_embed=sentence_embeds.to(summaries))
            mixed = mixed._replace(mix_weights=weights)
        else:  # the repository's loss takes the entropy of the weights in both stages
            weights = torch.full((len(images), num_groups), 1 / num_groups, device=images.device)
        self.instructions.layer_weights = weights
        return core.mm_projector(mixed)

    return encode_images


def _prepare(host_class: Any) -> Callable[..., Any]:
    method = host_class.prepare_inputs_labels_for_multimodal
    signature = inspect.signature(method)

    @wraps(method)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        if arguments["sentence_embeds"] is not None and arguments["images"] is not None:
            arguments["sentence_embeds"] = rows_of_images(arguments["sentence_embeds"], arguments)
        return method(*bound.args, **bound.kwargs)

    return prepare


def _forward(host_class: Any) -> Callable[..., Any]:
    method = host_class.forward

    @wraps(method)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            outputs = method(self, *args, **kwargs)
            weights = self.instructions.layer_weights
            return outputs if weights is None else add_to_outputs(outputs, "weights", weights)
        finally:
            self.instructions.layer_weights = None

    return forward
