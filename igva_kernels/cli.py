"""The command ``igva-kernels``.

``info`` and ``verify`` need only torch and the standard library, so that they work even if other packages are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from igva_kernels.registry import all_backends
from igva_kernels.runtime.errors import UserError
from igva_kernels.verify import DTYPES, is_slow
from igva_kernels.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    What the user can mend is told in one line on stderr, and the status is 2, as for wrong arguments: a ``UserError``
    or an ``OSError``. Any other exception is a fault of the package and keeps its traceback. A reader of the output
    that goes away and Ctrl-C end the command quietly, with a shell's statuses for these signals, 141 and 130.
    """
    parser = _parser()
    command = parser.prog
    try:
        try:
            args, rest = parser.parse_known_args(argv)
            command = f"{parser.prog} {args.command}"
            if args.run is _bench:
                args.rest = rest
            elif rest:
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            return args.run(args)
        finally:
            _flush()
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (UserError, OSError) as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _flush() -> None:
    """Writes what is buffered here, where a failure is caught, and not at exit; what cannot be written is dropped."""
    if sys.stdout is None:  # it was closed before Python began
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("igva-kernels", description="Fused multi-layer visual feature fusion.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    info = commands.add_parser("info", help="print versions, CPU, GPUs, what was built, and each backend or why not")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    verify = commands.add_parser("verify", help="judge every backend that can run here against fp64")
    verify.add_argument("--backend", action="append", choices=tuple(all_backends()), help="only this one (repeatable)")
    verify.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="only this one (repeatable)")
    verify.add_argument("--quick", action="store_true", help="leave out the shapes of real models")
    verify.add_argument(
        "--seed", type=_whole(2**32), default=0, metavar="N", help="seed of the inputs (default: %(default)s)"
    )
    verify.add_argument("--verbose", action="store_true", help="print every result, not only the worst of each case")
    verify.set_defaults(run=_verify)

    demo = commands.add_parser("demo", help="ask a LLaVA-IGVA model about an image, plain and fused")
    demo.add_argument("--image", type=Path, metavar="FILE", help="a photograph (default: a cup of coffee)")
    demo.add_argument("--ask", action="append", metavar="TEXT", help="an instruction (repeatable)")
    demo.add_argument("--model", metavar="DIR", help="a LLaVA-IGVA checkpoint (default: random weights)")
    demo.add_argument("--output", type=Path, metavar="DIR", default=Path("demo_output"), help="default: %(default)s")
    demo.add_argument("--steps", type=_whole(10**6), metavar="N", help="training steps (default: 4, none with --model)")
    demo.set_defaults(run=_demo)

    tune = commands.add_parser("tune", help="measure the kernels on this GPU and remember which are the fastest")
    tune.add_argument("--output", type=Path, metavar="FILE", help="default: where the backends look for it")
    tune.set_defaults(run=_tune)

    convert = commands.add_parser(
        "convert", help="convert a checkpoint of the IGVA or LLaVA repository to transformers' layout, or back"
    )
    convert.add_argument("source", type=Path, metavar="SRC", help="a directory; its layout decides the direction")
    convert.add_argument("target", type=Path, metavar="DST", help="a new directory")
    convert.add_argument(
        "--vision-tower", metavar="DIR", help="the tower's checkpoint, in place of the one that SRC names"
    )
    convert.add_argument(
        "--config", type=_json_object, metavar="JSON",
        help="fields of LlavaIgvaConfig in place of what SRC says, such as '{\"mix_groups\": 4}' for a LLaVA that was "
        "patched with a plan which its config does not record",
    )  # fmt: skip
    convert.set_defaults(run=_convert)

    bench = commands.add_parser("bench", add_help=False, help="run the benchmark suite of a checkout; see bench --help")
    bench.set_defaults(run=_bench)
    return parser


def _whole(limit: int) -> Callable[[str], int]:
    """The type of an argument: a whole number from 0 to below ``limit``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) >= limit:
            raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number from 0 to {limit - 1}")
        return int(text)

    return number


def _json_object(text: str) -> dict[str, Any]:
    """The type of an argument: an object in JSON."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, which is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise argparse.ArgumentTypeError(f"got {text!r}, need a JSON object, such as '{{\"mix_groups\": 4}}'")
    return data


@contextmanager
def _needs(requirement: str) -> Iterator[None]:
    """Says what to install where another package, or a version of it that has what is imported, is missing."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] == "igva_kernels":
            raise
        raise UserError(f"{error}; pip install {requirement}") from error


def _check_writable(directory: Path) -> None:
    """Fails before the work is done where its result could not be written; leaves nothing behind."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from error


def _info(args: argparse.Namespace) -> int:
    from igva_kernels import info

    report = info.collect()
    print(json.dumps(report, indent=2) if args.json else info.render(report))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from igva_kernels.verify import verify

    line = "{:34} {:5} {:14} {:22} {:>9} {:>9} {:>9}  {}"
    print("relative error against fp64; a result is right up to its budget, 2 x plain torch's error + eps/2\n")
    print(line.format("case", "dtype", "backend", "result", "error", "plain", "budget", ""))
    cases = failed = 0
    devices = set()
    try:
        for row in verify(args.backend or (), args.dtype or (), args.quick, args.seed):
            cases += 1
            failed += not row.ok
            devices.add(row.device)
            for verdict in row.verdicts if args.verbose else [row.worst]:
                numbers = (f"{x:.2e}" for x in (verdict.error, verdict.plain, verdict.budget))
                backend, answer = f"{row.backend} on {row.device}", "ok" if verdict.ok else "WRONG"
                if verdict.worst_entry > 1:
                    answer += f": an entry is off by {verdict.worst_entry:.2g} x what is allowed"
                print(line.format(row.case, row.dtype, backend, verdict.name, *numbers, answer), flush=True)
    except NotImplementedError as error:
        raise UserError(str(error)) from error
    if not cases:
        raise UserError(
            "nothing to judge: no kernel backend can run here, or none of those that were asked for serves a case in "
            "these dtypes; see igva-kernels info"
        )
    slow = [dtype for dtype in DTYPES if "cpu" in devices and is_slow(dtype, "cpu")]
    if slow and not args.dtype and not args.quick:
        print(f"\nleft out: {' and '.join(slow)} at real shapes, where plain torch needs minutes per case on this CPU; "
              f"--dtype includes it")  # fmt: skip
    print(f"\n{cases - failed} of {cases} within the rule" + ("" if args.verbose else "; the worst result of each"))
    return 1 if failed else 0


def _demo(args: argparse.Namespace) -> int:
    if args.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything it needs is installed
    _check_writable(args.output)
    print("importing torch and transformers ...", flush=True)  # 10 seconds and more where nothing is cached
    with _needs("'igva-kernels[demo]'"):
        from igva_kernels.demo import run
    return run(args.image, args.ask, args.model, args.output, args.steps)


def _bench(args: argparse.Namespace) -> int:
    """Hands over to ``python -m benchmarks``, which is part of a checkout and not of the package."""
    checkout = Path(__file__).parent.parent
    if not (checkout / "benchmarks" / "__main__.py").exists():
        raise UserError(
            f"no benchmarks beside {Path(__file__).parent}; they are not installed with the package. Get the sources, "
            f"and run there: pip install -e '.[bench]'"
        )
    sys.path.insert(0, str(checkout))
    with _needs("-e '.[bench]'"):
        from benchmarks.__main__ import main as bench
    return bench(args.rest)


def _tune(args: argparse.Namespace) -> int:
    reason = all_backends()["triton"].why_not(torch.device("cuda"), torch.bfloat16)
    if reason is not None:
        raise UserError(reason)
    from igva_kernels.runtime import config
    from igva_kernels.tune import tune

    if args.output is not None and args.output.is_dir():
        raise UserError(f"--output: got the directory {args.output}, need a file")
    _check_writable(config.tuned_dir() if args.output is None else args.output.parent)
    path, _ = tune(output=args.output, log=print)
    print(f"written: {path}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    with _needs("'igva-kernels[models]'"):
        from igva_kernels.models.llava_igva.convert import convert
    _check_writable(args.target)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"igva-kernels convert: {message}", file=sys.stderr)
        model = convert(args.source, args.target, args.vision_tower, args.config)
    layout = json.loads((args.target / "config.json").read_text())["model_type"]
    print(f"written: {args.target}, a {type(model).__name__} in the layout of {layout!r}")
    return 0
