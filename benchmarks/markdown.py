"""How figures and tables are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def digits(value: float) -> str:
    """Three digits, or a whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table, with an empty one behind it."""
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for line in lines:
        yield "| " + " | ".join(line) + " |"
    yield ""
