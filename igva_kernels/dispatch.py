"""Which backend serves a call: an explicit ``impl`` or the best that can run here."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch

from igva_kernels.backends.base import Backend
from igva_kernels.context import constant_under_compile, why_only_torch

# On a card "auto" takes the first that can serve the call, in the order of the card's configuration file: Triton before
# CUDA until ``tune`` has measured both there.
KERNEL_BACKENDS = ("triton", "cuda", "cpu")
IMPLS = ("auto", "reference", *KERNEL_BACKENDS)


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine."""

    name: str
    available: bool
    devices: tuple[str, ...]
    """Device types that it serves here."""
    reason: str
    """Why it cannot run; empty where it can."""


@constant_under_compile
def why_not_allocate(name: str, width: int, num_weights: int) -> str | None:
    """``Backend.why_not_allocate`` of the backend of this name."""
    return get(name).why_not_allocate(width, num_weights)


@cache
def get(name: str) -> Backend:
    """The backend of this name. Importing one touches no driver and never fails."""
    return importlib.import_module(f"igva_kernels.backends.{name}").BACKEND


def backends() -> list[BackendStatus]:
    """What can run here and, for each one that cannot, why."""
    present = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    statuses = [BackendStatus("reference", True, tuple(present), "")]
    for name in KERNEL_BACKENDS:
        reasons = {device: get(name).why_not(torch.device(device), torch.float32) for device in ("cpu", "cuda")}
        devices = tuple(device for device in present if reasons[device] is None)
        reason = "" if devices else reasons["cpu" if name == "cpu" else "cuda"] or "no CUDA device"
        statuses.append(BackendStatus(name, bool(devices), devices, reason))
    return statuses


def select(
    impl: str, device: torch.device, dtype: torch.dtype, *tensors: Any, allocator: tuple[int, int] | None = None
) -> str:
    """The backend that serves ``impl`` for tensors of this device and dtype.

    Args:
        impl: a name, or "auto".
        device: of the tensors.
        dtype: of the tensors.
        tensors: of the call, also in sequences; what is None or no tensor does not count.
        allocator: hidden width and K, where "auto" must find kernels for ``nn.WeightAllocator``.

    Raises:
        ValueError: no such ``impl``.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    backend = _select(impl, device, dtype, allocator)
    reason = None if backend == "reference" else why_only_torch(*tensors)
    if reason is None:
        return backend
    if impl != "auto":
        raise NotImplementedError(
            f"impl={impl!r} cannot serve the call while {reason}: the kernels have first derivatives in reverse mode "
            f"only; impl='reference' or 'auto' can"
        )
    return "reference"


@constant_under_compile
def _select(impl: str, device: torch.device, dtype: torch.dtype, allocator: tuple[int, int] | None) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl: got {impl!r}, need one of {', '.join(map(repr, IMPLS))}")
    if impl == "reference":
        return impl
    if impl != "auto":
        reason = get(impl).why_not(device, dtype)
        if reason is not None:
            raise NotImplementedError(f"impl={impl!r} cannot serve {dtype} tensors on {str(device)!r}: {reason}")
        return impl
    names = able(device, dtype)
    if allocator is not None:
        names = [name for name in names if get(name).why_not_allocate(*allocator) is None]
    if len(names) < 2:
        return names[0] if names else "reference"
    return next(name for name in _fastest_first(device) if name in names)


def able(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernel backends that "auto" may take: Triton's interpreter is a test tool, never the best choice."""
    names = (name for name in KERNEL_BACKENDS if (name, device.type) != ("triton", "cpu"))
    return [name for name in names if get(name).why_not(device, dtype) is None]


def _fastest_first(device: torch.device) -> tuple[str, ...]:
    from igva_kernels.backends.triton.config import of_device  # imports Triton, which takes a second

    measured = of_device(torch.cuda.current_device() if device.index is None else device.index).backends
    return (*measured, *KERNEL_BACKENDS)  # a backend that was built after the measurement comes last
