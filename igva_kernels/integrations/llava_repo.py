"""The LLaVA repository (haotian-liu): its model reads one layer, and a plan gives it more to read."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle, is_held
from igva_kernels.integrations.lazy import set_forward, set_method
from igva_kernels.integrations.llava_record import KEY, Record, describe, read_projector, rebuild
from igva_kernels.integrations.research import (
    Instructions,
    add_to_loss,
    add_to_outputs,
    check_host,
    check_mlp,
    encode,
    find_host,
    num_states,
    patch_mlp,
    rows_of_images,
)
from igva_kernels.nn import MixInput, balance_loss, column_summaries, widen
from igva_kernels.nn.sharding import below_adapter
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
    balance_coefficient: float | None = None,
    weights: str | os.PathLike[str] | None = None,
    impl: str = "auto",
) -> None:
    """Attach a plan to a plain LLaVA, whose answers at first stay the same.

    ``mm_projector[0]`` is replaced by a wider Linear: the old weight where the plan has the layer that LLaVA reads,
    zeros elsewhere. The allocator becomes a part of ``mm_projector``, so that scripts which select ``mm_projector`` by
    name, to train it, to save it or to exclude it from LoRA, select the allocator too. ``forward`` and ``generate``
    take ``sentence_embeds`` ``[B, E]``, one row per sample; ``forward`` returns ``layer_weights`` and adds the balance
    loss.

    The config records plan, allocator and balance coefficient (``config.igva_kernels``) and the width of the projector
    (``config.mm_hidden_size``), so that LLaVA's own loader builds the wide projector. What is None here is taken from
    the record.

    Args:
        model: a LLaVA with vision tower and projector loaded, before an optimizer or an engine holds its parameters.
        edits: the handle of the patch.
        plan: which layers it shall read; None for the recorded one, or else for the layer that it reads now.
        allocator: computes the weights of the plan's columns: a ``WeightAllocator``, ``TextAllocator`` or
            ``LearnedWeights``, or a module that is called as ``allocator(sentence_embeds, summaries)``.
        balance_coefficient: factor of ``balance_loss`` in the training loss; 0 where nothing is recorded.
        weights: a file or folder that a LLaVA script has written (``mm_projector.bin``, ``non_lora_trainables.bin``, a
            whole model), from which projector and allocator are loaded. A narrow first Linear is widened.
        impl: as in ``layer_mix``.

    Raises:
        ValueError: a plan with columns and no allocator, or the reverse; a recorded allocator without its weights; a
            plan that contradicts the recorded one; a narrow projector and a plan without the layer that LLaVA reads;
            weights that cannot be read or do not fit; a vision tower that is not loaded.
        NotImplementedError: an unknown projector or version of the repository, or a projector that must be replaced
            and is quantised, offloaded, partitioned (ZeRO-3) or under LoRA.
    """
    host = find_host(model)
    if is_held(host):  # or else its record would be read as that of a checkpoint
        raise ValueError(f"model: this {type(host).__name__} is patched already; revert that patch first")
    tower = check_host(host, "images")
    projector = host.get_model().mm_projector
    check_mlp(projector, "model.mm_projector")
    recorded = Record.of(host.config)
    layer, dim = tower.select_layer % num_states(tower), tower.config.hidden_size
    attached = plan is not None or recorded is not None
    plan = _plan(plan, recorded, layer, num_states(tower))
    loaded = {} if weights is None else read_projector(weights)
    allocator = _allocator(allocator, plan, recorded, loaded, projector)
    children = _children(projector, allocator, loaded, layer, dim, plan)
    if any(child is not projector._modules.get(name) for name, child in children.items()):
        edits.set(projector, "_modules", children)
    if balance_coefficient is None:
        balance_coefficient = recorded.balance_coefficient if recorded else 0.0
    if attached:
        record = Record(plan, None if allocator is None else describe(allocator), balance_coefficient)
        edits.set(host.config, KEY, record.to_dict())
        edits.set(host.config, "mm_hidden_size", plan.num_blocks * dim)
    patch_mlp(edits, projector, "model.mm_projector", impl)
    edits.set(host, "instructions", Instructions())
    kind = None if allocator is None else describe(allocator)["kind"]
    set_method(edits, host, "encode_images", _encoder(plan, 1 if tower.select_feature == "patch" else 0, kind))
    set_method(edits, host, "prepare_inputs_labels_for_multimodal", _prepare(type(host)))
    set_forward(edits, host, _forward(type(host), balance_coefficient))
    set_method(edits, host, "generate", _generate(type(host)))


def _plan(given: MixPlan | None, recorded: Record | None, layer: int, states: int) -> MixPlan:
    """The plan to attach, resolved: the given one, the recorded one, or the layer that LLaVA reads."""
    if recorded is None:
        return (MixPlan.concat([layer]) if given is None else given).resolve(states)
    plan = recorded.plan.resolve(states)
    if given is None:
        return plan
    given = given.resolve(states)
    layers = [[{entry.layer for entry in block} for block in each.blocks] for each in (given, plan)]
    # Stage 2 weighs what stage 1 has averaged; other layers in a block would be read by weights that know the old ones.
    if given.blocks != plan.blocks and (layers[0] != layers[1] or (given.num_columns and plan.num_columns)):
        raise ValueError(
            f"plan: got {given}, the config of this model records {plan}; need that plan, or one that weighs or "
            f"averages the same layers in each block (to begin anew, delete config.{KEY})"
        )
    return given


def _allocator(
    given: nn.Module | None,
    plan: MixPlan,
    recorded: Record | None,
    loaded: dict[str, Tensor],
    projector: Any,
) -> nn.Module | None:
    """The allocator with its weights: the given module, or the one that the config records."""
    prefix = f"{ALLOCATOR}."
    state = {name.removeprefix(prefix): value for name, value in loaded.items() if name.startswith(prefix)}
    description = None if recorded is None else recorded.allocator
    if plan.num_columns == 0:
        if given is not None or state:
            what = type(given).__name__ if given is not None else "the weights of one in weights"
            raise ValueError(f"allocator: got {what}, the plan {plan} has no weight columns and takes none")
        return None
    if given is None and description is None:
        raise ValueError(f"allocator: got None, the plan has {plan.num_columns} weight columns and needs one")
    if description is not None and not state:
        raise ValueError(
            f"weights: got {'None' if not loaded else 'a file without an allocator'}, the config of this model records "
            f"an allocator, which LLaVA's own loader leaves out; need the file or folder that has its weights (to "
            f"begin anew, delete config.{KEY})"
        )
    like = projector[0].weight
    allocator = given
    if allocator is None:
        allocator = rebuild(description or {})
        state = {name: value.to(like.device, like.dtype) for name, value in state.items()}
    if state:
        try:
            allocator.load_state_dict(state, assign=given is None)
        except RuntimeError as error:
            raise ValueError(f"weights: they do not fit the allocator: {error}") from error
    columns = describe(allocator).get("num_weights", plan.num_columns)
    if columns != plan.num_columns:
        raise ValueError(f"allocator: got one for {columns} weights, need {plan.num_columns}, the plan's columns")
    return allocator.to(like.device).train(projector.training)


def _children(
    projector: Any, allocator: nn.Module | None, loaded: dict[str, Tensor], layer: int, dim: int, plan: MixPlan
) -> dict[str, nn.Module | None]:
    """The projector's modules: replaced where they are loaded or widened, with the allocator among them."""
    children = dict(projector._modules)
    if allocator is not None:
        children[ALLOCATOR] = allocator
    first, second = projector[0], projector[2]
    width = getattr(below_adapter(first), "in_features", dim)
    loaded = {name: value for name, value in loaded.items() if not name.startswith(f"{ALLOCATOR}.")}
    if loaded:
        needed = {f"{i}.{name}" for i in (0, 2) for name, p in projector[i].named_parameters(recurse=False)}
        if loaded.keys() != needed:
            raise ValueError(f"weights: their mm_projector has {sorted(loaded)}, need {sorted(needed)}")
        weight = _widened(loaded["0.weight"], layer, dim, plan, "weights")
        children["0"] = _linear(first, weight, loaded.get("0.bias"))
        children["2"] = _linear(second, loaded["2.weight"], loaded.get("2.bias"))
    elif width != plan.num_blocks * dim:
        _check_replaceable(first)
        if first.weight.numel() != first.in_features * first.out_features:
            raise NotImplementedError(
                f"model.mm_projector[0]: its weights are partitioned {tuple(first.weight.shape)}, need them whole to "
                f"widen them; give weights=, the checkpoint that the model was loaded from"
            )
        children["0"] = _linear(first, _widened(first.weight, layer, dim, plan, "model.mm_projector[0]"), first.bias)
    return children


@torch.no_grad()
def _widened(weight: Tensor, layer: int, dim: int, plan: MixPlan, name: str) -> Tensor:
    if weight.ndim != 2 or weight.shape[1] not in (dim, plan.num_blocks * dim):
        raise ValueError(
            f"{name}: the first Linear has weights {list(weight.shape)}, need [H, {dim}], which reads the layer that "
            f"LLaVA reads, or [H, {plan.num_blocks * dim}], which reads the plan's {plan.num_blocks} blocks"
        )
    return weight if weight.shape[1] == plan.num_blocks * dim else widen(weight, [layer], plan)


def _linear(old: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear in place of ``old``; a bias that is ``old``'s own stays the same parameter."""
    _check_replaceable(old)
    if weight.shape[0] != old.out_features or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"weights: got a Linear of {list(weight.shape)} in mm_projector, need {old.out_features} rows as the model"
        )
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")

    def parameter(value: Tensor, of: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(of.device, of.dtype), requires_grad=of.requires_grad)

    new.weight = parameter(weight, old.weight)
    if bias is not None:
        new.bias = bias if bias is old.bias else parameter(bias, old.bias)
    return new.train(old.training)


def _check_replaceable(linear: nn.Module) -> None:
    if type(linear) is not nn.Linear or (linear.weight.is_meta and hasattr(linear, "_hf_hook")):
        raise NotImplementedError(
            f"model.mm_projector: got a {type(linear).__module__}.{type(linear).__name__} on {linear.weight.device}, "
            f"need an nn.Linear; patch before LoRA or offload change it, and leave it out of the quantisation"
        )


def _encoder(plan: MixPlan, skip_tokens: int, kind: str | None) -> Callable[[Any, Tensor], Tensor]:
    def encode_images(self: Any, images: Tensor) -> Tensor:
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        mixed = encode(tower, images, plan, skip_tokens)
        if kind is not None:
            has_cls = tower.config.model_type != "siglip_vision_model"
            allocator, sentence_embeds = getattr(projector, ALLOCATOR), self.instructions.sentence_embeds
            weights = _layer_weights(allocator, kind, sentence_embeds, mixed, has_cls)
            self.instructions.layer_weights = weights
            mixed = mixed._replace(mix_weights=weights)
        return projector(mixed)

    return encode_images


def _layer_weights(
    allocator: nn.Module, kind: str, sentence_embeds: Tensor | None, mixed: MixInput, has_cls: bool
) -> Tensor:
    source = next(state for state in mixed.hidden_states if state is not None)
    if kind == "LearnedWeights":
        return allocator(len(source))
    if sentence_embeds is None:
        raise ValueError("sentence_embeds: got None, need [B, E]: images are weighted by their instructions")
    sentence_embeds = sentence_embeds.to(source.device)
    if kind == "TextAllocator":
        return allocator(sentence_embeds)
    return allocator(sentence_embeds, column_summaries(mixed.hidden_states, mixed.plan, has_cls))


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
    signature = inspect.signature(method)

    def forward(self: Any, *args: Any, sentence_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        instructions = self.instructions
        try:
            if sentence_embeds is not None:  # inside generate they are set already
                instructions.sentence_embeds = sentence_embeds
            outputs = method(self, *args, **kwargs)
            weights = instructions.layer_weights
            if weights is None:
                return outputs
            if balance_coefficient and signature.bind(self, *args, **kwargs).arguments.get("labels") is not None:
                outputs = add_to_loss(outputs, balance_coefficient * balance_loss(weights))
            return add_to_outputs(outputs, "layer_weights", weights)
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
