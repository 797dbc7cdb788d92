"""How figures and tables are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def digits(value: float) -> str:
    """Three significant digits; a whole number from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a markdown table, and an empty one after it."""
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for line in lines:
        yield "| " + " | ".join(line) + " |"
    yield ""
