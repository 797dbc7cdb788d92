"""The first minutes on a card, before the suite ran there: a section of RESULTS.md made from the lines of a JSON file.

The first line of a file ``results/*-first-light.jsonl`` has the date and the revision; every other line is one
measurement, as written on the card. Microseconds are medians; "graph" means replays of a CUDA graph after a cache
flush, "wall" eager calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import digits, table
from benchmarks.workloads import igva_mix

Line = dict[str, Any]

CUDA, TRITON, OVERLAPPED = "time-cuda", "time-triton", "time-fused"
LABELS = {
    TRITON: "igva_kernels, triton", CUDA: "igva_kernels, cuda",
    OVERLAPPED: "igva_kernels, cuda, overlapped GEMMs (off by default)",
}  # fmt: skip
TRAINED = {"train-triton": LABELS[TRITON], "train-fused": LABELS[OVERLAPPED]}


def sections(folder: Path) -> Iterator[str]:
    """Lines of markdown, one section per file."""
    for path in sorted(folder.glob("*-first-light.jsonl")):
        yield from section([json.loads(line) for line in path.read_text().splitlines()])


def section(lines: Sequence[Line]) -> Iterator[str]:
    """The section of one card."""
    run, env = _first(lines, step="run"), _first(lines, step="env")
    name = env["name"]
    yield f"## {name}, first light\n"
    yield (
        f"Driver {env['smi'].split(',')[0]}, Python {env['python']}, torch {env['torch']}, Triton {env['triton']}, "
        f"{run['date']}, revision {run['revision']}; before the suite ran there, by a script of its own. The block at "
        f"CLIP-L/336 and H 4096 in bf16; medians in us, replays of a CUDA graph / eager calls by the clock.\n"
    )
    yield from _findings(lines)
    yield f"### Forward, {name}\n"
    yield from _forward(lines)
    yield f"### Its mix alone, replays, {name}\n"
    yield from _mix(lines)
    yield f"### Forward and backward, eager, {name}\n"
    yield from _training(lines)


def _findings(lines: Sequence[Line]) -> Iterator[str]:
    checks = [line for line in lines if "share_of_allowance" in line]
    if checks:  # if there are none, the card had run the GPU tests instead
        kept, same = (sum(line[name] for line in checks) for name in ("ok", "same_bits"))
        worst = max(line["share_of_allowance"] for line in checks)
        wrong = sum(line["wrong"] for line in lines if "wrong" in line)
        yield (
            f"* {kept} of {len(checks)} checks of output and gradients kept the error rule (the worst took {worst:.2f} "
            f"of what it allows), {same} gave the same bits twice; of the replays on changed inputs {wrong} differed "
            f"from an eager call."
        )
    plain = {line["B"]: line for line in _all(lines, step="plain", form="published")}
    cuda = {line["B"]: line for line in _all(lines, step=CUDA)}
    gains = [plain[b]["graph_us"] / cuda[b]["mlp_us"] for b in cuda]
    most = max(cuda)
    rate = _gbps(most, cuda[most]["mix_us"])
    copy = _first(lines, step="ceilings", what="copy")["gbps"]
    yield (
        f"* In replays the cuda backend (its mix, cuBLAS, GELU) is {min(gains):.2f} to {max(gains):.2f} times as fast "
        f"as plain torch as published. At B {most} the mix moves {rate:.0f} GB/s; a copy {copy:.0f}."
    )
    costs = [
        line[what] / cuda[line["B"]][what] for line in _all(lines, step=OVERLAPPED) for what in ("linear_us", "mlp_us")
    ]  # fmt: skip
    yield (
        f"* The GEMM that overlaps with the mix takes {min(costs):.1f} to {max(costs):.1f} times as long. It is off "
        f"unless asked for."
    )
    compiled = _first(lines, step="compile")
    b = compiled["B"]
    least = min(cuda)
    triton = _first(lines, step=TRITON, B=least)
    yield (
        f"* Additions under torch.compile take {compiled['graph_us']:.0f} us at B {b}, the cuda backend "
        f"{cuda[b]['mlp_us']:.0f}. At B {least} the CPU bounds an eager call: plain torch takes "
        f"{plain[least]['wall_us']:.0f} us, cuda {cuda[least]['mlp_wall_us']:.0f}, triton "
        f"{triton['mlp_wall_us']:.0f}.\n"
    )


def _forward(lines: Sequence[Line]) -> Iterator[str]:
    rows = {
        "plain torch, as published": _times(_all(lines, step="plain", form="published"), "graph_us", "wall_us"),
        "plain torch, as additions": _times(_all(lines, step="plain", form="additions"), "graph_us", "wall_us"),
        "plain torch, as additions, torch.compile": _times(_all(lines, step="compile"), "graph_us", "wall_us"),
        **{label: _times(_all(lines, step=step), "mlp_us", "mlp_wall_us") for step, label in LABELS.items()},
        "bare matrix products (floor)": _times(_all(lines, what="two bare GEMMs"), "us"),
    }
    yield from _by_batch(rows)


def _mix(lines: Sequence[Line]) -> Iterator[str]:
    def rated(found: Sequence[Line]) -> dict[int, str]:
        return {
            line["B"]: f"{digits(line['mix_us'])} ({_gbps(line['B'], line['mix_us']):.0f} GB/s)" for line in found
        }  # fmt: skip

    yield from _by_batch({
        "plain torch, as published": rated(_all(lines, step="plain", form="published")),
        "plain torch, as additions": rated(_all(lines, step="plain", form="additions")),
        **{LABELS[step]: rated(_all(lines, step=step)) for step in (TRITON, CUDA)},
    })  # fmt: skip


def _training(lines: Sequence[Line]) -> Iterator[str]:
    found = _all(lines, step="training")
    pairs = zip(found[::2], found[1::2], strict=True)  # each follows the plain one that was measured with it
    yield from table(
        ("", "B", "plain", "fused", "speed-up", "peak MiB, plain / fused"),
        [
            (TRAINED[ours["provider"]], str(ours["B"]), f"{digits(plain['wall_us'])} us",
             f"**{digits(ours['wall_us'])} us**", f"{plain['wall_us'] / ours['wall_us']:.2f}",
             f"{plain['peak_mib']} / {ours['peak_mib']}")
            for plain, ours in pairs
        ],
    )  # fmt: skip


def _times(found: Sequence[Line], *names: str) -> dict[int, str]:
    return {line["B"]: " / ".join(digits(line[name]) for name in names) for line in found}


def _by_batch(rows: dict[str, dict[int, str]]) -> Iterator[str]:
    batches = sorted({b for cells in rows.values() for b in cells})
    yield from table(
        ("", *(f"B {b}" for b in batches)),
        [(label, *(cells.get(b, "") for b in batches)) for label, cells in rows.items()],
    )


def _gbps(batch: int, us: float) -> float:
    moved = igva_mix(batch, "bf16").num_bytes
    assert moved is not None
    return moved / us / 1e3


def _all(lines: Sequence[Line], **wanted: Any) -> list[Line]:
    """Measurements with these fields, without the lines that have a step's exit status."""
    return [line for line in lines if "status" not in line and wanted.items() <= line.items()]


def _first(lines: Sequence[Line], **wanted: Any) -> Line:
    return _all(lines, **wanted)[0]
