"""Who multiplies on this CPU: our own products, or torch's library.

Ours compute an operand while they pack it: a mix of layers, an activation, a transposition, a conversion to fp32. They
are taken where they were measured to be no slower than the fastest library, or where no library suits the CPU. The
choice follows from what the CPU and torch have, never from timings.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from igva_kernels.runtime.cpu.features import INTEL, Cpu, this_cpu

OWN, TORCH = "igva_kernels", "torch"

_INSTRUCTIONS = {
    torch.bfloat16: ("avx512bf16", "amxbf16", "bf16"),
    torch.float16: ("avx512fp16", "amxfp16", "fp16arith", "asimdhp"),
}
"""The CPU features that multiply a dtype; the last ones of each are Arm's."""


class Route(NamedTuple):
    """Who computes the products of a dtype."""

    library: str
    """``OWN``, or ``TORCH`` for torch's public product, by whichever library it calls."""
    reason: str


def choose(dtype: torch.dtype, cpu: Cpu) -> Route:
    """Who multiplies ``dtype`` on ``cpu``."""
    if dtype not in (torch.float32, *_INSTRUCTIONS):
        return Route(TORCH, "our products are in fp32")
    if used := _instructions(dtype, cpu):
        return Route(TORCH, f"it calls oneDNN, which uses {used}")
    if cpu.isa not in ("avx2", "avx512"):
        return Route(TORCH, "our products are fast with AVX2 or AVX-512 only")
    if dtype != torch.float32:
        return Route(OWN, f"in fp32, as the CPU has no instructions for {str(dtype)[6:]}")
    if cpu.isa == "avx2":
        return Route(OWN, "with AVX2 they are as fast as any library's, and compute the mix as they read it")
    if not cpu.mkl:
        return Route(TORCH, "its BLAS is not MKL, and is assumed to suit the CPU")
    if cpu.vendor == INTEL or not cpu.vendor:
        whose = "which uses the AVX-512 of Intel's CPUs" if cpu.vendor else "as the vendor of the CPU is unknown"
        return Route(TORCH, f"it calls MKL, {whose}")
    return Route(OWN, "MKL uses the AVX-512 of Intel's CPUs only")


@cache
def route(dtype: torch.dtype) -> Route:
    """Who multiplies ``dtype`` on this CPU."""
    return choose(dtype, this_cpu())


def is_own(dtype: torch.dtype) -> bool:
    """Whether our own products multiply ``dtype``."""
    return route(dtype).library == OWN


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether the CPU has no instructions for ``dtype``, so that torch's products of it are very slow."""
    return dtype in _INSTRUCTIONS and not _instructions(dtype, this_cpu())


def describe(dtype: torch.dtype) -> str:
    """The route of ``dtype`` as a line of text."""
    library, reason = route(dtype)
    return f"{library}: {reason}"


def _instructions(dtype: torch.dtype, cpu: Cpu) -> str | None:
    """What oneDNN uses to multiply ``dtype``; None if there is nothing but fp32."""
    has = [feature for feature in _INSTRUCTIONS.get(dtype, ()) if feature in cpu.features]
    return has[0] if cpu.onednn and has else None
