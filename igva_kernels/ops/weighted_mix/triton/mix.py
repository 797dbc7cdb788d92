"""The one-pass mix, and its two gradients.

Forward, for every row (b, p) and block g, in one read of each layer:

    A[b, p, block g] = sum over columns c of w[b, c] * sum over terms (s, layers) of c of s * sum over l of h_l

Layers are added in fp32 in index order, then scaled, then added to the block by a fused multiply-add, and rounded
once. With a norm, mean and variance of the unrounded row come from registers (two passes), and the normalised row is
what is rounded.

Modelled floor, CLIP-L/336 and IGVA, bf16, u = P*D*2 bytes = 1.18 MB per image: 24 layers read, 2 blocks written =
26 u = 30.7 MB, 7.1 us per image at 4.3 TB/s; 4 u more where the group sums are kept. The 27 fp32 additions and
multiplications per element are free beside that.

Gradients: ``dw[b, c] = sum over p, d of s * dA * h`` as fp32 partials per row, added afterwards in a fixed order (IGVA:
5 u read), and the layer gradients, one per signature (2 u read, 5 u written).
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.ops.weighted_mix import program
from igva_kernels.ops.weighted_mix.steps import Keep, LayerShape, MixArgs, Mixed
from igva_kernels.runtime.config import RowConfig
from igva_kernels.runtime.dense import Norm
from igva_kernels.runtime.triton.common import cast, kernel_with
from igva_kernels.runtime.triton.launch import launch, strides

# What ends with a step of the program, as constants of the kernels.
_TERM, _PART, _BLOCK = tl.constexpr(program.TERM), tl.constexpr(program.PART), tl.constexpr(program.BLOCK)

kernel = kernel_with("num_images", "num_patches", "num_tokens", "skip", "slot", "slots", "stride_wb", "stride_wc")


@triton.jit
def image_of(index, b, num_images):
    """``(image, whether it exists)`` of batch row ``b``; a missing one reads image 0 and is masked by the caller."""
    if index is None:
        image = b.to(tl.int64)
        return image, image >= 0
    else:
        image = tl.load(index + b)
        exists = (image >= 0) & (image < num_images)
        return tl.where(exists, image, 0), exists


@triton.jit
def layer_tile(layers, LAYER: tl.constexpr, image, o_t, o_d, stride_image, stride_token):
    """Pointers to tokens ``o_t [BP, 1]`` and columns ``o_d [1, BD]``; a stride that all layers share is given once."""
    IMAGE: tl.constexpr = LAYER if len(stride_image) > 1 else 0
    TOKEN: tl.constexpr = LAYER if len(stride_token) > 1 else 0
    return layers[LAYER] + image * stride_image[IMAGE] + o_t * stride_token[TOKEN] + o_d


@kernel
def mix_kernel(
    layers, weights, index, rows, raw, sums, mean, rstd, norm_weight, norm_bias,
    num_images, num_patches, skip, stride_image, stride_token, stride_wb, stride_wc, eps,
    LAYERS: tl.constexpr, ENDS: tl.constexpr, SCALES: tl.constexpr, COLUMNS: tl.constexpr, KEEPS: tl.constexpr,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile ``[BLOCK_P, BLOCK_D]`` of every block of one batch row; a whole row of every block with NORM."""
    TILES_D: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    tiles_p = tl.cdiv(num_patches, BLOCK_P)
    b = (pid // TILES_D // tiles_p).to(tl.int64)
    o_p = ((pid // TILES_D) % tiles_p) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)  # [BP]
    o_d = ((pid % TILES_D) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]  # [1, BD]
    m_p = o_p < num_patches
    m_x = m_p[:, None]
    if WIDTH % BLOCK_D != 0:
        m_x = m_x & (o_d < WIDTH)
    image, exists = image_of(index, b, num_images)
    o_t = (skip + o_p)[:, None]

    # All stores come last: without one between two reads of the same layer, the compiler keeps only one read.
    b_blocks = ()
    b_sums = ()
    b_term = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    b_part = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    b_block = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for i in tl.static_range(len(LAYERS)):
        p_x = layer_tile(layers, LAYERS[i], image, o_t, o_d, stride_image, stride_token)
        b_term += tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        if ENDS[i] >= _TERM:
            b_part += b_term * SCALES[i]
            b_term = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        if ENDS[i] >= _PART:
            if KEEPS[i] >= 0:
                b_sums = b_sums + (cast(b_part, sums[0].dtype.element_ty),)  # type: ignore[assignment]
            if rows is not None or NORM:
                if COLUMNS[i] >= 0:
                    b_block += b_part * tl.load(weights + b * stride_wb + COLUMNS[i] * stride_wc)
                else:
                    b_block += b_part
            b_part = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        if ENDS[i] >= _BLOCK:
            if index is not None:
                b_block = tl.where(exists, b_block, float("nan"))
            b_blocks = b_blocks + (b_block,)  # type: ignore[assignment]
            b_block = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)

    if NORM:
        b_total = tl.zeros([BLOCK_P], tl.float32)
        for g in tl.static_range(BLOCKS):
            b_total += tl.sum(b_blocks[g], axis=1)
        b_mean = (b_total / (BLOCKS * WIDTH))[:, None]  # [BP, 1]
        b_square = tl.zeros([BLOCK_P], tl.float32)
        for g in tl.static_range(BLOCKS):
            b_centred = tl.where(m_x, b_blocks[g] - b_mean, 0.0)
            b_square += tl.sum(b_centred * b_centred, axis=1)
        b_rstd = tl.rsqrt(b_square / (BLOCKS * WIDTH) + eps)[:, None]
        o_m = (b * num_patches + o_p)[:, None]
        tl.store(mean + o_m, b_mean, mask=m_p[:, None])
        tl.store(rstd + o_m, b_rstd, mask=m_p[:, None])

    p_row = (b * num_patches + o_p)[:, None] * (BLOCKS * WIDTH) + o_d
    for g in tl.static_range(BLOCKS):
        if raw is not None:
            tl.store(raw + p_row + g * WIDTH, cast(b_blocks[g], raw.dtype.element_ty), mask=m_x)
        if rows is not None:
            b_row = b_blocks[g]  # type: ignore[var-annotated]
            if NORM:
                b_row = (b_row - b_mean) * b_rstd
                if norm_weight is not None:
                    b_row *= tl.load(norm_weight + g * WIDTH + o_d, mask=o_d < WIDTH, other=0.0).to(tl.float32)
                if norm_bias is not None:
                    b_row += tl.load(norm_bias + g * WIDTH + o_d, mask=o_d < WIDTH, other=0.0).to(tl.float32)
            tl.store(rows + p_row + g * WIDTH, cast(b_row, rows.dtype.element_ty), mask=m_x)
    p_sum = (b * num_patches + o_p)[:, None] * WIDTH + o_d
    for k in tl.static_range(len(b_sums)):
        tl.store(sums[k] + p_sum, b_sums[k], mask=m_x)


@kernel
def mix_weights_grad_kernel(
    grad, layers, index, partials, num_images, num_patches, slot, slots,
    stride_gb, stride_gp, stride_image, stride_token,
    LAYERS: tl.constexpr, SCALES: tl.constexpr, COLUMNS: tl.constexpr, NUM_COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partials ``<dA, sum over the entries of column c of s * h_l>`` of each row of one tile ``[BLOCK_P, BLOCK_D]`` of
    one block, in its rows' slots from ``slot`` on."""
    TILES_D: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    tiles_p = tl.cdiv(num_patches, BLOCK_P)
    tile_d = pid % TILES_D
    b = (pid // TILES_D // tiles_p).to(tl.int64)
    o_p = ((pid // TILES_D) % tiles_p) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)  # [BP]
    o_d = (tile_d * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]  # [1, BD]
    m_p = o_p < num_patches
    m_x = m_p[:, None]
    if WIDTH % BLOCK_D != 0:
        m_x = m_x & (o_d < WIDTH)
    image, exists = image_of(index, b, num_images)
    p_grad = grad + b * stride_gb + o_p[:, None] * stride_gp + o_d
    b_grad = tl.load(p_grad, mask=m_x, other=0.0).to(tl.float32)
    o_partial = ((b * num_patches + o_p) * slots + slot + tile_d) * NUM_COLUMNS
    # Every column is written, so that the partials need no zeroing.
    for c in tl.static_range(NUM_COLUMNS):
        b_dot = tl.zeros([BLOCK_P], tl.float32)
        for i in tl.static_range(len(LAYERS)):
            if COLUMNS[i] == c:
                p_x = layer_tile(layers, LAYERS[i], image, o_p[:, None], o_d, stride_image, stride_token)
                b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
                b_dot += tl.sum(b_grad * b_x, axis=1) * SCALES[i]
        b_dot = tl.where(exists, b_dot, float("nan"))
        tl.store(partials + o_partial + c, b_dot, mask=m_p)


@kernel
def layer_grads_kernel(
    grad, weights, index, outs, num_rows, num_tokens, skip, stride_gb, stride_gp, stride_wb, stride_wc,
    BLOCKS: tl.constexpr, ENDS: tl.constexpr, SCALES: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile ``[BLOCK_P tokens, BLOCK_D]`` of one image, of every signature's gradient."""
    TILES_D: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    tiles_t = tl.cdiv(num_tokens, BLOCK_P)
    image = (pid // TILES_D // tiles_t).to(tl.int64)
    o_t = ((pid // TILES_D) % tiles_t) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)[:, None]  # [BP, 1]
    o_d = ((pid % TILES_D) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]  # [1, BD]
    m_out = (o_t < num_tokens) & (o_d < WIDTH)
    # Skipped tokens read nothing and get zeros.
    m_grad = m_out & (o_t >= skip)
    p_grad = grad + (o_t - skip) * stride_gp + o_d
    p_out = (image * num_tokens + o_t) * WIDTH + o_d

    b_grads = ()
    b_grad = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for i in tl.static_range(len(BLOCKS)):
        if index is None:
            b_share = tl.load(p_grad + image * stride_gb + BLOCKS[i] * WIDTH, mask=m_grad, other=0.0).to(tl.float32)
            if COLUMNS[i] >= 0:
                b_share *= tl.load(weights + image * stride_wb + COLUMNS[i] * stride_wc)
        else:
            b_share = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
            b = tl.full((), 0, tl.int64)
            while b < num_rows:
                if tl.load(index + b) == image:
                    p_row = p_grad + b * stride_gb + BLOCKS[i] * WIDTH
                    b_row = tl.load(p_row, mask=m_grad, other=0.0).to(tl.float32)
                    if COLUMNS[i] >= 0:
                        b_row *= tl.load(weights + b * stride_wb + COLUMNS[i] * stride_wc)
                    b_share += b_row
                b += 1
        b_grad += b_share * SCALES[i]
        if ENDS[i] == 1:
            b_grads = b_grads + (b_grad,)  # type: ignore[assignment]
            b_grad = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for k in tl.static_range(len(b_grads)):
        tl.store(outs[k] + p_out, cast(b_grads[k], outs[k].dtype.element_ty), mask=m_out)


def mix(
    args: MixArgs, dtype: torch.dtype, norm: Norm | None, keep: Keep, config: RowConfig, stats_only: bool = False
) -> Mixed:
    """``WeightedMix.mix``; with ``stats_only`` the statistics of the norm are computed and the rows left out."""
    sums = args.new_sums() if keep == Keep.SOURCES else []
    if sums and args.image_index is not None:
        # Sums belong to images, rows to the batch: with an index the two need launches of their own.
        _launch_mix(args, None, None, sums, None, (None, None), config)
    rows = None if stats_only else args.new_rows(dtype)
    raw_rows = args.new_rows(dtype) if norm is not None and keep == Keep.ROWS else None
    stats = args.new_stats(norm)
    _launch_mix(args, rows, raw_rows, sums if args.image_index is None else [], norm, stats, config)
    return Mixed(rows, raw_rows, sums, *stats)


def _launch_mix(
    args: MixArgs, rows: Tensor | None, raw: Tensor | None, sums: Sequence[Tensor], norm: Norm | None,
    stats: tuple[Tensor | None, Tensor | None], config: RowConfig,
) -> None:  # fmt: skip
    layers, plan, weights, index = tuple(args.layers), args.plan, args.mix_weights, args.image_index
    of_rows = rows is not None or norm is not None
    if not of_rows:
        weights = index = None
    batch = args.num_rows if of_rows else layers[0].shape[0]
    steps = args.program.steps
    block_p, block_d, num_warps = config.tile(args.width, args.num_patches, plan.num_blocks if norm else 0)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    mean, rstd = stats
    launch(
        mix_kernel, batch * triton.cdiv(args.num_patches, block_p) * triton.cdiv(args.width, block_d), layers[0].device,
        layers, weights, index, rows, raw, tuple(sums), mean, rstd, norm_weight, norm_bias,
        layers[0].shape[0], args.num_patches, args.skip_tokens, strides(layers, 0), strides(layers, 1),
        *(weights.stride() if weights is not None else (0, 0)), eps,
        LAYERS=steps.layers, ENDS=steps.ends, SCALES=steps.scales, COLUMNS=steps.columns,
        KEEPS=steps.sums if sums else (-1,) * len(steps.sums),
        BLOCKS=plan.num_blocks, WIDTH=args.width, NORM=norm is not None, BLOCK_P=block_p, BLOCK_D=block_d,
        num_warps=num_warps, num_stages=1,
    )  # fmt: skip


def mix_weights_grad(grad_rows: Tensor, blocks: Sequence[int], args: MixArgs, config: RowConfig) -> Tensor:
    """``WeightedMix.mix_weights_grad``."""
    block_p, block_d, num_warps = config.tile(args.width, args.num_patches)
    tiles_d = triton.cdiv(args.width, block_d)
    partials = grad_rows.new_empty(
        args.num_rows, args.num_patches * len(blocks) * tiles_d, args.plan.num_columns, dtype=torch.float32
    )
    layers = tuple(args.layers)
    for position, block in enumerate(blocks):
        wanted = program.dots(args.plan, (block,))
        grad = grad_rows[..., position * args.width :]
        launch(
            mix_weights_grad_kernel, args.num_rows * triton.cdiv(args.num_patches, block_p) * tiles_d, grad.device,
            grad, layers, args.image_index, partials, layers[0].shape[0], args.num_patches,
            position * tiles_d, len(blocks) * tiles_d, grad.stride(0), grad.stride(1),
            strides(layers, 0), strides(layers, 1),
            LAYERS=wanted.layers, SCALES=wanted.scales, COLUMNS=wanted.columns,
            NUM_COLUMNS=args.plan.num_columns, WIDTH=args.width, BLOCK_P=block_p, BLOCK_D=block_d,
            num_warps=num_warps, num_stages=1,
        )  # fmt: skip
    return partials.sum(1)


def layer_grads(
    grad_rows: Tensor, shares: program.Shares, mix_weights: Tensor | None, image_index: Tensor | None,
    shape: LayerShape, config: RowConfig,
) -> list[Tensor]:  # fmt: skip
    """``WeightedMix.layer_grads``."""
    outs = tuple(shape.new_grads(grad_rows, shares.num_grads))
    block_p, block_d, num_warps = config.tile(shape.width, shape.num_tokens)
    launch(
        layer_grads_kernel,
        shape.num_images * triton.cdiv(shape.num_tokens, block_p) * triton.cdiv(shape.width, block_d), grad_rows.device,
        grad_rows, mix_weights, image_index, outs, grad_rows.shape[0], shape.num_tokens, shape.skip_tokens,
        grad_rows.stride(0), grad_rows.stride(1), *(mix_weights.stride() if mix_weights is not None else (0, 0)),
        BLOCKS=shares.blocks, ENDS=shares.ends, SCALES=shares.scales, COLUMNS=shares.columns,
        WIDTH=shape.width, BLOCK_P=block_p, BLOCK_D=block_d, num_warps=num_warps, num_stages=1,
    )  # fmt: skip
    return list(outs)
