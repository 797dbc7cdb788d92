"""transformers' models with multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, and its relatives).

Only the core is swapped in: the sum over sampled points. Most models keep it in a module without parameters, whose
forward is bound; the others call a function, which their attention modules are given anew. Projections, positions in
the image and the softmax of the weights stay transformers' own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle, describe, is_held
from igva_kernels.integrations.lazy import check_patch_impl, served_by, set_forward, unknown_host
from igva_kernels.ops.deform_attn import deform_attn
from igva_kernels.ops.deform_attn.op import OPERATOR

DESCRIPTION = (
    "transformers' models with deformable attention: DeformableDetr, GroundingDino, MMGroundingDino, OmDetTurbo, "
    "LwDetr, RfDetr, RTDetr, RTDetrV2, DFine, Deimv2, PPDocLayoutV2 to V4, Mask2Former, OneFormer"
)
CORE = "MultiScaleDeformableAttention"
"""The class whose forward is the core."""
PARAMETERS = [
    "self", "value", "value_spatial_shapes", "value_spatial_shapes_list", "level_start_index", "sampling_locations",
    "attention_weights", "im2col_step",
]  # fmt: skip
FUNCTIONS = {
    "multi_scale_deformable_attention": (
        "value", "value_spatial_shapes", "sampling_locations", "attention_weights"
    ),
    "multi_scale_deformable_attention_v2": (
        "value", "value_spatial_shapes", "sampling_locations", "attention_weights", "num_points_list", "method"
    ),
}  # fmt: skip
"""The functions that are the core elsewhere, and their parameters."""
ATTRIBUTE = "ms_deformable_attn_core"
"""Where an attention module may keep the function."""


def matches(model: nn.Module) -> bool:
    """Whether ``model`` contains a module of the family."""
    return any(_is_core(module) or _function_of(module) is not None for module in model.modules())


def apply(model: nn.Module, edits: PatchHandle, impl: str = "auto") -> None:
    """Swap in the core of every deformable attention.

    Args:
        model: the model.
        edits: the handle of the patch.
        impl: as in ``deform_attn``.

    Raises:
        ValueError: a forward or function that something else has replaced.
        NotImplementedError: a method of sampling other than bilinear, or a version of transformers that this package
            does not know; ``impl`` can serve nothing here.
    """
    check_patch_impl(OPERATOR, impl, next(model.parameters(), None))
    count = 0
    forwards: dict[Any, Callable[..., Any]] = {}
    for name, module in list(model.named_modules()):
        function = _function_of(module)
        if _is_core(module):
            _check_parameters(module, "forward", type(module).forward, PARAMETERS)
            set_forward(edits, module, _forward(impl))
        elif function is not None:
            _check_method(module, name)
            _patch_function(edits, module, function, impl, forwards)
        else:
            continue
        count += 1
    edits.note(lambda: f"deformable attention, {count} times, {_served(model, impl)}")


def _served(model: nn.Module, impl: str) -> str:
    return served_by(OPERATOR, impl, next(model.parameters(), None))[1]


def _is_core(module: nn.Module) -> bool:
    return type(module).__name__ == CORE and type(module).__module__.startswith("transformers.models.")


def _function_of(module: nn.Module) -> str | None:
    """The name of the function that is the core of an attention module of transformers, None if it calls none."""
    forward = type(module).forward
    if not str(getattr(forward, "__module__", "")).startswith("transformers.models."):
        return None
    if ATTRIBUTE in vars(module):
        return "multi_scale_deformable_attention_v2"
    called = getattr(getattr(forward, "__code__", None), "co_names", ())
    return next((name for name in FUNCTIONS if name in called), None)


def _check_parameters(module: nn.Module, name: str, function: Any, need: Sequence[str]) -> None:
    found = list(inspect.signature(function).parameters)
    if found != list(need):
        raise unknown_host(module, name, f"it takes {', '.join(found)}, need {', '.join(need)}")


def _check_method(module: nn.Module, name: str) -> None:
    for setting in ("decoder_method", "method"):
        method = getattr(module, setting, "default")
        if method != "default":
            raise NotImplementedError(
                f"decoder_method: got {method!r} ({name or type(module).__name__}), need 'default', which is bilinear"
            )


def _patch_function(
    edits: PatchHandle, module: Any, name: str, impl: str, forwards: dict[Any, Callable[..., Any]]
) -> None:
    forward = type(module).forward
    theirs = forward.__globals__.get(name)
    kind = type(module).__name__
    if not str(getattr(theirs, "__module__", "")).startswith("transformers.models."):
        raise ValueError(f"model: {name} of its {kind} has been replaced by {describe(theirs)}; patch without it")
    _check_parameters(module, name, theirs, FUNCTIONS[name])
    if ATTRIBUTE not in vars(module):
        if forward not in forwards:  # one for all modules, so that torch.compile shares what it compiles
            forwards[forward] = _with_global(forward, name, _core(impl))
        set_forward(edits, module, forwards[forward])
        return
    own = vars(module)[ATTRIBUTE]
    if own is not theirs and not is_held(module):
        raise ValueError(f"model: {ATTRIBUTE} of its {kind} has been replaced by {describe(own)}; patch without it")
    edits.set(module, ATTRIBUTE, _core(impl))


def _with_global(function: Any, name: str, value: Any) -> Callable[..., Any]:
    """``function``, but for one of the globals that it reads."""
    scope = {**function.__globals__, name: value}
    del scope["__name__"]  # by which torch.compile would find the module, and in it the other value
    same = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    return wraps(function)(same)


def _forward(impl: str) -> Callable[..., Tensor]:
    core = _core(impl)

    def forward(
        self: nn.Module, value: Tensor, value_spatial_shapes: Tensor, value_spatial_shapes_list: Any,
        level_start_index: Tensor, sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int,
    ) -> Tensor:  # fmt: skip
        return core(value, value_spatial_shapes_list, sampling_locations, attention_weights)

    return forward


def _core(impl: str) -> Callable[..., Tensor]:
    def core(
        value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor,
        num_points_list: Sequence[int] | None = None, method: str = "default",
    ) -> Tensor:  # fmt: skip
        if isinstance(value_spatial_shapes, Tensor):  # OneFormer's in transformers 4, which waits for the device too
            value_spatial_shapes = value_spatial_shapes.tolist()
        out = deform_attn(
            value, value_spatial_shapes, sampling_locations, attention_weights, points=num_points_list, reference=None,
            softmax=False, impl=impl,
        )  # fmt: skip
        # Under autocast, grid_sample takes the widest dtype that it is given, and so its product has it.
        return out.to(torch.promote_types(value.dtype, attention_weights.dtype))

    return core
