"""The Triton backend: the GPU path that needs no CUDA toolkit on the user's machine (Triton asks for a C compiler).

Importing it never fails and touches no driver; where Triton is missing, ``why_not`` says so.

Kernels launch on the current stream of the tensors' device, wait for nothing, and take their scratch from torch, so
CUDA graphs capture them.
"""

from __future__ import annotations

import os
import shutil
from functools import cache

import torch

from igva_kernels.runtime.backend import Backend


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """See ``Backend.why_not``."""
    try:
        from igva_kernels.runtime.triton.common import INTERPRETED  # imports Triton, which takes a second
    except ImportError as error:
        return f"Triton cannot be imported ({error}); `pip install triton`"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernels compute in fp32 and take fp32, fp16 and bf16, not {dtype}"
    if INTERPRETED.value:
        return None if device.type == "cpu" else "under TRITON_INTERPRET=1 they take CPU tensors only"
    if device.type != "cuda":
        return "Triton kernels need a CUDA device; TRITON_INTERPRET=1 runs them on CPU tensors, slowly"
    return _why_not_cuda(device.index)


@cache
def _why_not_cuda(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "only CUDA is supported, this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0, this card has {'.'.join(map(str, capability))}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launchers with a C compiler and finds none; install gcc or clang, or set CC"
    return None


# Its interpreter is a test tool: "auto" never chooses it on a CPU.
BACKEND = Backend("triton", 0, ("cuda",), why_not)
