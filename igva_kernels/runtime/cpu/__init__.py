"""The CPU backend: C++ kernels, chosen by instruction set at run time, around the products of torch's libraries."""

from __future__ import annotations

import torch

from igva_kernels.runtime import native
from igva_kernels.runtime.backend import Backend
from igva_kernels.runtime.operands import DTYPES


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """See ``Backend.why_not``."""
    if device.type != "cpu":
        return f"it serves CPU tensors, not {device.type!r}"
    if dtype not in DTYPES:
        return f"it serves {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    return native.load()[1] or None


def notes() -> list[str]:
    """See ``Backend.notes``."""
    module, build = native.load()[0], native.build_info()
    if module is None:
        return []
    forced = f", as {native.ISA_VARIABLE} says" if native.forced_isa() else ""
    return [
        f"built by {build.get('compiler', 'an unknown compiler')} for {', '.join(build.get('cpu_isas', []))}, "
        f"OpenMP {build.get('openmp', 'unknown')}; uses {module.isa()}{forced}"
    ]


BACKEND = Backend("cpu", 2, ("cpu",), why_not, notes)
