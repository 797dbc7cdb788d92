"""The CUDA backend: kernels in C++ on NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import torch

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


BACKEND = Backend("cuda", 1, ("cuda",), why_not)
