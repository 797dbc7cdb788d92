"""``python -m benchmarks.injection``: features into the language model, beside what the published codes write.

* DeepStack: one injection of V rows into ``[1, T, H]``, beside transformers' ``_deepstack_process`` (clone, masked
  read, addition, masked write): time and transient memory of the forward, and of forward and backward.
* Internal direct fusion: the backward of Layer_Select_Fuse's loop over the samples, beside one call, by batch size.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import igva_kernels as ik
from benchmarks.measure import timer_for
from igva_kernels.testing import measure_memory

DEEPSTACK = {"tokens": 4096, "width": 4096, "features": 3000}
"""A prompt with pictures for Qwen3-VL-8B."""


class Row(NamedTuple):
    """A way to inject, beside another one that computes the same bits."""

    what: str
    plain: float
    """Seconds of the published code, the median."""
    ours: float
    plain_bytes: int | None = None
    """Memory that the call takes beyond its arguments, at its peak."""
    our_bytes: int | None = None


def deepstack_process(hidden_states: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """What transformers' ``_deepstack_process`` computes, step by step."""
    hidden_states = hidden_states.clone()
    hidden_states[mask, :] = hidden_states[mask, :] + features
    return hidden_states


def slice_by_slice(hidden_states: Tensor, features: Tensor, start: int) -> Tensor:
    """What Layer_Select_Fuse's loop computes, step by step: an addition in place for every sample."""
    hidden_states = hidden_states.clone()  # the loop changes the states of the layer before
    for b in range(features.shape[0]):
        hidden_states[b, start : start + features.shape[1]] += features[b]
    return hidden_states


def deepstack(dtype: torch.dtype, rounds: int) -> list[Row]:
    """One injection of the size of ``DEEPSTACK``."""
    tokens, width, count = DEEPSTACK["tokens"], DEEPSTACK["width"], DEEPSTACK["features"]
    hidden = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    features = torch.randn(count, width, dtype=dtype, requires_grad=True)
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    mask[0, torch.randperm(tokens)[:count]] = True
    grad = torch.randn_like(hidden)

    def ours(hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        return ik.inject_tokens(hidden, features, ik.token_rows(mask))

    @torch.no_grad()
    def forward(inject: Callable[..., Tensor]) -> Tensor:
        return inject(hidden, mask, features)

    def both(inject: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(inject(hidden, mask, features), (hidden, features), grad)

    rows = []
    for name, run in (("forward", forward), ("forward and backward", both)):
        calls = [partial(run, deepstack_process), partial(run, ours)]
        results, memories = zip(*(measure_memory(call) for call in calls), strict=True)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "the bits differ"
        plain, own = medians(calls, rounds)
        bytes_of = [memory.peak for memory in memories]
        rows.append(Row(f"DeepStack, {name}, {str(dtype)[6:]}", plain, own, *bytes_of))
    return rows


def internal_direct(batch: int, rounds: int, tokens: int = 640, width: int = 512, patches: int = 576) -> Row:
    """The backward of one injected layer: seconds per image."""
    hidden = torch.randn(batch, tokens, width, requires_grad=True)
    features = torch.randn(batch, patches, width, requires_grad=True)
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    mask[:, 5 : 5 + patches] = True
    outputs = [slice_by_slice(hidden, features, 5), ik.inject_tokens(hidden, features, ik.token_rows(mask))]
    grad = torch.randn_like(hidden)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (hidden, features), grad, retain_graph=True)

    results = [backward(out) for out in outputs]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "the bits differ"
    plain, own = medians([partial(backward, out) for out in outputs], rounds)
    return Row(f"I_D, backward per image, B {batch}", plain / batch, own / batch)


def medians(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median seconds of each call; they take turns, so that what else the machine does falls on all of them."""
    times = timer_for("cpu").in_turn({str(i): [call] for i, call in enumerate(calls)}, 0.0, least=rounds)
    return [statistics.median(found) for found in times.values()]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.injection", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each (default: 15)")
    rounds = parser.parse_args().rounds
    table = Table("", "published, ms", "igva_kernels, ms", "ratio", "transient, MiB", title="Injection on this CPU")
    for row in (
        *(row for dtype in (torch.bfloat16, torch.float32) for row in deepstack(dtype, rounds)),
        *(internal_direct(batch, rounds) for batch in (2, 8, 32)),
    ):
        pair = (row.plain_bytes, row.our_bytes)
        memory = "" if None in pair else " / ".join(f"{(value or 0) / 2**20:.1f}" for value in pair)
        times = (f"{1e3 * row.plain:.2f}", f"{1e3 * row.ours:.2f}", f"{row.plain / row.ours:.1f}")
        table.add_row(row.what, *times, memory)
    Console().print(table)


if __name__ == "__main__":
    main()
