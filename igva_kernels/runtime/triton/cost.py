"""Which kernel, with which tile, for a shape: the cheapest by a small model, cuBLAS among the choices.

A matrix product takes waves of tiles; a pass over memory takes its bytes; a small kernel its launch gap:

    product = ceil(tiles / slots) * slots * tile FLOPs / (rate * efficiency)        pass = bytes / copy bandwidth

The rates and efficiencies come from the card's configuration (``config``). A product whose efficiency nobody measured
on such a card is never chosen: cuBLAS and a small kernel, in place where nothing else needs its operand, are. Only
differences between choices matter, so what all of them pay is left out. A choice is a pure function of shapes,
remembered, and takes no time inside a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from igva_kernels.runtime.config import Config, GemmConfig


def product_us(config: Config, rows: int, columns: int, length: int, gemm: GemmConfig) -> float:
    """The microseconds of a Triton GEMM ``[rows, length] @ [length, columns]`` whose efficiency is known."""
    assert gemm.efficiency is not None
    area = gemm.block_m * gemm.block_n
    tiles = -(-rows // gemm.block_m) * -(-columns // gemm.block_n)
    # An SM runs two tiles of 128 x 128 or less at once: one computes while the other stores.
    slots = config.rates.sms * (2 if area <= 128 * 128 else 1)
    waves = -(-tiles // slots)
    return waves * slots * 2.0 * area * length / (config.rates.matmul_tflops * gemm.efficiency * 1e6)


def cublas_us(config: Config, rows: int, columns: int, length: int) -> float:
    """The same product by cuBLAS, which chooses among tiles too."""
    tiles = ((256, 128), (128, 128), (64, 128), (64, 64))
    gemms = (GemmConfig(m, n, 64, 8, 3, 1, True, 1.0) for m, n in tiles)
    return min(product_us(config, rows, columns, length, gemm) for gemm in gemms)


def pass_us(config: Config, elements: float, dtype: torch.dtype) -> float:
    """The microseconds of an elementwise kernel that reads and writes ``elements`` in all."""
    return elements * dtype.itemsize / (config.rates.copy_gbps * 1e3) + config.rates.launch_us


def choose(
    config: Config, tiles: Sequence[GemmConfig], dtype: torch.dtype, cost: Callable[[GemmConfig], float], rival: float
) -> GemmConfig | None:
    """The cheapest tile of a kernel by its ``cost`` in microseconds; None where its ``rival`` costs less, and where no
    tile was measured: a kernel that nobody has timed on such a card never displaces cuBLAS."""
    if config.interpreted:
        return tiles[0]
    if dtype.itemsize != 2:
        # cuBLAS may use TF32 where torch allows it; Triton's exact fp32 product leaves the matrix units idle.
        return None
    best = min((tile for tile in tiles if tile.efficiency is not None), key=cost, default=None)
    return best if best is not None and cost(best) < rival else None


def why(config: Config, kernel: str, dtype: torch.dtype) -> str:
    """What ``explain`` tells of such a choice."""
    if config.interpreted:
        return "the interpreter runs every kernel"
    if dtype.itemsize != 2:
        return "Triton's exact fp32 product leaves the matrix units idle"
    if all(tile.efficiency is None for tile in config.gemms[kernel]):
        return "nobody has measured Triton's product on such a card; `igva-kernels tune` does"
    return f"by the table of such cards, {config.status}"


@lru_cache(maxsize=1024)
def linear(
    config: Config, rows: int, columns: int, length: int, dtype: torch.dtype, activation: bool
) -> GemmConfig | None:
    """The tile for ``linear``; None for cuBLAS, which has the bias, and an activation kernel."""
    if not activation and not config.interpreted:
        return None
    return choose(
        config, config.gemms["linear"], dtype, lambda gemm: product_us(config, rows, columns, length, gemm),
        cublas_us(config, rows, columns, length) + pass_us(config, 2 * rows * columns, dtype),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def linear_grad_input(
    config: Config, rows: int, columns: int, length: int, dtype: torch.dtype, need_y: bool, need_bias: bool
) -> GemmConfig | None:
    """The tile for ``linear_grad_input``; None for cuBLAS, elementwise kernels and a sum."""
    # Both read Z and write dZ (and Y). Elementwise kernels move dY twice more, and read Z again for Y, dZ for its sum.
    passes = pass_us(config, 2 * rows * columns, dtype)
    passes += (need_y + need_bias) * pass_us(config, rows * columns, dtype)
    return choose(
        config, config.gemms["linear_grad_input"], dtype,
        lambda gemm: product_us(config, rows, columns, length, gemm),
        cublas_us(config, rows, columns, length) + passes,
    )  # fmt: skip
