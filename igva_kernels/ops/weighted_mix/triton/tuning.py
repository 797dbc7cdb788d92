"""What ``igva-kernels tune`` times of the mix and of the dense steps: the IGVA connector on CLIP-L/336, random data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import Shares
from igva_kernels.ops.weighted_mix.steps import Keep, LayerShape, MixArgs, Projector, WeightedMix
from igva_kernels.ops.weighted_mix.triton import gemm, mix
from igva_kernels.runtime.config import Config, GemmConfig, RowConfig
from igva_kernels.runtime.triton import gemm as dense_gemm
from igva_kernels.runtime.triton import norm

DEVICE = "cuda"
PATCHES, WIDTH, HIDDEN = 576, 1024, 4096
"""Patches per image and channels per layer of CLIP-L/336, and the width of the language model."""
TAPS = MixPlan.concat(range(5), 5)
"""A plan of five taps."""
REDUCED = MixPlan.igva(groups=4).reduced()[1]
"""IGVA's plan over its five sources: one tap, one mixed block."""

Job = Callable[[], object]


def row_job(name: str) -> Callable[[RowConfig], object]:
    """A kernel over rows, at a batch of 16."""
    batch = 16
    grad = _random(batch, PATCHES, 2 * WIDTH)
    if name == "weighted_mix.mix":
        args = _args(MixPlan.igva(), batch, 1)
        return lambda rows: mix.mix(args, torch.bfloat16, None, Keep.NOTHING, rows)
    if name == "weighted_mix.mix_weights_grad":
        args = _args(REDUCED, batch, 0)
        return lambda rows: mix.mix_weights_grad(grad[..., WIDTH:], (1,), args, rows)
    if name == "weighted_mix.layer_grads":
        shares = Shares((0, 1, 1, 1, 1), (-1, 0, 1, 2, 3), (1.0, *[1 / 6] * 4), (1,) * 5)
        weights = torch.rand(batch, 4, device=DEVICE)
        shape = LayerShape(batch, PATCHES + 1, WIDTH, torch.bfloat16, 1)
        return lambda rows: mix.layer_grads(grad, shares, weights, None, shape, rows)
    rows_of_taps = _random(batch * PATCHES, 5 * WIDTH)
    mean, rstd = (torch.rand(batch * PATCHES, device=DEVICE) for _ in range(2))
    norm_weights = (_random(5 * WIDTH), _random(5 * WIDTH), 1e-5)
    programs = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return lambda rows: norm.norm_backward(rows_of_taps, rows_of_taps, norm_weights, mean, rstd, True, programs, rows)


def gemm_job(name: str, batch: int) -> tuple[Callable[[GemmConfig], object], tuple[int, int, int]]:
    """A kernel at a batch size, and its ``(rows, columns, length)``."""
    m = batch * PATCHES
    if name == "linear":
        x, weight, bias = _random(m, 2 * WIDTH), _random(HIDDEN, 2 * WIDTH), _random(HIDDEN)
        return lambda tile: dense_gemm.linear(x, weight, bias, "gelu", True, tile), (m, HIDDEN, 2 * WIDTH)
    if name == "linear_grad_input":
        grad, weight, z = _random(m, HIDDEN), _random(HIDDEN, HIDDEN), _random(m, HIDDEN)
        return lambda tile: dense_gemm.linear_grad_input(grad, weight, z, "gelu", True, True, tile), (m, HIDDEN, HIDDEN)
    args = _args(TAPS, batch, 1)
    length = args.plan.num_blocks * WIDTH
    weight, bias = _random(HIDDEN, length), _random(HIDDEN)
    return lambda tile: gemm.mix_linear(args, weight, bias, "gelu", False, tile), (m, HIDDEN, length)


def tiles(name: str, shipped: Config) -> Sequence[GemmConfig]:
    """The tiles from which the search starts: for the mix, those that are shipped."""
    return shipped.gemms[name]


def block(implementation: WeightedMix, batch: int) -> Job:
    """The whole connector at inference."""
    weights = _random(HIDDEN, 2 * WIDTH), _random(HIDDEN), _random(HIDDEN, HIDDEN), _random(HIDDEN)
    projector = Projector(*weights, activation="gelu")
    return partial(implementation.project, _args(MixPlan.igva(), batch, 1), projector, Keep.NOTHING, False)


def _args(plan: MixPlan, batch: int, skip: int) -> MixArgs:
    _, plan = plan.compact()
    layers = [_random(batch, PATCHES + skip, WIDTH) for _ in plan.layers]
    weights = torch.rand(batch, plan.num_columns, device=DEVICE) if plan.num_columns else None
    return MixArgs(layers, plan, weights, None, skip)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


ROW_JOBS = {
    name: partial(row_job, name)
    for name in ("weighted_mix.mix", "weighted_mix.mix_weights_grad", "weighted_mix.layer_grads", "norm_backward")
}
"""By kernel: ``job()`` returns a function of the configuration to time."""

GEMM_JOBS = {name: partial(gemm_job, name) for name in ("linear", "linear_grad_input", "weighted_mix.mix_linear")}
"""By kernel: ``job(batch)`` returns such a function, and ``(rows, columns, length)`` of its product."""
