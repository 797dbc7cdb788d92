"""What other programs tell: hardware counters (ncu), the tests that need a GPU (pytest), the memory checker."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.steps import CHANNEL, ROOT, emit, figures

HERE = (sys.executable, "-m", "benchmarks.first_light")

# ---- hardware counters -----------------------------------------------------------------------------------------------

METRICS = {
    "ns": "gpu__time_duration.sum",
    "dram_pct": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "read_bytes": "dram__bytes_read.sum",
    "written_bytes": "dram__bytes_write.sum",
    "issue_pct": "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "tensor_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "occupancy_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "warp_cycles_per_issue": "smsp__average_warp_latency_per_inst_issued.ratio",
    "long_scoreboard_per_issue": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "barrier_per_issue": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "registers": "launch__registers_per_thread",
}
"""What is counted, by the names that the results have for it."""
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
"""What is counted instead where ncu does not know one of the metrics."""
MOST_KERNELS = 6
"""Kernels of a call that are counted."""


def counters(*targets: str) -> bool:
    """Counters of the kernels that a call of each target launches."""
    oks = []
    for target in targets:
        for options in (("--metrics", ",".join(METRICS.values())), [o for s in SECTIONS for o in ("--section", s)]):
            found, tail = _profiled(target, options)
            for row in found:
                emit(target=target, **row)
            if found:
                break
            print(tail)
            emit(target=target, errors={"ncu": tail[-300:]})
        oks.append(bool(found))
    return all(oks)


def _profiled(target: str, options: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    command = [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--launch-count", str(MOST_KERNELS), "--csv",
        "--print-units", "base", "--apply-rules", "no", *options, *HERE, "--profile", target,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return list(kernels(done.stdout.splitlines())), done.stdout[-3000:]


def kernels(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A row per kernel from what ``ncu --csv`` prints, in which other lines are mixed."""
    names = {metric: name for name, metric in METRICS.items()}
    found: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(line for line in lines if line.startswith('"')):
        if None in line or None in line.values():
            continue  # a line of something else, or a broken one
        row = found.setdefault(
            line["ID"],
            {"kernel": line["Kernel Name"][:120], "grid": line.get("Grid Size"), "block": line.get("Block Size")},
        )
        name = line["Metric Name"]
        try:
            row[names.get(name, name)] = float(line["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a", or a rule's text
            continue
    yield from found.values()


def profile(target: str) -> None:
    """One call of a target in the range that ncu looks at, after two that compile and fill caches."""
    call = TARGETS[target]()
    with torch.no_grad():
        call()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


PROFILED_BATCH = 16


def _block(what: str, impl: str) -> Callable[[], Any]:
    from benchmarks.first_light.bench import DEVICE, block

    connector = block(what, PROFILED_BATCH)
    return partial(connector.case.forward, connector.draw(DEVICE), impl)


def _triton_linear() -> Callable[[], Any]:
    """Triton's own GEMM, which the tables of this card may never choose: with tables that overrate it."""
    from igva_kernels.runtime import config

    known = config.of_device(torch.cuda.current_device())
    gemms = {name: tuple(replace(gemm, efficiency=9.0) for gemm in tiles) for name, tiles in known.gemms.items()}
    folder = Path(tempfile.mkdtemp())
    name = config.file_name(torch.cuda.get_device_name())
    (folder / name).write_text(replace(known, status="measured", gemms=gemms).to_json())
    os.environ["IGVA_KERNELS_CONFIG_DIR"] = str(folder)
    config.of_device.cache_clear()
    return _block("linear", "triton")


def _deform(impl: str) -> Callable[[], Any]:
    from igva_kernels.ops.deform_attn.cases import DeformCase

    case = DeformCase("", PROFILED_BATCH, ((24, 24),) * 4, 16, 64, 4, joined=True)
    return partial(case.run, case.draw(0, torch.bfloat16, "cuda"), impl)


TARGETS: dict[str, Callable[[], Callable[[], Any]]] = {
    "mix-cuda": partial(_block, "mix", "cuda"), "mix-triton": partial(_block, "mix", "triton"),
    "linear-triton": _triton_linear, "linear-cuda": partial(_block, "linear", "cuda"),
    "deform-cuda": partial(_deform, "cuda"), "deform-triton": partial(_deform, "triton"),
}  # fmt: skip
"""What can be profiled; "linear-cuda" is the overlapped GEMM where the environment switches it on."""


# ---- the tests -------------------------------------------------------------------------------------------------------

TEST_SECONDS = 60
"""The limit of one test."""
WORKERS = 6
"""Processes that share the tests: most of the time goes into compiling."""
NAMED = 300
"""The most failures that are named; all are counted."""
EVERY = 5.0
"""Seconds between two counts."""


def tests(large: bool) -> bool:
    """The tests marked ``gpu``, those of large memory alone and one after the other; they report and gate nothing."""
    import pytest

    files = sorted({*ROOT.glob("tests/ops/*/test_*gpu*.py"), ROOT / "tests" / "package" / "test_benchmarks.py"})
    every = [] if large else [ROOT / "tests" / "ops" / "test_every_operator.py"]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "-m",
        "gpu and large" if large else "gpu and not large",
    ]
    if importlib.util.find_spec("pytest_timeout"):
        # A thread ends a process that waits for a hung kernel, which no signal reaches; xdist starts another one.
        options += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    if importlib.util.find_spec("xdist") and not large:
        options += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    reporter = Reporter()
    status = pytest.main([*options, *map(str, [*files, *every])], plugins=[reporter])
    reporter.count(status=int(status))
    return status == 0


class Reporter:
    """A plugin of pytest that hands over every failure at once, and counts every few seconds."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        self.last = time.monotonic()

    def count(self, **more: Any) -> None:
        """Hands over the counts so far."""
        self.last = time.monotonic()
        emit(**self.counts, **({"pytest": more} if more else {}))

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be read."""
        if report.failed:
            self.counts["unread"] = self.counts.get("unread", 0) + 1
            emit(file=report.nodeid[:300], why=str(report.longrepr).strip()[-300:])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of each test: its call, or what went wrong around it."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
        if report.outcome == "failed" and self.counts["failed"] <= NAMED:
            text = str(report.longrepr).strip().splitlines()
            emit(test=report.nodeid[:300], when=report.when, why=(text[-1] if text else "")[:300])
        if time.monotonic() - self.last > EVERY:
            self.count()


# ---- the memory checker ----------------------------------------------------------------------------------------------

CHECKED = {
    "cuda": [sys.executable, "tests/ops/weighted_mix/test_cuda_gpu.py"],
    "deform_attn": [sys.executable, "-m", "benchmarks.first_light", "--step", "check-few-cuda-deform"],
    "inject_tokens": [sys.executable, "-m", "benchmarks.first_light", "--step", "check-few-cuda-inject"],
    "triton": [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/ops", "-k",
        "triton and ((values and obey and odd and bf16) or (allocator_obeys and 17-16))",
    ],
}  # fmt: skip
"""Small runs of the kernels, for a checker is slow."""


def memcheck() -> bool:
    """compute-sanitizer's memcheck on small runs; racecheck would take the asynchronous copies for races."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    # Torch's cache would hide an access beyond a tensor but within its block.
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1", PYTHONPATH=paths)
    # What runs under the checker prints its results: the channel of this step is not open in it.
    environment.pop(CHANNEL, None)
    return all([
        figures({"what": name}, memcheck=partial(_checked, command, environment)) for name, command in CHECKED.items()
    ])  # fmt: skip


def _checked(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise FileNotFoundError("compute-sanitizer is not on this machine")
    done = subprocess.run(
        [sanitizer, "--tool", "memcheck", *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(done.stdout)
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", done.stdout)
    return {"errors_found": sum(map(int, summary)) if summary else None, "exit": done.returncode}
