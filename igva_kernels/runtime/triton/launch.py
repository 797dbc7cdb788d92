"""How kernels are launched: on the tensors' own device, on its current stream."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """``kernel[(programs,)](*args, **constants)`` on ``device``; no launch where there is nothing to do.

    Vectors (indices, biases, norm parameters) become contiguous: kernels take no strides for them. Triton launches on
    the current device, which need not be the tensors' own. Fused multiply-adds are asked for by name: they are part of
    the specified rounding, and Triton 3.10 stops assuming them. A kernel that must not have them says so.
    """
    if programs == 0:
        return
    args = tuple(x.contiguous() if isinstance(x, Tensor) and x.dim() == 1 else x for x in args)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, **{"enable_fp_fusion": True, **constants})


def strides(tensors: tuple[Tensor, ...], dim: int) -> tuple[int, ...]:
    """The strides of one dimension: one number where all tensors share it, otherwise one per tensor."""
    found = tuple(tensor.stride(dim) for tensor in tensors)
    return found[:1] if len(set(found)) == 1 else found
