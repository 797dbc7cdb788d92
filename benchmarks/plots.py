"""Pictures of the results: PNG and SVG, drawn from the rows of one machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from benchmarks.markdown import digits
from benchmarks.providers import PLAIN
from benchmarks.results import Row

COLORS = {
    "plain": "#8a8f98", "plain-compiled": "#c0791b", "additions": "#5b7aa6", "additions-compiled": "#d9a441",
    "mix+library": "#7a5aa6", "cpu": "#b5421f", "triton": "#b5421f", "cuda": "#1f7a4d", "cuda-fused": "#3fae78",
    "products": "#000000", "copy": "#000000", "tower": "#000000",
}  # fmt: skip
MARKERS = {"connector": "o", "its first Linear": "^", "its mix": "s"}
TITLE: dict[str, Any] = {"loc": "left", "fontweight": "bold"}
SVG: Any = {"svg.hashsalt": "igva_kernels"}  # the same figures give the same file


def draw_all(rows: Sequence[Row], folder: Path, name: str) -> list[Path]:
    """Every picture that the rows have figures for; returns the PNGs."""
    pictures = {
        "time": draw_time(rows), "memory": draw_memory(rows), "roofline": draw_roofline(rows),
        "speedup": draw_speedups(rows),
    }  # fmt: skip
    written = []
    for what, figure in pictures.items():
        if figure is None:
            continue
        figure.suptitle(where(rows), x=0.01, ha="left", fontsize=9, color="#555555")
        written.append(folder / f"{name}-{what}.png")
        figure.savefig(written[-1], dpi=120, metadata={"Software": None})
        with rc_context(SVG):
            figure.savefig(written[-1].with_suffix(".svg"), metadata={"Date": None})
    return written


def where(rows: Sequence[Row]) -> str:
    """The line above every picture: machine, torch, when."""
    last = max(rows, key=lambda row: row.date)
    return f"{last.machine}, torch {last.torch}, {last.date[:10]}, revision {last.revision}"


def draw_time(rows: Sequence[Row]) -> Figure | None:
    """Time of the block and of the mix against B, with the floor."""
    panels = [
        (workload, dtype, timing)
        for workload in ("igva-2", "igva-2-mix")
        for dtype in ("bf16", "fp32")
        for timing in _timings(rows)
        if len({r.batch for r in _of(rows, workload, dtype, timing)}) > 1
    ]
    if not panels:
        return None
    figure, axes = _grid(len(panels))
    for axis, (workload, dtype, timing) in zip(axes, panels, strict=False):
        found = _of(rows, workload, dtype, timing)
        for provider in _providers(found):
            line = sorted((r for r in found if r.provider == provider), key=lambda row: row.batch)
            axis.plot([r.batch for r in line], [r.ms for r in line], **_style(line[0]))
            if len(line) > 1:
                axis.fill_between(
                    [r.batch for r in line], [r.ms_p20 for r in line], [r.ms_p80 for r in line],
                    color=_color(line[0]), alpha=0.15, linewidth=0,
                )  # fmt: skip
        what = "the mix alone" if workload.endswith("mix") else "connector, forward"
        how = "" if timing == "eager" else ", CUDA graph"
        axis.set_title(f"IGVA, {what}, {dtype}{how}", **TITLE)
        axis.set_ylabel("ms (median, 20-80 %)")
        _log_batches(axis, found)
    return figure


def draw_memory(rows: Sequence[Row]) -> Figure | None:
    """Memory of the block against B."""
    panels = [d for d in ("bf16", "fp32") if len({r.batch for r in _of(rows, "igva-2", d, "eager")}) > 1]
    if not panels:
        return None
    figure, axes = _grid(len(panels))
    for axis, dtype in zip(axes, panels, strict=False):
        found = [r for r in _of(rows, "igva-2", dtype, "eager") if r.peak_mib]
        for provider in _providers(found):
            line = sorted((r for r in found if r.provider == provider), key=lambda row: row.batch)
            axis.plot([r.batch for r in line], [r.peak_mib or 0.0 for r in line], **_style(line[0]))
        axis.set_title(f"IGVA, connector, forward, {dtype}", **TITLE)
        axis.set_ylabel("MiB beyond inputs and output (peak)")
        _log_batches(axis, found)
    return figure


def draw_roofline(rows: Sequence[Row]) -> Figure | None:
    """Achieved rate against the work per byte, under the machine's own ceilings."""
    names = dict(zip(("igva-2", "igva-2-linear", "igva-2-mix"), MARKERS, strict=True))
    found = [
        r for r in rows
        if r.workload in names and r.mode == "forward" and r.gbps and r.tflops and not r.provider.endswith("-compiled")
        and r.timing == _timings(rows)[-1]
    ]  # fmt: skip
    dtypes = [d for d in ("bf16", "fp32") if {r.workload for r in found if r.dtype == d} >= {"igva-2", "igva-2-mix"}]
    if not dtypes:
        return None
    figure, axes = _grid(len(dtypes))
    for axis, dtype in zip(axes, dtypes, strict=False):
        points = [r for r in found if r.dtype == dtype]
        gbps = max(r.ceiling_gbps for r in points)
        tflops = max(max(r.ceiling_tflops, r.tflops or 0.0) for r in points)  # a provider's product may be faster
        work = sorted({1e3 * r.tflops / r.gbps for r in points if r.tflops and r.gbps})
        xs = [work[0] / 2, 1e3 * tflops / gbps, work[-1] * 2]
        axis.plot(xs, [min(tflops, x * gbps / 1e3) for x in xs], color="black", linewidth=1.2)
        label: dict[str, Any] = {"fontsize": 8, "va": "bottom", "ha": "right"}
        axis.annotate(f"memory {gbps:.0f} GB/s ", (xs[1] / 2, tflops / 2), **label)
        axis.annotate(f"products {tflops:.3g} TFLOP/s", (xs[2], tflops * 1.06), **label)
        seen = set()
        for row in points:
            assert row.tflops and row.gbps
            style = _style(row) | {"linestyle": "none", "marker": MARKERS[names[row.workload]], "alpha": 0.75}
            style["label"] = None if row.provider in seen else style["label"]
            seen.add(row.provider)
            axis.plot([1e3 * row.tflops / row.gbps], [row.tflops], **style)
        axis.set_xscale("log")
        axis.set_yscale("log")
        reached = [r.tflops for r in points if r.tflops]
        axis.set_ylim(min(reached) / 2, max(tflops, *reached) * 2.2)
        for name, marker in MARKERS.items():
            axis.plot([], [], linestyle="none", marker=marker, color="white", markeredgecolor="black", label=name)
        axis.set_xlabel("FLOP per byte that must be moved")
        axis.set_ylabel("TFLOP/s")
        axis.set_title(f"IGVA, forward, {dtype}, every B", **TITLE)
        axis.legend(fontsize=7.5, frameon=False, loc="lower right", ncols=2)
        _plain_numbers(axis)
    return figure


def draw_speedups(rows: Sequence[Row]) -> Figure | None:
    """A table: how much faster than plain torch, by workload and provider."""
    shown = [r for r in rows if r.timing != "wall" and not r.workload.startswith(("mix-by", "block-by"))]
    how: dict[tuple[str, str, str, int], str] = {}  # as graphs if there are such rows
    for r in shown:
        how[_line(r)] = max(r.timing, how.get(_line(r), ""))
    chosen = [r for r in shown if r.timing == how[_line(r)]]
    floors = {r.provider for r in chosen if r.floor}
    providers = [p for p in _providers(chosen) if p in COLORS and p != PLAIN and p not in floors]
    lines = list(how)
    if not lines or not providers:
        return None
    cells: list[list[str]] = []
    shades: list[list[str]] = []
    for workload, mode, dtype, batch in lines:
        at = {r.provider: r for r in chosen if _line(r) == (workload, mode, dtype, batch)}
        texts, colors = [f"{workload}, {mode}, {dtype}, B {batch}", f"{digits(at[PLAIN].ms)} ms"], ["white", "white"]
        for provider in providers:
            row = at.get(provider)
            texts.append("" if row is None else f"{row.speedup:.2f}")
            colors.append("white" if row is None else _shade(row.speedup))
        cells.append(texts)
        shades.append(colors)
    figure = Figure(figsize=(max(4.6 + 1.2 * len(providers), 9.0), 0.6 + 0.25 * (len(lines) + 2)), layout="constrained")
    axis = figure.subplots()
    axis.axis("off")
    heads = [provider.replace("-", "\n", 1).replace("+", "\n+ ") for provider in providers]
    table = axis.table(
        cells, cellColours=shades, colLabels=["plain's time / this one's", "plain", *heads], loc="upper left",
        cellLoc="center", colWidths=[0.34, 0.12, *[0.54 / len(providers)] * len(providers)],
        bbox=Bbox.from_bounds(0, 0, 1, 1),
    )  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    for (line, column), cell in table.get_celld().items():
        cell.set_edgecolor("#d8d8d8")
        if line == 0:
            cell.set_text_props(fontweight="bold")
            cell.set_height(1.8 * cell.get_height())
        if column == 0:
            cell.set_text_props(ha="left")
            cell.PAD = 0.02
    return figure


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 2)
    lines = -(-count // columns)
    figure = Figure(figsize=(6.4 * columns, 0.3 + 4.3 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, which="major", color="#eeeeee")
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes


def _of(rows: Iterable[Row], workload: str, dtype: str, timing: str) -> list[Row]:
    return [r for r in rows if (r.workload, r.mode, r.dtype, r.timing) == (workload, "forward", dtype, timing)]


def _timings(rows: Iterable[Row]) -> list[str]:
    return sorted({row.timing for row in rows} - {"wall"})


def _providers(rows: Iterable[Row]) -> list[str]:
    names = {row.provider for row in rows}
    return [name for name in COLORS if name in names] + sorted(names - set(COLORS))


def _color(row: Row) -> str:
    return COLORS.get(row.provider, "#444444")


def _style(row: Row) -> dict[str, Any]:
    return {
        "color": _color(row), "label": row.label + (" (floor)" if row.floor else ""), "markersize": 4.5,
        "linestyle": "--" if row.floor else "-", "marker": None if row.floor else "o",
        "linewidth": 2.2 if row.label.startswith("igva_kernels") else 1.4,
    }  # fmt: skip


def _log_batches(axis: Axes, rows: Sequence[Row]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    batches = sorted({row.batch for row in rows})
    axis.xaxis.set_major_locator(FixedLocator(batches))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("B (images)")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
    axis.legend(fontsize=7.5, frameon=False, loc="upper left")
    _plain_numbers(axis)


def _plain_numbers(axis: Axes) -> None:
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axis.get_ylim()
    if high / low < 300:  # few powers of ten: label values between them
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_formatter(NullFormatter())


def _line(row: Row) -> tuple[str, str, str, int]:
    return row.workload, row.mode, row.dtype, row.batch


def _shade(speedup: float) -> str:
    if speedup >= 2.0:
        return "#bfe3c8"
    if speedup >= 1.05:
        return "#e3f3e6"
    return "#ffffff" if speedup >= 0.95 else "#f8dcd4"
