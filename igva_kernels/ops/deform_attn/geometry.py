"""The constants of a call, and where its points lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

GRID, IMAGE, POINTS, BOXES = "grid", "image", "points", "boxes"
"""What ``sampling``, s, counts from: the position of a point in pixels of a level of size (H, W) with N points.

grid:    (q % W, q // W) + s, an offset from the query's own pixel
image:   (W, H) * s - 1/2, a place in the image, from 0 to 1
points:  (W, H) * (x, y) - 1/2 + s, an offset from the reference (x, y) of the query and level
boxes:   (W, H) * (x, y) - 1/2 + (W, H) * (w, h) / 2N * s, one from the centre of its reference (x, y, w, h)
"""


class Geometry(NamedTuple):
    """What is constant in a call."""

    shapes: tuple[tuple[int, int], ...]
    """(H, W) of each level."""
    points: tuple[int, ...]
    """How many points a query and head sample in each level; S in all."""
    origin: str
    """What ``sampling`` counts from."""
    softmax: bool
    """Whether the weights of the points are the softmax of the logits over all S, or the logits themselves."""

    @property
    def rows(self) -> list[int]:
        """Pixels of each level."""
        return [height * width for height, width in self.shapes]

    @property
    def firsts(self) -> list[int]:
        """The place of each level's first point among the S."""
        return [0, *accumulate(self.points[:-1])]

    @property
    def num_points(self) -> int:
        """S."""
        return sum(self.points)

    def levels(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Every level ``[B, H*W, Hd, dh]``, as a view: of the one tensor that holds all of them, or of its own."""
        if len(values) == 1:
            return list(values[0].split(self.rows, dim=1))
        return list(values)

    def of_levels(self, tensor: Tensor, dim: int) -> Iterator[Tensor]:
        """The parts of a dimension of length S that belong to each level."""
        return iter(tensor.split(list(self.points), dim))
