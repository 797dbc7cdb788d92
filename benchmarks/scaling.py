"""How time and memory grow: exponents fitted to the measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from benchmarks.results import Row

AXES = {
    "igva-2-mix": "batch", "igva-2": "batch", "mix-by-layers": "layers", "block-by-layers": "layers",
    "mix-by-width": "width", "block-by-hidden": "hidden",
}  # fmt: skip
"""By workload, the size that its rows differ in."""

SYMBOLS = {"batch": "B", "layers": "L", "width": "D", "hidden": "H"}


class Power(NamedTuple):
    """``y = c * x ** exponent``, fitted by least squares in logarithms."""

    exponent: float
    error: float
    """Standard error of the exponent; NaN with two points."""


class Growth(NamedTuple):
    """How one provider grows in one size."""

    workload: str
    dtype: str
    provider: str
    label: str
    timing: str
    axis: str
    sizes: tuple[int, ...]
    time: Power
    memory: Power | None
    """The peak's, beyond inputs and output; None for a floor, and if the peak is zero."""


def fit(xs: Sequence[float], ys: Sequence[float]) -> Power:
    """The power law through at least two points of different x, all positive."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread
    left = sum((b - mean_v - slope * (a - mean_u)) ** 2 for a, b in zip(u, v, strict=True))
    return Power(slope, math.sqrt(left / (len(u) - 2) / spread) if len(u) > 2 else math.nan)


def growths(rows: Sequence[Row]) -> Iterator[Growth]:
    """A fit for every provider that was measured at three sizes or more."""

    def series(row: Row) -> tuple[str, ...]:
        return (row.workload, row.dtype, row.provider, row.timing)

    usable = [row for row in rows if row.workload in AXES and row.mode == "forward"]
    for _, group in groupby(sorted(usable, key=series), key=series):
        found = list(group)
        first, axis = found[0], AXES[found[0].workload]
        by_size = {getattr(row, axis): row for row in found}
        if len(by_size) < 3:
            continue
        sizes = tuple(sorted(by_size))
        peaks = [by_size[size].peak_mib or 0.0 for size in sizes]
        yield Growth(
            first.workload, first.dtype, first.provider, first.label, first.timing, axis, sizes,
            fit(sizes, [by_size[size].ms for size in sizes]), fit(sizes, peaks) if min(peaks) > 0 else None,
        )  # fmt: skip
