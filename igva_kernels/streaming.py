"""Run a vision tower without keeping its hidden states: they are folded into the sources of a plan as they appear.

A tower asked for all hidden states keeps L of them alive (25 for CLIP ViT-L, 29.5 MB per image in bf16). A plan needs
only the sources of ``plan.reduced()``: IGVA's five. Hooks on the encoder's layers fold each state into the sources that
read it and let it go:

* ``mode="group"`` holds the states of a group until it is complete and folds them by one kernel, which reads each once:
  at most one group of states is alive beside the sources.
* ``mode="layer"`` adds each state to a running sum at once: only taps are kept alive, but every addition reads and
  writes an fp32 sum, so it moves about three times the bytes.

A stream belongs to the thread that opened it: only runs of the tower in that thread feed it, so that threads which
share a tower each find the states of their own images.

If gradients flow into the tower, autograd keeps the states alive anyway, and a sum made inside a checkpointed layer
would lose its graph: the states are then collected, and folded after the tower has returned.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.ops.weighted_mix import MixPlan, is_tap, layer_mix
from igva_kernels.ops.weighted_mix.plan import Block
from igva_kernels.runtime.context import PerThread
from igva_kernels.runtime.dense import accumulation_dtype

MODES = ("group", "layer")

_HOOKS = threading.Lock()
"""Held while hooks come or go, because torch numbers them by a counter that two threads can read at once."""


def encoder_layers(vision_tower: nn.Module) -> nn.ModuleList:
    """The layers of the tower's encoder: the longest ModuleList that lies in no other.

    They are found in the modules and not in a config, because some repositories cut the last layer. What a layer holds
    is a part of it, however long a list: experts, heads, the blocks of a stage.

    Raises:
        TypeError: the tower is no module.
        ValueError: it has no such list.
    """
    if not isinstance(vision_tower, nn.Module):
        raise TypeError(f"vision_tower: need a module, got {type(vision_tower).__name__}")
    lists = [found for found in _outermost_lists(vision_tower) if len(found)]
    if not lists:
        raise ValueError(
            f"vision_tower: need a module whose encoder layers are one ModuleList, got {type(vision_tower).__name__}"
        )
    return max(lists, key=len)


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


class _Here(PerThread):
    """Whether this thread is inside the ``with`` block of a stream.

    It is an attribute and not a comparison of threads, because torch.compile guards on the attributes that it reads:
    code compiled in one thread is not run in another.
    """

    def __init__(self) -> None:
        self.is_open = False


class HiddenStateStream:
    """The sources of a plan, gathered while a tower runs. Made by ``stream_hidden_states``."""

    def __init__(self, layers: nn.ModuleList, plan: MixPlan, mode: str, impl: str) -> None:
        if not isinstance(plan, MixPlan):
            raise TypeError(f"plan: need a MixPlan, got {type(plan).__name__}")
        if mode not in MODES:
            raise ValueError(f"mode: got {mode!r}, need one of {', '.join(map(repr, MODES))}")
        sources, self.plan = plan.resolve(len(layers) + 1).reduced()
        """The plan over the sources: mixing ``s.sources`` by ``s.plan`` equals mixing the hidden states by ``plan``."""
        self._folds = [_Fold(block, mode, impl) for block in sources.blocks]
        self._here = _Here()
        self._running = False
        self._sources: list[Tensor] | None = None

    @property
    def sources(self) -> list[Tensor]:
        """The sources ``[I, T, D]`` of the tower's latest run, with all T tokens.

        Raises:
            RuntimeError: the tower has not run to its end, or only in another thread.
        """
        if self._sources is None:
            raise RuntimeError(
                "sources: the vision tower has not run to its end inside the with block, in the thread that opened it"
            )
        return self._sources

    # The hooks. While another thread registers or removes one of its own, torch may call that one in this thread
    # without the keyword arguments that it takes; hence their defaults.

    def _start(self, tower: nn.Module, args: Any, kwargs: Any = None) -> None:
        if not self._here.is_open:
            return
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in (*tower.parameters(), *inputs))
        for fold in self._folds:
            fold.start(differentiates)
        self._sources = None
        self._running = True

    def _see_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        if not self._here.is_open:
            return None
        if not args and "hidden_states" not in kwargs:
            raise NotImplementedError(
                f"vision_tower: its first layer is called with {', '.join(kwargs)}, need the state as the first "
                f"argument or as hidden_states"
            )
        state = args[0] if args else kwargs["hidden_states"]
        # transformers' SigLIP starts with transposed patches, and every residual sum after them keeps that layout: one
        # copy here saves one per layer in the mix.
        if isinstance(state, Tensor):
            state = state.contiguous()
        self._see(0, state)
        return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})

    def _see_output(self, index: int, _: nn.Module, args: Any, output: Any) -> None:
        if self._here.is_open:
            self._see(index, output[0] if isinstance(output, tuple) else output)

    def _see(self, index: int, state: Any) -> None:
        # A layer that checkpointing runs again in the backward is not part of a run of the tower.
        if not self._running:
            return
        if not isinstance(state, Tensor) or state.dim() != 3:
            given = f"a tensor of shape {list(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            raise NotImplementedError(f"vision_tower: {_name(index)} is {given}, need a tensor [I, T, D]")
        for fold in self._folds:
            fold.see(index, state)

    def _finish(self, *_: Any) -> None:
        if not self._here.is_open:
            return
        self._running = False
        self._sources = [fold.finish() for fold in self._folds]

    def __deepcopy__(self, memo: Any) -> HiddenStateStream:
        """A stream that sees nothing, for the hooks of a copy of the tower that is made inside the block."""
        closed = copy(self)
        closed._here, closed._folds, closed._sources = _Here(), [], None
        return closed

    def _drop(self) -> None:
        """Forget a run that did not end."""
        if self._running:
            self._running = False
            for fold in self._folds:
                fold.start(False)


def _name(index: int) -> str:
    return f"the output of layer {index}" if index else "the input of layer 1"


class _Fold:
    """One source while it is being computed."""

    def __init__(self, block: Block, mode: str, impl: str) -> None:
        self.scales: dict[int, float] = {}
        for entry in block:  # a layer may have several, which add up
            self.scales[entry.layer] = self.scales.get(entry.layer, 0.0) + entry.scale
        self.layers, self.plan = MixPlan((block,)).compact()
        self.is_tap = is_tap(block)
        self.mode, self.impl = mode, impl
        self.start(False)

    def start(self, differentiates: bool) -> None:
        self.differentiates = differentiates
        self.held: dict[int, Tensor] = {}
        self.total: Tensor | None = None
        self.missing = set(self.layers)
        self.shape: torch.Size | None = None

    def see(self, index: int, state: Tensor) -> None:
        if index not in self.scales:
            return
        if index not in self.missing:
            raise RuntimeError(f"vision_tower: {_name(index)} came twice in one run, need it once")
        if self.shape not in (None, state.shape):
            raise NotImplementedError(
                f"vision_tower: {_name(index)} has shape {list(state.shape)}, need {list(self.shape)} as the states "
                f"that it is summed with"
            )
        self.missing.remove(index)
        self.shape = state.shape
        if self.mode == "layer" and not self.is_tap and not self.differentiates:
            self._add(index, state)
            return
        self.held[index] = state
        if not self.missing and not self.differentiates:
            self._fold()

    def finish(self) -> Tensor:
        if self.missing:
            raise RuntimeError(
                f"vision_tower: a run left out layers {sorted(self.missing)}, need each of the plan's once"
            )
        if self.total is None:
            self._fold()
        total, self.total = self.total, None
        assert total is not None
        return total

    def _fold(self) -> None:
        states = [self.held[layer] for layer in self.layers]
        device = states[-1].device  # a device map may have spread the layers
        self.held = {}
        self.total = states[0] if self.is_tap else layer_mix([s.to(device) for s in states], self.plan, impl=self.impl)

    def _add(self, index: int, state: Tensor) -> None:
        if self.total is None:
            self.total = torch.zeros_like(state, dtype=accumulation_dtype(state.dtype))
        self.total = self.total.to(state.device).add_(state, alpha=self.scales[index])
        if not self.missing:
            self.total = self.total.to(state.dtype)


@contextmanager
def stream_hidden_states(
    vision_tower: nn.Module, plan: MixPlan, *, mode: str = "group", impl: str = "auto"
) -> Iterator[HiddenStateStream]:
    """Gather the sources of ``plan`` while ``vision_tower`` runs, without keeping its hidden states.

    ::

        with ik.stream_hidden_states(tower, plan) as s:
            tower(pixel_values)
        out = ik.layer_mix_mlp(s.sources, s.plan, mix_weights, ...)

    The result equals the one-shot mix within rounding. Leave ``output_hidden_states`` off, or the tower keeps the
    states itself. Each run of the tower starts anew, and several streams may watch one tower, in one thread or in many.
    A stream sees only the runs of the thread that opened it: under ``nn.DataParallel``, open it inside the module that
    is replicated. The hooks are removed with the block, even if the tower raises. Under torch.compile, enter the block
    outside the compiled function: a tower that was compiled without hooks is compiled once more.

    Args:
        vision_tower: any module whose encoder layers are one ModuleList (transformers' CLIP and SigLIP, and others),
            see ``encoder_layers``; a layer returns its state ``[I, T, D]`` or a tuple that starts with it.
        plan: which layers go where; ``hidden_states[0]`` is the input of the first layer.
        mode: "group" or "layer", see above.
        impl: which backend folds, as in ``layer_mix``.

    Raises:
        ValueError: an unknown mode, a tower without a list of layers, or a plan for another number of states.
        TypeError: the tower is no module, or the plan no MixPlan.
        NotImplementedError: while the tower runs, if its first layer is called without its input state, or a state has
            another shape.
        RuntimeError: a run does not pass each layer of the plan once.
    """
    layers = encoder_layers(vision_tower)
    stream = HiddenStateStream(layers, plan, mode, impl)
    with _HOOKS:
        handles = [
            vision_tower.register_forward_pre_hook(stream._start, with_kwargs=True),
            layers[0].register_forward_pre_hook(stream._see_input, with_kwargs=True),
            *(
                layer.register_forward_hook(partial(stream._see_output, index))
                for index, layer in enumerate(layers, start=1)
            ),
            vision_tower.register_forward_hook(stream._finish),
        ]
    stream._here.is_open = True
    try:
        yield stream
    finally:
        stream._here.is_open = False
        with _HOOKS:
            for handle in handles:
                handle.remove()
        stream._drop()
