"""``python -m benchmarks.host``: what a call costs the host, beside plain torch.

IGVA's mix and its connector without gradients, on tensors so small that their kernels take next to no time. On a GPU
the calls are queued behind a kernel that waits, so that none of them waits for the GPU. Calls follow one another, as
those of one step of a model do: the median of many, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import igva_kernels as ik
from igva_kernels.registry import REFERENCE, backends

CALLS = 20
"""Calls of a sample: a GPU's queue holds their launches."""


def microseconds(call: Callable[[], object], device: str, samples: int = 50) -> float:
    """The median of what a call takes the host."""
    found = []
    for _ in range(samples):
        call()  # whatever ran before is no longer in the caches of the CPU
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(found)


@torch.no_grad()
def measure(device: str, tokens: int = 5, width: int = 8, hidden: int = 16) -> dict[str, tuple[float, float]]:
    """The mix and the connector of every backend that serves the device."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    plan, states = ik.MixPlan.igva(), [normal(1, tokens, width) for _ in range(25)]
    weights = torch.rand(1, plan.num_columns, device=device)
    params = normal(hidden, 2 * width), normal(hidden), normal(hidden, hidden), normal(hidden)
    found = {}
    for backend in backends():
        if device not in backend.devices or (backend.name != REFERENCE and not backend.available):
            continue
        given: dict[str, Any] = {"skip_tokens": 1, "impl": backend.name}
        mix = partial(ik.layer_mix, states, plan, weights, **given)
        connector = partial(ik.layer_mix_mlp, states, plan, weights, *params, **given)
        found[backend.name] = microseconds(mix, device), microseconds(connector, device)
    return found


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    table = Table("", "layer_mix, us", "layer_mix_mlp, us", title=f"What a call takes the host, {device}")
    for name, times in measure(device).items():
        table.add_row("plain torch" if name == REFERENCE else name, *(f"{us:.0f}" for us in times))
    Console().print(table)


if __name__ == "__main__":
    main()
