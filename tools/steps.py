"""What the Makefile's targets print: what happens now, how large it is, and in the end how long each step took.

    steps.py run "tests" -- pytest tests                    a command, timed
    steps.py install .venv-test "igva-kernels[test]" ...    a virtual environment, announced before it is filled
    steps.py summary                                        the steps of this call of make

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = ROOT / "build" / "steps.txt"
CPU_TORCH = "https://download.pytorch.org/whl/cpu"

DOWNLOAD = re.compile(r"\s*(?:Downloading|Using cached|Processing) .*?([^/\s]+\.(?:whl|tar\.gz))(?: \(([^)]+)\))?$")
WORTH_A_LINE = re.compile(r"\s*(?:WARNING|ERROR|error|Building \S+ for |Installing collected)")


def say(text: str) -> None:
    print(text, flush=True)


def run(what: str, command: Sequence[str]) -> None:
    """Runs a command and remembers how long it took; ends this process where it fails."""
    say(f"==> {what}")
    timed(what, lambda: subprocess.run(command).returncode)


def timed(what: str, call: Callable[[], int]) -> None:
    start = time.monotonic()
    status = call()
    seconds = time.monotonic() - start
    say(f"<== {what}: {'FAILED after ' if status else ''}{duration(seconds)}")
    if status:
        summary()
        sys.exit(status)
    # A call of make is known by when it started.
    lines = [line for line in known_times() if line.startswith(f"{started()} ")]
    TIMES.parent.mkdir(exist_ok=True)
    TIMES.write_text("\n".join([*lines, f"{started()} {seconds:.0f} {what}"]) + "\n")


def summary() -> None:
    """Says how long each step of this call of make took."""
    steps = [line.split(" ", 2)[1:] for line in known_times() if line.startswith(f"{started()} ")]
    if steps:
        say("time: " + ", ".join(f"{what} {duration(float(seconds))}" for seconds, what in steps))


def known_times() -> list[str]:
    return TIMES.read_text().splitlines() if TIMES.exists() else []


def started() -> str:
    return os.environ.get("MAKE_STARTED", "0")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ---- virtual environments ----


def install(folder: Path, packages: Sequence[str], editable: bool, free: Sequence[str], sizes: tuple[int, int]) -> None:
    """Fills a virtual environment: the kernels first, which is where a build goes wrong, then what they need.

    Args:
        folder: of the environment.
        packages: requirements; igva-kernels itself is installed from the source tree, an extra of it names the rest.
        editable: install the source tree as it lies.
        free: names that constraints.txt does not hold to a version here.
        sizes: MB to download and MB on disk, as measured on Linux x86-64 with torch for CPUs.
    """
    announce(folder, sizes)
    python = str(folder / "bin" / "python")
    timed(f"{folder.name}, Python", lambda: subprocess.run([sys.executable, "-m", "venv", str(folder)]).returncode)
    constraints = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints.write_text("\n".join(line for line in lines if re.split("[=<>;]", line)[0] not in free) + "\n")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    say("==> compiling the kernels (40 MB of cmake and ninja, then a quiet minute)")
    timed(f"{folder.name}, kernels", lambda: run_pip([*pip, "--no-deps", *(["-e"] if editable else []), str(ROOT)]))
    say("==> packages")
    timed(f"{folder.name}, packages", lambda: run_pip([*pip, "-c", str(constraints), *packages]))
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    say(f"{folder.name}: {size / 1e6:.0f} MB on disk")


def announce(folder: Path, sizes: tuple[int, int]) -> None:
    """What comes, before the first minute in which nothing moves."""
    download, disk = sizes
    say(
        f"==> {folder}: an environment of its own, with torch, triton, transformers and what they need.\n"
        f"    About {download} MB to download, less what pip's cache has, and {disk / 1000:.1f} GB on disk;\n"
        f"    a few minutes. `make clean` removes it."
    )
    if platform.system() != "Linux" or torch_for_cpus():
        return
    if shutil.which("nvidia-smi"):
        say("    torch from PyPI adds about 3 GB of CUDA packages to that.")
    else:
        goal = os.environ.get("MAKE_GOAL") or "test"
        say(
            f"    torch from PyPI adds about 3 GB of CUDA packages. This machine has no NVIDIA GPU (no nvidia-smi):\n"
            f"    to leave them out, stop this (Ctrl-C) and run\n\n"
            f"        PIP_EXTRA_INDEX_URL={CPU_TORCH} make {goal}\n"
        )


def torch_for_cpus() -> bool:
    """Whether pip is told of the index of torch's CPU builds, by a variable or by a file of its own."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    return "/whl/cpu" in told


def run_pip(command: Sequence[str]) -> int:
    """pip with its own progress bars in a terminal; elsewhere a line a package, and all it said where it fails."""
    if sys.stdout.isatty():
        return subprocess.run(command).returncode
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=100)
    for line in process.stdout:
        last.append(line)
        if found := DOWNLOAD.match(line):
            say(f"    {found[1]}" + (f" ({found[2]})" if found[2] else ""))
        elif WORTH_A_LINE.match(line):
            say("    " + (line.strip() if len(line) < 120 else f"{line.strip()[:110]} ..."))
    if process.wait():
        say("".join(last))
    return process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("run")
    one.add_argument("what")
    one.add_argument("words", nargs=argparse.REMAINDER)
    environment = commands.add_parser("install")
    environment.add_argument("folder", type=Path)
    environment.add_argument("packages", nargs="+")
    environment.add_argument("--editable", action="store_true")
    environment.add_argument("--free", nargs="*", default=[])
    environment.add_argument("--megabytes", type=int, nargs=2, required=True, metavar=("DOWNLOAD", "DISK"))
    commands.add_parser("summary")
    args = parser.parse_args()
    if args.command == "run":
        run(args.what, args.words[1:] if args.words[:1] == ["--"] else args.words)
    elif args.command == "install":
        install(args.folder, args.packages, args.editable, args.free, tuple(args.megabytes))
    else:
        summary()


if __name__ == "__main__":
    main()
