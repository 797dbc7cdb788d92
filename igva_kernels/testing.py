"""What "right" means: the error of a result against fp64, and how large it may be beside that of plain torch.

A kernel may be at most twice as wrong as the plain torch code in the same dtype, plus half a unit of rounding:

    error(kernel) <= 2 * error(plain) + 0.5 * eps(dtype)        error(x) = |x - oracle| / |oracle|  (Frobenius, fp64)

A small result of a long, cancelling sum (the gradient of ``mix_weights``: a few numbers from millions of products) has
an error that is mostly luck. Pass several draws of it, as sequences: the rule then holds for their root mean square.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Draws: TypeAlias = Tensor | Sequence[Tensor]
"""A result, or that result of several independent draws of the inputs."""

MIX_WEIGHT_DRAWS = 8
"""Draws that the gradient of ``mix_weights`` is judged on."""


class Verdict(NamedTuple):
    """One result beside plain torch's."""

    name: str
    error: float
    """Of the kernel, against fp64."""
    plain: float
    """Of plain torch in the same dtype, against fp64."""
    budget: float

    @property
    def ok(self) -> bool:
        """Whether the rule holds. NaN is never right."""
        return self.error <= self.budget

    def __str__(self) -> str:
        relation = "<=" if self.ok else ">"
        return f"{self.name}: error {self.error:.3e} {relation} budget {self.budget:.3e} (plain torch {self.plain:.3e})"


def relative_error(actual: Draws, oracle: Draws) -> float:
    """``|actual - oracle| / |oracle|`` (Frobenius, in fp64); the root mean square of it over draws.

    Where the oracle is zero, the error is the norm of ``actual``. An empty result has no error.
    """
    actual, oracle = _draws(actual), _draws(oracle)
    if len(actual) != len(oracle):
        raise ValueError(f"actual: {len(actual)} draws, but the oracle has {len(oracle)}")
    squares = [_relative_error(a, o) ** 2 for a, o in zip(actual, oracle, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def error_budget(plain_error: float, dtype: torch.dtype) -> float:
    """The largest error allowed where plain torch in the same dtype has ``plain_error``."""
    return 2.0 * plain_error + 0.5 * torch.finfo(dtype).eps


def judge(actual: Draws, oracle: Draws, plain: Draws, dtype: torch.dtype, name: str = "result") -> Verdict:
    """The verdict on ``actual``.

    Args:
        actual: the result of the kernel, or a sequence with one of each draw.
        oracle: the same computed in fp64 from the same (already rounded) inputs.
        plain: the same by the plain torch code in ``dtype``.
        dtype: the dtype of the computation, which may be narrower than that of the result.
        name: how the verdict calls it.
    """
    plain_error = relative_error(plain, oracle)
    return Verdict(name, relative_error(actual, oracle), plain_error, error_budget(plain_error, dtype))


def assert_within_rule(actual: Draws, oracle: Draws, plain: Draws, dtype: torch.dtype, name: str = "result") -> None:
    """Fails unless the rule holds. Arguments as in ``judge``."""
    verdict = judge(actual, oracle, plain, dtype, name)
    assert verdict.ok, str(verdict)


class Memory(NamedTuple):
    """Bytes of torch's CPU allocator that a call took beyond what was allocated before it."""

    peak: int
    kept: int
    """Still allocated when it returned, its result included."""


def measure_memory(call: Callable[[], T]) -> tuple[T, Memory]:
    """What ``call`` returns, and the CPU memory that it allocated (seen: what goes through torch's allocator)."""
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
    """``call`` as a CUDA graph, after two calls that compile and fill caches, and what the graph writes to."""
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


def _draws(value: Draws) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else value


def _relative_error(actual: Tensor, oracle: Tensor) -> float:
    if actual.shape != oracle.shape:
        raise ValueError(f"actual: shape {tuple(actual.shape)}, but the oracle has {tuple(oracle.shape)}")
    oracle = oracle.detach().double()
    difference = (actual.detach().to(oracle) - oracle).norm()
    scale = oracle.norm()
    return float(difference / scale if scale > 0 else difference)
