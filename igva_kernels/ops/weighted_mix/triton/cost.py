"""Which kernel of the mix, with which tile, for a plan and a shape: by the model of ``runtime.triton.cost``."""

from __future__ import annotations

from functools import lru_cache

import torch

from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import lower
from igva_kernels.runtime.config import Config, GemmConfig
from igva_kernels.runtime.triton.cost import choose, cublas_us, linear, pass_us, product_us

MAX_MIXED_LAYERS = 4
"""The most layers that one mixed block may read inside a product: more do not fit the shared memory of its pipeline."""


@lru_cache(maxsize=1024)
def mix_weights_grad_of_linear(
    config: Config, rows: int, columns: int, length: int, dtype: torch.dtype
) -> GemmConfig | None:
    """The tile for ``mix_weights_grad_of_linear``; None for cuBLAS and the dot kernel."""
    # Both read the sources; only cuBLAS's route writes and reads dA.
    return choose(
        config, config.gemms["weighted_mix.mix_weights_grad_of_linear"], dtype,
        lambda gemm: product_us(config, rows, columns, length, gemm),
        cublas_us(config, rows, columns, length) + pass_us(config, 2 * rows * columns, dtype),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def mix_linear(
    config: Config, plan: MixPlan, width: int, rows: int, columns: int, dtype: torch.dtype, activation: bool,
    norm: bool,
) -> GemmConfig | None:  # fmt: skip
    """The tile for a GEMM that reads the rows from the layers; None for the mix kernel and ``linear``."""
    length, reads = plan.num_blocks * width, len(plan.layers) * width
    mixed = [run.stop - run.start for run in lower(plan).runs if not run.taps]
    if max(mixed, default=0) > MAX_MIXED_LAYERS:
        return None

    def prologue_us(gemm: GemmConfig) -> float:
        # A mixed run reads its layers again for every column of tiles; taps are read like any operand.
        again = -(-columns // gemm.block_n) * rows * sum(mixed) * width * dtype.itemsize
        return product_us(config, rows, columns, length, gemm) + again / (config.rates.l2_gbps * 1e3)

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
    kernel = "weighted_mix.mix_linear_mixed" if mixed else "weighted_mix.mix_linear"
    return choose(config, config.gemms[kernel], dtype, prologue_us, rival)
