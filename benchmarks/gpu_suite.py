"""Everything on one GPU in one go, within eight minutes: its tests, the memory checker, then the benchmark suite.

    python -m benchmarks.gpu_suite [--seconds 450] [--skip-checks] [--tune] [options of python -m benchmarks]

Nothing is measured if a check fails, but a failed test does not stop the other tests, so that one run shows all that is
wrong. What no longer fits the time is left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import torch

from benchmarks import __main__ as suite
from benchmarks.measure import ROOT
from benchmarks.providers import kernels
from benchmarks.results import RESULTS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks and the suite; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450, help="in all (default: %(default)s)")
    parser.add_argument("--skip-checks", action="store_true", help="for use after a run that passed them")
    parser.add_argument("--tune", action="store_true", help="tune Triton for this card first, and measure with that")
    options, rest = parser.parse_known_args(argv)
    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    if not options.skip_checks:
        status = check(kernels("cuda", torch.bfloat16), deadline - options.seconds / 2)
        if status:
            return status
    if options.tune:
        from igva_kernels.tune import tune

        os.environ["IGVA_KERNELS_CONFIG_DIR"] = str(RESULTS)
        tune(log=print)
    left = str(max(deadline - time.monotonic(), 1.0))
    return suite.main(["--device", "cuda", "--seconds", left, "--plots", *rest])


def check(backends: Sequence[str], deadline: float) -> int:
    """Runs all tests of the backends, then compute-sanitizer on small shapes if it is installed; the exit status.

    Tests that outlast ``deadline``, a time of ``time.monotonic``, fail; runs of the sanitizer that do are left out.
    """
    folder = ROOT / "tests" / "ops"
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    # Most of the time goes into compiling, which several processes share.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    paths = (str(ROOT), str(ROOT / "tests" / "helpers"))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    status = run([*tests, *workers, str(folder)], environment, deadline)
    if status is None:
        print("out of time, nothing measured", file=sys.stderr)
    if status != 0:
        return 2 if status is None else status
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer: not on this machine, left out")
        return 0
    # Torch's cache would hide an access beyond a tensor but within its block.
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    few = "triton and ((values and obey and odd and bf16) or (allocator_obeys and 17-16))"
    script = [sys.executable, str(folder / "weighted_mix" / "test_cuda_gpu.py")]
    small = {
        "triton": [("memcheck", [*tests, str(folder), "-k", few])],
        "cuda": [(tool, script) for tool in ("memcheck", "racecheck")],
    }
    for backend in backends:
        for tool, command in small[backend]:
            status = run([sanitizer, "--tool", tool, "--error-exitcode", "1", *command], environment, deadline)
            if status is None:
                print(f"out of time, left out: {tool} of {backend}", file=sys.stderr)
            elif status:
                return status
    return 0


def run(command: Sequence[str], environment: Mapping[str, str], deadline: float) -> int | None:
    """The exit status of a command; None if it still ran at ``deadline`` and was killed with all that it started."""
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(max(deadline - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


if __name__ == "__main__":
    raise SystemExit(main())
