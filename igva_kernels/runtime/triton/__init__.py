"""The Triton backend: the GPU path that needs no CUDA toolkit on the user's machine (Triton asks for a C compiler).

Importing it never fails and touches no driver; where Triton is missing, ``why_not`` says so.

Kernels launch on the current stream of the tensors' device, wait for nothing, and take their scratch from torch, so
CUDA graphs capture them. That matters most around the block: the allocator's modules are 70 to 80 tiny kernels between
the tower and the mix, at one image longer than the block itself (modelled). At inference ``nn.WeightAllocator`` runs 16
instead (``ops/allocator``). Capture the whole connector once per batch size and copy new inputs into the captured ones:

    with torch.cuda.graph(graph):                                       # after one warm-up call on a side stream
        weights = allocator(sentence, column_summaries(states, plan))   # the group CLS: one launch of the mix kernel
        out = layer_mix_mlp(states, plan, weights, ...)

What does not wait for the weights is done before them: the sources of a streamed tower, while it runs (only the mix and
the products of the block are left, and read 5 states instead of 25); the group CLS; and the allocator's first three
launches, which do not need the sentence. The two products of the block come after the weights as a whole.

In training, ``torch.cuda.make_graphed_callables(allocator, (sentence, summaries))`` makes the allocator one launch
forward and one backward; the block stays eager.
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
