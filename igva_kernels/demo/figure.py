"""The figure of the demo: which layers each instruction reads, and how both connectors learn."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw(
    path: Path,
    instructions: Sequence[str],
    columns: Sequence[str],
    weights: Mapping[str, Sequence[Sequence[float]]],
    losses: Mapping[str, Sequence[float]],
    note: str,
) -> None:
    """Writes a PNG.

    Args:
        path: of the file.
        instructions: one per row of the weights.
        columns: what each column of the weights weighs.
        weights: by time ("at the start", "after 4 steps"), the layer weights of every instruction; if it is empty, no
            bars are drawn.
        losses: by connector, the loss of every training step; if it is empty, no curves are drawn.
        note: what the reader must know about the weights.
    """
    height = 1.4 + 0.42 * (len(instructions) + 1) * len(weights) + 0.22 * (len(columns) // 4)
    widths = [8.0] * bool(weights) + [5.0] * bool(losses)
    figure = Figure(figsize=(sum(widths), max(height, 4.0)), layout="constrained")
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    if weights:
        _draw_weights(panels[0], instructions, columns, weights)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False)
    if losses:
        _draw_losses(panels[-1], losses)
    figure.suptitle(note, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def _draw_weights(
    axes: Axes, instructions: Sequence[str], columns: Sequence[str], weights: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    rows = [(when, i) for when in weights for i in range(len(instructions))]
    # A gap between the blocks of rows, and the first row on top.
    heights = [-(at + at // len(instructions)) for at in range(len(rows))]
    starts = [0.0] * len(rows)
    for column, name in enumerate(columns):
        widths = [weights[when][i][column] for when, i in rows]
        shade = 0.3 + 0.55 * column / max(len(columns) - 1, 1)
        bars = axes.barh(heights, widths, left=starts, height=0.8, color=_shade(shade), edgecolor="white", label=name)
        axes.bar_label(
            bars, [f"{100 * width:.1f} %" if width > 0.06 else "" for width in widths],
            label_type="center", color="black" if shade < 0.6 else "white", fontsize=9,
        )  # fmt: skip
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    labels = [textwrap.fill(instructions[i], 34) + (f"\n({when})" if len(weights) > 1 else "") for when, i in rows]
    axes.set_yticks(heights, labels, fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_xlabel("layer weight (h1 is the tower's state after its first layer)")
    axes.set_title("Layer weights per instruction", loc="left", fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_losses(axes: Axes, losses: Mapping[str, Sequence[float]]) -> None:
    styles: tuple[dict[str, Any], ...] = (
        {"linewidth": 6, "color": "#b9c9dd"},
        {"linewidth": 1.8, "color": "#b5421f", "marker": "o"},
    )
    for (name, values), style in zip(losses.items(), styles, strict=True):
        axes.plot(range(len(values)), values, label=name, **style)
    axes.axhline(0, color="#cccccc", linewidth=0.8)  # keeps zero in view; the entropy can make a loss negative
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step")
    axes.set_ylabel("loss")
    axes.set_title("Training, plain and fused connector", loc="left", fontweight="bold")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _shade(depth: float) -> tuple[float, float, float]:
    """From light to dark blue."""
    return (0.92 - 0.8 * depth, 0.95 - 0.62 * depth, 0.98 - 0.38 * depth)
