"""The connector of LLaVA-IGVA on a CPU, at the shapes of CLIP-L/336 and a 7B language model: time and memory.

    python benchmarks/connector_cpu.py [--rounds N] [--quick]

The variants of a group are timed in turn, round by round in one run, and compared round by round: what a busy machine
does to one it does to all. A variant is timed only after its result kept the rule of ``igva_kernels.testing``. Prints
tables and writes ``benchmarks/results/connector_cpu.csv``.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from igva_kernels import MixPlan, info
from igva_kernels.testing import assert_within_rule, measure_memory
from igva_kernels.verify import Case

RESULTS = Path(__file__).parent / "results" / "connector_cpu.csv"
PLAN = MixPlan.igva()
TOKENS, WIDTH, HIDDEN, SKIP = 577, 1024, 4096, 1
PATCHES = TOKENS - SKIP
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Record(NamedTuple):
    """One figure: a line of the CSV."""

    group: str
    variant: str
    dtype: str
    batch: int
    unit: str
    p50: float
    p20: float
    p80: float
    baseline: str = ""
    ratio: float = 1.0
    """Median over the rounds of this variant's time / the baseline's."""


class Connector:
    """Inputs of the block, and its variants."""

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        shape = (PLAN, batch, TOKENS, WIDTH)
        self.batch, self.dtype = batch, dtype
        self.mix_case = Case("mix", "layer_mix", *shape)
        self.block_case = Case("block", "layer_mix_mlp", *shape, HIDDEN, activation="gelu")
        self.inputs = self.block_case.draw(0, dtype, "cpu")
        rows = batch * PATCHES
        self.rows = torch.randn(rows, PLAN.num_blocks * WIDTH).to(dtype)
        self.inner = torch.randn(rows, HIDDEN).to(dtype)

    def mix(self, impl: str) -> Tensor:
        return self.mix_case.forward(self.inputs, impl)

    def block(self, impl: str) -> Tensor:
        return self.block_case.forward(self.inputs, impl)

    def two_gemms(self) -> tuple[Tensor, Tensor]:
        params = self.inputs.params
        return torch.mm(self.rows, params["weight1"].t()), torch.mm(self.inner, params["weight2"].t())

    def train(self, impl: str) -> dict[str, Tensor]:
        """Forward and the gradients of stage 2: mix weights and projector, the tower frozen."""
        return self.block_case.run(self.inputs, impl)

    def forward_that_saves(self, impl: str) -> Tensor:
        """A forward whose graph waits for the backward of stage 2."""
        learning = self.inputs.detached()
        assert learning.mix_weights is not None
        for leaf in (learning.mix_weights, *learning.params.values()):
            leaf.requires_grad_()
        return self.block_case.forward(learning, impl)

    def check(self) -> None:
        """Fails where the fused block breaks the rule."""
        oracle = self.inputs.double()
        for case in (self.mix_case, self.block_case):
            plain = case.forward(self.inputs, "reference")
            assert_within_rule(case.forward(self.inputs, "auto"), case.forward(oracle, "reference"), plain, self.dtype)


def in_turn(variants: dict[str, Callable[[], object]], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of every round by variant; each round runs all, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for counted in track([False] + [True] * rounds, title, transient=True):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def records(group: str, dtype: str, batch: int, seconds: dict[str, list[float]], baseline: str) -> Iterator[Record]:
    """The rows of a group, each beside the baseline."""
    for name, values in seconds.items():
        p20, *_, p80 = quantiles([1e3 * value for value in values], n=5)
        ratio = median(a / b for a, b in zip(values, seconds[baseline], strict=True))
        yield Record(group, name, dtype, batch, "ms", 1e3 * median(values), p20, p80, baseline, ratio)


@torch.no_grad()
def block_forward(rounds: int) -> Iterator[Record]:
    """The whole connector beside its two GEMMs alone and beside the plain code."""
    for name, dtype in DTYPES.items():
        connector = Connector(2, dtype)
        connector.check()
        seconds = in_turn(
            {
                "two bare GEMMs": connector.two_gemms,
                "plain": lambda c=connector: c.block("reference"),
                "fused": lambda c=connector: c.block("auto"),
            },
            rounds, f"block forward, {name}",
        )  # fmt: skip
        yield from records("block forward", name, 2, seconds, "two bare GEMMs")


@torch.no_grad()
def mix_forward(rounds: int, batches: tuple[int, ...]) -> Iterator[Record]:
    """The mix alone beside the plain aggregation, and how fast it reads beside how fast the machine can read."""
    buffer = torch.ones(2**27)  # 512 MiB, far beyond any cache
    for name in ("fp32", "bf16"):
        for batch in batches:
            connector = Connector(batch, DTYPES[name])
            seconds = in_turn(
                {
                    "plain": lambda c=connector: c.mix("reference"),
                    "fused": lambda c=connector: c.mix("auto"),
                    "read (sum)": buffer.sum,
                    "read (max)": buffer.amax,
                    "read (dot)": lambda: torch.dot(buffer[: 2**26], buffer[2**26 :]),
                },
                3 * rounds, f"mix forward, {name}, B {batch}",
            )  # fmt: skip
            reads = {key: seconds.pop(key) for key in list(seconds) if key.startswith("read")}
            yield from records("mix forward", name, batch, seconds, "plain")

            machine = [buffer.nbytes / min(times) / 1e9 for times in zip(*reads.values(), strict=True)]
            states = batch * PATCHES * WIDTH * DTYPES[name].itemsize * len(PLAN.layers)
            fused = [states / value / 1e9 for value in seconds["fused"]]
            share = median(a / b for a, b in zip(fused, machine, strict=True))
            for variant, values, ratio in (("machine", machine, 1.0), ("fused", fused, share)):
                p20, *_, p80 = quantiles(values, n=5)
                yield Record("mix read", variant, name, batch, "GB/s", median(values), p20, p80, "machine", ratio)


def training(rounds: int) -> Iterator[Record]:
    """Forward and backward of stage 2."""
    for name in DTYPES:
        connector = Connector(2, DTYPES[name])
        seconds = in_turn(
            {"plain": lambda c=connector: c.train("reference"), "fused": lambda c=connector: c.train("auto")},
            rounds, f"training, {name}",
        )  # fmt: skip
        yield from records("training step", name, 2, seconds, "plain")


def memory(batches: tuple[int, ...]) -> Iterator[Record]:
    """What a forward allocates beyond inputs and output, and what training keeps for backward beyond the output."""
    for name in ("fp32", "bf16"):
        for batch in batches:
            connector = Connector(batch, DTYPES[name])
            for variant, impl in (("plain", "reference"), ("fused", "auto")):
                with torch.no_grad():
                    out, inference = measure_memory(lambda c=connector, i=impl: c.block(i))
                _, train = measure_memory(lambda c=connector, i=impl: c.forward_that_saves(i))
                for group, size in (
                    ("memory, inference", inference.peak - out.nbytes),
                    ("memory, saved", train.kept - out.nbytes),
                ):
                    mib = size / 2**20
                    yield Record(group, variant, name, batch, "MiB", mib, mib, mib)


def print_tables(console: Console, rows: list[Record]) -> None:
    """A table a group."""
    for group in dict.fromkeys(row.group for row in rows):
        unit = next(row.unit for row in rows if row.group == group)
        compared = unit != "MiB"
        table = Table("dtype", "B", "variant", title=group, title_justify="left")
        for header in [unit, *(["20-80 %", "x baseline", "baseline"] if compared else [])]:
            table.add_column(header, justify="right")
        for row in rows:
            if row.group == group:
                more = [f"{row.p20:.1f}-{row.p80:.1f}", f"{row.ratio:.3f}", row.baseline] if compared else []
                table.add_row(row.dtype, str(row.batch), row.variant, f"{row.p50:.1f}", *more)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="3 rounds, B 2 only, nothing written")
    args = parser.parse_args()
    rounds, batches = (3, (2,)) if args.quick else (args.rounds, (1, 2, 4, 8))

    console = Console()
    report = info.collect()
    console.print(info.render(report), highlight=False)
    rows = [*block_forward(rounds), *mix_forward(rounds, batches), *training(rounds), *memory(batches)]
    print_tables(console, rows)
    if args.quick:
        return
    cpu = report["cpu"]
    where = {"cpu": cpu["name"], "threads": cpu["threads"], "torch": report["packages"]["torch"]}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*Record._fields, *where])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row._asdict().items()} | where)
    console.print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
