"""Two changes that integrations make to instances of a host.

1. ``defer_concat``: inside the host's own method (``get_image_features``) the vision tower returns its hidden states as
   ``LazyConcat``. What the method does to all of them, cutting off the CLS token and concatenating, is only recorded;
   any other use computes the tensor. The method runs on a stand-in for the model, so nothing is hooked: wrappers of the
   tower (sharding, offload, compilation) see tensors, and so do callers of the method.
2. ``patch_projector``: the projector takes a ``LazyConcat``, a ``MixInput`` or a tensor, and runs the operator.

Both bind functions to the instance, never closures over a module, so that a copy of a patched model uses itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.nn import LayerMixLinear, LayerMixNorm, MixInput, connect
from igva_kernels.nn.sharding import below_adapter, forward_attribute
from igva_kernels.ops.weighted_mix import MixPlan, check_impl
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.runtime.context import is_distributed


class LazyConcat:
    """``torch.cat([h[:, skip_tokens:] for h in layers], dim=-1)``, not computed until it is needed.

    ``[:, n:]``, ``torch.cat(..., dim=-1)`` and ``to`` stay lazy; any other use computes the tensor.
    """

    def __init__(self, layers: tuple[Tensor, ...], skip_tokens: int = 0) -> None:
        self.layers, self.skip_tokens = layers, skip_tokens
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The tensor that this stands for; for one whole layer, the layer itself."""
        if self._tensor is None:  # not a cached_property: its lock cannot be compiled
            states = [h[:, self.skip_tokens :] if self.skip_tokens else h for h in self.layers]
            self._tensor = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        return self._tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> LazyConcat:
        """``fn`` applied to every layer; it must commute with the concatenation."""
        return LazyConcat(tuple(fn(LazyConcat((h,), self.skip_tokens).tensor) for h in self.layers))

    def to(self, *args: Any, **kwargs: Any) -> LazyConcat:
        """``Tensor.to`` of every layer; accelerate calls it on the arguments of a module."""
        return LazyConcat(tuple(h.to(*args, **kwargs) for h in self.layers), self.skip_tokens)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple) and len(index) == 2 and all(isinstance(part, slice) for part in index):
            rows, tokens = index
            from_start = tokens.stop is None and tokens.step is None and isinstance(tokens.start, int)
            if rows == slice(None) and from_start and tokens.start >= 0:
                return LazyConcat(self.layers, self.skip_tokens + tokens.start)
        return self.tensor[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling look for methods that an object need not have
            raise AttributeError(name)
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cat:
            parts, dim = _cat_arguments(*args, **kwargs)
            lazy = dim in (-1, 2) and all(isinstance(part, LazyConcat) for part in parts)
            if lazy and len({part.skip_tokens for part in parts}) == 1:
                return cls(tuple(h for part in parts for h in part.layers), parts[0].skip_tokens)
        return func(*computed(args), **computed(kwargs))


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.tensor, name)(*computed(others))


_OPERATORS = ("len", "iter", "neg", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "matmul")
for _name in _OPERATORS:
    setattr(LazyConcat, f"__{_name}__", _operator(f"__{_name}__"))  # Python looks operators up on the class


def _cat_arguments(tensors: Any, dim: int = 0, **_: Any) -> tuple[Any, int]:
    return tensors, dim


def computed(value: Any) -> Any:
    """``value`` with everything lazy in it computed, also in tuples, lists and dicts (transformers' outputs).

    A dict is changed in place.
    """
    if isinstance(value, LazyConcat):
        return value.tensor
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = computed(item)
    elif type(value) in (tuple, list):
        return type(value)([computed(item) for item in value])
    return value


class _StandIn:
    """Behaves as another object, except where the subclass overrides it."""

    def __init__(self, of: Any, **own: Any) -> None:
        object.__setattr__(self, "_of", of)
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._of, name, value)


class _LazyTower(_StandIn):
    """A vision tower whose hidden states are lazy."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._of(*args, **kwargs)
        if getattr(out, "hidden_states", None) is not None:
            states = tuple(None if h is None else LazyConcat((h,)) for h in out.hidden_states)
            out = replace(out, hidden_states=states)  # a new one, as hooks of the tower may have kept the old
        return out


class _Host(_StandIn):
    """A model as its own method sees it: itself, but with lazy towers."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._of, name)
        return _LazyTower(value) if name in self._towers else value


def defer_concat(edits: PatchHandle, model: nn.Module, methods: tuple[str, ...], towers: tuple[str, ...]) -> None:
    """Let ``methods`` of ``model`` concatenate the hidden states of ``towers`` lazily.

    Raises:
        ValueError: the instance has a method of its own, which must be another patch's.
    """
    for name in methods:
        set_method(edits, model, name, _deferring(getattr(type(model), name), towers))


def _deferring(method: Callable[..., Any], towers: tuple[str, ...]) -> Callable[..., Any]:
    @wraps(method)  # generate() reads the signature
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return computed(method(_Host(self, _towers=towers), *args, **kwargs))

    return run


Children = Callable[[nn.Module], tuple[nn.Module | None, nn.Module, nn.Module]]
"""Finds the LayerNorm (or None), the first and the second Linear of a projector."""


def patch_projector(
    edits: PatchHandle, projector: nn.Module, children: Children, activation: str, impl: str, name: str
) -> None:
    """Let ``projector`` take layers: a ``LazyConcat``, a ``MixInput``, or one state ``[I, P, D]``.

    Args:
        edits: the handle of the patch.
        projector: computes ``linear_2(act(linear_1(norm?(rows))))``.
        children: finds the modules in it, and in a copy of it.
        activation: a key of ``ACTIVATIONS``, see ``activation_of``.
        impl: as in ``layer_mix_mlp``.
        name: what to call the projector in an error.

    Raises:
        NotImplementedError: a Linear is quantised, or an explicit ``impl`` cannot serve it.
        ValueError: the projector is patched already.
    """
    norm, linear_1, linear_2 = children(projector)
    for linear in (linear_1, linear_2):
        _check_linear(linear, name)
    weight = below_adapter(linear_1).weight
    if weight.device.type != "meta":  # offloaded weights have no device until they run
        check_impl(impl, weight.device, weight.dtype, activation)
    set_forward(edits, projector, _projector_forward(children, activation, impl))
    # A replacement of linear_1 (LoRA's) is given the mixed row, so neither it nor the Linear inside it is changed.
    if isinstance(linear_1, nn.Linear):
        set_forward(edits, linear_1, LayerMixLinear.forward)
    if norm is not None:
        set_forward(edits, norm, LayerMixNorm.forward)


def _projector_forward(children: Children, activation: str, impl: str) -> Callable[..., Tensor]:
    def forward(self: nn.Module, rows: LazyConcat | MixInput | Tensor) -> Tensor:
        if isinstance(rows, MixInput):
            return connect(rows._replace(activation=activation, impl=impl), *children(self))
        if isinstance(rows, Tensor):
            if rows.dim() != 3:
                return type(self).forward(self, rows)
            rows = LazyConcat((rows,))
        plan = MixPlan.concat(range(len(rows.layers)))
        mixed = MixInput(rows.layers, None, None, None, plan, rows.skip_tokens, activation, impl)
        return connect(mixed, *children(self))

    return forward


def set_forward(edits: PatchHandle, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Bind ``forward`` to the module, below the hook that accelerate may have put around its forward."""
    set_method(edits, module, "forward", forward, forward_attribute(module))


def set_method(
    edits: PatchHandle, module: nn.Module, method: str, function: Callable[..., Any], attribute: str | None = None
) -> None:
    """Bind ``function`` to ``module`` in place of its class's ``method``, as ``attribute`` (by default ``method``).

    Raises:
        ValueError: the instance has a method of its own there, which must be another patch's.
    """
    attribute = attribute or method
    own = vars(module).get(attribute)
    if own is not None and getattr(own, "__func__", None) is not getattr(type(module), method):
        raise ValueError(
            f"model: {attribute} of its {type(module).__name__} is patched already; revert that patch first (a copy "
            f"of a patched model stays patched: copy it before)"
        )
    edits.set(module, attribute, MethodType(function, module))


def _check_linear(linear: nn.Module, name: str) -> None:
    base = below_adapter(linear)
    weight: Any = getattr(base, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) or is_distributed(weight)
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward and plain and weight.dtype in floats:
        return
    raise NotImplementedError(
        f"{name}: got a {type(base).__module__}.{type(base).__name__} with {getattr(weight, 'dtype', 'no')} weights, "
        f"need nn.Linear modules in floating point; leave the projector out of the quantisation (bitsandbytes: "
        f"llm_int8_skip_modules, others: modules_to_not_convert); its weights are few"
    )


def activation_of(module: nn.Module, name: str) -> str:
    """The key of ``ACTIVATIONS`` for an activation module, found by what the module computes.

    Raises:
        NotImplementedError: it is none of them.
    """
    with torch.no_grad():
        probe = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64, device="cpu")
        for key, fn in ACTIVATIONS.items():
            if torch.allclose(module(probe), fn(probe), rtol=0, atol=1e-5):
                return key
    raise NotImplementedError(
        f"{name}: got the activation {type(module).__name__}, need one of {', '.join(map(repr, ACTIVATIONS))}"
    )
