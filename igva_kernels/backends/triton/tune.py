"""Measures a card and writes its configuration file: rates, at most three tiles a kernel with their efficiencies, and
which backend is the fastest.

Nothing is searched inside a step: ``config`` reads the file once a process, ``cost`` computes from it.

Tiles are timed on CUDA-graph replays of the real launchers, with random data, at the rows of a small, a middle and a
large batch of the IGVA connector on CLIP-L/336; the best of each stays. An efficiency is the model's time at 100 % over
the measured time, so that the model reproduces the large batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from igva_kernels.backends.base import Backend, Keep, LayerShape, MixArgs, ProjectorWeights
from igva_kernels.backends.cuda import CudaBackend
from igva_kernels.backends.triton import config, cost, gemm, mix, norm
from igva_kernels.backends.triton.backend import TritonBackend
from igva_kernels.backends.triton.config import Config, DeviceRates, GemmConfig, RowConfig
from igva_kernels.plan import MixPlan

DEVICE = "cuda"
BATCHES = (1, 8, 32)
PATCHES, WIDTH, HIDDEN = 576, 1024, 4096
TAPS = MixPlan.concat(range(5), 5)
REDUCED = MixPlan.igva(groups=4).reduced()[1]
BACKENDS: tuple[Backend, ...] = (TritonBackend(), CudaBackend())

ROWS = [RowConfig(elements, warps) for elements in (512, 1024, 2048, 4096) for warps in (2, 4, 8)]

Job = Callable[[], object]


def tune(
    device: int | None = None, output: Path | None = None, log: Callable[[str], None] | None = None
) -> tuple[Path, Config]:
    """Tunes the kernels for a CUDA device; takes a few minutes, most of them compiling.

    Args:
        device: index; the current device by default.
        output: the file to write. Default: where this machine's processes look for it, ``config.tuned_dir()``.
        log: told one line a measurement.

    Returns:
        The file written, and what it holds. Processes that start later use it, and so does this one.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune measures a CUDA device, and torch sees none")
    index = torch.cuda.current_device() if device is None else device
    log = log or (lambda line: None)
    with torch.cuda.device(index), torch.no_grad():
        shipped = config.shipped(config.architecture(torch.cuda.get_device_capability(index)))
        rates = _rates(index, shipped)
        log(f"{rates}")
        blank = replace(shipped, status="measured", rates=rates)
        tuned = replace(
            blank,
            rows={name: _best_rows(name, log) for name in shipped.rows},
            gemms={name: _best_tiles(name, blank, log) for name in shipped.gemms},
        )
        path = output or config.tuned_dir() / config.file_name(torch.cuda.get_device_name(index))
        _write(path, tuned)
        tuned = replace(tuned, backends=_by_speed(torch.device(DEVICE, index), log))  # as that file makes them
        _write(path, tuned)
    return path, tuned


def _write(path: Path, tuned: Config) -> None:
    """Whole or not at all: every process that starts on this card reads the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(tuned.to_json())
    unfinished.replace(path)
    config.of_device.cache_clear()


def _by_speed(device: torch.device, log: Callable[[str], None]) -> tuple[str, ...]:
    """The backends that serve this card, by the time that the IGVA block takes them; each batch size counts alike."""
    found: dict[str, float] = {}
    for backend in BACKENDS:
        if backend.why_not(device, torch.bfloat16) is None:
            times = [time_us(_block(backend, batch)) for batch in BATCHES]
            found[backend.name] = math.prod(times)
            log(f"{backend.name}: {', '.join(f'{us:.1f}' for us in times)} us a block at batch {BATCHES}")
    return tuple(sorted(found, key=lambda name: found[name]))


def _block(backend: Backend, batch: int) -> Job:
    weights = ProjectorWeights(_random(HIDDEN, 2 * WIDTH), _random(HIDDEN), _random(HIDDEN, HIDDEN), _random(HIDDEN))
    return partial(backend.project, _args(MixPlan.igva(), batch, 1), None, weights, "gelu", Keep.NOTHING, False)


def time_us(job: Job, repeats: int = 20) -> float:
    """Median time of ``job`` in a CUDA graph."""
    job()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    graph.replay()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))
    return times[repeats // 2] * 1e3


def _rates(index: int, shipped: Config) -> DeviceRates:
    source = _random(1 << 29)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / time_us(lambda: target.copy_(source)) / 1e3
    a, b = _random(8192, 8192), _random(8192, 8192)
    matmul = 2 * 8192**3 / time_us(lambda: a @ b) / 1e6
    tiny = _random(32)

    def hundred() -> None:
        for _ in range(100):
            tiny.add_(1)

    sms = torch.cuda.get_device_properties(index).multi_processor_count
    # The L2 rate matters for one rare choice only, and stays modelled.
    return DeviceRates(sms, round(matmul, 1), round(copy, 1), shipped.rates.l2_gbps, round(time_us(hundred) / 100, 2))


def _best_rows(name: str, log: Callable[[str], None]) -> RowConfig:
    job = _row_job(name)
    times = {rows: time_us(partial(job, rows)) for rows in ROWS}
    best = min(times, key=times.__getitem__)
    log(f"{name}: {best}, {times[best]:.1f} us")
    return best


def _best_tiles(name: str, blank: Config, log: Callable[[str], None]) -> tuple[GemmConfig, ...]:
    jobs = [_gemm_job(name, batch) for batch in BATCHES]
    times: dict[GemmConfig, list[float]] = {}
    for tile in _candidates(name, blank):
        with suppress(OutOfResources, PTXASError):  # a neighbour may need more than the card has
            times[tile] = [time_us(partial(job, tile)) for job, _ in jobs]
    best = dict.fromkeys(min(times, key=lambda tile: times[tile][i]) for i in reversed(range(len(BATCHES))))
    tuned = []
    for tile in best:
        at_full_rate = cost.product_us(blank, *jobs[-1][1], replace(tile, efficiency=1.0))
        tuned.append(replace(tile, efficiency=round(at_full_rate / times[tile][-1], 3)))
        log(f"{name}: {tuned[-1]}, {', '.join(f'{us:.1f}' for us in times[tile])} us at batch {BATCHES}")
    return tuple(tuned)


def _candidates(name: str, blank: Config) -> Iterator[GemmConfig]:
    """The shipped tiles and their neighbours."""
    for tile in blank.gemms[name]:
        for stages in (tile.num_stages, tile.num_stages + 1):
            for slices in (tile.slices, 2 * tile.slices if tile.slices < 4 else 1):
                yield replace(tile, num_stages=stages, slices=slices, efficiency=1.0)


def _row_job(name: str) -> Callable[[RowConfig], object]:
    batch = 16
    grad = _random(batch, PATCHES, 2 * WIDTH)
    if name == "mix":
        args = _args(MixPlan.igva(), batch, 1)
        return lambda rows: mix.mix(args, torch.bfloat16, None, Keep.NOTHING, rows)
    if name == "mix_weights_grad":
        args = _args(REDUCED, batch, 0)
        return lambda rows: mix.mix_weights_grad(grad[..., WIDTH:], (1,), args, rows)
    if name == "layer_grads":
        signatures = [((0, None, 1.0),), *(((1, k, 1 / 6),) for k in range(4))]
        weights = torch.rand(batch, 4, device=DEVICE)
        shape = LayerShape(batch, PATCHES + 1, WIDTH, torch.bfloat16)
        return lambda rows: mix.layer_grads(grad, signatures, weights, None, 1, shape, rows)
    rows_of_taps = _random(batch * PATCHES, 5 * WIDTH)
    mean, rstd = (torch.rand(batch * PATCHES, device=DEVICE) for _ in range(2))
    norm_weights = (_random(5 * WIDTH), _random(5 * WIDTH), 1e-5)
    programs = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return lambda rows: norm.norm_backward(rows_of_taps, rows_of_taps, norm_weights, mean, rstd, True, programs, rows)


def _gemm_job(name: str, batch: int) -> tuple[Callable[[GemmConfig], object], tuple[int, int, int]]:
    """A kernel at a batch size, and its ``(rows, columns, length)``."""
    m = batch * PATCHES
    if name == "linear":
        x, weight, bias = _random(m, 2 * WIDTH), _random(HIDDEN, 2 * WIDTH), _random(HIDDEN)
        return lambda tile: gemm.linear(x, weight, bias, "gelu", True, tile), (m, HIDDEN, 2 * WIDTH)
    if name == "linear_grad_input":
        grad, weight, z = _random(m, HIDDEN), _random(HIDDEN, HIDDEN), _random(m, HIDDEN)
        return lambda tile: gemm.linear_grad_input(grad, weight, z, "gelu", True, True, tile), (m, HIDDEN, HIDDEN)
    if name == "mix_weights_grad_of_linear":
        grad, weight, args = _random(m, HIDDEN), _random(HIDDEN, 2 * WIDTH), _args(REDUCED, batch, 0)
        return lambda tile: gemm.mix_weights_grad_of_linear(grad, weight, (1,), args, tile), (m, WIDTH, HIDDEN)
    args = _args(TAPS if name == "mix_linear" else REDUCED, batch, 1)
    length = args.plan.num_blocks * WIDTH
    weight, bias = _random(HIDDEN, length), _random(HIDDEN)
    return lambda tile: gemm.mix_linear(args, weight, bias, "gelu", False, tile), (m, HIDDEN, length)


def _args(plan: MixPlan, batch: int, skip: int) -> MixArgs:
    _, plan = plan.compact()
    layers = [_random(batch, PATCHES + skip, WIDTH) for _ in plan.layers]
    weights = torch.rand(batch, plan.num_columns, device=DEVICE) if plan.num_columns else None
    return MixArgs(layers, plan, weights, None, skip)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)
