"""What the steps share: device, shapes, inputs and clocks. Without a card everything is tiny and runs on the CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import CpuTimer, CudaClock, CudaTimer, Timer
from benchmarks.providers import additions
from benchmarks.workloads import CLIP_L, HIDDEN, IGVA, Connector, Tower, connector
from igva_kernels import MixPlan
from igva_kernels.ops.weighted_mix import spec
from igva_kernels.ops.weighted_mix.cases import LINEARS, Case, Inputs
from igva_kernels.registry import REFERENCE, Operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_CARD = DEVICE == "cuda"


class Shapes(NamedTuple):
    """The sizes of the block."""

    tower: Tower
    hidden: int
    batches: tuple[int, ...]


SHAPES = Shapes(CLIP_L, HIDDEN, (1, 4, 16, 64)) if IS_CARD else Shapes(Tower(9, 32, 24, 1), 48, (1, 2))

OPS = {"mix": "layer_mix", "linear": "layer_mix_linear", "mlp": "layer_mix_mlp"}
"""The public functions of the block, by the names that the results have for them."""


def block(what: str, batch: int, plan: MixPlan = IGVA, hidden: int = SHAPES.hidden) -> Connector:
    """A part of IGVA's connector in bf16: "mix", "linear" or "mlp"."""
    return connector(f"igva-2-{what}", plan, batch, "bf16", op=OPS[what], tower=SHAPES.tower, hidden=hidden)


def impl_here(operator: Operator, wanted: str, *demands: Any) -> str:
    """The backend ``wanted``; in a rehearsal, the one that serves the CPU."""
    if IS_CARD:
        return wanted
    return next(iter(operator.candidates(torch.device("cpu"), torch.bfloat16, *demands)), REFERENCE)


def published(case: Case, inputs: Inputs) -> Tensor:
    """The authors' code itself, without any check of ours before it."""
    rows = spec.layer_mix_as_published(inputs.layers, case.plan, inputs.mix_weights, skip_tokens=case.skip)
    linears = [inputs.params[name] for name in LINEARS[case.op]]
    if not linears:
        return rows
    weight1, bias1, *second = linears
    return spec.project(rows, weight1, bias1, *second, activation=case.activation)


PLAIN_FORMS: dict[str, Callable[[Case, Inputs], Tensor]] = {"published": published, "additions": additions}
"""Plain torch, as published and as additions."""


class Clocks:
    """Three ways to time a call, each the median in microseconds; the first two need a card.

    ``graph_us`` is the GPU's time of a graph's replay, ``events_us`` that of a call from Python behind other work, both
    with cold caches; ``wall_us`` is the time from an idle GPU to an idle GPU by the CPU's clock.
    """

    rounds = 20 if IS_CARD else 3

    @cached_property
    def _cuda(self) -> CudaTimer:
        return CudaTimer(flushes=True)

    def graph_us(self, call: Callable[[], Any]) -> float | None:
        """Replays of a CUDA graph."""
        return self._median(self._cuda, self._cuda.prepare(call, "graph")) if IS_CARD else None

    def events_us(self, call: Callable[[], Any]) -> float | None:
        """Calls from Python, by events."""
        return self._median(self._cuda, call) if IS_CARD else None

    def wall_us(self, call: Callable[[], Any]) -> float | None:
        """Calls from Python, by the clock."""
        return self._median(CudaClock() if IS_CARD else CpuTimer(), call)

    def _median(self, timer: Timer, call: Callable[[], Any]) -> float:
        # Beyond the first ones, which compile and allocate, few calls tell a slow one's time.
        for _ in range(2):
            call()
        times = timer.in_turn({"": [call]}, budget=0.5, least=8 if IS_CARD else self.rounds, most=self.rounds)[""]
        return round(1e6 * statistics.median(times), 1)

    def both(self, call: Callable[[], Any], prefix: str = "") -> dict[str, Callable[[], float | None]]:
        """The makers of ``graph_us`` and ``wall_us``, for ``steps.figures``."""
        return {f"{prefix}graph_us": partial(self.graph_us, call), f"{prefix}wall_us": partial(self.wall_us, call)}


@cache
def clocks() -> Clocks:
    """The clocks of this process."""
    return Clocks()


def rate(amount: float, us: float | None, unit: float) -> float | None:
    """``amount`` per second in ``unit``; None in a rehearsal."""
    return None if us is None else round(amount / us * 1e6 / unit, 1)
