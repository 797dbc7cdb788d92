"""The calls by which implementations of deformable attention are judged."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.deform_attn import spec
from igva_kernels.ops.deform_attn.api import deform_attn
from igva_kernels.ops.deform_attn.geometry import BOXES, GRID, IMAGE, POINTS, Geometry
from igva_kernels.testing import SPECIFICATION, results


class Inputs(NamedTuple):
    """The tensors of one draw."""

    value: list[Tensor]
    sampling: Tensor
    logits: Tensor
    reference: Tensor | None
    grad_out: Tensor

    def double(self) -> Inputs:
        """The same numbers in fp64."""
        reference = None if self.reference is None else self.reference.double()
        value = [tensor.double() for tensor in self.value]
        return Inputs(value, self.sampling.double(), self.logits.double(), reference, self.grad_out.double())


@dataclass(frozen=True)
class DeformCase:
    """One call, drawn at random."""

    name: str
    batch: int
    shapes: tuple[tuple[int, int], ...]
    """(H, W) of each level."""
    heads: int
    width: int
    """Of a head."""
    points: int | tuple[int, ...] = 4
    reference: str = GRID
    """What the positions count from, see ``geometry``."""
    queries: int | None = None
    """None where each pixel of a level is one."""
    softmax: bool = True
    joined: bool = False
    """Whether all levels are one tensor."""
    is_large: bool = False
    demands: tuple[()] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """The points of each level."""
        return (self.points,) * len(self.shapes) if isinstance(self.points, int) else self.points

    def draw(self, seed: int, dtype: torch.dtype, device: str) -> Inputs:
        """See ``testing.Case``.

        Positions keep away from the kinks of bilinear interpolation, where derivatives in two precisions may be those
        of two cells; some are outside the map.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        queries, levels = self.num_queries, len(self.shapes)
        reference = None
        if self.reference in (POINTS, BOXES):
            reference = uniform(self.batch, queries, levels, 2)
            if self.reference == BOXES:
                reference = torch.cat([reference, 0.1 + 0.4 * uniform(*reference.shape)], -1)
            reference = reference.float()
        parts = []
        for level, ((height, width), count) in enumerate(zip(self.shapes, self.counts, strict=True)):
            shape, size = (self.batch, queries, self.heads, count, 2), torch.tensor([width, height])
            if self.reference == GRID:
                pixel = torch.arange(queries)
                own = torch.stack([pixel % width, pixel // width], -1)[:, None, None]
                position = own + 2 * normal(*shape).double()
            else:
                own, position = torch.zeros(2), uniform(*shape) * (size + 3) - 2
            position = position.floor() + 1 / 32 + 15 / 16 * uniform(*shape)
            parts.append(self._sampling(position, own, size, None if reference is None else reference[:, :, level]))
        sampling = torch.cat(parts, 3).float()
        logits = normal(*sampling.shape[:4])
        if isinstance(self.points, int):
            sampling = sampling.unflatten(3, (levels, self.points))
            logits = logits.unflatten(3, (levels, self.points))
        rows = [height * width for height, width in self.shapes]
        value = [normal(self.batch, count, self.heads, self.width) for count in ([sum(rows)] if self.joined else rows)]
        grad_out = normal(self.batch, queries, self.heads * self.width)
        return Inputs(
            [tensor.to(device, dtype) for tensor in value], sampling.to(device), logits.to(device),
            None if reference is None else reference.to(device), grad_out.to(device, dtype),
        )  # fmt: skip

    def _sampling(self, position: Tensor, own: Tensor, size: Tensor, reference: Tensor | None) -> Tensor:
        """What says that a point lies at this position, in pixels."""
        if self.reference == GRID:
            return position - own
        if self.reference == IMAGE:
            return (position + 0.5) / size
        assert reference is not None
        reference = reference[:, :, None, None].double()
        offset = position + 0.5 - reference[..., :2] * size
        return offset if self.reference == POINTS else offset / (reference[..., 2:] * size * 0.5 / position.shape[3])

    @property
    def num_queries(self) -> int:
        """Q."""
        height, width = self.shapes[0]
        return height * width if self.queries is None else self.queries

    def run(self, inputs: Inputs, impl: str, only: Collection[str] = ()) -> dict[str, Tensor]:
        """See ``testing.Case``."""
        value = [tensor.detach() for tensor in inputs.value]
        leaves = {f"grad value {level}": tensor for level, tensor in enumerate(value)}
        sampling, logits = inputs.sampling.detach(), inputs.logits.detach()
        leaves |= {"grad sampling": sampling, "grad logits": logits}
        reference = None if inputs.reference is None else inputs.reference.detach()
        if reference is not None:
            leaves["grad reference"] = reference

        def forward() -> Tensor:
            if impl == SPECIFICATION:
                return self._specified(value, sampling, logits, reference)
            given = {GRID: GRID, IMAGE: None}.get(self.reference, reference)
            return deform_attn(
                value[0] if self.joined else value, self.shapes, sampling, logits,
                points=None if isinstance(self.points, int) else self.points, reference=given, softmax=self.softmax,
                impl=impl,
            )  # fmt: skip

        return results(forward, leaves, inputs.grad_out, only)

    def _specified(self, value: list[Tensor], sampling: Tensor, logits: Tensor, reference: Tensor | None) -> Tensor:
        """The formula."""
        if isinstance(self.points, int):
            sampling, logits = sampling.flatten(3, 4), logits.flatten(3, 4)
        geometry = Geometry(self.shapes, self.counts, self.reference, self.softmax)
        return spec.deform_attn(geometry.levels(value), sampling, logits, reference, geometry)

    def is_rounded_once(self, result: str) -> bool:
        """See ``testing.Case``."""
        return True


CASES = (
    DeformCase("deformable, one level", 2, ((3, 4),), 2, 8),
    DeformCase("deformable, three grids of unlike form", 1, ((4, 6), (6, 4), (3, 8)), 3, 20, points=2),
    DeformCase("deformable, in the image, joined", 2, ((5, 7), (3, 4), (1, 1)), 2, 16, 3, IMAGE, 9, joined=True),
    DeformCase("deformable, around points, weights", 2, ((6, 3), (2, 5)), 2, 33, 2, POINTS, 7, False, True),
    DeformCase("deformable, in boxes, points by level", 1, ((5, 4), (4, 3), (2, 2)), 2, 16, (3, 1, 2), BOXES, 8),
    DeformCase("MMFuser's attention", 1, ((24, 24),) * 4, 16, 64, is_large=True),
    DeformCase(
        "Deformable DETR's encoder", 1, ((67, 100), (34, 50), (17, 25), (9, 13)), 8, 32, 4, POINTS, 8942,
        joined=True, is_large=True,
    ),
)  # fmt: skip
