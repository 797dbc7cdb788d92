"""How an operator is registered with torch.library: arguments, what is saved for its backward, and gradients, by name.

A dispatch mode, a profiler and torch.compile see an operator as ``torch.ops.igva_kernels.<name>``, in eager calls too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from igva_kernels.runtime.context import has_tangent, saveable, transform
from igva_kernels.runtime.flops import register_flops

NAMESPACE = "igva_kernels"
OPS = torch.ops.igva_kernels
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Kernel = Callable[[SimpleNamespace], Any]
"""``kernel(arguments)``."""
Save = Callable[[SimpleNamespace, Any], Mapping[str, Any]]
"""``save(arguments, output)``: what the backward needs, by name: tensors, lists of tensors, and constants."""
Differentiate = Callable[[Tensor, SimpleNamespace, SimpleNamespace], Mapping[str, Any]]
"""``differentiate(grad, needs, saved)``: the gradients by the names of the arguments; one that is left out is None."""


def define(
    schema: str, kernel: Kernel, fake: Kernel, save: Save | None, differentiate: Differentiate,
    left_out: Mapping[str, Any] | None = None, flops: Kernel | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Registers an operator that returns its result, or ``(result, tensors that its backward needs)``.

    Args:
        schema: in torch's notation, without the namespace.
        kernel: takes the arguments by name, on every device; autocast is off inside it.
        fake: returns empty tensors like those of ``kernel``.
        save: returns what the backward needs; None where it needs nothing.
        differentiate: returns the gradients; it may raise where there is no derivative.
        left_out: values for arguments that the schema does not have, for functions that serve several schemas.
        flops: what plain PyTorch would multiply and add in the products of such a call, for torch's FlopCounterMode, in
            which work by elements counts as nothing.

    Returns:
        The operator as a function of its arguments by name; what its schema does not have is ignored.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    arguments = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    given = type("Arguments", (SimpleNamespace,), dict(left_out or {}))  # class attributes, which cost a call nothing
    _LIBRARY.impl(name, _without_autocast(_by_name(kernel, arguments, given)), "CompositeExplicitAutograd")
    # torch.func and autograd's vmap enter at these keys. Further down, jvp would silently drop the tangents, and the
    # other transforms would fail without a reason.
    for key in ("FuncTorchDynamicLayerFrontMode", "Batched"):
        if torch._C._parse_dispatch_key(key) is not None:  # if this torch has the key
            _LIBRARY.impl(name, _refuse_transform, key)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1])
        if save is not None:
            _save(ctx, save(given(**dict(zip(arguments, inputs, strict=True))), output))

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needs = dict(zip(arguments, ctx.needs_input_grad, strict=True))
        grads = {} if grad is None else differentiate(grad, SimpleNamespace(**needs), given(**_saved(ctx)))
        nothing = {name: [None] * len(n) if isinstance(n, (list, tuple)) else None for name, n in needs.items()}
        return tuple(grads.get(name, nothing[name]) for name in arguments)

    torch.library.register_fake(f"{NAMESPACE}::{name}", _by_name(fake, arguments, given), lib=_LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    packet = getattr(OPS, name)
    if flops is not None:
        register_flops(packet, _by_name(flops, arguments, given))
    return lambda **values: packet(*[values[argument] for argument in arguments])


def _by_name(function: Kernel, names: Sequence[str], given: type[SimpleNamespace]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(given(**dict(zip(names, args, strict=False)), **kwargs))

    return run


def no_second_derivative(*_: Any) -> NoReturn:
    """The ``differentiate`` of an operator that is itself a backward."""
    raise NotImplementedError(
        "igva_kernels has first derivatives only; impl='reference' can be differentiated any number of times"
    )


def _save(ctx: Any, values: Mapping[str, Any]) -> None:
    flat: list[Tensor] = []
    ctx.slots, ctx.constants = {}, dict(values)
    for name, value in values.items():
        if isinstance(value, Tensor):
            ctx.slots[name] = len(flat)
            flat.append(value)
        elif isinstance(value, list) and all(isinstance(item, Tensor) for item in value):
            ctx.slots[name] = slice(len(flat), len(flat) + len(value))
            flat += value
        else:
            continue
        del ctx.constants[name]
    ctx.save_for_backward(*map(saveable, flat))


def _saved(ctx: Any) -> dict[str, Any]:
    if not hasattr(ctx, "slots"):
        return {}
    flat = ctx.saved_tensors
    tensors = {name: list(flat[at]) if isinstance(at, slice) else flat[at] for name, at in ctx.slots.items()}
    return ctx.constants | tensors


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with autocast off, which must not change products whose dtypes the public functions have settled.

    It refuses tensors with a tangent, which it would drop.
    """

    @wraps(kernel)
    def run(first: Any, *args: Any) -> Any:
        if has_tangent((first, *args)):
            raise _without_derivative("forward-mode AD")
        device = (first[0] if isinstance(first, (list, tuple)) else first).device.type
        if not torch.is_autocast_enabled(device):
            return kernel(first, *args)
        with torch.autocast(device, enabled=False):
            return kernel(first, *args)

    return run


def _refuse_transform(*args: Any) -> NoReturn:
    raise _without_derivative(transform())


def _without_derivative(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"igva_kernels: its operators have first derivatives in reverse mode only, got a call under {what}; the public "
        f"functions and modules support it with impl='reference' or 'auto'"
    )
