"""What torch does around a call: torch.func, forward-mode AD, autocast, inference mode, other threads."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Tensor = TypeVar("_Tensor", Tensor, Tensor | None)


def constant_under_compile(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile evaluate a function of constants while it traces.

    It is ``torch.compiler.assume_constant_result``, without the two seconds of importing the compiler.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def cached_constant(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``functools.cache`` for a function of constants, which torch.compile evaluates and does not trace."""
    cached = cache(fn)

    @constant_under_compile
    @wraps(fn)
    def run(*args: Any) -> Any:
        return cached(*args)

    run.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return run


class FallbackWarning(UserWarning):
    """``impl="auto"`` took plain PyTorch for a call, although kernels serve its device."""


@cached_constant
def warn_of_fallback(operator: str, reason: str) -> bool:
    """Says once per reason that plain PyTorch computes what kernels would; torch.compile says it while it traces."""
    warnings.warn(f"{operator}: impl='auto' takes plain PyTorch, not kernels, because {reason}", FallbackWarning, 2)
    return True


@constant_under_compile
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype where it is on for this device; None where it is off, or unknown to torch (meta)."""
    if not _has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def why_only_torch(values: Iterable[Any]) -> str | None:
    """What is being done to a call with these tensors that only plain torch supports; None where nothing is.

    The kernels have a backward, but neither a forward-mode derivative nor a rule for a batch of calls: they would drop
    a tangent silently.
    """
    # torch's own check; in a torch without it, the operators themselves refuse a transform (``torch_op``).
    if getattr(torch._C, "_are_functorch_transforms_active", bool)():
        return f"{transform()} is active and the kernels {_DERIVATIVES}"
    if _exports_to_onnx():
        return "torch.onnx exports it and ONNX has no such operator"
    # Code that is being compiled shows no tangents; when it runs, the operators look again.
    seen = not torch.compiler.is_compiling() and has_tangent(values)
    return f"forward-mode AD is active, a tensor carries a tangent and the kernels {_DERIVATIVES}" if seen else None


_DERIVATIVES = "have first derivatives in reverse mode only"


@constant_under_compile
def _exports_to_onnx() -> bool:
    exporter = sys.modules.get("torch.onnx")  # recent versions of torch import it when it is first used
    return exporter is not None and exporter.is_in_onnx_export()


def transform() -> str:
    """The innermost transform that is active: torch.func's grad, vmap, jvp or functionalize, or autograd's own vmap."""
    if torch.compiler.is_compiling():
        return "torch.func"
    innermost = torch._C._functorch.peek_interpreter_stack()
    return "is_grads_batched" if innermost is None else f"torch.func's {innermost.key().name.lower()}"


def has_tangent(values: Iterable[Any]) -> bool:
    """Whether a tensor among these, or in a sequence among these, carries a tangent of forward-mode AD."""
    if getattr(forward_ad, "_current_level", 0) < 0:  # outside forward-mode AD the check costs no more than this
        return False
    # Below a dispatch mode autograd is excluded, and torch would see no tangent.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        return _has_tangent(values)


def _has_tangent(values: Iterable[Any]) -> bool:
    return any(
        forward_ad.unpack_dual(value).tangent is not None
        if isinstance(value, Tensor)
        else isinstance(value, (tuple, list)) and _has_tangent(value)
        for value in values
    )


def has_storage(tensor: Tensor) -> bool:
    """Whether there is memory behind a tensor, real or pretended (a meta tensor's).

    True for torch.func's wrappers, which do not show theirs.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.untyped_storage().size() > 0


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what its memory says: no subclass that wants to know what is done with it, and nothing that
    torch's dispatcher turns into an ordinary tensor before a kernel sees it."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not (
        tensor.layout is not torch.strided or tensor.is_neg() or tensor._is_zerotensor() or tensor.is_nested
    )


def is_unobserved() -> bool:
    """Whether nothing around a call would notice that it does not pass torch's dispatcher: gradients that are recorded,
    a compiler, a tracer, a function or dispatch mode, a profiler, forward-mode AD. Transforms and autocast are known
    by the tensors' layout (``layouts``)."""
    return not (
        torch.compiler.is_compiling()
        or records_gradients()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or getattr(forward_ad, "_current_level", 0) >= 0
    )


def check_storage(name: str, weight: Tensor) -> None:
    """Raises ValueError for a weight whose storage was freed: a kernel would read memory that is not the weight's."""
    if weight.numel() and not has_storage(weight):
        raise ValueError(
            f"{name}: its storage has been freed, as sharded training does outside the forward of the module that owns "
            f"it; read the weight inside that forward"
        )


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor, whose values are spread over processes."""
    return hasattr(tensor, "device_mesh")


def has_values(tensor: Tensor) -> bool:
    """Whether Python may look at the values: not those of meta and fake tensors, nor of torch.func's wrappers."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or tensor.untyped_storage().device.type == "meta"
    )


def saveable(tensor: _Tensor) -> _Tensor:
    """The tensor as autograd can save it: one that was made under inference mode is copied."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def records_gradients() -> bool:
    """Whether a call must keep what its backward needs; a trace of torch.jit is checked, and may later be run, in
    another mode than it was made in."""
    return torch.is_grad_enabled() or torch.jit.is_tracing()


class PerThread(threading.local):
    """State of a call on an object that threads share: each thread has its own, and a copy of the object starts new."""

    def __reduce__(self) -> Any:
        return type(self), ()
