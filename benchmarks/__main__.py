"""The command of the suite: ``python -m benchmarks``, or ``igva-kernels bench`` in a checkout."""

from __future__ import annotations

import argparse
import gc
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from benchmarks import report
from benchmarks.measure import (
    CALLS,
    COMPILING,
    ROOT,
    Figures,
    Machine,
    Refused,
    measure,
    needs_a_fresh_process,
    timer_for,
)
from benchmarks.providers import PLAIN, Provider, plain_rate, providers
from benchmarks.results import (
    RESULTS,
    Environment,
    Row,
    append,
    check_machine,
    compare,
    default_path,
    environment,
    read,
    row_of,
)
from benchmarks.workloads import Workload, affordable, suite
from igva_kernels.verify import DTYPES

SECONDS = {"cpu": 540, "cuda": 450}
"""By device: default seconds for the whole suite, shared by the workloads; one that no longer fits is not begun."""
BUDGETS = {"full": {"cpu": 1.5, "cuda": 0.5}, "quick": {"cpu": 1.0, "cuda": 0.3}, "shapes": {"cpu": 1.0, "cuda": 0.3}}
"""By suite and device: seconds of timed rounds per workload; slow ones take two rounds however long."""
SETTING_UP, DRAWING_A_MODEL = 2.5, 15.0
"""Seconds, roughly, of a workload beside its calls, and of a model's imports and weights in each process."""


class Cost(NamedTuple):
    """Seconds that a workload takes, roughly."""

    least: float
    """With plain torch, the backends and the floor."""
    wanted: float
    """With the extra providers too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite and returns the exit status: 1 if a provider other than torch.compile failed its check."""
    args = _parser().parse_args(argv)
    console = Console()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: torch sees no CUDA device", file=sys.stderr)
        return 2
    wrong = 0
    if args.suite != "none":
        env = environment(args.device)
        path = args.output or (None if args.suite == "quick" else default_path(env))
        try:
            if path:
                check_machine(path, [env.machine])
        except ValueError as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 2
        earlier = read(path) if path else []
        # A GPU multiplies fast in every dtype of the suite.
        rates = {name: plain_rate("cpu", dtype) for name, dtype in DTYPES.items()} if args.device == "cpu" else {}
        chosen = [
            workload for workload in suite(args.suite, args.device)
            if _is_named(workload.name, args.workload) and (not args.dtype or workload.dtype in args.dtype)
        ]  # fmt: skip
        if rates and not args.dtype:
            chosen = affordable(chosen, rates)
        costs = [_cost(workload, args.device, rates) for workload in chosen]
        budget, seconds = BUDGETS[args.suite][args.device], args.seconds or SECONDS[args.device]
        rows, wrong = run(chosen, args.provider, args.device, budget, seconds, env, path, console, costs)
        console.print(f"written: {path}" if path else "nothing written; name a file with --output")
        if args.compare:
            try:
                console.print(_changes(earlier, rows, args.compare))
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
    if args.plots:
        for written in report.write(RESULTS, RESULTS.parent / "RESULTS.md", ROOT / "README.md"):
            console.print(f"written: {written}", highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def run(
    workloads: Sequence[Workload], names: Sequence[str], device: str, budget: float, seconds: float,
    env: Environment, path: Path | None, console: Console, costs: Sequence[Cost] | None = None,
) -> tuple[list[Row], int]:  # fmt: skip
    """Measures workloads and adds to the CSV as it goes.

    Args:
        workloads: in the order of measurement; those that no longer fit the time are left out and named.
        names: of providers, with wildcards; all of them if empty. Plain torch is always measured.
        device: "cpu" or "cuda".
        budget: seconds of timed rounds per workload.
        seconds: for everything.
        env: what the rows record of the machine.
        path: the CSV, or None.
        console: where progress and figures go.
        costs: of each workload; None for equal ones. Each gets the least that it needs; the rest is shared in
            proportion to what each wants beyond that, and what one leaves of its share goes to those that follow.

    Returns:
        The rows, and how many providers failed their check.
    """
    deadline = time.monotonic() + seconds
    costs = [Cost(0.0, 1.0)] * len(workloads) if costs is None else costs
    timer, machine = timer_for(device), Machine(device)
    rows: list[Row] = []
    wrong = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(workloads))
        progress.console.print(
            f"{env.machine}, torch {env.torch}, revision {env.revision}; {len(workloads)} workloads in at most "
            f"{_clock(seconds)}", highlight=False, soft_wrap=True,
        )  # fmt: skip
        left_out = []
        for at, workload in enumerate(workloads):
            left = deadline - time.monotonic()
            if left <= costs[at].least / 2:
                left_out.append(workload.title)
                continue
            what = f"{at + 1} of {len(workloads)}, {_clock(left)} left: {workload.title}"
            progress.update(task, description=what, completed=at)
            progress.console.print(f"[dim]{what}[/] {workload.note}", highlight=False, soft_wrap=True)
            share = _share(left, costs[at:])
            torch.compiler.reset()  # workloads compile anew: the compiler would give up after a few
            found: list[Row] = []
            try:
                for result in measure(workload, _chosen(workload, names, device), timer, machine, budget, share):
                    if isinstance(result, Refused):
                        # torch.compile may sum in a worse order than plain torch: not recorded, but no failure of ours.
                        wrong += result.is_wrong and not result.provider.is_compiled
                        progress.console.print(_refusal(result), highlight=False, soft_wrap=True)
                    else:
                        found.append(_noted(result, env, progress.console))
            except torch.OutOfMemoryError:
                progress.console.print(f"{workload.title}: needs more memory than there is, left out")
            except ModuleNotFoundError as error:
                progress.console.print(f"{workload.title}: needs {error.name}, left out")
            except (RuntimeError, subprocess.CalledProcessError) as error:
                wrong += 1
                progress.console.print(f"{workload.title}: [bold red]broken[/]: {error}", highlight=False)
            if path:
                append(path, found)
            rows += found
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        if left_out:
            progress.console.print(
                f"[bold]out of time, left out:[/] {', '.join(left_out)}", highlight=False, soft_wrap=True
            )
    return rows, wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("igva-kernels bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--suite", choices=("full", "quick", "shapes", "none"), default="full",
                        help="quick: a minute, written only to --output; shapes: the connector at 72 shapes, to "
                             "compare kernels with --provider; none: no measurement, for --plots")  # fmt: skip
    parser.add_argument("--workload", action="append", metavar="NAME", default=[],
                        help="only these (repeatable; wildcards)")  # fmt: skip
    parser.add_argument("--provider", action="append", metavar="NAME", default=[],
                        help="only these beside plain torch (repeatable; wildcards)")  # fmt: skip
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this one (repeatable)")
    parser.add_argument("--output", type=Path, metavar="CSV", help="rows are added to it (default: the machine's own)")
    parser.add_argument("--compare", metavar="REV", help="with the CSV's newest earlier rows of this git revision")
    parser.add_argument("--plots", action="store_true", help="draw the pictures, write RESULTS.md and README's tables")
    parser.add_argument("--seconds", type=float, help="in all (default: 540 on a CPU, 450 on a GPU)")
    return parser


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch(name, pattern) for pattern in patterns)


def _cost(workload: Workload, device: str, rates: Mapping[str, float]) -> Cost:
    """Estimated from what a call of plain torch costs, and from what was seen to take time beside the calls."""
    found = providers(workload, device).values()
    plain = workload.plain_flops / rates.get(workload.dtype, math.inf)
    # In plain torch's calls: two for the fp64 results, three each for plain torch and a backend, the rest for a floor.
    calls = 9 if workload.mode == "forward" else 12
    least = SETTING_UP + calls * plain
    if workload.is_model:
        least += DRAWING_A_MODEL * (2 if needs_a_fresh_process(workload, device) else 1)
    extra = sum(CALLS * plain + (COMPILING if provider.is_compiled else 0.0) for provider in found if provider.is_extra)
    return Cost(least, least + extra)


def _share(left: float, costs: Sequence[Cost]) -> float:
    """Seconds for the first of the workloads that remain."""
    least = sum(cost.least for cost in costs)
    beyond = sum(cost.wanted - cost.least for cost in costs)
    if left <= least or not beyond:
        return left * costs[0].least / least
    return costs[0].least + (left - least) * (costs[0].wanted - costs[0].least) / beyond


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _chosen(workload: Workload, names: Sequence[str], device: str) -> Mapping[str, Provider]:
    found = providers(workload, device)
    return {name: provider for name, provider in found.items() if name == PLAIN or _is_named(name, names)}


def _noted(figures: Figures, env: Environment, console: Console) -> Row:
    row = row_of(figures, env)
    shown = figures.workload.title + ("" if figures.timing == "eager" else f" ({figures.timing})")
    rate = f"{100 * row.tflops / row.ceiling_tflops:3.0f} % of GEMM" if row.tflops else ""
    rate = f"{100 * row.gbps / row.ceiling_gbps:3.0f} % of copy" if row.gbps and not row.hidden else rate
    memory = f"{row.peak_mib:8.1f} MiB" if row.peak_mib is not None else ""
    line = f"{shown:42} {row.label:36} {row.ms:9.4g} ms  x {row.speedup:5.2f}  {rate:14} {memory}"
    console.print(line, highlight=False, soft_wrap=True)
    return row


def _refusal(refused: Refused) -> str:
    answer = "[bold red]WRONG, not recorded[/]" if refused.is_wrong else "left out"
    return f"{refused.workload.title:42} {refused.provider.label:36} {answer}: {refused.reason}"


def _changes(earlier: Sequence[Row], rows: Sequence[Row], name: str) -> Table:
    changes = compare(earlier, rows, name)
    count = Counter(change.verdict for change in changes)
    least, most = changes[0].drift
    table = Table(
        title=f"beside {name}: {len(changes)} measurements, "
        + ", ".join(f"{count[verdict]} {verdict}" for verdict in ("same", "drift", "slower", "faster"))
        + f"; what is not ours took {least:.2f} to {most:.2f} times as long as before",
        title_justify="left",
    )
    for head in ("workload", "provider", "run", "before, ms", "after, ms", "after / before", ""):
        table.add_column(head, justify="right" if "/" in head or "ms" in head else "left")
    for change in changes:
        before, row, _ = change
        table.add_row(
            f"{row.workload} {row.mode} {row.dtype} B {row.batch}", row.provider, row.timing, _spread(before),
            _spread(row), f"{change.ratio:.2f}", change.verdict,
        )  # fmt: skip
    return table


def _spread(row: Row) -> str:
    return f"{row.ms:.4g} ({row.ms_p20:.4g}-{row.ms_p80:.4g})"


if __name__ == "__main__":
    raise SystemExit(main())
