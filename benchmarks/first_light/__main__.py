"""The first minutes on a card: what it can do, which kernels are right, how fast they are, and why.

    python -m benchmarks.first_light --out DIR [--seconds 300] [--only STEP ...] [--skip STEP ...] [--no-build]

Needs a checkout and torch; nothing has to be installed, and the CUDA module is built in the background for the card's
own architecture. DIR then has ``results.jsonl`` (a line per result, written as soon as it is there), ``steps.log`` and
``build.log``. Every step is a process of its own with a limit (``benchmarks.steps``), so that one that hangs or dies
costs only what it had not yet found out. What is most worth knowing comes first; the GEMM that could hang comes after
what does not depend on it. Without a card the steps rehearse on the CPU with tiny shapes.

``--only`` and ``--skip`` take the beginnings of names; ``--list`` prints them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.git import state
from benchmarks.steps import Runner, Step, chosen, emit

OVERLAPPED = {"IGVA_KERNELS_FUSED_GEMM": "1"}
SEPARATE = {"IGVA_KERNELS_FUSED_GEMM": "0"}
BUILD_SECONDS = 240
CORES_LEFT = 3
"""Cores that the build leaves to the steps beside it."""


def step(
    name: str, limit: float, *, module: bool = False, quiet: bool = False, environment: Mapping[str, str] = SEPARATE
) -> Step:
    """A step of this program."""
    command = (sys.executable, "-m", "benchmarks.first_light", "--step", name)
    return Step(name, limit, command, environment, module, quiet)


def steps() -> list[Step]:
    """All steps, what is most worth knowing first."""
    return [
        step("env", 40), step("ceilings", 40),
        *(
            step(f"check-triton-{kernel}", 60)
            for kernel in ("mix", "linear", "mlp", "deform", "inject", "project", "allocator")
        ),
        step("plain", 50, quiet=True), step("time-triton", 60, quiet=True),
        *(step(f"check-cuda-{kernel}", 30, module=True) for kernel in ("mix", "linear", "mlp", "deform", "inject")),
        step("time-cuda", 40, module=True),
        *(step(f"{what}-triton", 60, quiet=True) for what in ("deform", "inject", "train")),
        *(step(f"{what}-cuda", 40, module=True) for what in ("deform", "inject", "train")),
        step("compile", 90, quiet=True),
        step("counters-mix", 40, quiet=True), step("counters-deform", 40, quiet=True),
        *(step(f"check-fused-{kernel}", 45, module=True, environment=OVERLAPPED) for kernel in ("linear", "mlp")),
        *(step(name, 40, module=True, environment=OVERLAPPED) for name in ("time-fused", "replays", "ablate-fused")),
        step("ablate-cuda", 30, module=True),
        *(step(name, 40, module=True, environment=OVERLAPPED) for name in ("train-fused", "counters-fused")),
        step("counters-linear", 40, quiet=True), step("check-cuda-project", 30, module=True),
        step("launches-triton", 25), step("launches-cuda", 25, module=True),
        step("launches-fused", 25, module=True, environment=OVERLAPPED),
        step("operators", 40, quiet=True), step("compile-max-autotune", 150, quiet=True),
        step("tests", 240, quiet=True), step("tests-large", 90, quiet=True), step("memcheck", 120, quiet=True),
    ]  # fmt: skip


def run_step(name: str) -> bool:
    """What a step does, in its own process; whether all of it could be done."""
    from benchmarks.first_light import checks, outside, times

    what, *rest = name.split("-")
    backend = {"fused": "cuda"}.get(rest[0], rest[0]) if rest else ""
    if what == "check":
        kernel = rest[-1]
        if rest[0] == "fused":
            return checks.check_overlapped(kernel)
        return checks.check(rest[-2], kernel, **({"few": True} if rest[0] == "few" else {}))
    of_backends: dict[str, Callable[[str], bool]] = {
        "time": times.blocks, "deform": times.deform, "inject": times.inject, "launches": times.launches,
        "ablate": lambda _: times.ablations(), "train": lambda backend: times.training(backend, name),
    }  # fmt: skip
    if what in of_backends:
        return of_backends[what](backend)
    others: dict[str, Callable[[], bool]] = {
        "env": checks.env, "ceilings": times.ceilings, "plain": times.plain, "replays": checks.replays,
        "compile": lambda: times.compiled("default"),
        "compile-max-autotune": lambda: times.compiled("max-autotune"), "operators": times.all_operators,
        "counters-mix": lambda: outside.counters("mix-cuda", "mix-triton"),
        "counters-deform": lambda: outside.counters("deform-cuda", "deform-triton"),
        "counters-linear": lambda: outside.counters("linear-triton"),
        "counters-fused": lambda: outside.counters("linear-cuda"),
        "tests": lambda: outside.tests(large=False), "tests-large": lambda: outside.tests(large=True),
        "memcheck": outside.memcheck,
    }  # fmt: skip
    return others[name]()


def architecture() -> str | None:
    """The first card's architecture as nvcc takes it, with its own instructions; None without a card."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    major, _, minor = told.partition(".")
    return f"{major}{minor}{'a' if int(major) >= 9 else ''}" if major.isdigit() and minor.isdigit() else None


def build() -> Step | None:
    """Builds the modules in place, for the card alone; None where there is no card or no compiler for it."""
    target = architecture()
    if target is None or shutil.which("nvcc") is None:
        return None
    jobs = max(1, (os.cpu_count() or 1) - CORES_LEFT)
    environment = {"IGVA_KERNELS_CUDA_ARCHS": target, "IGVA_KERNELS_FORCE_CUDA": "1", "MAX_JOBS": str(jobs)}
    return Step("build", BUILD_SECONDS, (sys.executable, "setup.py", "build_ext", "--inplace"), environment)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps, or what one of them does."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.first_light", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the folder of the results")
    parser.add_argument("--seconds", type=float, default=300, help="in all (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], metavar="STEP", help="only steps whose names begin so")
    parser.add_argument("--skip", nargs="*", default=[], metavar="STEP", help="no steps whose names begin so")
    parser.add_argument("--no-build", action="store_true", help="take the modules as they are")
    parser.add_argument("--list", action="store_true", help="print the names of the steps")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--profile", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.step:
        try:
            return 0 if run_step(options.step) else 1
        except Exception as error:
            emit(errors={"step": f"{type(error).__name__}: {error}"[:300]})
            raise
    if options.profile:
        from benchmarks.first_light.outside import profile

        profile(options.profile)
        return 0
    if options.list:
        print("\n".join(step.name for step in steps()))
        return 0
    if options.out is None:
        parser.error("--out: need the folder of the results")
    runner = Runner(options.out, options.seconds)
    runner.record("run", {"date": time.strftime("%Y-%m-%d", time.gmtime()), "revision": state()})
    runner.run(chosen(steps(), options.only, options.skip), None if options.no_build else build())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
