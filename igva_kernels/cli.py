"""The command ``igva-kernels``.

``info`` and ``verify`` need only torch and the standard library, so that they work even if other packages are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from igva_kernels.registry import all_backends
from igva_kernels.verify import DTYPES, is_slow
from igva_kernels.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.run is _bench:
        args.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("igva-kernels", description="Fused multi-layer visual feature fusion.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="print versions, CPU, GPUs, what was built, and each backend or why not")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    verify = commands.add_parser("verify", help="judge every backend that can run here against fp64")
    verify.add_argument("--backend", action="append", choices=tuple(all_backends()), help="only this one (repeatable)")
    verify.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="only this one (repeatable)")
    verify.add_argument("--quick", action="store_true", help="leave out the shapes of real models")
    verify.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the inputs (default: %(default)s)")
    verify.add_argument("--verbose", action="store_true", help="print every result, not only the worst of each case")
    verify.set_defaults(run=_verify)

    demo = commands.add_parser("demo", help="ask a LLaVA-IGVA model about an image, plain and fused")
    demo.add_argument("--image", type=Path, metavar="FILE", help="a photograph (default: a cup of coffee)")
    demo.add_argument("--ask", action="append", metavar="TEXT", help="an instruction (repeatable)")
    demo.add_argument("--model", metavar="DIR", help="a LLaVA-IGVA checkpoint (default: random weights)")
    demo.add_argument("--output", type=Path, metavar="DIR", default=Path("demo_output"), help="default: %(default)s")
    demo.add_argument("--steps", type=int, metavar="N", help="training steps (default: 4, none with --model)")
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
        "--config", type=json.loads, metavar="JSON", help="for a LLaVA patched with a plan: fields of LlavaIgvaConfig"
    )
    convert.set_defaults(run=_convert)

    bench = commands.add_parser("bench", add_help=False, help="run the benchmark suite of a checkout; see bench --help")
    bench.set_defaults(run=_bench)
    return parser


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
        print(error, file=sys.stderr)
        return 2
    if not cases:
        print(
            "nothing to judge: no kernel backend can run here, or none of those that were asked for serves a case in "
            "these dtypes; see igva-kernels info",
            file=sys.stderr,
        )
        return 2
    slow = [dtype for dtype in DTYPES if "cpu" in devices and is_slow(dtype, "cpu")]
    if slow and not args.dtype and not args.quick:
        print(f"\nleft out: {' and '.join(slow)} at real shapes, where plain torch needs minutes per case on this CPU; "
              f"--dtype includes it")  # fmt: skip
    print(f"\n{cases - failed} of {cases} within the rule" + ("" if args.verbose else "; the worst result of each"))
    return 1 if failed else 0


def _demo(args: argparse.Namespace) -> int:
    if args.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything it needs is installed
    print("importing torch and transformers ...", flush=True)  # 10 seconds and more where nothing is cached
    try:
        from igva_kernels.demo import run
    except ModuleNotFoundError as error:
        print(f"the demo needs {error.name}: pip install 'igva-kernels[demo]'", file=sys.stderr)
        return 2
    return run(args.image, args.ask, args.model, args.output, args.steps)


def _bench(args: argparse.Namespace) -> int:
    """Hands over to ``python -m benchmarks``, which is part of a checkout and not of the package."""
    checkout = Path(__file__).parent.parent
    if not (checkout / "benchmarks" / "__main__.py").exists():
        print(
            f"igva-kernels bench: no benchmarks beside {Path(__file__).parent}; they are not installed with the "
            "package. Get the sources, and run there: pip install -e '.[bench]'",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(checkout))
    try:
        from benchmarks.__main__ import main as bench
    except ModuleNotFoundError as error:
        print(f"the benchmarks need {error.name}: pip install -e '.[bench]'", file=sys.stderr)
        return 2
    return bench(args.rest)


def _tune(args: argparse.Namespace) -> int:
    reason = all_backends()["triton"].why_not(torch.device("cuda"), torch.bfloat16)
    if reason is not None:
        print(f"igva-kernels tune: {reason}", file=sys.stderr)
        return 1
    from igva_kernels.tune import tune

    path, _ = tune(output=args.output, log=print)
    print(f"written: {path}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    try:
        from igva_kernels.models.llava_igva.convert import convert
    except ModuleNotFoundError as error:
        print(f"convert needs {error.name}: pip install 'igva-kernels[models]'", file=sys.stderr)
        return 2
    try:
        model = convert(args.source, args.target, args.vision_tower, args.config)
    except (OSError, ValueError) as error:
        print(f"igva-kernels convert: {error}", file=sys.stderr)
        return 1
    layout = json.loads((args.target / "config.json").read_text())["model_type"]
    print(f"written: {args.target}, a {type(model).__name__} in the layout of {layout!r}")
    return 0
