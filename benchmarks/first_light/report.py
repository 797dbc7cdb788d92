"""The first minutes on a card, before the suite ran there: a section of RESULTS.md made from the lines of a JSON file.

The first line of a file ``results/*-first-light.jsonl`` has the date and the revision; every other line is one
measurement, as written on the card. Microseconds are medians; "graph" means replays of a CUDA graph after a cache
flush, "wall" eager calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import digits, table
from benchmarks.workloads import igva_mix

Line = dict[str, Any]

CUDA, TRITON, OVERLAPPED = "time-cuda", "time-triton", "time-fused"
LABELS = {
    TRITON: "igva_kernels, triton", CUDA: "igva_kernels, cuda",
    OVERLAPPED: "igva_kernels, cuda, the GEMM that overlaps",
}  # fmt: skip
TRAINED = {"train-triton": LABELS[TRITON], "train-cuda": LABELS[CUDA], "train-fused": LABELS[OVERLAPPED]}
COMPILED = {
    "plain torch, as additions, torch.compile": ("compile", "additions"),
    "plain torch, as published, torch.compile": ("compile", "published"),
    "plain torch, as additions, torch.compile, max-autotune": ("compile-max-autotune", "additions"),
}
"""By label: the step, and the form that it compiles."""


def sections(folder: Path) -> Iterator[str]:
    """Lines of markdown, one section per file."""
    for path in sorted(folder.glob("*-first-light.jsonl")):
        yield from section([json.loads(line) for line in path.read_text().splitlines()])


def section(lines: Sequence[Line]) -> Iterator[str]:
    """The section of one card; what was not measured is left out."""
    run, env = _all(lines, step="run")[0], _all(lines, step="env")[0]
    name = env["name"]
    yield f"## {name}, first light of {run['date']}\n"
    yield (
        f"Driver {env['smi'].split(',')[0]}, Python {env['python']}, torch {env['torch']}, Triton {env['triton']}, "
        f"{run['date']}, revision {run['revision']}; before the suite ran there, by a script of its own. The block at "
        f"CLIP-L/336 and H 4096 in bf16; medians in us, replays of a CUDA graph / eager calls by the clock.\n"
    )
    for finding in (_checked, _sped_up, _overlapped, _compiled, _tested):
        for told in finding(lines):
            yield f"* {told}"
    yield ""
    for title, part in PARTS.items():
        found = list(part(lines))
        if found:
            yield f"### {title}, {name}, {run['date']}\n"
            yield from found


def _checked(lines: Sequence[Line]) -> Iterator[str]:
    checks = [line for line in lines if "share_of_allowance" in line]
    if checks:  # if there are none, the card had run the GPU tests instead
        kept, same = (sum(line.get(name, False) for line in checks) for name in ("ok", "same_bits"))
        worst = max(line["share_of_allowance"] for line in checks)
        wrong = sum(line["wrong"] for line in lines if isinstance(line.get("wrong"), int))
        yield (
            f"{kept} of {len(checks)} checks of output and gradients kept the error rule (the worst took {worst:.2f} "
            f"of what it allows), {same} gave the same bits twice; of the replays on changed inputs {wrong} differed "
            f"from an eager call."
        )


def _sped_up(lines: Sequence[Line]) -> Iterator[str]:
    plain, cuda = _by_b(lines, step="plain", form="published"), _by_b(lines, step=CUDA)
    gains = [plain[b]["graph_us"] / cuda[b]["mlp_us"] for b in cuda if b in plain]
    copy = _all(lines, step="ceilings", what="copy")
    if gains and copy:
        most = max(cuda)
        rate = _gbps(most, cuda[most]["mix_us"])
        yield (
            f"In replays the cuda backend (its mix, cuBLAS, GELU) is {min(gains):.2f} to {max(gains):.2f} times as "
            f"fast as plain torch as published. At B {most} the mix moves {rate:.0f} GB/s; a copy "
            f"{copy[0]['gbps']:.0f}."
        )


def _overlapped(lines: Sequence[Line]) -> Iterator[str]:
    cuda = _by_b(lines, step=CUDA)
    costs = [
        line[what] / cuda[b][what]
        for b, line in _by_b(lines, step=OVERLAPPED).items() if b in cuda for what in ("linear_us", "mlp_us")
    ]  # fmt: skip
    if costs:
        yield (
            f"The GEMM that overlaps with the mix takes {min(costs):.2f} to {max(costs):.2f} times as long as the mix "
            f"kernel and cuBLAS."
        )


def _compiled(lines: Sequence[Line]) -> Iterator[str]:
    compiled, cuda = _all(lines, step="compile")[:1], _by_b(lines, step=CUDA)
    plain, triton = _by_b(lines, step="plain", form="published"), _by_b(lines, step=TRITON)
    least = min(cuda, default=0)
    if compiled and compiled[0]["B"] in cuda and least in plain and least in triton:
        b = compiled[0]["B"]
        yield (
            f"Additions under torch.compile take {compiled[0]['graph_us']:.0f} us at B {b}, the cuda backend "
            f"{cuda[b]['mlp_us']:.0f}. At B {least} the CPU bounds an eager call: plain torch takes "
            f"{plain[least]['wall_us']:.0f} us, cuda {cuda[least]['mlp_wall_us']:.0f}, triton "
            f"{triton[least]['mlp_wall_us']:.0f}."
        )


def _tested(lines: Sequence[Line]) -> Iterator[str]:
    for step, called in (("tests", "tests on the GPU"), ("tests-large", "of large memory")):
        counts = [line for line in _all(lines, step=step) if "passed" in line]
        if counts:
            last = counts[-1]
            ended = "" if "pytest" in last else ", before the time was over"
            yield f"{called}: {last['passed']} passed, {last['failed']} failed, {last['skipped']} skipped{ended}."


def _forward(lines: Sequence[Line]) -> Iterator[str]:
    rows = {
        "plain torch, as published": _times(_all(lines, step="plain", form="published"), "graph_us", "wall_us"),
        "plain torch, as additions": _times(_all(lines, step="plain", form="additions"), "graph_us", "wall_us"),
        **{
            label: _times(_of_form(_all(lines, step=step), form), "graph_us", "wall_us")
            for label, (step, form) in COMPILED.items()
        },
        **{label: _times(_all(lines, step=step), "mlp_us", "mlp_wall_us") for step, label in LABELS.items()},
        "bare matrix products (floor)": _times(_all(lines, what="two bare GEMMs"), "us"),
    }
    yield from _by_batch(rows)


def _mix(lines: Sequence[Line]) -> Iterator[str]:
    def rated(found: Sequence[Line]) -> dict[int, str]:
        return {
            line["B"]: f"{digits(line['mix_us'])} ({_gbps(line['B'], line['mix_us']):.0f} GB/s)"
            for line in found if line.get("mix_us")
        }  # fmt: skip

    yield from _by_batch({
        "plain torch, as published": rated(_all(lines, step="plain", form="published")),
        "plain torch, as additions": rated(_all(lines, step="plain", form="additions")),
        **{LABELS[step]: rated(_all(lines, step=step)) for step in (TRITON, CUDA)},
    })  # fmt: skip


def _training(lines: Sequence[Line]) -> Iterator[str]:
    found = []
    plain: dict[int, Line] = {}
    for line in lines:
        if "peak_mib" not in line or "wall_us" not in line:
            continue
        if line["provider"] == "plain":  # the others follow the plain one that was measured with them
            plain[line["B"]] = line
        elif line["B"] in plain:
            found.append((plain[line["B"]], line))
    heads = ("", "B", "plain", "fused", "speed-up", "peak MiB, plain / fused")
    rows = [
        (TRAINED[ours["provider"]], str(ours["B"]), f"{digits(theirs['wall_us'])} us",
         f"**{digits(ours['wall_us'])} us**", f"{theirs['wall_us'] / ours['wall_us']:.2f}",
         f"{theirs['peak_mib']} / {ours['peak_mib']}")
        for theirs, ours in found
    ]  # fmt: skip
    return _some(heads, rows)


def _features(lines: Sequence[Line]) -> Iterator[str]:
    """Deformable attention and injection."""
    clocks = ("graph_us", "events_us", "wall_us")
    rows = [
        (line["step"].split("-")[0], line["provider"], line.get("dtype", ""), str(line.get("B", "")), line["mode"],
         *("" if line.get(clock) is None else digits(line[clock]) for clock in clocks))
        for line in lines if line["step"].startswith(("deform-", "inject-")) and "mode" in line
    ]  # fmt: skip
    return _some(("", "provider", "dtype", "B", "", "replays, us", "eager, us", "by the clock, us"), rows)


def _parts(lines: Sequence[Line]) -> Iterator[str]:
    """The overlapped GEMM with parts left out."""
    by_part: dict[str, dict[int, list[str]]] = {}
    for overlapped in (True, False):
        for line in lines:
            if line.get("overlapped") is overlapped and line.get("us") is not None:
                by_part.setdefault(line["part"], {}).setdefault(line["B"], []).append(digits(line["us"]))
    cells = {part: {b: " / ".join(found) for b, found in by_b.items()} for part, by_b in by_part.items()}
    return _by_batch(cells)


def _counters(lines: Sequence[Line]) -> Iterator[str]:
    """Hardware counters by kernel."""
    shown = {"dram_pct": "memory, %", "issue_pct": "issue, %", "tensor_pct": "tensor, %", "occupancy_pct": "warps, %"}
    rows = [
        (line["target"], f"`{line['kernel'][:60]}`", digits(line["ns"] / 1e3),
         *("" if line.get(name) is None else digits(line[name]) for name in shown), _stalls(line))
        for line in lines if "kernel" in line and "ns" in line
    ]  # fmt: skip
    return _some(("", "kernel", "us", *shown.values(), "waits for memory / barriers, %"), rows)


def _stalls(line: Line) -> str:
    """The share of a warp's time in which it waits for memory, and for a barrier."""
    whole = line.get("warp_cycles_per_issue")
    parts = [line.get(f"{name}_per_issue") for name in ("long_scoreboard", "barrier")]
    return "" if not whole or None in parts else " / ".join(digits(100 * (part or 0.0) / whole) for part in parts)


def _some(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    return table(heads, rows) if rows else iter(())


def _times(found: Sequence[Line], *names: str) -> dict[int, str]:
    """By batch size; figures that are missing are left out."""
    return {line["B"]: " / ".join(digits(line[name]) for name in names if line.get(name) is not None) for line in found}


def _by_batch(rows: dict[str, dict[int, str]]) -> Iterator[str]:
    batches = sorted({b for cells in rows.values() for b in cells})
    lines = [(label, *(cells.get(b, "") for b in batches)) for label, cells in rows.items() if cells]
    return _some(("", *(f"B {b}" for b in batches)), lines)


def _gbps(batch: int, us: float) -> float:
    moved = igva_mix(batch, "bf16").num_bytes
    assert moved is not None
    return moved / us / 1e3


def _all(lines: Sequence[Line], **wanted: Any) -> list[Line]:
    """Measurements with these fields, without the lines that have a step's exit status."""
    return [line for line in lines if "status" not in line and wanted.items() <= line.items()]


def _of_form(lines: Sequence[Line], form: str) -> list[Line]:
    """Those of a form of plain torch; older files have but one, and do not name it."""
    return [line for line in lines if line.get("form", "additions") == form]


def _by_b(lines: Sequence[Line], **wanted: Any) -> dict[int, Line]:
    """Of those, the ones whose figures could all be had, by batch size."""
    return {line["B"]: line for line in _all(lines, **wanted) if "errors" not in line}


PARTS: dict[str, Callable[[Sequence[Line]], Iterator[str]]] = {
    "Forward": _forward, "Its mix alone, replays": _mix, "Forward and backward, eager": _training,
    "The overlapped GEMM with parts left out, beside the mix kernel and cuBLAS": _parts,
    "Deformable attention and injection": _features, "Hardware counters": _counters,
}  # fmt: skip
