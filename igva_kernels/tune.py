"""Measures a card and writes its configuration file: rates, at most three tiles per GEMM with their efficiencies, one
per kernel over rows, and the backends by speed.

Nothing is searched inside a step: ``config`` reads the file once per process, ``cost`` computes from it.

Tiles are timed on CUDA-graph replays of the real launchers, with random data, at the rows of a small, a middle and a
large batch of the IGVA connector on CLIP-L/336; the best tile for each is kept. An efficiency is the model's time at
100 % divided by the measured time, so that the model reproduces the large batch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from igva_kernels.registry import Operator, all_backends, choose, operators
from igva_kernels.runtime import config
from igva_kernels.runtime.config import Config, DeviceRates, GemmConfig, RowConfig
from igva_kernels.runtime.triton import cost

DEVICE = "cuda"
BATCHES = (1, 8, 32)
"""Images of the small, the middle and the large batch."""

ROWS = [RowConfig(elements, warps) for elements in (512, 1024, 2048, 4096) for warps in (2, 4, 8)]
"""The configurations that are tried for every kernel over rows."""

Job = Callable[[], object]


class Tuning(Protocol):
    """What an operator's ``triton/tuning.py`` holds. Kernels have the names by which they ask the configuration:
    ``<operator>.<kernel>``, or the kernel's alone where it is the runtime's."""

    ROW_JOBS: Mapping[str, Callable[[], Callable[[RowConfig], object]]]
    """By kernel over rows: ``job()`` returns a function of the configuration to time."""
    GEMM_JOBS: Mapping[str, Callable[[int], tuple[Callable[[GemmConfig], object], tuple[int, int, int]]]]
    """By GEMM: ``job(batch)`` returns such a function, and ``(rows, columns, length)`` of its product."""

    def tiles(self, name: str, shipped: Config) -> Sequence[GemmConfig]:
        """The tiles of a GEMM that are tried, and their neighbours, given what is shipped for the architecture."""

    def block(self, implementation: Any, batch: int) -> Job:
        """A call by which the backends of the operator are compared."""


def tune(
    device: int | None = None, output: Path | None = None, log: Callable[[str], None] | None = None
) -> tuple[Path, Config]:
    """Tunes the kernels for a CUDA device; takes a few minutes, most of them compiling.

    Args:
        device: index; the current device by default.
        output: the file to write. Default: where this machine's processes look for it, ``config.tuned_dir()``.
        log: told one line per measurement.

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
        rates = _rates(index)
        log(f"{rates}")
        card = torch.cuda.get_device_name(index)
        blank = replace(shipped, status=f"measured on {card}", rates=rates, faster_from={})
        jobs = [tuning for _, tuning in _tunings()]
        tuned = replace(
            blank,
            rows={name: _best_rows(name, job(), log) for each in jobs for name, job in each.ROW_JOBS.items()},
            gemms={
                name: _best_tiles(name, job, each.tiles(name, shipped), blank, log)
                for each in jobs
                for name, job in each.GEMM_JOBS.items()
            },
        )
        path = output or config.tuned_dir() / config.file_name(card)
        _write(path, tuned)
        tuned = replace(tuned, backends=_by_speed(torch.device(DEVICE, index), log))  # timed with that file
        _write(path, tuned)
    return path, tuned


def _write(path: Path, tuned: Config) -> None:
    """Writes the file whole or not at all, since every process that starts on this card reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(tuned.to_json())
    unfinished.replace(path)
    config.of_device.cache_clear()
    choose.cache_clear()


def _by_speed(device: torch.device, log: Callable[[str], None]) -> tuple[str, ...]:
    """The backends that serve this card, the fastest on the IGVA connector first.

    All batch sizes count alike, and so does a call of the small one by the clock, which waits for the host.
    """
    found: dict[str, float] = {}
    for operator, tuning in _tunings():
        for name, backend in all_backends().items():
            implementation = operator.implementation(name) if DEVICE in backend.devices else None
            if implementation is None or backend.why_not(device, torch.bfloat16) is not None:
                continue
            times = [time_us(tuning.block(implementation, batch)) for batch in BATCHES]
            eager = wall_us(tuning.block(implementation, BATCHES[0]))
            found[name] = found.get(name, 1.0) * math.prod(times) * eager
            graphs = ", ".join(f"{us:.1f}" for us in times)
            log(f"{name}: {graphs} us per block at batch {BATCHES}, {eager:.1f} us by the clock at {BATCHES[0]}")
    return tuple(sorted(found, key=lambda name: found[name]))


def _tunings() -> list[tuple[Operator, Tuning]]:
    """The operators whose Triton kernels can be tuned, and their ``triton/tuning.py``."""
    found = [(operator, operator.module("triton.tuning")) for operator in operators().values()]
    return [(operator, cast(Tuning, tuning)) for operator, tuning in found if tuning is not None]


def time_us(job: Job, repeats: int = 20) -> float:
    """The median time of ``job`` as a CUDA graph, in microseconds."""
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


def wall_us(job: Job, repeats: int = 20) -> float:
    """The median time of a call of ``job`` on an idle GPU by the clock, in microseconds."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        job()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] * 1e6


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def _rates(index: int) -> DeviceRates:
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
    return DeviceRates(sms, round(matmul, 1), round(copy, 1), round(time_us(hundred) / 100, 2))


def _best_rows(name: str, job: Callable[[RowConfig], object], log: Callable[[str], None]) -> RowConfig:
    times = {rows: time_us(partial(job, rows)) for rows in ROWS}
    best = min(times, key=times.__getitem__)
    log(f"{name}: {best}, {times[best]:.1f} us")
    return best


def _best_tiles(
    name: str, job: Callable[[int], Any], tiles: Iterable[GemmConfig], blank: Config, log: Callable[[str], None]
) -> tuple[GemmConfig, ...]:
    jobs = [job(batch) for batch in BATCHES]
    times: dict[GemmConfig, list[float]] = {}
    for tile in _with_neighbours(tiles):
        with suppress(OutOfResources, PTXASError):  # a neighbouring tile may need more than the card has
            times[tile] = [time_us(partial(job, tile)) for job, _ in jobs]
    best = dict.fromkeys(min(times, key=lambda tile: times[tile][i]) for i in reversed(range(len(BATCHES))))
    tuned = []
    for tile in best:
        rows, columns, length = jobs[-1][1]
        at_full_rate = cost.product_us(blank, rows, columns, length, replace(tile, efficiency=1.0))
        tuned.append(replace(tile, efficiency=round(at_full_rate / times[tile][-1], 3)))
        log(f"{name}: {tuned[-1]}, {', '.join(f'{us:.1f}' for us in times[tile])} us at batch {BATCHES}")
    return tuple(tuned)


def _with_neighbours(tiles: Iterable[GemmConfig]) -> Iterator[GemmConfig]:
    for tile in tiles:
        for stages in (tile.num_stages, tile.num_stages + 1):
            for slices in (tile.slices, 2 * tile.slices if tile.slices < 4 else 1):
                yield replace(tile, num_stages=stages, slices=slices, efficiency=1.0)
