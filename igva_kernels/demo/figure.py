"""The figure of the demo: which layers each instruction reads, and how both connectors learn."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw(
    path: Path,
    instructions: Sequence[str],
    groups: Sequence[str],
    weights: Mapping[str, Sequence[Sequence[float]]],
    losses: Mapping[str, Sequence[float]],
    note: str,
) -> None:
    """Writes a PNG.

    Args:
        path: of the file.
        instructions: one per row of the weights.
        groups: names of the layer groups, one per column of the weights.
        weights: by time ("at the start", "after 4 steps"), the layer weights of every instruction.
        losses: by connector, the loss of every training step; if it is empty, no curves are drawn.
        note: what the reader must know about the weights.
    """
    height = 1.4 + 0.42 * (len(instructions) + 1) * len(weights)
    figure = Figure(figsize=(13.0 if losses else 8.0, max(height, 4.0)), layout="constrained")
    left, *rest = figure.subplots(1, 2 if losses else 1, squeeze=False, width_ratios=[3, 2] if losses else [1])[0]

    rows = [(when, i) for when in weights for i in range(len(instructions))]
    # A gap between the blocks of rows, and the first row on top.
    heights = [-(at + at // len(instructions)) for at in range(len(rows))]
    starts = [0.0] * len(rows)
    for column, group in enumerate(groups):
        widths = [weights[when][i][column] for when, i in rows]
        shade = 0.3 + 0.55 * column / max(len(groups) - 1, 1)
        bars = left.barh(heights, widths, left=starts, height=0.8, color=_shade(shade), edgecolor="white", label=group)
        left.bar_label(
            bars, [f"{100 * width:.1f} %" if width > 0.06 else "" for width in widths],
            label_type="center", color="black" if shade < 0.6 else "white", fontsize=9,
        )  # fmt: skip
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    labels = [textwrap.fill(instructions[i], 34) + (f"\n({when})" if len(weights) > 1 else "") for when, i in rows]
    left.set_yticks(heights, labels, fontsize=9)
    left.set_xlim(0, 1)
    left.set_xlabel("share of the layer group in the second half of the mixed row")
    left.set_title("Layer weights per instruction", loc="left", fontweight="bold")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=min(len(groups), 4), frameon=False)
    left.spines[["top", "right", "left"]].set_visible(False)

    for axes in rest:
        styles = ({"linewidth": 6, "color": "#b9c9dd"}, {"linewidth": 1.8, "color": "#b5421f", "marker": "o"})
        for (name, values), style in zip(losses.items(), styles, strict=True):
            axes.plot(range(len(values)), values, label=name, **style)
        axes.set_ylim(0, 1.08 * max(max(values) for values in losses.values()))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("training step")
        axes.set_ylabel("loss")
        axes.set_title("Training, plain and fused connector", loc="left", fontweight="bold")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(note, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def _shade(depth: float) -> tuple[float, float, float]:
    """From light to dark blue as the layers get deeper."""
    return (0.92 - 0.8 * depth, 0.95 - 0.62 * depth, 0.98 - 0.38 * depth)
