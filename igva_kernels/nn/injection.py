"""Features of images added to the hidden states of a language model, at some of its layers.

The features travel with the call: whoever runs the language model passes ``**injection.given(...)``, the model hands
this argument to each of its layers, and a hook of the layer takes it out again. Nothing is kept between calls, so that
threads can share a model, and a layer that runs again in a backward is given the same features as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.ops.inject_tokens import inject_tokens
from igva_kernels.runtime.context import PerThread

_ARGUMENT = "injected_tokens"
"""The name under which the language model hands the features to its layers."""


class _Injected:
    """What one call of the language model injects. No dataclass: FSDP would rebuild one on its way to the layers."""

    def __init__(self, feature: Callable[[int], Tensor], token_rows: Tensor) -> None:
        self.feature, self.token_rows = feature, token_rows
        self.is_differentiated = torch.is_grad_enabled()
        self.seen: set[int] = set()  # the layers that have injected


class _InLayer(PerThread):
    """What the layer that is running in this thread injects after it has run."""

    def __init__(self) -> None:
        self.injected: _Injected | None = None


class TokenInjection:
    """Adds features to the hidden states before, or after, some layers of a language model.

    ::

        injection = TokenInjection({3: 0, 23: 1})  # feature 0 before layer 3, feature 1 before layer 23
        injection.attach(language_model, language_model.layers)
        language_model(inputs_embeds=embeds, **injection.given([first, second], ik.token_rows(is_image)))

    A call without the argument, such as a decode step, runs as if nothing were attached.

    Args:
        layers: by the index of a layer, the index of the feature that is injected there.
        when: "before" or "after" the layer.
        impl: as in ``inject_tokens``.

    Raises:
        ValueError: no layer, a negative index, or another ``when``.
    """

    def __init__(self, layers: Mapping[int, int], when: str = "before", impl: str = "auto") -> None:
        if not layers or min(*layers, *layers.values()) < 0:
            raise ValueError(f"layers: need indices of features by indices of layers, from 0 on, got {dict(layers)}")
        if when not in ("before", "after"):
            raise ValueError(f"when: got {when!r}, need 'before' or 'after'")
        self.layers, self.when, self.impl = dict(layers), when, impl
        self._in_layer = _InLayer()

    def attach(self, language_model: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Hooks the layers; ``language_model`` is the module that calls them and hands on its keyword arguments.

        Raises:
            ValueError: features are injected at a layer that there is not.
        """
        modules = list(layers)
        if max(self.layers) >= len(modules):
            raise ValueError(f"layers: got layer {max(self.layers)} of a language model with {len(modules)} layers")
        for index, module in enumerate(modules):
            module.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            if self.when == "after" and index in self.layers:
                module.register_forward_hook(partial(self._leave, index))
        language_model.register_forward_hook(self._check_all_injected, with_kwargs=True)

    def given(self, feature: Sequence[Tensor] | Callable[[int], Tensor], token_rows: Tensor) -> dict[str, Any]:
        """The keyword argument of a call of the language model that injects.

        Args:
            feature: the features ``[V, H]`` or ``[B, P, H]`` in their order, or a function of the index that computes
                one when its layer is reached.
            token_rows: int32 or int64 ``[B, T]``, the row of a feature that each token takes, -1 for none.
        """
        compute = feature if callable(feature) else feature.__getitem__
        return {_ARGUMENT: _Injected(compute, token_rows)}

    # The hooks.

    def _enter(self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _ARGUMENT not in kwargs:
            return None
        kwargs = dict(kwargs)
        injected = kwargs.pop(_ARGUMENT)
        if index not in self.layers:
            return args, kwargs
        if self.when == "after":
            self._in_layer.injected = injected
        elif args:
            args = (self._inject(index, args[0], injected), *args[1:])
        else:
            kwargs["hidden_states"] = self._inject(index, kwargs["hidden_states"], injected)
        return args, kwargs

    def _leave(self, index: int, _: nn.Module, args: Any, output: Any) -> Any:
        injected, self._in_layer.injected = self._in_layer.injected, None
        if injected is None:
            return None
        if isinstance(output, tuple):
            return (self._inject(index, output[0], injected), *output[1:])
        return self._inject(index, output, injected)

    def _inject(self, index: int, hidden_states: Tensor, injected: _Injected) -> Tensor:
        if injected.is_differentiated and not torch.is_grad_enabled():
            # A reentrant checkpoint around the hooks would give the features no gradient.
            raise NotImplementedError(
                "gradient_checkpointing: with use_reentrant=True this version of transformers runs the hooks of a "
                "layer inside the checkpoint; need use_reentrant=False, or transformers 5.23 or newer"
            )
        injected.seen.add(index)
        feature = injected.feature(self.layers[index]).to(hidden_states.device)
        rows = injected.token_rows.to(hidden_states.device)
        return inject_tokens(hidden_states, feature, rows, impl=self.impl)

    def _check_all_injected(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        injected = kwargs.get(_ARGUMENT)
        if injected is not None and len(injected.seen) != len(self.layers):
            missing = sorted(self.layers.keys() - injected.seen)
            raise NotImplementedError(
                f"language_model: a {type(module).__name__} ran without injecting at its layers {missing}; need one "
                f"that runs all of its layers and hands them its keyword arguments"
            )
