"""Deformable attention by Triton kernels, for maps of any size: what a query reads is gathered from the L2 cache.

    attend_kernel         four corners of every point, weighted and added in fp32, and rounded once
    places_grad_kernel    the dot products of the same corners with the gradient; from them those of sampling and logits
    levels_grad_kernel    the gradient goes to the corners, as integers of 64 bits, which add to the same in any order
    convert_kernel        these integers to the levels' own dtype

A program has one head of a block of queries. Every kernel places a point in the same way: products and sums are not
fused there, so that a point on a kink has the derivative that the specification gives it. Elsewhere multiply-adds are
fused, by name.

The integers count in units of a power of two that follows from the largest gradient of the batch row and head, and of
the sum of its weights where these are the logits themselves, so that the sum over all queries fits: with a thousand of
them a unit is at most 2**-48 of the largest gradient. One that is NaN or infinite makes the gradients of the
levels NaN for its whole batch row and head, also where plain torch would spoil a few pixels. As many levels at a time
are done as have 32 MiB of such integers, at least one: their memory is that, or 8 bytes for each element of the largest
level.

Modelled for MMFuser in bf16 (24 x 24, 4 levels, 4 points, 16 heads of 64) an image; measured on an H100 at B 16: 9.6 us
for the forward, 117 for all gradients. Levels, sampling,
logits and output are 7.7 MB of memory, 1.8 us at 4.3 TB/s; the gathers are 75 MB from the caches, 14 us at 5.5 TB/s if
L1 had none of them. Gradients of sampling and logits gather as much; those of the levels are 38 million additions of
8 bytes in the L2 cache, and 19 MB of integers that are cleared, and read.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.ops.deform_attn.geometry import BOXES, GRID, IMAGE, Geometry
from igva_kernels.ops.deform_attn.op import DeformAttn
from igva_kernels.runtime.triton.common import cast, kernel_with
from igva_kernels.runtime.triton.launch import launch, strides

_GRID, _IMAGE, _BOXES = tl.constexpr(GRID), tl.constexpr(IMAGE), tl.constexpr(BOXES)

_TILE_BYTES, _NUM_WARPS = 2048, 4
"""Of what a program gathers at once: 16 bytes per thread. More queries would leave multiprocessors without a program at
one image, and hold more registers."""
_TILE_INTEGERS = 512
"""Of what a program adds at once. Threads have some channel of every query there, and hold where each of them goes."""
_WIDEST = 128
"""Channels of a tile. A wider head has several."""
_TILE_POINTS = 2048
"""Points of all queries of a program: for each a thread has up to three registers, in 16 places."""
_SCRATCH_BYTES = 2**25
"""Integers of the gradients of the levels, at a time: what an L2 cache keeps beside what is read."""
_SUM_BITS = 58
"""Of a sum of products of two numbers below 4, so that it is below 2**62."""
_LARGEST_SIDE = 2**24
"""Beyond it fp32 has not every pixel."""
_OPTIONS = {"num_warps": _NUM_WARPS, "num_stages": 1, "enable_fp_fusion": False}
_ALL = slice(None)

kernel = kernel_with("num_queries", "num_tiles", "num_pixels")


@triton.jit
def of_level(values, level):
    """``values[level]`` of one number or address for each level, or of one for all.

    Selections, since loops over levels stay loops: unrolled, they would take half a minute to compile for 24 levels.
    """
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(level == i, values[i], found)
    return found


@triton.jit
def first_point_of(POINTS: tl.constexpr, level):
    """The first point of a level, counted over all levels.

    It follows from the level alone. Triton (3.6 and 3.7) loses what one pass of a loop leaves to the next where the
    bounds of an inner loop depend on it: every level would then read the points of the first.
    """
    if len(POINTS) == 1:
        first = level * POINTS[0]
    else:
        first = level * 0
        for i in tl.static_range(len(POINTS) - 1):
            first += tl.where(level > i, POINTS[i], 0)
    return first


@triton.jit
def block_of(num_queries, HEADS: tl.constexpr, TILES_D: tl.constexpr, BLOCK_Q: tl.constexpr):
    """``(b, head, queries [BQ], which exist, first channel / BLOCK_D)`` of this program.

    Programs that run together share a head.
    """
    pid = tl.program_id(0)
    tiles_q = tl.cdiv(num_queries, BLOCK_Q)
    o_q = ((pid // TILES_D) % tiles_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    bh = pid // TILES_D // tiles_q
    return (bh // HEADS).to(tl.int64), bh % HEADS, o_q, o_q < num_queries, pid % TILES_D


@triton.jit
def given_of(sampling, logits, place_strides, b, h, o_m, NUM_POINTS: tl.constexpr):
    """The addresses of the samplings and logits of every query, and where its references begin, each ``[BQ]``."""
    p_sampling = sampling + b * place_strides[0] + o_m * place_strides[1] + h * (2 * NUM_POINTS)
    p_logits = logits + b * place_strides[2] + o_m * place_strides[3] + h * NUM_POINTS
    return p_sampling, p_logits, b * place_strides[4] + o_m * place_strides[5]


@triton.jit
def normaliser(p_logits, m_q, NUM_POINTS: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_S: tl.constexpr):
    """``(largest logit, 1 / sum of the exponentials)`` of every query, for ``weight_of``."""
    o_s = tl.arange(0, BLOCK_S)[None, :]
    if SOFTMAX:
        b_logits = tl.load(p_logits[:, None] + o_s, mask=m_q[:, None] & (o_s < NUM_POINTS), other=0.0)  # [BQ, BS]
        b_logits = tl.where(o_s < NUM_POINTS, b_logits, float("-inf"))
        b_largest = tl.max(b_logits, axis=1)
        return b_largest, 1.0 / tl.sum(tl.exp(b_logits - b_largest[:, None]), axis=1)
    else:
        return m_q.to(tl.float32), m_q.to(tl.float32)


@triton.jit
def weight_of(b_logit, b_largest, b_scale, SOFTMAX: tl.constexpr):
    """The weight of a point."""
    if SOFTMAX:
        return tl.exp(b_logit - b_largest) * b_scale
    else:
        return b_logit


@triton.jit
def frame_of(reference, o_reference, o_q, m_q, heights, widths, level, HALF_SHARES: tl.constexpr, ORIGIN: tl.constexpr):
    """``(origin x, origin y, step x, step y, height, width)``: a position in pixels is ``origin + step * sampling``.

    The first four are ``[BQ]``.
    """
    height, width = of_level(heights, level), of_level(widths, level)
    one = tl.full(o_q.shape, 1.0, tl.float32)
    if ORIGIN == _GRID:
        side = tl.cast(width, tl.int32)
        return (o_q % side).to(tl.float32), (o_q // side).to(tl.float32), one, one, height, width
    elif ORIGIN == _IMAGE:
        return one * -0.5, one * -0.5, one * width, one * height, height, width
    else:
        p_reference = reference + o_reference + level * (4 if ORIGIN == _BOXES else 2)
        x = tl.load(p_reference, mask=m_q, other=0.0) * width - 0.5
        y = tl.load(p_reference + 1, mask=m_q, other=0.0) * height - 0.5
        if ORIGIN == _BOXES:
            half_share = of_level(HALF_SHARES, level)
            step_x = (tl.load(p_reference + 2, mask=m_q, other=0.0) * width - 0.5 + 0.5) * half_share
            step_y = (tl.load(p_reference + 3, mask=m_q, other=0.0) * height - 0.5 + 0.5) * half_share
            return x, y, step_x, step_y, height, width
        else:
            return x, y, one, one, height, width


@triton.jit
def cell_of(b_sampling, b_origin, b_step, ORIGIN: tl.constexpr):
    """A coordinate of the cell's first corner, a whole number, and the position within the cell."""
    if ORIGIN == _GRID:  # the query's own pixel is a whole number, so that nothing is rounded
        floor = tl.floor(b_sampling)
        cell = b_origin + floor
        fraction = b_sampling - floor
    else:
        position = b_origin + b_step * b_sampling
        cell = tl.floor(position)
        fraction = position - cell
    # An infinite position has the fraction NaN, and reads nothing.
    return cell, tl.where((fraction == fraction) | (cell != cell), fraction, 0.0)


@triton.jit
def place_of(p_sampling, m_q, frame, ORIGIN: tl.constexpr):
    """``(above, below, x0, x1, y0, y1, right, down)``: where a point of every query lies, each ``[BQ]``.

    The pixels of the cell's corners are above, above + 1, below and below + 1; x0 and x1 say which of its columns
    exist, y0 and y1 which of its rows, as told in fp32, before there are integers; the last two are the position within
    the cell.
    """
    origin_x, origin_y, step_x, step_y, height, width = frame
    x, right = cell_of(tl.load(p_sampling, mask=m_q, other=0.0), origin_x, step_x, ORIGIN)
    y, down = cell_of(tl.load(p_sampling + 1, mask=m_q, other=0.0), origin_y, step_y, ORIGIN)
    x0 = m_q & (x >= 0) & (x < width)
    x1 = m_q & (x >= -1) & (x < width - 1)
    y0 = m_q & (y >= 0) & (y < height)
    y1 = m_q & (y >= -1) & (y < height - 1)
    column = tl.where(x0 | x1, x, 0.0).to(tl.int32)
    row = tl.where(y0 | y1, y, 0.0).to(tl.int32)
    side = tl.cast(width, tl.int64)
    o_pixel = row.to(tl.int64) * side + column
    return o_pixel, o_pixel + side, x0, x1, y0, y1, right, down


@triton.jit
def corners(p_level, place, stride, m_d):
    """The four corners of ``place_of``, each ``[BQ, BD]`` in fp32: zero where there is none."""
    above, below, x0, x1, y0, y1, _, _ = place
    p_above, p_below = p_level + (above * stride)[:, None], p_level + (below * stride)[:, None]
    b_00 = tl.load(p_above, mask=(x0 & y0)[:, None] & m_d, other=0.0).to(tl.float32)
    b_01 = tl.load(p_above + stride, mask=(x1 & y0)[:, None] & m_d, other=0.0).to(tl.float32)
    b_10 = tl.load(p_below, mask=(x0 & y1)[:, None] & m_d, other=0.0).to(tl.float32)
    b_11 = tl.load(p_below + stride, mask=(x1 & y1)[:, None] & m_d, other=0.0).to(tl.float32)
    return b_00, b_01, b_10, b_11


@triton.jit
def head_of(levels, stride_level, HEAD_STRIDES: tl.constexpr, level, b, h):
    """The address of the first row of a head in a level."""
    return of_level(levels, level) + b * of_level(stride_level, level) + h.to(tl.int64) * of_level(HEAD_STRIDES, level)


@kernel
def attend_kernel(
    levels, sampling, logits, reference, out, heights, widths, num_queries,
    stride_level, place_strides,
    NUM_LEVELS: tl.constexpr, POINTS: tl.constexpr, NUM_POINTS: tl.constexpr, HALF_SHARES: tl.constexpr,
    ORIGIN: tl.constexpr, SOFTMAX: tl.constexpr, ROW_STRIDES: tl.constexpr, HEAD_STRIDES: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile ``[BLOCK_Q queries, BLOCK_D]`` of one head."""
    b, h, o_q, m_q, tile_d = block_of(num_queries, HEADS, (WIDTH + BLOCK_D - 1) // BLOCK_D, BLOCK_Q)
    o_d = (tile_d * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    m_d = o_d < WIDTH
    o_m = o_q.to(tl.int64)
    p_sampling, p_logits, o_reference = given_of(sampling, logits, place_strides, b, h, o_m, NUM_POINTS)
    b_largest, b_scale = normaliser(p_logits, m_q, NUM_POINTS, SOFTMAX, BLOCK_S)

    b_out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for level in range(NUM_LEVELS):
        frame = frame_of(reference, o_reference, o_q, m_q, heights, widths, level, HALF_SHARES, ORIGIN)
        p_level = head_of(levels, stride_level, HEAD_STRIDES, level, b, h) + o_d
        stride = of_level(ROW_STRIDES, level)
        first = first_point_of(POINTS, level)
        for i in range(of_level(POINTS, level)):
            point = first + i
            place = place_of(p_sampling + 2 * point, m_q, frame, ORIGIN)
            right, down = place[6], place[7]
            b_logit = tl.load(p_logits + point, mask=m_q, other=0.0)
            b_weight = weight_of(b_logit, b_largest, b_scale, SOFTMAX)
            b_left, b_right = b_weight * (1 - right), b_weight * right
            b_00, b_01, b_10, b_11 = corners(p_level, place, stride, m_d)
            b_out = tl.fma((b_left * (1 - down))[:, None], b_00, b_out)
            b_out = tl.fma((b_right * (1 - down))[:, None], b_01, b_out)
            b_out = tl.fma((b_left * down)[:, None], b_10, b_out)
            b_out = tl.fma((b_right * down)[:, None], b_11, b_out)
    p_out = out + ((b * num_queries + o_m) * (HEADS * WIDTH) + h * WIDTH)[:, None] + o_d
    tl.store(p_out, cast(b_out, out.dtype.element_ty), mask=m_q[:, None] & m_d)


@kernel
def places_grad_kernel(
    grad, levels, sampling, logits, reference, grad_sampling, grad_logits, heights, widths, num_queries,
    stride_gb, stride_gq, stride_level, place_strides,
    NUM_LEVELS: tl.constexpr, POINTS: tl.constexpr, NUM_POINTS: tl.constexpr, HALF_SHARES: tl.constexpr,
    ORIGIN: tl.constexpr, SOFTMAX: tl.constexpr, IN_PIXELS: tl.constexpr, ROW_STRIDES: tl.constexpr,
    HEAD_STRIDES: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All points of ``BLOCK_Q`` queries of one head, over all channels."""
    b, h, o_q, m_q, _ = block_of(num_queries, HEADS, 1, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_m = o_q.to(tl.int64)
    p_sampling, p_logits, o_reference = given_of(sampling, logits, place_strides, b, h, o_m, NUM_POINTS)

    p_grad = grad + (b * stride_gb + o_m * stride_gq + h * WIDTH)[:, None] + o_d
    b_grads = ()
    for start in tl.static_range(0, WIDTH, BLOCK_D):
        b_grad = tl.load(p_grad + start, mask=m_q[:, None] & (start + o_d < WIDTH), other=0.0).to(tl.float32)
        b_grads = b_grads + (b_grad,)  # type: ignore[assignment]

    # The gradients of the weights, and those of the positions without the weights; each point puts its own into them.
    o_s = tl.arange(0, BLOCK_S)[None, :]
    b_weight_grads = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    b_xs = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    b_ys = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    for level in range(NUM_LEVELS):
        frame = frame_of(reference, o_reference, o_q, m_q, heights, widths, level, HALF_SHARES, ORIGIN)
        p_level = head_of(levels, stride_level, HEAD_STRIDES, level, b, h) + o_d
        stride = of_level(ROW_STRIDES, level)
        first = first_point_of(POINTS, level)
        for i in range(of_level(POINTS, level)):
            point = first + i
            place = place_of(p_sampling + 2 * point, m_q, frame, ORIGIN)
            right, down = place[6], place[7]
            b_00, b_01, b_10, b_11 = dots(b_grads, p_level, place, stride, o_d, WIDTH)
            if grad_logits is not None:
                b_above = (1 - right) * b_00 + right * b_01
                b_below = (1 - right) * b_10 + right * b_11
                b_weight_grad = (1 - down) * b_above + down * b_below
                b_weight_grads = tl.where(o_s == point, b_weight_grad[:, None], b_weight_grads)
            if grad_sampling is not None:
                b_x = (1 - down) * (b_01 - b_00) + down * (b_11 - b_10)
                b_y = (1 - right) * (b_10 - b_00) + right * (b_11 - b_01)
                if not IN_PIXELS:
                    b_x *= frame[2]
                    b_y *= frame[3]
                # A coordinate that is NaN spoils both.
                is_place = (right == right) & (down == down)
                b_xs = tl.where(o_s == point, tl.where(is_place, b_x, float("nan"))[:, None], b_xs)
                b_ys = tl.where(o_s == point, tl.where(is_place, b_y, float("nan"))[:, None], b_ys)

    m_s = m_q[:, None] & (o_s < NUM_POINTS)
    o_out = (((b * num_queries + o_m) * HEADS + h) * NUM_POINTS)[:, None]
    b_largest, b_scale = normaliser(p_logits, m_q, NUM_POINTS, SOFTMAX, BLOCK_S)
    b_logits = tl.load(p_logits[:, None] + o_s, mask=m_s, other=float("-inf") if SOFTMAX else 0.0)
    b_weights = weight_of(b_logits, b_largest[:, None], b_scale[:, None], SOFTMAX)  # [BQ, BS]
    if grad_logits is not None:
        if SOFTMAX:
            b_mean = tl.sum(b_weights * b_weight_grads, axis=1)[:, None]
            b_weight_grads = b_weights * (b_weight_grads - b_mean)
        tl.store(grad_logits + o_out + o_s, b_weight_grads, mask=m_s)
    if grad_sampling is not None:
        o_xy = tl.arange(0, 2 * BLOCK_S)[None, :]
        b_places = tl.interleave(b_weights * b_xs, b_weights * b_ys)
        tl.store(grad_sampling + 2 * o_out + o_xy, b_places, mask=m_q[:, None] & (o_xy < 2 * NUM_POINTS))


@triton.jit
def dots(b_grads, p_level, place, stride, o_d, WIDTH: tl.constexpr):
    """The gradient, in tiles of channels, times each of the four corners: each ``[BQ]``."""
    BLOCK_D: tl.constexpr = o_d.shape[1]
    b_00 = tl.zeros(b_grads[0].shape, tl.float32)
    b_01, b_10, b_11 = b_00, b_00, b_00
    for tile in tl.static_range(len(b_grads)):
        v_00, v_01, v_10, v_11 = corners(p_level + tile * BLOCK_D, place, stride, tile * BLOCK_D + o_d < WIDTH)
        b_00 = tl.fma(b_grads[tile], v_00, b_00)
        b_01 = tl.fma(b_grads[tile], v_01, b_01)
        b_10 = tl.fma(b_grads[tile], v_10, b_10)
        b_11 = tl.fma(b_grads[tile], v_11, b_11)
    return tl.sum(b_00, axis=1), tl.sum(b_01, axis=1), tl.sum(b_10, axis=1), tl.sum(b_11, axis=1)


@triton.jit
def exponent_of(x):
    """Of the power of two below x >= 0; one that fp32 has, and whose inverse it has."""
    return tl.minimum(tl.maximum((x.to(tl.int32, bitcast=True) >> 23) - 127, -126), 126)


@triton.jit
def power_of_two(exponent):
    """``2 ** exponent``, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


# Of tensors that are not known to be aligned a thread takes one element, so that the lanes of a warp add to neighbours.
@kernel_with("num_queries", "num_pixels", "grad", "integers")
def levels_grad_kernel(
    grad, sampling, logits, reference, largest_grad, largest_weight, integers, heights, widths, num_queries, num_pixels,
    unit, stride_gb, stride_gq, place_strides,
    FIRST_LEVEL: tl.constexpr, FIRST_POINT: tl.constexpr, NUM_LEVELS: tl.constexpr, POINTS: tl.constexpr,
    NUM_POINTS: tl.constexpr, HALF_SHARES: tl.constexpr, ORIGIN: tl.constexpr, SOFTMAX: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What one tile ``[BLOCK_Q queries, BLOCK_D]`` of one head adds to ``integers [B, num_pixels, HEADS, WIDTH]``, in
    some of the levels."""
    b, h, o_q, m_q, tile_d = block_of(num_queries, HEADS, (WIDTH + BLOCK_D - 1) // BLOCK_D, BLOCK_Q)
    o_d = (tile_d * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    m_d = o_d < WIDTH
    o_m = o_q.to(tl.int64)
    p_sampling, p_logits, o_reference = given_of(sampling, logits, place_strides, b, h, o_m, NUM_POINTS)
    b_largest, b_scale = normaliser(p_logits, m_q, NUM_POINTS, SOFTMAX, BLOCK_S)

    p_largest = largest_grad + b * HEADS + h
    p_grad = grad + (b * stride_gb + o_m * stride_gq + h * WIDTH)[:, None] + o_d
    b_grad = tl.load(p_grad, mask=m_q[:, None] & m_d, other=0.0).to(tl.float32)
    b_grad = b_grad * power_of_two(-exponent_of(tl.load(p_largest))) * unit
    if SOFTMAX:
        # Every program that sees a NaN writes the same, and what others have read before is used no more.
        is_spoilt = tl.max((b_scale != b_scale).to(tl.int32), axis=0) > 0
        tl.store(p_largest, float("nan"), mask=is_spoilt)
    else:
        weight_unit = power_of_two(-exponent_of(tl.load(largest_weight + b * HEADS + h)))

    if reference is not None:
        o_reference += FIRST_LEVEL * (4 if ORIGIN == _BOXES else 2)
    p_level = integers + (b * num_pixels * HEADS + h) * WIDTH + o_d
    pixel = tl.full((), 0, tl.int64)
    for level in range(NUM_LEVELS):
        frame = frame_of(reference, o_reference, o_q, m_q, heights, widths, level, HALF_SHARES, ORIGIN)
        first = FIRST_POINT + first_point_of(POINTS, level)
        for i in range(of_level(POINTS, level)):
            point = first + i
            above, below, x0, x1, y0, y1, right, down = place_of(p_sampling + 2 * point, m_q, frame, ORIGIN)
            b_logit = tl.load(p_logits + point, mask=m_q, other=0.0)
            b_weight = weight_of(b_logit, b_largest, b_scale, SOFTMAX)
            if not SOFTMAX:
                b_weight *= weight_unit
            b_point = b_weight[:, None] * b_grad
            add(p_level, pixel + above, HEADS * WIDTH, (1 - right) * (1 - down), b_point, x0 & y0, m_d)
            add(p_level, pixel + above + 1, HEADS * WIDTH, right * (1 - down), b_point, x1 & y0, m_d)
            add(p_level, pixel + below, HEADS * WIDTH, (1 - right) * down, b_point, x0 & y1, m_d)
            add(p_level, pixel + below + 1, HEADS * WIDTH, right * down, b_point, x1 & y1, m_d)
        pixel += pixels_of(heights, widths, level)


@triton.jit
def add(p_level, o_pixel, stride, b_share, b_point, exists, m_d):
    """Adds ``b_share [BQ] * b_point [BQ, BD]``, in integers, to a pixel of every query."""
    b_value = (b_share[:, None] * b_point).to(tl.int64)
    tl.atomic_add(p_level + (o_pixel * stride)[:, None], b_value, mask=exists[:, None] & m_d, sem="relaxed")


@triton.jit
def pixels_of(heights, widths, level):
    """Of a level."""
    return tl.cast(of_level(heights, level), tl.int64) * tl.cast(of_level(widths, level), tl.int64)


@kernel
def convert_kernel(
    integers, largest_grad, largest_weight, outs, heights, widths, num_tiles, num_pixels, inverse_unit, stride_level,
    NUM_LEVELS: tl.constexpr, ROW_STRIDES: tl.constexpr, HEAD_STRIDES: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile ``[BLOCK_R pixels of a level, BLOCK_D]`` of one head; a batch row has ``num_tiles`` over all levels."""
    TILES_D: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    o_d = ((pid % TILES_D) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    h = (pid // TILES_D) % HEADS
    tile = (pid // TILES_D // HEADS) % num_tiles
    b = (pid // TILES_D // HEADS // num_tiles).to(tl.int64)

    # The level that the tile is in, the tile's number there, and the level's first pixel among all.
    level = 0
    pixel = tl.full((), 0, tl.int64)
    for i in range(NUM_LEVELS - 1):
        pixels = pixels_of(heights, widths, i)
        tiles = tl.cdiv(pixels, BLOCK_R).to(tl.int32)
        is_later = (level == i) & (tile >= tiles)
        level += is_later.to(tl.int32)
        tile -= tl.where(is_later, tiles, 0)
        pixel += tl.where(is_later, pixels, 0)

    bound = tl.load(largest_grad + b * HEADS + h)
    exponent = exponent_of(bound)
    if largest_weight is not None:
        weight = tl.load(largest_weight + b * HEADS + h)
        exponent += exponent_of(weight)
        bound += weight
    # In two steps, neither of which leaves the range of fp32 before the result does.
    half = exponent >> 1
    o_r = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    mask = (o_r < pixels_of(heights, widths, level)) & (o_d < WIDTH)
    p_sum = integers + ((b * num_pixels + pixel + o_r) * HEADS + h) * WIDTH + o_d
    b_sum = tl.load(p_sum, mask=mask, other=0).to(tl.float32) * inverse_unit
    b_sum = b_sum * power_of_two(half) * power_of_two(exponent - half)
    b_sum = tl.where(tl.abs(bound) < float("inf"), b_sum, float("nan"))
    p_out = head_of(outs, stride_level, HEAD_STRIDES, level, b, h) + o_r * of_level(ROW_STRIDES, level) + o_d
    tl.store(p_out, cast(b_sum, outs[0].dtype.element_ty), mask=mask)


class TritonDeformAttn(DeformAttn):
    """``DeformAttn`` by the kernels above."""

    def attend(
        self, levels: Sequence[Tensor], sampling: Tensor, logits: Tensor, reference: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """As in ``DeformAttn``."""
        (batch, queries, _), (_, _, heads, width) = sampling.shape, levels[0].shape
        constants = _constants(geometry, queries, heads, width, _TILE_BYTES // levels[0].itemsize)
        out = levels[0].new_empty(batch, queries, heads * width)
        launch(
            attend_kernel, batch * heads * _tiles(queries, constants) * triton.cdiv(width, constants["BLOCK_D"]),
            out.device, tuple(levels), sampling, logits, reference, out, *_levels_of(geometry, _ALL), queries,
            strides(tuple(levels), 0), _place_strides(sampling, logits, reference),
            **constants, **_inner_strides(levels),
        )  # fmt: skip
        return out

    def attend_grad(
        self, grad: Tensor, levels: Sequence[Tensor] | None, sampling: Tensor, logits: Tensor,
        reference: Tensor | None, geometry: Geometry, grad_levels: Sequence[Tensor] | None, needs: tuple[bool, bool],
        in_pixels: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """As in ``DeformAttn``. A NaN or infinity in ``grad`` or ``logits`` makes the gradients of the levels NaN for
        its whole batch row and head."""
        batch, queries, width = grad.shape
        heads = logits.shape[2] // geometry.num_points
        grad_sampling, grad_logits = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else None
            for tensor, need in zip((sampling, logits), needs, strict=True)
        )
        if any(needs):
            assert levels is not None
            constants = _constants(geometry, queries, heads, width // heads, _TILE_BYTES // grad.itemsize)
            launch(
                places_grad_kernel, batch * heads * _tiles(queries, constants), grad.device,
                grad, tuple(levels), sampling, logits, reference, grad_sampling, grad_logits,
                *_levels_of(geometry, _ALL), queries, *grad.stride()[:2], strides(tuple(levels), 0),
                _place_strides(sampling, logits, reference),
                **constants, **_inner_strides(levels), IN_PIXELS=in_pixels,
            )  # fmt: skip
        if grad_levels is not None:
            _levels_grad(grad, sampling, logits, reference, geometry, grad_levels)
        return grad_sampling, grad_logits


def _levels_grad(
    grad: Tensor, sampling: Tensor, logits: Tensor, reference: Tensor | None, geometry: Geometry,
    grad_levels: Sequence[Tensor],
) -> None:  # fmt: skip
    """Writes the gradients of the levels."""
    (batch, queries, _), (_, _, heads, width) = grad.shape, grad_levels[0].shape
    constants = _constants(geometry, queries, heads, width, _TILE_INTEGERS)
    largest_grad = torch.linalg.vector_norm(grad.unflatten(2, (heads, width)), torch.inf, (1, 3)).float().contiguous()
    largest_weight = None
    if not geometry.softmax:
        sums = torch.linalg.vector_norm(logits.unflatten(2, (heads, geometry.num_points)), 1, 3)
        largest_weight = sums.amax(1).contiguous()
    unit = 2.0 ** (_SUM_BITS - (queries - 1).bit_length())
    tiles_d = triton.cdiv(width, constants["BLOCK_D"])
    block_r = 2 * _TILE_INTEGERS // constants["BLOCK_D"]
    of_convert = {name: constants[name] for name in ("HEADS", "WIDTH", "BLOCK_D", *_OPTIONS)}
    pixel = batch * heads * width
    groups = [*_groups(geometry.rows, pixel * torch.int64.itemsize)]
    most = max(sum(geometry.rows[group]) for group in groups)
    memory = torch.empty(most * pixel, dtype=torch.int64, device=grad.device)
    for group in groups:
        rows, outs, sizes = geometry.rows[group], tuple(grad_levels[group]), _levels_of(geometry, group)
        points, integers = _points_of(geometry, group), memory[: sum(rows) * pixel].zero_()
        launch(
            levels_grad_kernel, batch * heads * _tiles(queries, constants) * tiles_d, grad.device,
            grad, sampling, logits, reference, largest_grad, largest_weight, integers, *sizes, queries, sum(rows), unit,
            *grad.stride()[:2], _place_strides(sampling, logits, reference),
            **constants | points, FIRST_LEVEL=group.start, FIRST_POINT=geometry.firsts[group.start],
        )  # fmt: skip
        num_tiles = sum(triton.cdiv(count, block_r) for count in rows)
        launch(
            convert_kernel, batch * num_tiles * heads * tiles_d, grad.device,
            integers, largest_grad, largest_weight, outs, *sizes, num_tiles, sum(rows), 1 / unit,
            strides(outs, 0), NUM_LEVELS=points["NUM_LEVELS"], BLOCK_R=block_r, **of_convert, **_inner_strides(outs),
        )  # fmt: skip


def _groups(rows: Sequence[int], row_bytes: int) -> Iterator[slice]:
    """Levels whose integers are in memory together."""
    first, total = 0, 0
    for level, count in enumerate(rows):
        if level > first and (total + count) * row_bytes > _SCRATCH_BYTES:
            yield slice(first, level)
            first, total = level, 0
        total += count
    yield slice(first, len(rows))


def _levels_of(geometry: Geometry, levels: slice) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The heights and the widths; no integers, since Triton compiles anew for those that are 1 or a multiple of 16."""
    heights, widths = zip(*geometry.shapes[levels], strict=True)
    if max(heights + widths) > _LARGEST_SIDE:
        raise NotImplementedError(
            f"shapes: the Triton kernels need sides of at most {_LARGEST_SIDE} pixels, got {list(geometry.shapes)}"
        )
    return tuple(map(float, heights)), tuple(map(float, widths))


def _constants(geometry: Geometry, queries: int, heads: int, width: int, elements: int) -> dict[str, Any]:
    """Of a kernel over queries, with tiles of so many elements."""
    block_d = min(triton.next_power_of_2(width), _WIDEST)
    block_s = triton.next_power_of_2(geometry.num_points)
    most = max(1, min(elements // block_d, _TILE_POINTS // block_s))
    return _points_of(geometry, _ALL) | _OPTIONS | {
        "NUM_POINTS": geometry.num_points, "ORIGIN": geometry.origin, "SOFTMAX": geometry.softmax,
        "HEADS": heads, "WIDTH": width,
        "BLOCK_Q": min(most, triton.next_power_of_2(queries)), "BLOCK_S": block_s, "BLOCK_D": block_d,
    }  # fmt: skip


def _points_of(geometry: Geometry, levels: slice) -> dict[str, Any]:
    """The constants of some levels."""
    points = geometry.points[levels]
    half_shares = tuple(0.5 / max(count, 1) for count in points)
    return {"NUM_LEVELS": len(points), "POINTS": _shared(points), "HALF_SHARES": _shared(half_shares)}


def _shared(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """One value where all levels share it, otherwise one per level."""
    return values[:1] if len(set(values)) == 1 else values


def _tiles(queries: int, constants: dict[str, Any]) -> int:
    """Blocks of queries."""
    return triton.cdiv(queries, constants["BLOCK_Q"])


def _place_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Of batch and queries, tensor by tensor."""
    return tuple(stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2]))


def _inner_strides(levels: Sequence[Tensor]) -> dict[str, Any]:
    """From a pixel to the next and from a head to the next; constants, since a model has the same in every batch."""
    return {"ROW_STRIDES": strides(tuple(levels), 1), "HEAD_STRIDES": strides(tuple(levels), 2)}


IMPLEMENTATION = TritonDeformAttn()
