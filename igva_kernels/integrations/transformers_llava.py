"""transformers' models of the LLaVA family, whose projector reads one hidden state or a concat of several."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.integrations.lazy import (
    LazyConcat,
    activation_of,
    defer_concat,
    patch_projector,
    set_forward,
    unknown_host,
)
from igva_kernels.nn import Connector

DESCRIPTION = "transformers' (4.52 and newer) Llava, VipLlava, LlavaNext, LlavaNextVideo, LlavaOnevision, VideoLlava"
HOSTS = ("Llava", "VipLlava", "LlavaNext", "LlavaNextVideo", "LlavaOnevision", "VideoLlava")
"""Names of the hosts' classes, without "Model"."""
TOWERS = ("vision_tower", "image_tower", "video_tower")
"""Attributes of a host that may hold a vision tower."""
METHODS = ("get_image_features", "get_video_features")
"""Methods of a host that may feed its projector."""


def matches(model: nn.Module) -> bool:
    """Whether ``model`` contains a model of the family."""
    return any(_is_host(module) for module in model.modules())


def _is_host(module: nn.Module) -> bool:
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models.")]
    return "multi_modal_projector" in module._modules and any(name.removesuffix("Model") in HOSTS for name in names)


def apply(model: nn.Module, edits: PatchHandle, impl: str = "auto") -> None:
    """Let the projectors take layers, and the methods that feed them concatenate lazily."""
    for host in model.modules():
        if not _is_host(host):
            continue
        methods = [name for name in METHODS if hasattr(type(host), name)]
        for name in methods:
            _check_signature(host, name)
        projectors = [m for m in host.multi_modal_projector.modules() if {"linear_1", "linear_2"} <= m._modules.keys()]
        if not projectors:
            raise unknown_host(host, "multi_modal_projector", "no linear_1 and linear_2 in it")
        for projector in projectors:  # peft's modules_to_save holds two of them
            _patch_projector(edits, projector, impl)
        resampler = getattr(host, "vision_resampler", None)
        if isinstance(getattr(resampler, "pool", None), (nn.AvgPool2d, nn.MaxPool2d)):
            set_forward(edits, resampler, _resample)
        for tower in (getattr(host, name) for name in TOWERS if hasattr(host, name)):
            for embeddings in (m for m in tower.modules() if "patch_embedding" in m._modules):
                set_forward(edits, embeddings, _embed)
        defer_concat(edits, host, tuple(methods), TOWERS)


def _check_signature(host: nn.Module, name: str) -> None:
    method = getattr(type(host), name)
    if not method.__module__.startswith("transformers.models."):
        raise unknown_host(host, name, f"it is overridden in {method.__module__}")
    parameters = inspect.signature(method).parameters
    if not {"vision_feature_layer", "vision_feature_layers"} & parameters.keys():
        raise unknown_host(host, name, f"it takes {', '.join(parameters)}, need vision_feature_layer")


def _patch_projector(edits: PatchHandle, projector: nn.Module, impl: str) -> None:
    children = projector._modules.keys()
    if children - {"projector_layernorm"} != {"linear_1", "act", "linear_2"}:
        raise unknown_host(
            projector, "forward", f"it has {', '.join(children)}, need [projector_layernorm,] linear_1, act, linear_2"
        )
    activation = activation_of(projector.act, "model.multi_modal_projector.act")
    patch_projector(edits, projector, _children, activation, impl, "model.multi_modal_projector")


def _children(projector: Any) -> Connector:
    norm = getattr(projector, "projector_layernorm", None)
    return Connector(norm, projector.linear_1, projector.act, projector.linear_2)


def _embed(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """SigLIP's patches start transposed, and all its states keep that layout: one copy here saves one per layer."""
    return type(self).forward(self, *args, **kwargs).contiguous()


def _resample(self: nn.Module, image_features: Tensor | LazyConcat) -> Tensor | LazyConcat:
    """LlavaNextVideo pools frames before the projector: channel by channel, so that the concat can wait."""
    pool = partial(type(self).forward, self)
    return image_features.map(pool) if isinstance(image_features, LazyConcat) else pool(image_features)
