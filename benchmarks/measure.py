"""How a workload is measured: every provider is judged and its memory counted, then all are timed in turn.

Every round runs each provider once, so that a busy machine slows all of them alike, and providers are compared round by
round. Nothing that fails its check is timed, let alone recorded.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median, quantiles
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.providers import PLAIN, Call, Provider, bind, products, providers
from benchmarks.steps import ROOT
from benchmarks.workloads import Connector, Model, Operation, Workload, clones
from igva_kernels.ops.weighted_mix.cases import MIX_WEIGHTS_GRAD, Inputs
from igva_kernels.testing import (
    ENOUGH_ELEMENTS,
    SPECIFICATION,
    Memory,
    Verdict,
    capture,
    judge,
    measure_memory,
    relative_error,
)

GROSS_ERROR = 0.25
"""The largest relative error allowed in a result of few numbers, such as the gradient of mix_weights. The error of one
draw is mostly luck, so only gross mistakes are caught here; ``igva-kernels verify`` judges it on several draws."""


# ---- time ------------------------------------------------------------------------------------------------------------


class Timer(ABC):
    """Times calls, in rounds."""

    device: ClassVar[str] = "cpu"
    timings: ClassVar[tuple[str, ...]] = ("eager",)
    """How calls can run: "eager", and on a GPU as replays of a "graph", and eager again by the "wall" clock."""
    compiles = False
    """Whether the first call of any provider may compile kernels, so that it does not show what a call costs."""
    copies_bytes = 0
    """Bytes that the copies of the inputs, used in turn, hold at least, so that no call finds its inputs in a cache."""

    def of(self, timing: str) -> Timer:
        """The timer for calls that run like this."""
        return self

    def prepare(self, call: Call, timing: str) -> Call:
        """The call as it will be timed."""
        return call

    @abstractmethod
    def once(self, call: Call) -> Any:
        """Runs the call and returns a mark of the time that it took."""

    @abstractmethod
    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """The seconds that the marks stand for."""

    def in_turn(
        self, calls: Mapping[str, Sequence[Call]], budget: float, least: int = 3, most: int = 40,
        twice: Collection[str] = (), beside: Mapping[str, Call] | None = None,
    ) -> dict[str, list[float]]:  # fmt: skip
        """Seconds of every round by name, as many rounds as the budget of seconds allows.

        Every other round runs backwards, so that no provider always has the same one before it; the copies of a call,
        each on its own inputs, take turns. First calls, which do some work only once, are not timed: ``calls`` ran in
        their check, and their copies run here once before the rounds.

        Args:
            calls: by name, the copies of each.
            budget: seconds of all rounds.
            least: fewest rounds, however long they take.
            most: most rounds.
            twice: those that take a second turn at the end of each round; their times of a round follow one another.
            beside: calls that take a turn in the first two rounds and in every other one of the rest.
        """
        beside = beside or {}
        for copies in calls.values():
            for call in copies[1:]:
                self.once(call)
        marks: dict[str, list[Any]] = {name: [] for name in (*calls, *beside)}
        order = [*calls, *reversed([name for name in calls if name in twice])]
        start = time.perf_counter()
        rounds = 0
        while rounds < least or (rounds < most and time.perf_counter() - start < budget):
            for name in order if rounds % 2 == 0 else reversed(order):
                marks[name].append(self.once(calls[name][rounds % len(calls[name])]))
            for name, call in beside.items() if rounds < 2 or rounds % 2 == 0 else ():
                marks[name].append(self.once(call))
            self.end_round()
            rounds += 1
        return {name: self.seconds(found) for name, found in marks.items()}

    @abstractmethod
    def end_round(self) -> None:
        """Waits until everything that the round started has ended."""


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
    """Times with CUDA events; inputs are cold in L2, and a product ahead of each call outlasts a launch from Python.

    Kernels therefore follow one another as they do after other work; what an eager call costs the CPU shows only as far
    as it exceeds that head start, and in full in the timing "wall".

    Args:
        flushes: fill the L2 cache with other data ahead of every call; otherwise the copies of the inputs, used in
            turn, are what keeps them out of it.
    """

    device = "cuda"
    timings = ("eager", "graph", "wall")
    compiles = True

    def __init__(self, flushes: bool = False) -> None:
        cold = 3 * torch.cuda.get_device_properties(0).L2_cache_size
        self.copies_bytes = 0 if flushes else cold
        self.ahead = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        self.flushed = torch.empty(cold if flushes else 0, dtype=torch.uint8, device="cuda")

    def of(self, timing: str) -> Timer:
        """A timer by the clock for "wall", and itself for the others."""
        return CudaClock() if timing == "wall" else self

    def prepare(self, call: Call, timing: str) -> Call:
        """The call itself, or the replay of it as a CUDA graph, which returns the same tensors every time."""
        if timing != "graph":
            return call
        graph, results = capture(call)

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def once(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.mm(self.ahead, self.ahead)
        self.flushed.zero_()
        start.record()
        call()
        end.record()
        return start, end

    def seconds(self, marks: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in marks]

    def end_round(self) -> None:
        torch.cuda.synchronize()


class CudaClock(CpuTimer):
    """Wall-clock time of an eager call on an idle GPU, from before it is called until the GPU has ended."""

    device = "cuda"
    compiles = True

    def once(self, call: Call) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start


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


class Used(NamedTuple):
    """Memory of a provider."""

    peak: int | None = None
    """Most bytes that a call holds beyond inputs and results."""
    kept: int | None = None
    """Bytes kept for the backward beyond the output."""


def fresh_peaks(workload: Model, names: Sequence[str]) -> dict[str, int]:
    """Peak bytes of a model's calls in a process of their own, where nothing was allocated before."""
    identity = json.dumps({field.name: getattr(workload, field.name) for field in fields(workload)})
    command = [sys.executable, "-m", "benchmarks.measure", identity, *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def _print_peaks(identity: str, *names: str) -> None:
    workload = Model(**json.loads(identity))
    inputs, available = draw(workload, "cpu"), providers(workload, "cpu")
    peaks = {}
    for name in names:
        call = available[name].bind(inputs).call
        call()  # what torch allocates once and keeps does not count
        peaks[name] = memory_of(call, "cpu")[1].peak
    print(json.dumps(peaks))


# ---- the machine's own -----------------------------------------------------------------------------------------------


CEILING_SIZES = {"cpu": (2**28, (1024, 4096, 2048)), "cuda": (2**30, (8192, 8192, 8192))}
"""By device: bytes that are copied, far beyond any cache, and ``(m, n, k)`` of the product."""


class Ceilings(NamedTuple):
    """The best that the machine was seen to do while a workload was measured."""

    gbps: float
    """GB/s read and written by a copy, or read by a reduction, whichever is more."""
    tflops: float
    """TFLOP/s of a library's large product in the workload's dtype."""


class Machine:
    """A device, and the calls that show its ceilings, which take turns with the providers."""

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
        """The calls to time, by name."""
        if dtype not in self._products:
            self._products[dtype] = products(self.device, dtype, [self._product])[1]
        return {name: call for name, (call, _) in self._moving.items()} | {"ceiling: product": self._products[dtype]}

    def ceilings(self, times: Mapping[str, Sequence[float]]) -> Ceilings:
        """The ceilings, from the seconds of ``calls``."""
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
    """Whether it failed, in its check or before, rather than being unable to serve."""


SLOW = 0.5
"""Seconds per call of the slowest provider above which those with under a quarter of it get two turns per round."""
CALLS = 3
"""Calls of a slow provider: its check, in which its memory is counted, and two rounds."""
HOST_BOUND = 4
"""The largest B that is measured by the wall clock too: at larger ones the GPU takes longer than the CPU that calls."""
COMPILING = 8.0
"""Seconds that torch.compile takes per form on a CPU, roughly."""


def measure(
    workload: Workload, chosen: Mapping[str, Provider], timer: Timer, machine: Machine, budget: float,
    share: float = math.inf,
) -> Iterator[Figures | Refused]:  # fmt: skip
    """Judges every provider, times those that are right in turn, and counts their memory.

    Args:
        workload: what they compute.
        chosen: by name; the plain one is among them.
        timer: of the device.
        machine: where it is measured.
        budget: seconds of timed rounds.
        share: seconds for everything. If they run short, there are fewer rounds, and extra providers are left out.
    """
    start = time.perf_counter()
    inputs = draw(workload, machine.device)
    exact = exact_results(workload, inputs)
    samples = rotated(workload, inputs, timer)
    for timing in timer.timings:
        if timing == "wall" and workload.batch > HOST_BOUND:
            continue
        clock = timer.of(timing)
        right: dict[str, Checked] = {}
        plain: Mapping[str, Tensor] = {}
        for name, provider in sorted(chosen.items(), key=lambda item: item[1].is_extra):
            if timing == "graph" and not (provider.in_graph and workload.mode == "forward"):
                continue
            left = share - (time.perf_counter() - start)
            if provider.is_extra and left < _still_to_come(right, provider):
                yield Refused(workload, provider, timing, "too slow for the time that is left", False)
                continue
            checked = check(workload, provider, samples, clock, timing, exact, plain)
            if isinstance(checked, Refused):
                yield checked
                continue
            if name == PLAIN:
                plain = checked.results
            right[name] = checked._replace(results={})
            del checked
        if PLAIN not in right:
            continue
        plain = {}
        right = {name: right[name] for name in chosen if name in right}
        turn = sum(one.seconds for one in right.values())
        slowest = max(one.seconds for one in right.values())
        left = share - (time.perf_counter() - start)
        times = clock.in_turn(
            {name: one.calls for name, one in right.items()}, min(budget, left), 3 if 3 * turn < left else 2,
            twice=[name for name, one in right.items() if slowest > SLOW and one.seconds < slowest / 4],
            beside=machine.calls(workload.torch_dtype),
        )  # fmt: skip
        ceilings = machine.ceilings(times)
        peaks: Mapping[str, int] = {}
        if needs_a_fresh_process(workload, machine.device):
            assert isinstance(workload, Model)
            peaks = fresh_peaks(workload, [name for name in right if not chosen[name].is_floor])
        for name, one in right.items():
            note = workload.note if name == PLAIN else one.note
            used = Used(peaks[name]) if name in peaks else one.used
            yield _figures(workload, chosen[name], timing, times[name], times[PLAIN], ceilings, used, one.verdict, note)
        del right
        gc.collect()


def needs_a_fresh_process(workload: Workload, device: str) -> bool:
    """Whether its peak memory shows only in a process that has allocated nothing before."""
    return isinstance(workload, Model) and workload.task == "tower" and device == "cpu"


def _still_to_come(right: Mapping[str, Checked], provider: Provider) -> float:
    """Seconds that the checked providers still need, and ``provider`` too if it is as slow as plain torch."""
    compiling = COMPILING if provider.is_compiled else 0.0
    plain = right[PLAIN].seconds if PLAIN in right else 0.0
    return (CALLS - 1) * sum(one.seconds for one in right.values()) + CALLS * plain + compiling


class Checked(NamedTuple):
    """A provider that is right."""

    calls: Sequence[Call]
    """One per draw."""
    seconds: float
    """Per call."""
    results: Mapping[str, Tensor]
    used: Used
    verdict: Verdict | None
    """That on the result nearest to its budget; None for a floor."""
    note: str


def check(
    workload: Workload, provider: Provider, samples: Sequence[Any], timer: Timer, timing: str,
    exact: Mapping[str, Tensor], plain: Mapping[str, Tensor],
) -> Checked | Refused:  # fmt: skip
    """Calls a provider, counts its memory and judges what it returns; ``plain`` is empty for plain torch itself."""
    used = Used()
    try:
        calls: list[Call] = []
        for sample in samples:
            bound = provider.bind(sample)
            calls.append(timer.prepare(bound.call, timing))
        if provider.is_compiled or timer.compiles or workload.first_differs:
            calls[0]()
        start = time.perf_counter()
        results, memory = memory_of(calls[0], timer.device)
        seconds = time.perf_counter() - start
        if timing == "eager" and (workload.is_model or not provider.is_floor):
            returned = 0 if workload.is_model else sum(result.nbytes for result in results.values())
            used = Used(memory.peak - returned)
        if timing == "eager" and bound.keeps is not None and not provider.is_floor:
            out, memory = memory_of(bound.keeps, timer.device)
            used = used._replace(kept=memory.kept - out.nbytes)
            del out
    except RuntimeError as error:
        cannot = isinstance(error, (NotImplementedError, torch.OutOfMemoryError))
        return Refused(workload, provider, timing, str(error).splitlines()[0], not cannot)
    if provider.is_floor:
        return Checked(calls, seconds, {}, used, None, bound.note)
    found = verdicts(workload, results, exact, plain or results)
    for verdict in found:
        if not verdict.ok:
            return Refused(workload, provider, timing, str(verdict), True)
    worst = max((v for v in found if v.name != MIX_WEIGHTS_GRAD), key=lambda verdict: verdict.error / verdict.budget)
    return Checked(calls, seconds, results, used, worst, bound.note)


def _figures(
    workload: Workload, provider: Provider, timing: str, times: Sequence[float], plain: Sequence[float],
    ceilings: Ceilings, used: Used, verdict: Verdict | None, note: str,
) -> Figures:  # fmt: skip
    spread = Spread.of([1e3 * value for value in times])
    speedup = Spread.of(paired(plain, times))
    moved, work = workload.num_bytes, workload.flops
    return Figures(
        workload, provider, timing, len(times), spread, speedup,
        None if moved is None else moved / spread.p50 / 1e6,
        None if work is None else work / spread.p50 / 1e9,
        ceilings, used.peak, used.kept, verdict, note,
    )  # fmt: skip


def paired(plain: Sequence[float], times: Sequence[float]) -> list[float]:
    """Plain torch's seconds / this one's, round by round; either may have had more turns per round."""
    pairs = max(len(plain), len(times))
    return [plain[i * len(plain) // pairs] / times[i * len(times) // pairs] for i in range(pairs)]


def draw(workload: Workload, device: str) -> Any:
    """The inputs of a workload, of either kind."""
    if isinstance(workload, Connector):
        return workload.draw(device)
    if isinstance(workload, Operation):
        return workload.case.draw(0, workload.torch_dtype, device)
    from benchmarks import models

    assert isinstance(workload, Model)
    return models.draw(workload, device)


def exact_results(workload: Workload, inputs: Any) -> dict[str, Tensor]:
    """The results in fp64; of a forward of many rows, only the first and the last row's."""
    if isinstance(workload, Model):
        if _only_ends(workload):
            inputs = inputs._replace(sentences=_ends(inputs.sentences))
        return providers(workload, inputs.pixels.device.type)[PLAIN].bind(inputs.double()).call()
    if isinstance(workload, Operation):
        return workload.case.run(inputs.double(), SPECIFICATION)
    assert isinstance(workload, Connector)
    case = workload.case
    if _only_ends(workload):
        inputs = Inputs(
            [None if layer is None else _ends(layer) for layer in inputs.layers],
            None if inputs.mix_weights is None else _ends(inputs.mix_weights), inputs.params, _ends(inputs.grad_out),
        )  # fmt: skip
    return bind(workload, lambda exact: case.forward(exact, "reference"), inputs.double()).call()


def _only_ends(workload: Workload) -> bool:
    """Whether two rows tell as much as all of them, because the rows of a forward do not depend on each other."""
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
    """Copies of the inputs, enough to hold ``timer.copies_bytes``."""
    if not isinstance(workload, Connector):
        return [inputs]
    layers = [layer for layer in inputs.layers if layer is not None]
    held = sum(tensor.nbytes for tensor in (*layers, *inputs.params.values()))
    return clones(inputs, max(1, math.ceil(timer.copies_bytes / held)))


if __name__ == "__main__":
    _print_peaks(*sys.argv[1:])
