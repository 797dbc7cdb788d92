"""What "right" means: the error of a result against fp64, and how large it may be beside that of plain torch.

A kernel may be at most twice as wrong as the plain torch code in the same dtype, plus half a unit of rounding:

    error(kernel) <= 2 * error(plain) + 0.5 * eps(dtype)        error(x) = |x - oracle| / |oracle|  (Frobenius, fp64)

One wrong entry in a million hardly changes a norm, so no entry may be off by more than four times the error of plain
torch's worst entry, plus half a unit of rounding of the largest value.

Both errors are measured on random inputs: with N independent numbers, the logarithm of the ratio of their squares
scatters by sqrt(4 / N), and the rule allows it ln 4. A ``Judge`` therefore pools draws until it has 1024 numbers of a
result, or 8 draws of a small one. A result that keeps the rule by then is right: a kernel that is wrong by one rounding
or one stride is further off than luck goes. For any other, the number of draws is doubled until it keeps the rule, and
it is wrong only if 256 draws say so. With 4 numbers per draw the logarithm then scatters by 0.06: a kernel with 1.3
times plain torch's error stays fourteen such deviations within the limit, one with 1.6 times the error seven.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ENOUGH_ELEMENTS = 1024
"""Numbers in a result from which one draw suffices for a verdict."""
FIRST_DRAWS = 8
"""Draws after which a smaller result is first judged."""
MAX_DRAWS = 256
"""Draws after which a result that still exceeds its budget is wrong."""

# A result over its budget is wrong before its last draw if it has this many numbers, or is this many times over it.
_MANY_ELEMENTS = 2**20
_FAR = 64


OUTPUT = "output"
"""The name of the output among the results of ``Case.run``."""

SPECIFICATION = "specification"
"""The ``impl`` of ``Case.run`` that computes the oracle; the others are those that operators take."""


class Case(Protocol):
    """One call of one operator on random inputs, by which implementations are judged."""

    @property
    def name(self) -> str:
        """The name of the case in reports."""

    @property
    def batch(self) -> int:
        """Rows of the batch."""

    @property
    def demands(self) -> tuple[Any, ...]:
        """What ``Operator.why_not`` is asked beside device and dtype."""

    @property
    def is_large(self) -> bool:
        """Whether its shapes are those of a real model, which take seconds."""

    def draw(self, seed: int, dtype: torch.dtype, device: str) -> Any:
        """Inputs rounded to ``dtype``, with a method ``double``; a seed gives the same numbers on every device."""

    def run(self, inputs: Any, impl: str, only: Collection[str] = ()) -> dict[str, Tensor]:
        """The output and the gradients by name, all of them or ``only`` some; ``impl`` may be ``SPECIFICATION``."""

    def is_rounded_once(self, result: str) -> bool:
        """Whether a kernel rounds this result once, from an accumulator in fp32."""


def results(
    forward: Callable[[], Tensor], leaves: Mapping[str, Tensor], grad_out: Tensor, only: Collection[str] = ()
) -> dict[str, Tensor]:
    """What ``Case.run`` returns: the output and the gradients of ``leaves``, all of them or ``only`` some.

    Args:
        forward: computes the output from the leaves.
        leaves: by the names of their gradients; no part of a graph. Those that are asked for are made to require one,
            and none has one where gradients are not recorded.
        grad_out: the gradient of the output.
        only: names.
    """
    asked = {name: leaf for name, leaf in leaves.items() if not only or name in only}
    for leaf in asked.values():
        leaf.requires_grad_()
    out = forward()
    if not torch.is_grad_enabled():
        asked = {}
    grads = torch.autograd.grad(out, list(asked.values()), grad_out) if asked else ()
    output = {OUTPUT: out.detach()} if not only or OUTPUT in only else {}
    return output | dict(zip(asked, grads, strict=True))


class Verdict(NamedTuple):
    """A kernel's error in one result, beside plain torch's."""

    name: str
    error: float
    """The kernel's relative error against fp64."""
    plain: float
    """Plain torch's relative error in the same dtype against fp64."""
    budget: float
    """The largest ``error`` allowed."""
    worst_entry: float = 0.0
    """The error of the entry that is furthest off, as a share of what is allowed."""

    @property
    def ok(self) -> bool:
        """Whether the rule holds. NaN is never right."""
        return self.error <= self.budget and self.worst_entry <= 1

    def __str__(self) -> str:
        relation = "<=" if self.error <= self.budget else ">"
        text = f"{self.name}: error {self.error:.3e} {relation} budget {self.budget:.3e} (plain torch {self.plain:.3e})"
        return text if self.worst_entry <= 1 else f"{text}; an entry is off by {self.worst_entry:.2g} x what is allowed"


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """``|actual - oracle| / |oracle|`` (Frobenius, in fp64).

    Where the oracle is zero, the error is the norm of ``actual``. An empty result has no error.
    """
    oracle = oracle.detach().double()
    return float(_difference(actual, oracle).norm()) / (float(oracle.norm()) or 1.0)


def error_budget(plain_error: float, dtype: torch.dtype) -> float:
    """The largest error allowed where plain torch in the same dtype has ``plain_error``."""
    return 2.0 * plain_error + 0.5 * torch.finfo(dtype).eps


class Judge:
    """Pools what a kernel returns for independent draws of its inputs, until every result has a verdict.

    Args:
        dtype: of the computation, which may be narrower than that of a result.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._pools: dict[str, _Pool] = {}
        self._settled: dict[str, Verdict] = {}

    def add(
        self, actual: Tensor, oracle: Tensor, plain: Tensor, name: str = "result", *, rounded_once: bool = False
    ) -> None:
        """Adds a draw of a result; it is ignored once the verdict on that result has fallen.

        Args:
            actual: the result of the kernel.
            oracle: the same computed in fp64 from the same (already rounded) inputs.
            plain: the same by the plain torch code in ``dtype``.
            name: of the result, in its verdict.
            rounded_once: whether every entry of a 16-bit result must be within its one final rounding.
        """
        if name not in self._settled:
            self._pools.setdefault(name, _Pool()).add(actual, oracle, plain, rounded_once)

    def settle(self) -> None:
        """Gives its verdict on every result that has enough draws."""
        for name in self.pending:
            pool = self._pools[name]
            verdict = pool.verdict(name, self.dtype)
            is_far_off = not (verdict.error <= _FAR * verdict.budget and verdict.worst_entry <= _FAR)
            if pool.is_enough and (verdict.ok or is_far_off or pool.is_all_there_can_be):
                self._settled[name] = verdict

    @property
    def pending(self) -> list[str]:
        """Results that need more draws."""
        return [name for name in self._pools if name not in self._settled]

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts so far, those on pending results included."""
        return [self._settled.get(name) or pool.verdict(name, self.dtype) for name, pool in self._pools.items()]


def draws(judges: Iterable[Judge]) -> Iterator[int]:
    """0, 1, 2, ..., one per draw of inputs whose results the caller adds, until no judge needs more."""
    judges = list(judges)
    for draw in range(MAX_DRAWS):
        yield draw
        if (draw + 1).bit_count() == 1:
            for judge in judges:
                judge.settle()
            if not any(judge.pending for judge in judges):
                return


def within_rule(dtype: torch.dtype) -> Iterator[Judge]:
    """For tests: yields a judge once per draw that it needs, and fails after the last one unless the rule holds.

    for judge in within_rule(torch.bfloat16):
        x = torch.randn(16, 16).bfloat16()
        judge.add(kernel(x), plain(x.double()), plain(x))
    """
    judge = Judge(dtype)
    for _ in draws([judge]):
        yield judge
    assert judge.verdicts, "nothing was judged"
    wrong = [str(verdict) for verdict in judge.verdicts if not verdict.ok]
    assert not wrong, "\n".join(wrong)


def judge(actual: Tensor, oracle: Tensor, plain: Tensor, dtype: torch.dtype, name: str = "result") -> Verdict:
    """The verdict on a result that is too large, or too costly, to draw again. Arguments as in ``Judge.add``.

    Raises:
        ValueError: the result is too small to be judged by one draw.
    """
    if 0 < oracle.numel() < ENOUGH_ELEMENTS:
        raise ValueError(
            f"{name}: {oracle.numel()} elements of one draw are judged by luck; need {ENOUGH_ELEMENTS} or more, or a "
            f"Judge of several draws"
        )
    judge = Judge(dtype)
    judge.add(actual, oracle, plain, name)
    return judge.verdicts[0]


class _Pool:
    """One result over its draws so far."""

    def __init__(self) -> None:
        self.draws = self.elements = 0
        # Sums of squares, and the largest magnitudes: of the two differences from the oracle, and of the oracle.
        self.squares = dict.fromkeys(("actual", "plain", "oracle"), 0.0)
        self.peaks = dict.fromkeys(self.squares, 0.0)
        self.off_once = 0.0

    def add(self, actual: Tensor, oracle: Tensor, plain: Tensor, rounded_once: bool) -> None:
        oracle = oracle.detach().double()
        parts = {"actual": _difference(actual, oracle), "plain": _difference(plain, oracle), "oracle": oracle}
        self.draws += 1
        self.elements += oracle.numel()
        if not oracle.numel():
            return
        for name, part in parts.items():
            self.squares[name] += float(part.norm()) ** 2
            self.peaks[name] = max(self.peaks[name], float(torch.linalg.vector_norm(part, torch.inf)))
        if rounded_once and actual.dtype.itemsize == 2:
            # Beside that rounding, the sum in fp32 before it is exact, except where terms cancel.
            nearly = oracle.abs() + oracle.norm() / oracle.numel() ** 0.5 / 64
            half = (0.5 * torch.finfo(actual.dtype).eps * nearly).clamp(min=torch.finfo(torch.float64).tiny)
            self.off_once = max(self.off_once, float((parts["actual"].abs() / half).max()))

    @property
    def is_enough(self) -> bool:
        return not 0 < self.elements < ENOUGH_ELEMENTS or self.draws >= FIRST_DRAWS

    @property
    def is_all_there_can_be(self) -> bool:
        return self.draws >= MAX_DRAWS or (self.draws >= FIRST_DRAWS and self.elements >= _MANY_ELEMENTS)

    def verdict(self, name: str, dtype: torch.dtype) -> Verdict:
        scale = self.squares["oracle"] ** 0.5 or 1.0
        error, plain = (self.squares[side] ** 0.5 / scale for side in ("actual", "plain"))
        allowed = 4.0 * self.peaks["plain"] + 0.5 * torch.finfo(dtype).eps * (self.peaks["oracle"] or 1.0)
        worst = max(self.peaks["actual"] / allowed, self.off_once)
        return Verdict(name, error, plain, error_budget(plain, dtype), worst)


class Memory(NamedTuple):
    """Bytes of torch's CPU allocator that a call took beyond what was allocated before it."""

    peak: int
    kept: int
    """Still allocated when it returned, its result included."""


def measure_memory(call: Callable[[], T]) -> tuple[T, Memory]:
    """What ``call`` returns, and the CPU memory that it allocated, as far as torch's allocator sees it."""
    with (
        _silent_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return result, Memory(peak, allocated)


def capture(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """``call`` as a CUDA graph, and the result that it writes to; two calls before it compile and fill caches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides what the profiler's native half logs when it starts and stops."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _difference(actual: Tensor, oracle: Tensor) -> Tensor:
    if actual.shape != oracle.shape:
        raise ValueError(f"actual: got shape {tuple(actual.shape)}, need {tuple(oracle.shape)} as the oracle")
    return actual.detach().to(oracle) - oracle
