"""The CUDA backend: kernels in C++ on NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import torch

from igva_kernels.runtime import native
from igva_kernels.runtime.backend import Backend
from igva_kernels.runtime.cuda import launch
from igva_kernels.runtime.operands import DTYPES


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """See ``Backend.why_not``."""
    if device.type != "cuda":
        return f"it serves CUDA tensors, not {device.type!r}"
    if dtype not in DTYPES:
        return f"it serves {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    return launch.load()[1] or launch.why_not_device(device)


def notes() -> list[str]:
    """See ``Backend.notes``."""
    build = native.build_info().get("cuda", {})
    if launch.load()[0] is None:
        return []
    left_out = f"; left out: {', '.join(build['left_out'])}" if build.get("left_out") else ""
    archs = ", ".join(build.get("archs", []))
    return [f"built by nvcc {build.get('nvcc', 'unknown')} for {archs} and PTX for {build.get('ptx')}{left_out}"]


BACKEND = Backend("cuda", 1, ("cuda",), why_not, notes)
