"""transformers' models whose language model adds visual features between its layers (DeepStack, arXiv 2511.21631).

Two parts are swapped in. Between layers, a method of the language model adds features to the visual tokens; the
operator needs no index of them, so nothing waits for the GPU. In the vision tower, mergers turn the states of some
layers into these features, with a LayerNorm and an MLP over a cell of patches, which is one tap and one operator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle, describe
from igva_kernels.integrations.lazy import (
    activation_of,
    check_patch_impl,
    explain,
    served_by,
    set_forward,
    set_method,
    unknown_host,
)
from igva_kernels.nn import Connector, MixInput, connect, is_one_operator
from igva_kernels.nn.sharding import below_adapter
from igva_kernels.ops.inject_tokens import inject_tokens, token_rows
from igva_kernels.ops.inject_tokens.op import OPERATOR
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.ops.weighted_mix import op as mix
from igva_kernels.runtime.context import has_values

DESCRIPTION = (
    "transformers' (4.57 and newer) models with DeepStack: Qwen3VL, Qwen3VLMoe, Qwen3OmniMoe, CohereCompass, "
    "GraniteDocling, Granite4Vision"
)
METHOD = "_deepstack_process"
"""The method of a language model that adds features to the visual tokens."""
PARAMETERS = ["self", "hidden_states", "visual_pos_masks", "visual_embeds"]
BEFORE_LAYERS = {"vision_mask", "deepstack_features"}
"""What the forward of Granite 4 Vision's language model takes: it adds the features itself, before its layers."""


def matches(model: nn.Module) -> bool:
    """Whether ``model`` contains a language model of the family."""
    return any(hasattr(type(module), METHOD) or _adds_before_layers(module) for module in model.modules())


def apply(
    model: nn.Module, edits: PatchHandle, impl: str = "auto", mergers: bool = True, check: str | None = None
) -> None:
    """Swap in the injection, and the mergers that make what is injected.

    Args:
        model: the model.
        edits: the handle of the patch.
        impl: as in ``layer_mix_mlp`` and ``inject_tokens``.
        mergers: False leaves the mergers as they are. The injection alone changes no bit of any result.
        check: "sync" raises a ValueError on a GPU too if features and visual tokens differ in number, for which every
            injection waits for the GPU. By default such a mistake is a ValueError on a CPU and NaN on a GPU.

    Raises:
        ValueError: an unknown ``check``; a method that something else has replaced.
        NotImplementedError: a method or merger that this package does not know; ``impl`` can serve nothing here.
    """
    if check not in (None, "sync"):
        raise ValueError(f"check: got {check!r}, need None or 'sync'")
    for name, module in list(model.named_modules()):
        if hasattr(type(module), METHOD):
            _patch_injection(edits, module, name, impl, waits=check == "sync")
        elif _adds_before_layers(module):
            _patch_before_layers(edits, module, name, impl, waits=check == "sync")
        elif mergers and _is_merger(module):
            _patch_merger(edits, module, name, impl)


def _patch_injection(edits: PatchHandle, module: Any, name: str, impl: str, waits: bool) -> None:
    method: Any = getattr(type(module), METHOD)
    kind = type(module).__name__
    if not str(getattr(method, "__module__", "")).startswith("transformers.models."):
        raise ValueError(
            f"model: {METHOD} of its {kind} is {describe(method)}, which is not transformers' own and which a patch "
            f"would undo; load the model without what replaces it"
        )
    parameters = list(inspect.signature(method).parameters)
    if parameters != PARAMETERS:
        raise unknown_host(module, METHOD, f"it takes {', '.join(parameters)}, need {', '.join(PARAMETERS)}")
    set_method(edits, module, METHOD, _deepstack_process(impl, waits))
    _say_what_injects(edits, module, name, impl)


def _say_what_injects(edits: PatchHandle, module: nn.Module, name: str, impl: str) -> None:
    check_patch_impl(OPERATOR, impl, _weight(module))
    kind = type(module).__name__
    edits.note(lambda: f"{name or kind}: features are injected {served_by(OPERATOR, impl, _weight(module))[1]}")


def _weight(module: nn.Module) -> Tensor | None:
    """A parameter that is where the hidden states are, and of their dtype."""
    return next(module.norm.parameters(), None)


def _deepstack_process(impl: str, waits: bool) -> Callable[..., Tensor]:
    def run(self: nn.Module, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        mask = visual_pos_masks.to(hidden_states.device)
        if mask.dim() == 3:  # Qwen3-Omni's in transformers 4, the same in every channel
            mask = mask[..., 0]
        features = visual_embeds.to(hidden_states.device, hidden_states.dtype)
        return inject_tokens(hidden_states, features, _rows(mask, features.shape[0], waits), impl=impl)

    return run


def _adds_before_layers(module: nn.Module) -> bool:
    forward = type(module).forward
    known = forward.__module__.startswith("transformers.models.") and hasattr(module, "layers")
    return known and inspect.signature(forward).parameters.keys() >= BEFORE_LAYERS


class _Features(NamedTuple):
    """What a call of the language model hands to its layers, as the argument ``added_features``."""

    by_layer: dict[int, Tensor]
    mask: Tensor
    differentiated: bool


def _patch_before_layers(edits: PatchHandle, module: Any, name: str, impl: str, waits: bool) -> None:
    set_forward(edits, module, _hand_on)
    for index, layer in enumerate(module.layers):
        set_forward(edits, layer, _add_before(index, impl, waits))
    _say_what_injects(edits, module, name, impl)


def _hand_on(
    self: nn.Module, *args: Any, vision_mask: Tensor | None = None,
    deepstack_features: dict[int, Tensor] | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """The language model's forward, which passes arguments that it does not know on to its layers."""
    if deepstack_features is not None and vision_mask is not None:
        mask = vision_mask[..., 0]
        kwargs["added_features"] = _Features(deepstack_features, mask, torch.is_grad_enabled())
    return type(self).forward(self, *args, **kwargs)


def _add_before(index: int, impl: str, waits: bool) -> Callable[..., Any]:
    def forward(
        self: nn.Module, hidden_states: Tensor, *args: Any, added_features: _Features | None = None, **kwargs: Any
    ) -> Any:
        if added_features is not None and index in added_features.by_layer:
            if added_features.differentiated and not torch.is_grad_enabled():
                raise NotImplementedError(
                    "gradient_checkpointing: with use_reentrant=True, the features would get no gradient in this "
                    "version of transformers; need use_reentrant=False, or transformers 5.23 or newer"
                )
            features = added_features.by_layer[index].to(hidden_states.device, hidden_states.dtype)
            rows = _rows(added_features.mask.to(hidden_states.device), features.shape[0], waits)
            hidden_states = inject_tokens(hidden_states, features, rows, impl=impl)
        return type(self).forward(self, hidden_states, *args, **kwargs)

    return forward


def _rows(mask: Tensor, count: int, waits: bool) -> Tensor:
    """The row map of a mask that must have ``count`` visual tokens.

    It is made anew for every layer, by a few kernels over ``[B, T]``: one that is kept would have to notice every
    change of the mask, and torch.compile shares it between layers by itself.
    """
    rows, found = token_rows(mask), mask.sum()
    if has_values(mask) and (waits or mask.device.type == "cpu"):
        if int(found) != count:
            raise ValueError(f"visual_embeds: need one row per visual token, got {count} rows for {int(found)} tokens")
        return rows
    # Nothing waits here. Rows that no features have are an error on a CPU, and NaN on a GPU.
    return torch.where(found == count, rows, count + 1)


def _is_merger(module: nn.Module) -> bool:
    """Whether it is a merger of DeepStack: the main one of Qwen's towers has its norm before the patches are joined."""
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models.")]
    return any(name.endswith("Merger") for name in names) and getattr(module, "use_postshuffle_norm", True)


def _patch_merger(edits: PatchHandle, merger: nn.Module, name: str, impl: str) -> None:
    children = next((find for names, find in MERGERS if merger._modules.keys() == names), None)
    if children is None:
        raise unknown_host(merger, "forward", f"it has {', '.join(merger._modules)}")
    modules = children(merger)
    activation = activation_of(modules.act, f"{name}.act")
    check_patch_impl(mix.OPERATOR, impl, getattr(below_adapter(modules.linear_1), "weight", None), activation)
    set_forward(edits, merger, _merge(children, activation, impl))
    edits.note(lambda: f"{name}: {_explain(children(merger), activation, impl)}")


def _merge(children: Callable[[Any], Connector], activation: str, impl: str) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        modules = children(self)
        if not is_one_operator(modules):
            return type(self).forward(self, x)  # there are no layers to concatenate, so nothing is lost
        width = modules.linear_1.in_features
        shape = x.shape[:-1] if x.shape[-1] == width else (-1,)
        mixed = MixInput((x.reshape(1, -1, width),), None, None, None, _TAP, 0, activation, impl)
        return connect(mixed, modules).unflatten(1, shape).squeeze(0)

    return forward


_TAP = MixPlan.concat([0])


def _explain(modules: Connector, activation: str, impl: str) -> str:
    if is_one_operator(modules):
        return explain(modules, activation, impl)
    return "runs its own modules, as one is hooked, sharded, offloaded, quantised or replaced"


def _qwen(merger: Any) -> Connector:
    return Connector(merger.norm, merger.linear_fc1, merger.act_fn, merger.linear_fc2)


def _omni(merger: Any) -> Connector:
    return Connector(merger.ln_q, *merger.mlp)


def _docling(merger: Any) -> Connector:
    return Connector(merger.layer_norm, merger.linear_1, merger.act, merger.linear_2)


MERGERS = (
    ({"norm", "linear_fc1", "act_fn", "linear_fc2"}, _qwen),
    ({"ln_q", "mlp"}, _omni),
    ({"layer_norm", "linear_1", "act", "linear_2"}, _docling),
)
"""The names of a merger's modules, and what finds them."""
