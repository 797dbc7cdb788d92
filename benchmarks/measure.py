"""How a workload is measured: judged first, then timed in turn with the others, then its memory counted.

Every round runs each provider once, so that what a busy machine does to one it does to all, and providers are compared
round by round. Nothing that fails its check is timed, let alone recorded.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.providers import PLAIN, Call, Provider, bind, products, providers
from benchmarks.workloads import Connector, Model, Workload, clones
from igva_kernels.testing import (
    ENOUGH_ELEMENTS,
    Memory,
    Verdict,
    capture,
    judge,
    measure_memory,
    relative_error,
)
from igva_kernels.verify import MIX_WEIGHTS_GRAD, Inputs

ROOT = Path(__file__).parent.parent

GROSS_ERROR = 0.25
"""Of a result of few numbers, as the gradient of mix_weights: the error of one draw is mostly luck, so that here only a
gross mistake is caught. ``igva-kernels verify`` judges it by the rule, on several draws."""


# ---- time ------------------------------------------------------------------------------------------------------------


class Timer(ABC):
    """Seconds of calls, in rounds."""

    timings: ClassVar[tuple[str, ...]] = ("eager",)
    """How calls can run: "eager", and on a GPU as replays of a "graph"."""
    copies_bytes = 0
    """Draws of the inputs are rotated until together they hold as much, so that no call finds its inputs in a cache."""

    def prepare(self, call: Call, timing: str) -> Call:
        """The call as it will be timed."""
        assert timing == "eager"
        return call

    @abstractmethod
    def once(self, call: Call) -> Any:
        """Runs the call and returns a mark of the time that it took."""

    @abstractmethod
    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """What the marks say."""

    def in_turn(
        self, calls: Mapping[str, Sequence[Call]], budget: float, least: int = 3, most: int = 40
    ) -> dict[str, list[float]]:
        """Seconds of every round by name, as many rounds as the budget of seconds allows.

        Every other round runs backwards, so that no provider always has the same one before it; the copies of a call,
        each on its own inputs, take turns. What a first call does once is done before: ``calls`` ran in their check,
        and copies run here once without being counted.
        """
        for copies in calls.values():
            for call in copies[1:]:
                self.once(call)
        marks: dict[str, list[Any]] = {name: [] for name in calls}
        start = time.perf_counter()
        rounds = 0
        while rounds < least or (rounds < most and time.perf_counter() - start < budget):
            for name in list(calls) if rounds % 2 == 0 else reversed(list(calls)):
                marks[name].append(self.once(calls[name][rounds % len(calls[name])]))
            self.end_round()
            rounds += 1
        return {name: self.seconds(found) for name, found in marks.items()}

    @abstractmethod
    def end_round(self) -> None:
        """Waits for what the round has started."""


class CpuTimer(Timer):
    """Wall-clock time."""

    def once(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return list(marks)

    def end_round(self) -> None:
        pass


class CudaTimer(Timer):
    """CUDA events; inputs cold in L2, and a product ahead that outlasts a launch from Python.

    So kernels follow one another as they do behind other work; what an eager call costs the CPU shows where it exceeds
    that head start.
    """

    timings = ("eager", "graph")

    def __init__(self) -> None:
        self.copies_bytes = 3 * torch.cuda.get_device_properties(0).L2_cache_size
        self.ahead = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def prepare(self, call: Call, timing: str) -> Call:
        """The call itself, or the replay of it as a CUDA graph, which returns the same tensors every time."""
        if timing == "eager":
            return call
        graph, results = capture(call)

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def once(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.mm(self.ahead, self.ahead)
        start.record()
        call()
        end.record()
        return start, end

    def seconds(self, marks: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in marks]

    def end_round(self) -> None:
        torch.cuda.synchronize()


def timer_for(device: str) -> Timer:
    """The timer of a device type."""
    return CpuTimer() if device == "cpu" else CudaTimer()


class Spread(NamedTuple):
    """A median and the quantiles around it that hold the middle 60 % of the rounds."""

    p50: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        p20, *_, p80 = quantiles(values, n=5, method="inclusive")
        return cls(median(values), p20, p80)


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_of(call: Callable[[], Any], device: str) -> tuple[Any, Memory]:
    """What the call returns, and the bytes that it took of torch's allocator beyond what was there before."""
    if device == "cpu":
        return measure_memory(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, Memory(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)


def fresh_peak(workload: Model, name: str) -> int:
    """Peak bytes of a model's call in a process of its own, where nothing was allocated before."""
    identity = json.dumps({field.name: getattr(workload, field.name) for field in fields(workload)})
    command = [sys.executable, "-m", "benchmarks.measure", identity, name]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(done.stdout.split()[-1])


def _print_peak(identity: str, name: str) -> None:
    workload = Model(**json.loads(identity))
    call = providers(workload, "cpu")[name].bind(draw(workload, "cpu")).call
    call()  # what torch allocates once and keeps does not count
    print(memory_of(call, "cpu")[1].peak)


# ---- the machine's own -----------------------------------------------------------------------------------------------


CEILING_SIZES = {"cpu": (2**28, (2048, 4096, 2048)), "cuda": (2**30, (8192, 8192, 8192))}
"""Bytes that are copied, far beyond any cache, and ``(m, n, k)`` of the product."""


class Ceilings(NamedTuple):
    """The best that the machine was seen to do while a workload was measured."""

    gbps: float
    """Bytes read and written a second by a copy, or read by a sum, whichever is more."""
    tflops: float
    """Of a library's large product in the workload's dtype."""


class Machine:
    """A device, and the calls that show its ceilings: they take turns with the providers."""

    def __init__(self, device: str) -> None:
        self.device = device
        size, self._product = CEILING_SIZES[device]
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        half = source.numel() // 2
        self._moving: dict[str, tuple[Call, int]] = {
            "ceiling: copy": (lambda: target.copy_(source), 2 * size),
            "ceiling: sum": (source.sum, size),
            "ceiling: max": (source.amax, size),
            "ceiling: dot": (lambda: torch.dot(source[:half], source[half:]), size),
        }
        self._products: dict[torch.dtype, Call] = {}

    def calls(self, dtype: torch.dtype) -> dict[str, Call]:
        """By name, to be timed."""
        if dtype not in self._products:
            self._products[dtype] = products(self.device, dtype, [self._product])[1]
        return {name: call for name, (call, _) in self._moving.items()} | {"ceiling: product": self._products[dtype]}

    def ceilings(self, times: Mapping[str, Sequence[float]]) -> Ceilings:
        """From the seconds of ``calls``."""
        m, n, k = self._product
        return Ceilings(
            max(moved / min(times[name]) / 1e9 for name, (_, moved) in self._moving.items()),
            2 * m * n * k / min(times["ceiling: product"]) / 1e12,
        )


# ---- a workload ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What was measured of one provider in one workload."""

    workload: Workload
    provider: Provider
    timing: str
    rounds: int
    ms: Spread
    speedup: Spread
    """Time of the plain provider / this one's, round by round."""
    gbps: float | None
    tflops: float | None
    ceilings: Ceilings
    peak_bytes: int | None
    """Most that a call holds beyond inputs and results."""
    saved_bytes: int | None
    """Kept for the backward beyond the output."""
    verdict: Verdict | None
    """The result nearest to its budget; None for a floor."""
    note: str


@dataclass(frozen=True)
class Refused:
    """A provider of which nothing is recorded."""

    workload: Workload
    provider: Provider
    timing: str
    reason: str
    is_wrong: bool
    """Whether it failed, in its check or before, rather than that it cannot serve."""


def measure(
    workload: Workload, chosen: Mapping[str, Provider], timer: Timer, machine: Machine, budget: float
) -> Iterator[Figures | Refused]:
    """Judges every provider, times those that are right in turn, and counts their memory.

    Args:
        workload: what they compute.
        chosen: by name; the plain one is among them.
        timer: of the device.
        machine: where it is measured.
        budget: seconds of the rounds.
    """
    inputs = draw(workload, machine.device)
    exact = exact_results(workload, inputs)
    samples = rotated(workload, inputs, timer)
    worst: dict[str, Verdict] = {}
    notes: dict[str, str] = {}
    for timing in timer.timings:
        calls: dict[str, list[Call]] = {}
        plain: dict[str, Tensor] = {}
        for name, provider in chosen.items():
            if timing == "graph" and not (provider.in_graph and workload.mode == "forward"):
                continue
            try:
                prepared: list[Call] = []
                for sample in samples:
                    bound = provider.bind(sample)
                    prepared.append(timer.prepare(bound.call, timing))
                results = prepared[0]()
            except RuntimeError as error:
                cannot = isinstance(error, (NotImplementedError, torch.OutOfMemoryError))
                yield Refused(workload, provider, timing, str(error).splitlines()[0], not cannot)
                continue
            notes[name] = bound.note
            if not provider.is_floor:
                plain = results if name == PLAIN else plain
                found = verdicts(workload, results, exact, plain or results)
                wrong = [verdict for verdict in found if not verdict.ok]
                if wrong:
                    yield Refused(workload, provider, timing, str(wrong[0]), True)
                    continue
                worst[name] = max(
                    (v for v in found if v.name != MIX_WEIGHTS_GRAD), key=lambda verdict: verdict.error / verdict.budget
                )
            calls[name] = prepared
        if PLAIN not in calls:
            continue
        results = plain = {}  # not alive while memory is counted
        limits = machine.calls(workload.torch_dtype)
        times = timer.in_turn(calls | {name: [call] for name, call in limits.items()}, budget)
        ceilings = machine.ceilings(times)
        for name in calls:
            yield _figures(workload, chosen[name], timing, times[name], times[PLAIN], ceilings, inputs,
                           machine.device, worst.get(name), notes[name])  # fmt: skip
        del calls
        gc.collect()


def _figures(
    workload: Workload, provider: Provider, timing: str, times: Sequence[float], plain: Sequence[float],
    ceilings: Ceilings, inputs: Any, device: str, verdict: Verdict | None, note: str,
) -> Figures:  # fmt: skip
    spread = Spread.of([1e3 * value for value in times])
    speedup = Spread.of([a / b for a, b in zip(plain, times, strict=True)])
    moved, work = workload.num_bytes, workload.flops
    peak = saved = None
    if timing == "eager" and (workload.is_model or not provider.is_floor):
        peak, saved = _memory(workload, provider, inputs, device)
    return Figures(
        workload, provider, timing, len(times), spread, speedup,
        None if moved is None else moved / spread.p50 / 1e6,
        None if work is None else work / spread.p50 / 1e9,
        ceilings, peak, saved, verdict, note,
    )  # fmt: skip


def _memory(workload: Workload, provider: Provider, inputs: Any, device: str) -> tuple[int, int | None]:
    if isinstance(workload, Model) and workload.task == "tower" and device == "cpu":
        return fresh_peak(workload, provider.name), None
    bound = provider.bind(inputs)
    if workload.mode == "backward":
        bound.call()
    results, memory = memory_of(bound.call, device)
    peak = memory.peak - (0 if workload.is_model else sum(result.nbytes for result in results.values()))
    del results
    if bound.keeps is None:
        return peak, None
    out, memory = memory_of(bound.keeps, device)
    return peak, memory.kept - out.nbytes


def draw(workload: Workload, device: str) -> Any:
    """The inputs of a workload, of either kind."""
    if isinstance(workload, Connector):
        return workload.draw(device)
    from benchmarks import models

    assert isinstance(workload, Model)
    return models.draw(workload, device)


def exact_results(workload: Workload, inputs: Any) -> dict[str, Tensor]:
    """The results in fp64; of a forward of many rows, the first and the last one's."""
    if isinstance(workload, Model):
        if _only_ends(workload):
            inputs = inputs._replace(sentences=_ends(inputs.sentences))
        return providers(workload, inputs.pixels.device.type)[PLAIN].bind(inputs.double()).call()
    assert isinstance(workload, Connector)
    case = workload.case
    if _only_ends(workload):
        inputs = Inputs(
            [None if layer is None else _ends(layer) for layer in inputs.layers],
            None if inputs.mix_weights is None else _ends(inputs.mix_weights), inputs.params, _ends(inputs.grad_out),
        )  # fmt: skip
    return bind(workload, lambda exact: case.forward(exact, "reference"), inputs.double()).call()


def _only_ends(workload: Workload) -> bool:
    """Whether a few rows tell as much as all: the rows of a forward do not see each other."""
    if isinstance(workload, Connector):
        return workload.mode == "forward" and workload.case.images > 2
    return isinstance(workload, Model) and workload.questions > 2


def _ends(tensor: Tensor) -> Tensor:
    return torch.stack([tensor[0], tensor[-1]])


def verdicts(
    workload: Workload, results: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor]
) -> list[Verdict]:
    """The rule on every result that is large enough for one draw, and ``GROSS_ERROR`` on the others."""
    pick = _ends if _only_ends(workload) else torch.Tensor.detach
    found = []
    for name, oracle in exact.items():
        triple = pick(results[name]), oracle, pick(plain[name])
        if oracle.numel() < ENOUGH_ELEMENTS or name == MIX_WEIGHTS_GRAD:
            error, plain_error = (relative_error(side, oracle) for side in triple[::2])
            found.append(Verdict(name, error, plain_error, GROSS_ERROR))
        else:
            found.append(judge(*triple, workload.torch_dtype, name))
    return found


def rotated(workload: Workload, inputs: Any, timer: Timer) -> list[Any]:
    """Draws enough to hold ``timer.copies_bytes``."""
    if not isinstance(workload, Connector):
        return [inputs]
    layers = [layer for layer in inputs.layers if layer is not None]
    held = sum(tensor.nbytes for tensor in (*layers, *inputs.params.values()))
    return clones(inputs, max(1, math.ceil(timer.copies_bytes / held)))


if __name__ == "__main__":
    _print_peak(*sys.argv[1:])
