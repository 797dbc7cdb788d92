"""What the Makefile's targets print: what happens now, how large it is, and at the end how long each step took.

    steps.py run "tests" -- pytest tests                    a command, timed
    steps.py install .venv-test test ...                    a virtual environment, announced before it is filled
    steps.py layer .venv-oldest .venv-test ...              one that differs from another in some packages
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

LARGE = re.compile(r"\s*(?:Downloading|Using cached) .*?([^/\s]+) \(([\d.]+ [MG]B)\)$")
WORTH_A_LINE = re.compile(r"\s*(?:Building \S+ for |Installing collected)")


def say(text: str) -> None:
    print(text, flush=True)


def run(what: str, command: Sequence[str]) -> None:
    """Runs a command and remembers how long it took; ends this process if it fails."""
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
    # A call of make is identified by the time at which it started.
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


def install(folder: Path, extra: str, editable: bool, sizes: tuple[int, int]) -> None:
    """Fills a virtual environment: the kernels first, as their build is what may fail, then what they need.

    Args:
        folder: of the environment.
        extra: of igva-kernels, which is installed from the source tree.
        editable: install the source tree as it lies.
        sizes: MB to download and MB on disk, as measured on Linux x86-64 with torch for CPUs.
    """
    if (folder / "installed").exists():
        say(f"==> {folder}: brought up to date, because something that it was made from has changed")
    else:
        announce(folder, sizes)
    make(folder)
    quiet = "a quiet minute" if os.environ.get("IGVA_KERNELS_SKIP_CUDA") == "1" else "quiet minutes, if nvcc is there"
    say(f"==> compiling the kernels (40 MB of cmake and ninja, then {quiet})")
    source = ["-e", str(ROOT)] if editable else [str(ROOT)]
    timed(f"{folder.name}, kernels", lambda: run_pip(folder, "--no-deps", *source))
    say("==> packages")
    packages = ["-c", str(ROOT / "constraints.txt"), f"igva-kernels[{extra}]"]
    timed(f"{folder.name}, packages", lambda: run_pip(folder, *packages))
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    say(f"    {folder} takes {size / 1e9:.1f} GB")


def layer(
    folder: Path, base: Path, packages: Sequence[str], free: Sequence[str], bare: Sequence[str], megabytes: int
) -> None:
    """Makes a virtual environment that has all of another one, and further packages, or some in other versions.

    Args:
        folder: of the new environment.
        base: the environment below, which is read and not changed.
        packages: requirements that win over those of the base.
        free: packages whose versions constraints.txt does not fix here.
        bare: packages that are installed without what they require.
        megabytes: on disk, as measured.
    """
    say(f"==> {folder}: {base} with {', '.join([*packages, *bare])}; about {megabytes} MB on disk")
    make(folder, "--clear", "--without-pip")  # the base has pip
    below, own = (site_packages(environment) for environment in (base, folder))
    # addsitedir and not a bare path, because the editable installation is a .pth file itself.
    (own / "base.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in lines if re.split("[=<>;]", line)[0] not in free) + "\n")
    pinned = ("-c", str(constraints))
    timed(f"{folder.name}, packages", lambda: run_pip(folder, *pinned, *packages))
    if bare:
        timed(f"{folder.name}, bare packages", lambda: run_pip(folder, "--no-deps", *pinned, *bare))


def make(folder: Path, *options: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", *options, str(folder)], check=True)


def site_packages(folder: Path) -> Path:
    command = [str(folder / "bin" / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.check_output(command, text=True).strip())


def announce(folder: Path, sizes: tuple[int, int]) -> None:
    """Says what is to come, before the first minute without output."""
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
    """Whether a variable or a configuration file tells pip of the index of torch's CPU builds."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    return "/whl/cpu" in told


def run_pip(folder: Path, *arguments: str) -> int:
    """``pip install``, with its own progress bars in a terminal; elsewhere each large package has a line.

    If it fails, the end of its output is shown.
    """
    command = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    if sys.stdout.isatty():
        return subprocess.run(command).returncode
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=100)
    for line in process.stdout:
        last.append(line)
        if found := LARGE.match(line):
            say(f"    {found[1]} ({found[2]})")
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
    whole = commands.add_parser("install")
    whole.add_argument("folder", type=Path)
    whole.add_argument("extra")
    whole.add_argument("--editable", action="store_true")
    whole.add_argument("--megabytes", type=int, nargs=2, required=True, metavar=("DOWNLOAD", "DISK"))
    other = commands.add_parser("layer")
    other.add_argument("folder", type=Path)
    other.add_argument("base", type=Path)
    other.add_argument("packages", nargs="+")
    other.add_argument("--free", nargs="+", default=[])
    other.add_argument("--bare", nargs="+", default=[])
    other.add_argument("--megabytes", type=int, default=150)
    commands.add_parser("summary")
    args = parser.parse_args()
    if args.command == "run":
        run(args.what, args.words[1:] if args.words[:1] == ["--"] else args.words)
    elif args.command == "install":
        install(args.folder, args.extra, args.editable, tuple(args.megabytes))
    elif args.command == "layer":
        layer(args.folder, args.base, args.packages, args.free, args.bare, args.megabytes)
    else:
        summary()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
