"""RESULTS.md, the tables in README.md and the pictures: all made from the files in results/, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks import plots, scaling
from benchmarks.device import slug
from benchmarks.first_light import report as first_light
from benchmarks.markdown import digits, table
from benchmarks.providers import PLAIN
from benchmarks.results import Row, newest, read
from igva_kernels.registry import all_backends

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

HEAD = """\
# Results

Made by `python -m benchmarks --suite none --plots` from the files in `results/`; do not edit. Everything here was
measured, nothing is modelled. Only the newest row of every measurement counts. Each section, table and picture belongs
to one machine; times of two machines are not comparable.

* **ms**: median of the rounds and, in brackets, the quantiles that hold the middle 60 %. The providers of a workload
  take turns round by round in one run. "graph": replays of a CUDA graph; "eager": calls from Python
  while the GPU is busy; "wall": calls from Python on an idle GPU, by the clock.
* **speed-up**: time of plain torch as published / this one's, median over the rounds of one run, with the same
  quantiles.
* **GB/s**, **TFLOP/s**: bytes and operations that cannot be avoided / time, and their percentage of the most that the
  machine was seen to do in the same rounds (copy or read; a library's large product). Intermediates that a provider
  moves do not count.
* **peak**: most memory of torch's allocator beyond inputs and results, of a model beyond weights and pixels; the tower
  on a CPU is measured in a process of its own. **kept**: held for the backward beyond the output.
* **error**: relative, against fp64, of the result that is nearest to its budget (2 x plain torch's error + eps / 2). A
  provider beyond its budget is not timed and has no row. The gradient of `mix_weights` is judged on several draws by
  `igva-kernels verify`; here it is only checked for gross mistakes.
* A **floor** does only what cannot be left out: the bare products, a copy of the same bytes, the tower.
"""


def write(folder: Path, page: Path, readme: Path | None) -> list[Path]:
    """Draws the pictures of every machine with a CSV in ``folder``, writes the page, and the README's tables.

    A machine's section is made from its rows alone.

    Returns:
        The files that were written.

    Raises:
        ValueError: ``readme`` lacks the two marks around its tables; nothing is written.
    """
    around = None if readme is None else _around_tables(readme)
    machines: dict[str, list[Row]] = {}
    for row in newest(row for path in sorted(folder.glob("*.csv")) for row in read(path)):
        machines.setdefault(row.machine, []).append(row)
    pictures = {machine: plots.draw_all(rows, folder, slug(machine)) for machine, rows in machines.items()}
    sections = [
        line for machine, rows in machines.items()
        for line in _section(machine, rows, [p.relative_to(page.parent).as_posix() for p in pictures[machine]])
    ]  # fmt: skip
    page.write_text("\n".join([HEAD, *sections, *first_light.sections(folder)]))
    written = [
        file for found in pictures.values() for picture in found for file in (picture, picture.with_suffix(".svg"))
    ]
    written.append(page)
    if readme is not None and around is not None and machines:
        summaries = [_summary(rows, pictures[machine], readme.parent) for machine, rows in machines.items()]
        tables = "\n".join(line for summary in summaries for line in summary)
        readme.write_text(f"{around[0]}{BEGIN}\n{tables}\n{END}{around[1]}")
        written.append(readme)
    return written


def _section(machine: str, rows: Sequence[Row], pictures: Sequence[str]) -> Iterator[str]:
    last = max(rows, key=lambda row: row.date)
    yield f"## {machine}\n"
    yield (
        f"Driver or kernel {last.driver}, Python {last.python}, torch {last.torch}, Triton "
        f"{last.triton or 'none'}, igva_kernels {last.igva_kernels}. Runs of {_dates(rows)}, revisions "
        f'{", ".join(sorted({row.revision for row in rows}))} ("+": with changes that were not committed).\n'
    )
    rates = {
        dtype: [r.ceiling_tflops for r in rows if r.dtype == dtype] for dtype in dict.fromkeys(r.dtype for r in rows)
    }
    products = ", ".join(f"{dtype} {_range(found)} TFLOP/s" for dtype, found in rates.items())
    yield (
        f"The machine's own ceilings, from the lowest to the highest measured beside a workload: memory "
        f"{_range([r.ceiling_gbps for r in rows])} GB/s; products {products}. A range shows how far the machine drifts "
        f"during a run, which the spread of a workload's rounds does not show: two runs differ by as much.\n"
    )
    for picture in pictures:
        yield f"![{Path(picture).stem}]({picture})\n"
    yield from _growth_table(machine, rows)
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row.workload, row.mode), []).append(row)
    for (workload, mode), found in tables.items():
        yield from _table(f"{workload} {mode}, {machine}", found)


def _table(title: str, rows: Sequence[Row]) -> Iterator[str]:
    columns: dict[str, Callable[[Row], str]] = {
        "dtype": lambda r: r.dtype,
        "B": lambda r: str(r.batch),
        "L": lambda r: _number(r.layers),
        "D": lambda r: _number(r.width),
        "H": lambda r: _number(r.hidden),
        "provider": lambda r: r.label + (" (floor)" if r.floor else "") + (f" [{r.note}]" if r.note else ""),
        "run": lambda r: r.timing,
        "ms": lambda r: f"{digits(r.ms)} ({digits(r.ms_p20)}-{digits(r.ms_p80)})",
        "speed-up": lambda r: (
            "1" if r.provider == PLAIN else f"{r.speedup:.2f} ({r.speedup_p20:.2f}-{r.speedup_p80:.2f})"
        ),
        "GB/s": lambda r: _rate(r.gbps, r.ceiling_gbps),
        "TFLOP/s": lambda r: _rate(r.tflops, r.ceiling_tflops),
        "peak MiB": lambda r: _number(r.peak_mib),
        "kept MiB": lambda r: _number(r.saved_mib),
        "error (plain's)": lambda r: "" if r.error is None else f"{r.judged} {r.error:.1e} ({r.plain_error:.1e})",
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = [name for name, column in cells.items() if any(column)]
    yield f"### {title}\n"
    yield from table(shown, zip(*(cells[name] for name in shown), strict=True))


def _growth_table(machine: str, rows: Sequence[Row]) -> Iterator[str]:
    lines = [
        (g.workload, g.dtype, f"{g.label}{HOW.get(g.timing, '')}",
         f"{scaling.SYMBOLS[g.axis]} = {', '.join(map(str, g.sizes))}", _power(g.time), _power(g.memory))
        for g in scaling.growths(rows)
    ]  # fmt: skip
    if not lines:
        return
    yield f"### Growth, {machine}\n"
    yield "Fitted exponents e of time and of peak memory ~ size^e, with standard errors; e = 1 is linear growth.\n"
    yield from table(("workload", "dtype", "provider", "size", "time", "peak memory"), lines)


def _power(power: scaling.Power | None) -> str:
    if power is None:
        return ""
    return f"{power.exponent:.2f}" + ("" if math.isnan(power.error) else f" ± {power.error:.2f}")


HOW = {"graph": ", CUDA graph", "wall": ", wall clock"}
"""What is added to the name of a measurement for how it ran."""
HIGHLIGHTS = (
    ("igva-2", "forward", "connector, forward"),
    ("igva-2-mix", "forward", "its mix alone"),
    ("igva-2", "both", "connector, forward and backward"),
    ("vision-tower", "forward", "whole vision tower and connector"),
    ("vision-tower-224px", "forward", "whole vision tower at 224 pixels, and connector"),
    ("training-step", "both", "training step of the reference model, cut language model"),
    ("training-step-224px", "both", "training step at 224 pixels, cut language model"),
)
"""What the README shows: workload, mode, and what it is called."""


def _summary(rows: Sequence[Row], pictures: Sequence[Path], root: Path) -> Iterator[str]:
    """The short table of a machine, and its picture of times."""
    kernels = [name for name in tuple(all_backends()) if any(row.provider == name for row in rows)]
    lines = []
    for workload, mode, called in HIGHLIGHTS:
        found = [row for row in rows if (row.workload, row.mode) == (workload, mode)]
        for (dtype, batch, timing), group in groupby(found, key=lambda row: (row.dtype, row.batch, row.timing)):
            at = {row.provider: row for row in group}
            fused = next((at[name] for name in kernels if name in at), None)
            if fused is None or (batch not in (2, 16) and workload.startswith("igva")):
                continue
            floor = next((row for row in at.values() if row.floor), None)
            memory = [f"{row.peak_mib:.3g}" if row.peak_mib is not None else "" for row in (at[PLAIN], fused)]
            kept = [f"{row.saved_mib:.3g}" if row.saved_mib is not None else "" for row in (at[PLAIN], fused)]
            lines.append((
                f"{called}, {dtype}, B {batch}{HOW.get(timing, '')}",
                f"{digits(at[PLAIN].ms)} ms", f"**{digits(fused.ms)} ms**", f"{fused.speedup:.2f}",
                f"{digits(floor.ms)} ms" if floor else "", " / ".join(memory) if all(memory) else "",
                " / ".join(kept) if all(kept) else "",
            ))  # fmt: skip
    heads = ("", "plain", "fused", "speed-up", "floor", "peak MiB, plain / fused", "kept for backward MiB")
    yield f"{plots.where(rows)}:\n"
    yield from table(heads, lines)
    for picture in (path for path in pictures if path.stem.endswith("-time")):
        yield f"![time against the batch size]({picture.relative_to(root).as_posix()})\n"


def _around_tables(path: Path) -> tuple[str, str]:
    whole = path.read_text()
    if BEGIN not in whole or END not in whole:
        raise ValueError(f"{path}: need the lines {BEGIN} and {END}")
    before, rest = whole.split(BEGIN, 1)
    return before, rest.split(END, 1)[1]


def _dates(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({row.date[:10] for row in rows}))


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _rate(value: float | None, ceiling: float) -> str:
    return "" if value is None else f"{value:.3g} ({100 * value / ceiling:.0f} %)"
