"""The CSV of a machine: rows of many runs, each with all that its figures depend on, and how runs are compared."""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple, get_type_hints

import torch

from benchmarks.device import device_name, slug
from benchmarks.git import revision, state
from benchmarks.measure import Figures
from benchmarks.providers import PLAIN
from benchmarks.workloads import Connector
from igva_kernels import info

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the figures of a run depend on."""

    date: str
    revision: str
    """Git's; ends in "+" if files had changes that were not committed."""
    device: str
    driver: str
    threads: int
    python: str
    torch: str
    triton: str
    igva_kernels: str

    @property
    def machine(self) -> str:
        """The name by which rows share a CSV, pictures and tables."""
        return f"{self.device}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True, kw_only=True)
class Row(Environment):
    """One provider in one workload of one run: a line of the CSV. Columns that do not apply are empty."""

    workload: str
    mode: str
    dtype: str
    batch: int
    images: int | None = None
    patches: int | None = None
    layers: int | None = None
    width: int | None = None
    hidden: int | None = None
    provider: str
    label: str
    timing: str
    floor: bool
    rounds: int
    ms: float
    ms_p20: float
    ms_p80: float
    speedup: float
    """Time of plain torch as published / this one's, median over the rounds of one run."""
    speedup_p20: float
    speedup_p80: float
    gbps: float | None = None
    tflops: float | None = None
    ceiling_gbps: float
    ceiling_tflops: float
    """Both are the machine's own, measured in the same rounds."""
    peak_mib: float | None = None
    saved_mib: float | None = None
    judged: str = ""
    """The result nearest to its budget, or "" for a floor."""
    error: float | None = None
    plain_error: float | None = None
    budget: float | None = None
    note: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether the time depends on this package."""
        return not (self.floor or self.provider.startswith((PLAIN, "additions")))

    @property
    def key(self) -> tuple[Any, ...]:
        """What is measured: equal for the same measurement in two runs."""
        return (
            self.machine, self.workload, self.mode, self.dtype, self.batch, self.layers, self.width,
            self.hidden, self.provider, self.timing,
        )  # fmt: skip


def environment(device: str) -> Environment:
    """The environment of a run that starts now."""
    report = info.collect()
    return Environment(
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        revision=state(),
        device=device_name(device),
        driver=platform.release() if device == "cpu" else _driver(),
        threads=torch.get_num_threads(),
        python=report["python"],
        torch=report["packages"]["torch"],
        triton=report["packages"]["triton"] or "",
        igva_kernels=report["igva_kernels"],
    )  # fmt: skip


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def default_path(env: Environment) -> Path:
    """The CSV of this machine."""
    return RESULTS / f"{slug(env.machine)}.csv"


def row_of(figures: Figures, env: Environment) -> Row:
    """The line of the CSV."""
    workload, verdict = figures.workload, figures.verdict
    sizes: dict[str, Any] = {}
    if isinstance(workload, Connector):
        case = workload.case
        sizes = {
            "images": case.images, "patches": case.tokens - case.skip, "layers": len(case.plan.layers),
            "width": case.width, "hidden": case.hidden or None,
        }  # fmt: skip
    return Row(
        **{field.name: getattr(env, field.name) for field in fields(env)},
        workload=workload.name, mode=workload.mode, dtype=workload.dtype, batch=workload.batch, **sizes,
        provider=figures.provider.name, label=figures.provider.label, timing=figures.timing,
        floor=figures.provider.is_floor, rounds=figures.rounds,
        ms=figures.ms.p50, ms_p20=figures.ms.p20, ms_p80=figures.ms.p80,
        speedup=figures.speedup.p50, speedup_p20=figures.speedup.p20, speedup_p80=figures.speedup.p80,
        gbps=figures.gbps, tflops=figures.tflops, ceiling_gbps=figures.ceilings.gbps,
        ceiling_tflops=figures.ceilings.tflops,
        peak_mib=_mib(figures.peak_bytes), saved_mib=_mib(figures.saved_bytes),
        judged=verdict.name if verdict else "", error=verdict.error if verdict else None,
        plain_error=verdict.plain if verdict else None, budget=verdict.budget if verdict else None, note=figures.note,
    )  # fmt: skip


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


# ---- the file --------------------------------------------------------------------------------------------------------

COLUMNS = [field.name for field in fields(Row)]


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows of one machine to its CSV, which is made if it does not exist.

    Raises:
        ValueError: the file has other columns, or rows of another machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    check_machine(path, (row.machine for row in rows))
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_text(getattr(row, name)) for name in COLUMNS])


def read(path: Path) -> list[Row]:
    """The rows of a CSV, in the order in which they were measured; none if there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    _check_columns(path)
    types = get_type_hints(Row)
    with path.open(newline="") as file:
        return [Row(**{name: _value(types[name], line[name]) for name in COLUMNS}) for line in csv.DictReader(file)]


def check_machine(path: Path, machines: Iterable[str]) -> None:
    """Checks that rows of ``machines`` may be added to a CSV, which need not exist yet.

    Raises:
        ValueError: the file has other columns, or rows of another machine.
    """
    found = {row.machine for row in read(path)}.union(machines)
    if len(found) > 1:
        raise ValueError(
            f"{path}: a CSV has the rows of one machine, not of {' and '.join(sorted(found))}; name another file"
        )


def newest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of every measurement, in the order in which measurements first came."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.key not in found or row.date >= found[row.key].date:
            found[row.key] = row
    return list(found.values())


def _check_columns(path: Path) -> None:
    with path.open(newline="") as file:
        columns = next(csv.reader(file), [])
    if columns != COLUMNS:
        raise ValueError(f"{path}: its columns are those of another version of the suite; name another file")


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _value(kind: Any, text: str) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return text == "True"
    if text == "":
        return None
    return int(text) if kind in (int, int | None) else float(text)


# ---- two runs --------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """One measurement in two runs."""

    before: Row
    after: Row
    drift: tuple[float, float]
    """Range of after / before that holds nine in ten measurements without this package: the machine's own drift."""

    @property
    def ratio(self) -> float:
        """Time after / before."""
        return self.after.ms / self.before.ms

    @property
    def verdict(self) -> str:
        """ "same", "drift", "slower" or "faster".

        Two measurements are the same if their spreads overlap, in time or in speed-up over plain torch. They differ by
        drift if the spreads do not overlap, but measurements without this package moved as far. A slower machine
        changes the times and not the speed-ups; noise in plain torch alone changes the speed-ups and not the times.
        """
        before, after, (least, most) = self
        times_agree = after.ms_p20 <= before.ms_p80 and before.ms_p20 <= after.ms_p80
        speedups_agree = after.speedup_p20 <= before.speedup_p80 and before.speedup_p20 <= after.speedup_p80
        if times_agree or (speedups_agree and after.provider != PLAIN):
            return "same"
        if not after.is_ours or least <= self.ratio <= most:
            return "drift"
        return "slower" if self.ratio > 1 else "faster"


def compare(earlier: Sequence[Row], after: Sequence[Row], name: str) -> list[Change]:
    """The rows of a run beside the newest earlier ones of a revision.

    Args:
        earlier: what the CSV held before the run.
        after: the rows of the run.
        name: the revision, as git takes it or as the CSV has it.

    Raises:
        ValueError: the CSV has no such row; the message says how to get them.
    """
    wanted = revision(name) or name
    before = {row.key: row for row in newest(row for row in earlier if row.revision.startswith(wanted))}
    pairs = [(before[row.key], row) for row in after if row.key in before]
    elsewhere = {row.machine for row in before.values()} - {row.machine for row in after}
    if elsewhere and not pairs:
        raise ValueError(f"--compare {name}: its rows are of {' and '.join(sorted(elsewhere))}, not of this machine")
    if not pairs:
        raise ValueError(
            f"--compare {name}: the CSV has no row of revision {wanted} that this run measured too; to measure it, run "
            f"`git worktree add ../earlier {wanted}` and, in there, `python -m benchmarks --output` with this CSV"
        )
    others = [row.ms / old.ms for old, row in pairs if not row.is_ours]
    cuts = quantiles(others, n=20, method="inclusive") if len(others) > 1 else [1.0]
    return [Change(old, row, (cuts[0], cuts[-1])) for old, row in pairs]
