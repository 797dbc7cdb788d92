"""Which kernel of the mix, with which tile, for a plan and a shape: by the model of ``runtime.triton.cost``."""

from __future__ import annotations

from functools import lru_cache

import torch

from igva_kernels.ops.weighted_mix.plan import MixPlan, is_tap
from igva_kernels.runtime.config import Config, GemmConfig
from igva_kernels.runtime.triton.cost import choose, cublas_us, linear, pass_us, product_us


@lru_cache(maxsize=1024)
def mix_linear(
    config: Config, plan: MixPlan, width: int, rows: int, columns: int, dtype: torch.dtype, activation: bool,
    norm: bool,
) -> GemmConfig | None:  # fmt: skip
    """The tile for a GEMM that reads the rows from the layers; None for the mix kernel and ``linear``."""
    length, reads = plan.num_blocks * width, len(plan.layers) * width
    if not all(map(is_tap, plan.blocks)):
        return None
    chosen = linear(config, rows, columns, length, dtype, activation)
    rival = pass_us(config, rows * (reads + length), dtype)
    if chosen is not None:
        rival += product_us(config, rows, columns, length, chosen)
    else:
        rival += cublas_us(config, rows, columns, length)
        rival += pass_us(config, 2 * rows * columns, dtype) if activation else 0.0
    if norm:
        # The GEMM also needs one pass for the statistics and one that scales the weight.
        rival -= pass_us(config, rows * reads, dtype) + pass_us(config, 2 * columns * length, dtype)
    return choose(
        config, config.gemms["weighted_mix.mix_linear"], dtype,
        lambda gemm: product_us(config, rows, columns, length, gemm), rival,
    )  # fmt: skip
