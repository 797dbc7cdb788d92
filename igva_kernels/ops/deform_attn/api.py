"""The public function: its arguments are checked, an implementation is chosen, and one registered operator runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igva_kernels.ops.deform_attn import op, spec
from igva_kernels.ops.deform_attn.geometry import BOXES, GRID, IMAGE, POINTS, Geometry
from igva_kernels.registry import REFERENCE
from igva_kernels.runtime.context import saveable
from igva_kernels.runtime.dense import accumulation_dtype, why_no_float


def deform_attn(
    value: Tensor | Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    sampling: Tensor,
    logits: Tensor,
    *,
    points: Sequence[int] | None = None,
    reference: str | Tensor | None = "grid",
    softmax: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Multi-scale deformable attention: every query and head reads a few points of every map, and sums them.

    ``out[b, q, h] = sum over levels l and points n of a * bilinear(value_l[b, :, h], position)``, where ``a`` is the
    softmax of the logits over all levels and points (Deformable DETR, arXiv 2010.04159; MMFuser, arXiv 2410.11829).
    Corners outside a map count as zero, as in ``grid_sample`` with ``align_corners=False``. Nothing but the arguments
    is kept for the backward, which is deterministic on every device.

    ``sampling`` says where a query reads, (x, y), by ``reference``:

    * "grid": an offset in pixels from the query's own pixel, (q % W, q // W); every level then has as many pixels as
      there are queries. No rounding: the position is the offset's.
    * None: a position in the image, from 0 to 1, as ``MultiScaleDeformableAttention`` takes it.
    * a tensor ``[B or 1, Q, L or 1, 2]``: an offset in pixels from these points of the image, (x, y) from 0 to 1.
    * a tensor ``[B or 1, Q, L or 1, 4]``: an offset from the centres of these boxes, (x, y, width, height) from 0 to 1,
      of which one stands for half a box divided by the number of the level's points.

    Positions are computed in fp32 from fp32. Bilinear interpolation has a kink where a coordinate, in pixels, is an
    integer: the derivative there is that to the right, or below. A position that is NaN makes the output of its query
    and head NaN, and an infinite one reads nothing.

    Args:
        value: all levels ``[B, sum of H*W, Hd, dh]``, one after the other, or a list of L tensors ``[B, H*W, Hd, dh]``;
            any strides.
        shapes: (H, W) of each level, as Python integers.
        sampling: ``[B or 1, Q, Hd, L, N, 2]``; any floating dtype, used in fp32 (fp64 with fp64 values).
        logits: ``[B or 1, Q, Hd, L, N]``, in the same way.
        points: None where every level has N points, or the number of each; ``sampling`` is then
            ``[B or 1, Q, Hd, sum of points, 2]``, and ``logits`` ``[B or 1, Q, Hd, sum of points]``.
        reference: "grid", None or a tensor, see above; differentiable.
        softmax: False takes the logits themselves as the weights.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        ``[B, Q, Hd * dh]`` in the dtype of ``value``; sums are made in fp32 (fp64) and rounded once.

    Raises:
        ValueError: shapes or devices do not fit; the message names the argument.
        TypeError: wrong types or dtypes.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    values, sizes = _check_value(value, shapes)
    batch, _, heads, _ = values[0].shape
    device, dtype = values[0].device, values[0].dtype
    sampling, logits, counts = _check_sampling(sampling, logits, points, batch, heads, len(sizes), device)
    wide = accumulation_dtype(dtype)
    sampling, logits = sampling.to(wide), logits.to(wide)
    origin, reference = _check_reference(reference, batch, sampling.shape[1], len(sizes), wide, device)
    if origin == GRID and any(height * width != sampling.shape[1] for height, width in sizes):
        raise ValueError(
            f"shapes: with reference='grid' every level needs {sampling.shape[1]} pixels, one for each query of "
            f"sampling, got {list(sizes)}"
        )
    geometry = Geometry(sizes, counts, origin, softmax)
    backend = op.OPERATOR.select(impl, device, dtype, (values, sampling, logits, reference), len(sizes))
    if backend == REFERENCE:
        if torch.is_grad_enabled():  # plain torch saves these for its backward
            values, sampling, logits = [saveable(each) for each in values], saveable(sampling), saveable(logits)
            reference = saveable(reference)
        return spec.deform_attn(geometry.levels(values), sampling, logits, reference, geometry)
    return op.deform_attn(
        value=values, sampling=sampling, logits=logits, reference=reference,
        shapes=[side for size in sizes for side in size], points=list(counts), origin=origin, softmax=softmax,
        impl=backend,
    )  # fmt: skip


def _check_value(value: Any, shapes: Any) -> tuple[list[Tensor], tuple[tuple[int, int], ...]]:
    """``value`` as a list of one tensor, or of one per level, and the sizes of the levels."""
    if isinstance(shapes, Tensor) or not isinstance(shapes, Sequence):
        hint = "; shapes.tolist() gives them, and waits for the device" if isinstance(shapes, Tensor) else ""
        raise TypeError(f"shapes: need a sequence of (H, W), as Python integers, got {type(shapes).__name__}{hint}")
    sizes = tuple((int(height), int(width)) for height, width in shapes)
    if not sizes or any(side < 1 for size in sizes for side in size):
        raise ValueError(f"shapes: need (H, W) of at least one level, each at least 1, got {list(shapes)}")
    values = [value] if isinstance(value, Tensor) else list(value)
    rows = [height * width for height, width in sizes]
    if isinstance(value, Tensor):
        rows = [sum(rows)]
    elif len(values) != len(rows):
        raise ValueError(f"value: need {len(rows)} tensors, one for each level of shapes, got {len(values)}")
    for level, (tensor, count) in enumerate(zip(values, rows, strict=True)):
        name = "value" if isinstance(value, Tensor) else f"value[{level}]"
        reason = why_no_float(tensor)
        if reason is not None:
            raise TypeError(f"{name}: {reason}")
        if tensor.dim() != 4 or tensor.shape[1] != count or not tensor.shape[2]:
            raise ValueError(
                f"{name}: need shape [B, {count}, Hd, dh] by shapes, with at least one head, got {list(tensor.shape)}"
            )
        first = values[0]
        others = (first.shape[0], first.shape[2], first.shape[3], first.dtype, first.device)
        if (tensor.shape[0], tensor.shape[2], tensor.shape[3], tensor.dtype, tensor.device) != others:
            raise ValueError(
                f"{name}: need batch, heads, width, dtype and device of the first level, got {list(tensor.shape)} of "
                f"{tensor.dtype} on {tensor.device} beside {list(first.shape)} of {first.dtype} on {first.device}"
            )
    return values, sizes


def _check_sampling(
    sampling: Any, logits: Any, points: Any, batch: int, heads: int, levels: int, device: torch.device
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """``[B, Q, Hd, S, 2]``, ``[B, Q, Hd, S]``, and the number of points of each level."""
    for name, tensor in {"sampling": sampling, "logits": logits}.items():
        reason = why_no_float(tensor)
        if reason is not None:
            raise TypeError(f"{name}: {reason}")
        if tensor.device != device:
            raise ValueError(f"{name}: need device {device} as value, got {tensor.device}")
    if points is None:
        if sampling.dim() != 6 or sampling.shape[3] != levels:
            raise ValueError(
                f"sampling: need shape [B, Q, {heads}, {levels}, N, 2] (or points=), got {list(sampling.shape)}"
            )
        counts = (sampling.shape[4],) * levels
        inner: tuple[int, ...] = (levels, sampling.shape[4])
    else:
        counts = tuple(int(count) for count in points)
        if len(counts) != levels or any(count < 0 for count in counts):
            raise ValueError(f"points: need one number for each of the {levels} levels, got {list(points)}")
        inner = (sum(counts),)
    at = sampling.dim() - len(inner) - 1
    fits = at == 3 and sampling.shape[3:] == (*inner, 2) and sampling.shape[2] == heads
    if not fits or sampling.shape[0] not in (1, batch):
        need = f"[{batch} or 1, Q, {heads}, {_listed(inner)}, 2]"
        raise ValueError(f"sampling: need shape {need}, got {list(sampling.shape)}")
    queries = sampling.shape[1]
    if logits.shape[1:] != (queries, heads, *inner) or logits.shape[0] not in (1, batch):
        need = f"[{batch} or 1, {queries}, {heads}, {_listed(inner)}]"
        raise ValueError(f"logits: need shape {need}, got {list(logits.shape)}")
    total = math.prod(inner)
    sampling = sampling.reshape(sampling.shape[0], queries, heads, total, 2)
    logits = logits.reshape(logits.shape[0], queries, heads, total)
    return sampling.expand(batch, -1, -1, -1, -1), logits.expand(batch, -1, -1, -1), counts


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _check_reference(
    reference: Any, batch: int, queries: int, levels: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, Tensor | None]:
    """What ``sampling`` counts from, and the references ``[B, Q, L, 2 or 4]`` if these are points or boxes."""
    if reference is None:
        return IMAGE, None
    if isinstance(reference, str):
        if reference != GRID:
            raise ValueError(f"reference: got {reference!r}, need 'grid', None or a tensor")
        return GRID, None
    reason = why_no_float(reference)
    if reason is not None:
        raise TypeError(f"reference: need 'grid', None or a tensor; {reason}")
    if reference.device != device:
        raise ValueError(f"reference: need device {device} as value, got {reference.device}")
    fits = reference.dim() == 4 and reference.shape[0] in (1, batch) and reference.shape[1] == queries
    if not fits or reference.shape[2] not in (1, levels) or reference.shape[3] not in (2, 4):
        raise ValueError(
            f"reference: need shape [{batch} or 1, {queries}, {levels} or 1, 2 or 4], got {list(reference.shape)}"
        )
    origin = POINTS if reference.shape[3] == 2 else BOXES
    return origin, reference.to(dtype).expand(batch, -1, levels, -1)
