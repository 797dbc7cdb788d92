"""What FSDP, DeepSpeed, accelerate and peft do to a Linear or a LayerNorm, as far as the modules must know.

All of them act in a module's own forward: FSDP2 turns its class into a subclass and DeepSpeed ZeRO-3 hooks it, and both
gather its weights there and free them after; accelerate puts a wrapper around the forward, which moves weights in and
out; peft puts a module of its own in its place. A weight may be read outside that forward only where none of them acts.

A hook that none of them has put there is the user's (or tensor parallelism's): it expects the tensors that it would see
without this package, so a module that has one is called as the module it is, with tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.runtime.context import has_storage

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_GATHER = ("deepspeed.", "torch.distributed.fsdp.", "torch.distributed._composable", "torch.utils.module_tracker")
"""Where hooks come from that gather weights or count calls, and leave the tensors of a call as they are."""


def is_untouched(module: nn.Module, *lent: Callable[..., Any]) -> bool:
    """Whether a module's forward runs the code of its class and nothing else, and its weights are there.

    False with hooks; with a forward set on the instance (accelerate's wrapper), unless it is one of those that a patch
    has ``lent`` it; with weights that are tensor subclasses (DTensors, quantised ones) or whose storage was freed.
    """
    own = module.__dict__.get("forward")
    if own is not None and not _is_one_of(own, lent):
        return False
    if any(getattr(module, name) for name in _HOOKS):
        return False
    return has_plain_weights(module) and all(_is_there(p) for p in module._parameters.values() if p is not None)


def has_plain_weights(module: nn.Module) -> bool:
    """Whether no weight is of a subclass of tensor, as quantised and distributed ones are; torch.export's may be."""
    weights = (p for p in module._parameters.values() if p is not None)
    return all(type(p) in (Tensor, nn.Parameter) or type(p).__name__ == "FakeTensor" for p in weights)


def is_watched(module: nn.Module) -> bool:
    """Whether a hook of the module may read or change the tensors of a call."""
    return not all(_only_gathers(hook) for name in _HOOKS for hook in getattr(module, name).values())


def _only_gathers(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a functools.partial
    return str(getattr(function, "__module__", "")).startswith(_GATHER)


def runs(module: nn.Module, *forwards: Callable[..., Any]) -> bool:
    """Whether a module's forward, below the wrapper that accelerate may have put around it, is one of ``forwards``."""
    own = module.__dict__  # torch 2.8 cannot trace vars()
    return _is_one_of(own.get("_old_forward", own.get("forward", type(module).forward)), forwards)


def forward_attribute(module: nn.Module) -> str:
    """Where a module's forward is to be replaced: below accelerate's wrapper, if there is one."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def finds_forward(wrapper: Any) -> bool:
    """Whether accelerate's wrapper calls what is in ``_old_forward``; an old one calls the forward that it found."""
    function = getattr(wrapper, "func", wrapper)  # of a functools.partial
    code = getattr(function, "__code__", None)
    return code is None or "_old_forward" in code.co_names


def below_adapter(module: nn.Module) -> Any:
    """The module itself, or the one that peft's adapter (LoRA) or copy (``modules_to_save``) has replaced."""
    for name in ("base_layer", "original_module"):
        if isinstance(below := getattr(module, name, None), nn.Module):
            return below_adapter(below)
    return module


def _is_one_of(forward: Any, forwards: tuple[Callable[..., Any], ...]) -> bool:
    function = getattr(forward, "__func__", forward)
    return any(function is one for one in forwards)  # torch 2.11 cannot trace `in`


def _is_there(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or (tensor.numel() > 0 and has_storage(tensor))
