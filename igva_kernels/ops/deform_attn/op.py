"""Deformable attention as torch sees it: schema, fake and gradients, and what implementations are given."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from igva_kernels.ops.deform_attn.geometry import BOXES, GRID, POINTS, Geometry
from igva_kernels.registry import Implementation, Operator
from igva_kernels.runtime.dense import accumulation_dtype
from igva_kernels.runtime.operands import adjacent
from igva_kernels.runtime.torch_op import define, no_second_derivative

OPERATOR = Operator("deform_attn", __package__)


class DeformAttn(Implementation):
    """The steps of the operator.

    They are given ``levels``, L tensors ``[B, H*W, Hd, dh]``, and ``grad`` ``[B, Q, Hd*dh]``, whose last dimensions lie
    together, and in the accumulation dtype ``sampling`` ``[B, Q, Hd*S*2]``, ``logits`` ``[B, Q, Hd*S]`` and
    ``reference`` ``[B, Q, L*2]`` (points), ``[B, Q, L*4]`` (boxes) or None, each row of which is dense. Batch and
    queries have any strides, also 0. Neither the output nor a level is empty, and S is not 0.
    """

    def attend(
        self, levels: Sequence[Tensor], sampling: Tensor, logits: Tensor, reference: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """The output ``[B, Q, Hd*dh]``, dense."""
        raise NotImplementedError

    def attend_grad(
        self, grad: Tensor, levels: Sequence[Tensor] | None, sampling: Tensor, logits: Tensor,
        reference: Tensor | None, geometry: Geometry, grad_levels: Sequence[Tensor] | None, needs: tuple[bool, bool],
        in_pixels: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Writes the gradients of the levels, and returns those of ``sampling`` and ``logits``, dense, as ``needs`` has
        it.

        Args:
            grad: the gradient of the output.
            levels: None where nothing is needed but the gradients of the levels.
            sampling, logits, reference, geometry: as above.
            grad_levels: memory like the levels, all of which is written; None where they need no gradient.
            needs: whether the gradients of ``sampling`` and of ``logits`` are needed.
            in_pixels: whether the former is to be the gradient of the positions in pixels, and not of ``sampling``.
        """
        raise NotImplementedError


def _attend(given: SimpleNamespace) -> Tensor:
    geometry = _geometry(given)
    _check_fits(given, given.value, geometry)
    out_shape = _out_shape(given)
    first = given.value[0]
    if not _is_work(out_shape, geometry):
        return first.new_zeros(out_shape)
    levels = [adjacent(level) for level in geometry.levels(given.value)]
    implementation = OPERATOR.serving(given.impl, first)
    return implementation.attend(levels, *_rows(given), geometry)


def _attend_fake(given: SimpleNamespace) -> Tensor:
    return given.value[0].new_empty(_out_shape(given))


def _save(given: SimpleNamespace, output: Tensor) -> dict[str, Any]:
    places = (given.sampling, given.logits, given.reference)
    reads_value = any(tensor is not None and tensor.requires_grad for tensor in places)
    kept = {name: value for name, value in vars(given).items() if name != "value"}
    return kept | {"value": given.value if reads_value else [], "num_values": len(given.value)}


def _differentiate(grad: Tensor, needs: SimpleNamespace, saved: SimpleNamespace) -> dict[str, Any]:
    of_value = any(needs.value)
    asked = {name: getattr(needs, name) for name in ("sampling", "logits", "reference")}
    count = saved.num_values
    found = _backward(**vars(saved), grad=grad, needs=[of_value, *asked.values()])
    grads: dict[str, Any] = {}
    if of_value:
        grads["value"], found = found[:count], found[count:]
    names = [name for name, need in asked.items() if need]
    return grads | dict(zip(names, found, strict=True))


def _run_backward(given: SimpleNamespace) -> list[Tensor]:
    geometry = _geometry(given)
    of_value, of_sampling, of_logits, of_reference = given.needs
    reads_value = of_sampling or of_logits or of_reference
    if reads_value:
        _check_fits(given, given.value, geometry)
    grads = _new_grads(given, geometry) if of_value else []
    _check_grad(given, given.value if reads_value else grads)
    _check_fits(given, grads, geometry)
    needs = (of_sampling or of_reference, of_logits)
    if _is_work(given.grad.shape, geometry):
        sampling_grad, logits_grad = OPERATOR.serving(given.impl, given.grad).attend_grad(
            adjacent(given.grad), [adjacent(level) for level in geometry.levels(given.value)] if reads_value else None,
            *_rows(given), geometry, geometry.levels(grads) if of_value else None, needs, of_reference,
        )  # fmt: skip
    else:
        grads = [grad.zero_() for grad in grads]
        sampling_grad, logits_grad = (
            torch.zeros_like(tensor, memory_format=torch.contiguous_format) if need else None
            for tensor, need in zip((given.sampling, given.logits), needs, strict=True)
        )
    found = list(grads)
    if sampling_grad is not None:
        sampling_grad = sampling_grad.view(given.sampling.shape)
        of_its_reference = _reference_grad(sampling_grad, given, geometry) if of_reference else None
        if of_sampling:
            found.append(_from_pixels(sampling_grad, given, geometry) if of_reference else sampling_grad)
    if logits_grad is not None:
        found.append(logits_grad.view(given.logits.shape))
    if of_reference:
        assert of_its_reference is not None
        found.append(of_its_reference)
    return found


def _from_pixels(positions: Tensor, given: SimpleNamespace, geometry: Geometry) -> Tensor:
    """The gradient of ``sampling`` ``[B, Q, Hd, S, 2]`` from that of the positions in pixels."""
    if geometry.origin == POINTS:
        return positions
    steps = [_steps(given.reference[:, :, level, 2:], geometry, level) for level in range(len(geometry.shapes))]
    of_levels = zip(geometry.of_levels(positions, 3), steps, strict=True)
    return torch.cat([part * step[:, :, None, None] for part, step in of_levels], 3)


def _steps(boxes: Tensor, geometry: Geometry, level: int) -> Tensor:
    """How many pixels a unit of ``sampling`` is, for boxes (w, h) ``[B, Q, 2]``; linear in them."""
    (height, width), count = geometry.shapes[level], max(geometry.points[level], 1)
    return torch.stack([boxes[..., 0] * (0.5 * width / count), boxes[..., 1] * (0.5 * height / count)], -1)


def _reference_grad(positions: Tensor, given: SimpleNamespace, geometry: Geometry) -> Tensor:
    """The gradient of the references ``[B, Q, L, 2 or 4]`` from that of the positions in pixels."""
    grads = []
    parts = zip(geometry.of_levels(positions, 3), geometry.of_levels(given.sampling, 3), strict=True)
    for level, (part, sampling) in enumerate(parts):
        height, width = geometry.shapes[level]
        x, y = part.sum((2, 3)).unbind(-1)
        grad = torch.stack([x * width, y * height], -1)
        if geometry.origin == BOXES:
            grad = torch.cat([grad, _steps((part * sampling).sum((2, 3)), geometry, level)], -1)
        grads.append(grad)
    return torch.stack(grads, 2)


def _backward_fake(given: SimpleNamespace) -> list[Tensor]:
    of_value, *of_places = given.needs
    found = _new_grads(given, _geometry(given)) if of_value else []
    places = (given.sampling, given.logits, given.reference)
    return found + [tensor.new_empty(tensor.shape) for tensor, need in zip(places, of_places, strict=True) if need]


def _new_grads(given: SimpleNamespace, geometry: Geometry) -> list[Tensor]:
    batch, _, width = given.grad.shape
    heads = given.sampling.shape[2]
    counts = [sum(geometry.rows)] if given.num_values == 1 else geometry.rows
    return [given.grad.new_empty((batch, rows, heads, width // max(heads, 1))) for rows in counts]


def _geometry(given: SimpleNamespace) -> Geometry:
    sizes = given.shapes
    shapes = tuple(zip(sizes[::2], sizes[1::2], strict=True))
    return Geometry(shapes, tuple(given.points), given.origin, given.softmax)


def _out_shape(given: SimpleNamespace) -> tuple[int, int, int]:
    batch, queries = given.sampling.shape[:2]
    return batch, queries, given.value[0].shape[2] * given.value[0].shape[3]


def _is_work(out_shape: Sequence[int], geometry: Geometry) -> bool:
    return all((*out_shape, *geometry.rows, geometry.num_points))


def _rows(given: SimpleNamespace) -> list[Any]:
    """``sampling``, ``logits`` and ``reference`` as implementations read them."""
    tensors = (given.sampling, given.logits, given.reference)
    return [None if tensor is None else adjacent(tensor.flatten(2)) for tensor in tensors]


def _check_fits(given: SimpleNamespace, values: Sequence[Tensor], geometry: Geometry) -> None:
    """Refuses what kernels would read beyond; the public function has checked it, and a direct call has not."""
    batch, queries, heads = given.sampling.shape[:3]
    levels, points = len(geometry.shapes), geometry.num_points
    if len(geometry.points) != levels or len(values) not in (0, 1, levels):
        raise ValueError(f"points: need one number for each of the {levels} levels, got {list(geometry.points)}")
    need = [(batch, sum(geometry.rows))] if len(values) == 1 else [(batch, rows) for rows in geometry.rows]
    for value, (count, rows) in zip(values, need, strict=bool(values)):
        if tuple(value.shape) != (count, rows, heads, value.shape[-1]) or value.dtype != values[0].dtype:
            raise ValueError(f"value: need {[count, rows, heads]} and the width of a head, got {list(value.shape)}")
    wide = accumulation_dtype(values[0].dtype if values else given.grad.dtype)
    expected = {
        "sampling": (batch, queries, heads, points, 2), "logits": (batch, queries, heads, points),
        "reference": (batch, queries, levels, 4 if given.origin == BOXES else 2),
    }  # fmt: skip
    for name, shape in expected.items():
        tensor = getattr(given, name)
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != wide):
            raise ValueError(f"{name}: need {list(shape)} of {wide}, got {list(tensor.shape)} of {tensor.dtype}")
    if (given.origin in (POINTS, BOXES)) != (given.reference is not None):
        raise ValueError(f"reference: need one where origin is {POINTS!r} or {BOXES!r}, and only there")
    if given.origin == GRID and any(rows != queries for rows in geometry.rows):
        raise ValueError(f"shapes: need levels of {queries} pixels, one for each query, got {list(geometry.shapes)}")


def _check_grad(given: SimpleNamespace, values: Sequence[Tensor]) -> None:
    """The same for the gradient of the output."""
    for value in values:
        need, dtype = (*given.sampling.shape[:2], value.shape[2] * value.shape[3]), value.dtype
        if tuple(given.grad.shape) != need or given.grad.dtype != dtype:
            raise ValueError(f"grad: need {list(need)} of {dtype}, got {list(given.grad.shape)} of {given.grad.dtype}")


_backward = define(
    "deform_attn_backward(Tensor grad, Tensor[] value, Tensor sampling, Tensor logits, Tensor? reference,"
    " SymInt[] shapes, int[] points, str origin, bool softmax, int num_values, bool[] needs, str impl) -> Tensor[]",
    _run_backward, _backward_fake, None, no_second_derivative,
)  # fmt: skip
deform_attn = define(
    "deform_attn(Tensor[] value, Tensor sampling, Tensor logits, Tensor? reference, SymInt[] shapes,"
    " int[] points, str origin, bool softmax, str impl) -> Tensor",
    _attend, _attend_fake, _save, _differentiate,
)  # fmt: skip
