"""The compiled CUDA module, the devices that it runs on, and how the current stream reaches it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from igva_kernels.runtime import native


@cache
def load() -> tuple[ModuleType | None, str]:
    """``(module, "")``, or ``(None, why not)``."""
    try:
        return importlib.import_module("igva_kernels._cuda"), ""
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            return None, f"the compiled CUDA module does not load: {error}"
        built = native.build_info()
        reason = built.get("cuda", {}).get("reason") or built.get("reason")
        return None, reason or "the CUDA module was never built; run `pip install .` where nvcc is found"


def module() -> Any:
    """The compiled module; only called where ``load`` has found it."""
    return load()[0]


def why_not_device(device: torch.device) -> str | None:
    """None if the module's kernels run on this CUDA device, otherwise the reason why not."""
    if torch.version.hip is not None:
        return "only CUDA is supported, this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _why_not_index(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _why_not_index(index: int) -> str | None:
    driver, runtime = module().versions()
    if driver // 1000 < runtime // 1000:
        return (
            f"the module was built with CUDA {_version(runtime)} and needs a driver of that major version, "
            f"this one supports CUDA {_version(driver)}"
        )
    capability = torch.cuda.get_device_capability(index)
    built = native.build_info().get("cuda", {})
    archs, ptx = built.get("archs", []), built.get("ptx") or None
    if not runs_on(archs, ptx, capability):
        major, minor = capability
        return (
            f"the module has code for {', '.join(archs)}{f' and PTX for {ptx}' if ptx else ''}, the device has compute "
            f"capability {major}.{minor}; rebuild with IGVA_KERNELS_CUDA_ARCHS={major}{minor}"
        )
    return None


def runs_on(archs: Sequence[str], ptx: str | None, capability: tuple[int, int]) -> bool:
    """Whether machine code for ``archs``, or the PTX of one, runs on a device.

    Machine code runs on devices of its own major version and of its minor version or a later one; with an "a", on its
    own version only. The driver compiles PTX for any device from its version on.
    """
    major, minor = capability
    for arch in archs:
        own = divmod(int(arch.rstrip("a")), 10)
        if own == capability or (not arch.endswith("a") and own[0] == major and own[1] <= minor):
            return True
    return ptx is not None and divmod(int(ptx), 10) <= (major, minor)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class on_device_of:
    """``with on_device_of(tensor) as stream``: its device is current, for torch and for the module; the stream is the
    current one of that device."""

    def __init__(self, tensor: Tensor) -> None:
        self._index = tensor.device.index if tensor.is_cuda else None  # the tests' emulation has CPU tensors

    def __enter__(self) -> int:
        if self._index is None:
            return 0
        # What torch.cuda.device and torch.cuda.current_stream do, at a quarter of their time.
        self._before = torch.cuda._exchange_device(self._index)
        try:
            module().set_device(self._index)
            stream: int = torch._C._cuda_getCurrentRawStream(self._index)
        except BaseException:
            self.__exit__()
            raise
        return stream

    def __exit__(self, *_: object) -> None:
        if self._index is not None:
            torch.cuda._maybe_exchange_device(self._before)
