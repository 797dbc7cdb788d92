"""The benchmark suite on one GPU, its tests and the memory checker in one go, within eight minutes.

    python -m benchmarks.gpu_suite --out DIR [--seconds 450] [--tune] [--no-build] [--only STEP ...] [options]

The steps are processes with limits, as those of ``benchmarks.first_light``: they report, and none gates another one.
DIR then has ``results.jsonl``, ``steps.log``, ``build.log`` and the suite's CSV, under the name that it has in
``benchmarks/results``: `python -m benchmarks --suite none --plots` makes the pages from it there. ``--only`` and
``--skip`` take the beginnings of the steps' names; further options are those of ``python -m benchmarks``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import __main__ as suite
from benchmarks.first_light.__main__ import build
from benchmarks.first_light.__main__ import steps as steps_of_first_light
from benchmarks.results import default_path, environment, read
from benchmarks.steps import Runner, Step, chosen, emit

SHARE = 0.6
"""Of the time, what the suite gets."""
TUNE_SECONDS = 150


def steps(out: Path, seconds: float, tunes: bool, options: Sequence[str]) -> list[Step]:
    """Tuning if asked for, the suite, then what reports on the kernels."""
    here = (sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(out))
    tuned = {"IGVA_KERNELS_CONFIG_DIR": str(out)} if tunes else {}
    share = SHARE * seconds
    found = [Step("tune", TUNE_SECONDS, (*here, "--step", "tune"), tuned, is_quiet=True)] if tunes else []
    # The suite ends by itself, and is ended only if it does not.
    command = (*here, "--seconds", str(share - 20), "--step", "suite", *options)
    found.append(Step("suite", share, command, tuned, needs_background=True))
    return [*found, *(step for step in steps_of_first_light() if step.name.startswith(("env", "tests", "memcheck")))]


def run_step(name: str, out: Path, seconds: float, options: Sequence[str]) -> int:
    """What a step does, in its own process; the exit status."""
    if name == "tune":
        from igva_kernels.tune import tune

        path, _ = tune(log=print)
        emit(written=path.name)
        return 0
    path = out / default_path(environment("cuda")).name
    status = suite.main(["--device", "cuda", "--seconds", str(seconds), "--output", str(path), *options])
    emit(csv=path.name, rows_of_csv=len(read(path)), wrong=status != 0)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps, or what one of them does; returns the exit status, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--seconds", type=float, default=450, help="in all (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="tune Triton for this card first, and measure with that")
    parser.add_argument("--only", nargs="*", default=[], metavar="STEP", help="only steps whose names begin so")
    parser.add_argument("--skip", nargs="*", default=[], metavar="STEP", help="no steps whose names begin so")
    parser.add_argument("--no-build", action="store_true", help="take the modules as they are")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(argv)
    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device", file=sys.stderr)
        return 2
    out = options.out.resolve()
    if options.step:
        return run_step(options.step, out, options.seconds, rest)
    runner = Runner(out, options.seconds)
    listed = chosen(steps(out, options.seconds, options.tune, rest), options.only, options.skip)
    runner.run(listed, None if options.no_build else build())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
