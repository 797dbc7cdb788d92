"""Two changes that integrations make to instances of a host.

1. ``defer_concat``: inside the host's own method (``get_image_features``) the vision tower returns its hidden states as
   ``LazyConcat``. What the method does to all of them, cutting off the CLS token and concatenating, is only recorded;
   any other use computes the tensor. The method runs on a stand-in for the model, so nothing is hooked: wrappers of the
   tower (sharding, offload, compilation) see tensors, and so do callers of the method.
2. ``patch_projector``: the projector takes a ``LazyConcat``, a ``MixInput`` or a tensor, and runs the operator.

Both bind functions to the instance, never closures over a module, so that a copy of a patched model uses itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle, describe, is_held
from igva_kernels.nn import Connector, LayerMixLinear, LayerMixNorm, MixInput, connect, is_one_operator
from igva_kernels.nn.sharding import below_adapter, finds_forward, forward_attribute, is_watched
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.ops.weighted_mix.op import OPERATOR
from igva_kernels.registry import REFERENCE, Operator, all_backends, check_here
from igva_kernels.runtime.activations import ACTIVATIONS


class LazyConcat:
    """``torch.cat([h[:, skip_tokens:] for h in layers], dim=-1)``, not computed until it is needed.

    ``[:, n:]``, ``torch.cat(..., dim=-1)``, ``to`` and questions about the shape stay lazy; any other use computes the
    tensor. From then on that tensor is the one layer: whoever was given it may have changed it in place.
    """

    def __init__(self, layers: tuple[Tensor, ...], skip_tokens: int = 0) -> None:
        self.layers, self.skip_tokens = layers, skip_tokens

    @property
    def tensor(self) -> Tensor:
        """The tensor that this stands for; for one whole layer, the layer itself."""
        if len(self.layers) > 1 or self.skip_tokens:
            states = [h[:, self.skip_tokens :] if self.skip_tokens else h for h in self.layers]
            self.layers, self.skip_tokens = (states[0] if len(states) == 1 else torch.cat(states, dim=-1),), 0
        return self.layers[0]

    @property
    def shape(self) -> torch.Size:
        first = self.layers[0].shape
        return torch.Size((first[0], first[1] - self.skip_tokens, sum(h.shape[-1] for h in self.layers)))

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

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


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_OPERATORS = (
    *(f"{how}{name}" for name in _BINARY for how in ("", "r", "i")),
    *("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert", "bool", "float", "int", "index", "complex"),
    *("len", "iter", "reversed", "contains", "setitem", "delitem", "array", "dlpack", "dlpack_device", "format"),
)
for _name in _OPERATORS:
    if hasattr(Tensor, f"__{_name}__"):  # Python looks operators up on the class
        setattr(LazyConcat, f"__{_name}__", _operator(f"__{_name}__"))
LazyConcat.__hash__ = object.__hash__  # type: ignore[method-assign]


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


class _Reader(_StandIn):
    """A module that takes a ``LazyConcat``, unless it has hooks: these are shown the tensor."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_watched(self._of):
            args, kwargs = computed(args), computed(kwargs)
        return self._of(*args, **kwargs)


class _Host(_StandIn):
    """A model as its own method sees it: itself, but with lazy towers."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._of, name)
        if name in self._towers:
            return _LazyTower(value)
        return _Reader(value) if name in READERS and value is not None else value


READERS = ("multi_modal_projector", "vision_resampler")
"""Modules of transformers' hosts that may be given a ``LazyConcat``."""


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


Children = Callable[[nn.Module], Connector]
"""Finds the modules of a projector."""


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
        name: what to call the projector.

    Raises:
        NotImplementedError: an explicit ``impl`` cannot serve it.
        ValueError: the projector is patched already.
    """
    modules = children(projector)
    weight = getattr(below_adapter(modules.linear_1), "weight", None)
    check_patch_impl(OPERATOR, impl, weight, activation)
    set_forward(edits, projector, _projector_forward(children, activation, impl))
    let_take_layers(edits, modules.linear_1, modules.norm)
    edits.note(lambda: f"{name}: {explain(children(projector), activation, impl)}")


def let_take_layers(edits: PatchHandle, *modules: nn.Module | None) -> None:
    """Let Linears and LayerNorms take layers in their own forward, as sharding and offload need it.

    A replacement (LoRA's, a quantised one) is given tensors, so neither it nor what it holds is changed.
    """
    for module in modules:
        for taken, forward in ((nn.Linear, LayerMixLinear.forward), (nn.LayerNorm, LayerMixNorm.forward)):
            if module is not None and type(module).forward is taken.forward:
                set_forward(edits, module, forward)


def check_patch_impl(operator: Operator, impl: str, weight: Tensor | None, *demands: Any) -> None:
    """Checks an ``impl`` at the patch, as far as it can be known: training scripts move a model to its GPU later, so a
    model on the CPU may ask for whatever runs on this machine at all. The rest is checked when the model runs.

    Raises:
        ValueError: no such ``impl``.
        NotImplementedError: it can serve nothing here, or not the device where the model is.
    """
    if weight is not None and weight.device.type not in ("cpu", "meta") and weight.is_floating_point():
        operator.select(impl, weight.device, weight.dtype, (), *demands)
    else:
        check_here(impl)


def explain(modules: Connector, activation: str, impl: str) -> str:
    """Which implementation serves a connector where it is now, and what of it is left to plain PyTorch and why."""
    weight = getattr(below_adapter(modules.linear_1), "weight", None)
    by_kernels, line = served_by(OPERATOR, impl, weight, activation)
    return f"{line}; {modules.explain()}" if by_kernels else line


def served_by(operator: Operator, impl: str, weight: Tensor | None, *demands: Any) -> tuple[bool, str]:
    """Which implementation of an operator serves tensors like ``weight`` where it is now, or why none does, in words;
    and whether there is more to say than that plain PyTorch serves them, or nothing."""
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point():  # offloaded, quantised
        return True, f"impl={impl!r}"
    device, dtype = weight.device, weight.dtype
    at = f"{str(dtype).removeprefix('torch.')} on {device}"
    served = impl
    if impl == "auto":
        served = next(iter(operator.candidates(device, dtype, *demands)), REFERENCE)
    if served != REFERENCE:
        cannot = operator.why_not(served, device, dtype, *demands)
        return cannot is None, f"by {served} ({at})" if cannot is None else f"{served} cannot serve {at}: {cannot}"
    passed_over = all_backends() if impl == "auto" else ()
    why = [f"{name}: {operator.why_not(name, device, dtype, *demands)}" for name in passed_over]
    return False, "; ".join([f"by plain PyTorch ({at})", *why])


def _projector_forward(children: Children, activation: str, impl: str) -> Callable[..., Tensor]:
    def forward(self: nn.Module, rows: LazyConcat | MixInput | Tensor) -> Tensor:
        modules = children(self)
        if isinstance(rows, MixInput):
            mixed = rows._replace(activation=activation, impl=impl)
        else:
            if isinstance(rows, Tensor):
                if rows.dim() != 3 or not is_one_operator(modules):
                    return type(self).forward(self, rows)
                rows = LazyConcat((rows,))
            plan = MixPlan.concat(range(len(rows.layers)))
            mixed = MixInput(rows.layers, None, None, None, plan, rows.skip_tokens, activation, impl)
        return connect(mixed, modules)

    return forward


def set_forward(edits: PatchHandle, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Bind ``forward`` to the module, below the hook that accelerate may have put around its forward."""
    attribute = forward_attribute(module)
    set_method(edits, module, "forward", forward, attribute)
    if attribute != "forward" and not finds_forward(vars(module)["forward"]):
        edits.set(module, "forward", MethodType(_hooked(forward), module))


def _hooked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What an old accelerate puts around the forward that it found, around the one that is there."""

    @wraps(forward)  # generate() reads the signature
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._hf_hook.pre_forward(self, *args, **kwargs)
        with torch.no_grad() if self._hf_hook.no_grad else nullcontext():
            output = self._old_forward(*args, **kwargs)
        return self._hf_hook.post_forward(self, output)

    return run


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
        kind = type(module).__name__
        if is_held(module, but_by=edits):
            raise ValueError(f"model: {attribute} of its {kind} is patched already; revert that patch first")
        raise ValueError(
            f"model: {attribute} of its {kind} has been replaced by {describe(own)}, which a patch would undo; patch "
            f"first, and replace, wrap or compile it then (to take accelerate's mixed precision off: "
            f"accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    edits.set(module, attribute, MethodType(function, module))


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


def unknown_host(module: nn.Module, name: str, found: str) -> NotImplementedError:
    """The error for a host's method or module that is not as this package knows it."""
    version = getattr(sys.modules.get("transformers"), "__version__", "unknown")
    return NotImplementedError(
        f"model: {type(module).__name__}.{name} with transformers {version}: {found}; "
        f"docs/compatibility.md lists the versions that are known"
    )
