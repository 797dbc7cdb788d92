"""Everything on one GPU in one go, within eight minutes: its tests, the memory checker, then the benchmark suite.

    python -m benchmarks.gpu_suite [--seconds 450] [--skip-checks] [--tune] [options of python -m benchmarks]

Nothing is measured if a check fails. What no longer fits the time is left out, and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks import __main__ as suite
from benchmarks.measure import ROOT
from benchmarks.providers import kernels
from benchmarks.results import RESULTS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks and the suite; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450, help="for everything (default: %(default)s)")
    parser.add_argument("--skip-checks", action="store_true", help="after a run that passed them")
    parser.add_argument("--tune", action="store_true", help="tune Triton for this card first, and measure with that")
    options, rest = parser.parse_known_args(argv)
    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    if not options.skip_checks:
        for backend in kernels("cuda", torch.bfloat16):
            status = check(backend, deadline - options.seconds / 2)
            if status:
                return status
    if options.tune:
        from igva_kernels.backends.triton.config import file_name
        from igva_kernels.backends.triton.tune import tune

        tune(output=RESULTS / file_name(torch.cuda.get_device_name()), log=print)
        os.environ["IGVA_KERNELS_CONFIG_DIR"] = str(RESULTS)
    left = str(max(deadline - time.monotonic(), 1.0))
    return suite.main(["--device", "cuda", "--seconds", left, "--plots", *rest])


def check(backend: str, deadline: float) -> int:
    """The tests of a backend, and compute-sanitizer on small shapes where the tool is there; their exit status."""
    file = ROOT / "tests" / f"test_{backend}_gpu.py"
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", str(file)]
    # Most of the time goes into compiling, which several processes share.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    paths = dict(os.environ, PYTHONPATH=str(ROOT))
    runs = [([*tests, *workers], paths)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer: not on this machine, left out")
    else:
        # Torch's cache would hide an access beyond a tensor but within its block.
        uncached = paths | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        small = {
            "triton": [("memcheck", [*tests, "-k", "obey and odd and bf16"])],
            "cuda": [(tool, [sys.executable, str(file)]) for tool in ("memcheck", "racecheck")],
        }
        runs += [([sanitizer, "--tool", tool, "--error-exitcode", "1", *run], uncached) for tool, run in small[backend]]
    for command, environment in runs:
        try:
            seconds = max(deadline - time.monotonic(), 1.0)
            status = subprocess.run(command, env=environment, cwd=ROOT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            print(f"out of time, nothing measured: {' '.join(command)}", file=sys.stderr)
            return 2
        if status:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
