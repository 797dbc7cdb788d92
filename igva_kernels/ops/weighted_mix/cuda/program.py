"""What the CUDA kernels of the mix take: the plan as an object of the C++ module, and what fits them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import lower
from igva_kernels.runtime.cuda import launch

DOT_CHUNK = 32
"""Patches that one block of threads sums in the first stage of the gradient of the mix weights."""

NORM_ROW_BYTES = 96 << 10
"""The most bytes of shared memory for one unrounded row: what every architecture from 8.0 on can give a block."""


@cache
def mix_program(plan: MixPlan, keep_sums: bool) -> Any:
    """The plan as the module's object; with ``keep_sums`` its sums are by-products."""
    return launch.module().MixProgram(lower(plan).steps, keep_sums)


def norm_row_fits(width: int, layers: torch.dtype) -> bool:
    """Whether the kernel with LayerNorm can hold an unrounded row of this width."""
    return width * (8 if layers == torch.float64 else 4) <= NORM_ROW_BYTES
