"""LayerNorm over a row: its gradient, and the two small kernels that fold it into a GEMM.

With x the row before the norm, n = (x - mean) * rstd, and g = grad_out * weight:

    grad_x = rstd * (g - avg(g) - n * avg(g * n))       grad_weight = sum over rows of grad_out * n

Folding uses  LN(x) W^T + b = rstd * (x V^T - mean * sums) + (W bias + b)  with V = weight * W and its row sums, so that
the GEMM reads x as it is and the normalised row is never written.

Modelled floor of the gradient: 3 row widths moved, 3 * 5120 * 2 bytes per row for five taps of 1024 in bf16.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from igva_kernels.runtime.config import RowConfig
from igva_kernels.runtime.dense import Norm, NormGrads, norm_param_grads
from igva_kernels.runtime.triton.common import cast, kernel
from igva_kernels.runtime.triton.launch import launch


@kernel
def norm_backward_kernel(
    grad_out, rows, weight, mean, rstd, grad_rows, partials, num_rows, stride_grad, stride_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every ``num_programs``-th row; the parameters' gradients of these rows stay in registers until the end."""
    pid = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    m = o < WIDTH
    b_grad_weight = tl.zeros([BLOCK], tl.float32)
    b_grad_bias = tl.zeros([BLOCK], tl.float32)
    row = pid.to(tl.int64)
    while row < num_rows:
        b_rstd = tl.load(rstd + row)
        b_grad = tl.load(grad_out + row * stride_grad + o, mask=m, other=0.0).to(tl.float32)
        b_row = tl.load(rows + row * stride_row + o, mask=m, other=0.0).to(tl.float32)
        b_normal = tl.where(m, (b_row - tl.load(mean + row)) * b_rstd, 0.0)
        if partials is not None:
            b_grad_weight += b_grad * b_normal
            b_grad_bias += b_grad
        if weight is not None:
            b_grad *= tl.load(weight + o, mask=m, other=0.0).to(tl.float32)
        b_average = tl.sum(b_grad, axis=0) / WIDTH
        b_along = tl.sum(b_grad * b_normal, axis=0) / WIDTH
        b_grad = b_rstd * (b_grad - b_average - b_normal * b_along)
        tl.store(grad_rows + row * WIDTH + o, cast(b_grad, grad_rows.dtype.element_ty), mask=m)
        row += tl.num_programs(0)
    if partials is not None:
        p_partial = partials + pid * (2 * WIDTH) + o
        tl.store(p_partial, b_grad_weight, mask=m)
        tl.store(p_partial + WIDTH, b_grad_bias, mask=m)


@kernel
def fold_norm_kernel(
    weight, bias, norm_weight, norm_bias, folded, column_sums, shift, stride_weight,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of W: ``folded = norm_weight * W`` rounded, the sum of that, and ``shift = <W, norm_bias> + bias``."""
    row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_shift = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < WIDTH
        b_weight = tl.load(weight + row * stride_weight + o, mask=m, other=0.0).to(tl.float32)
        if norm_bias is not None:
            b_shift += b_weight * tl.load(norm_bias + o, mask=m, other=0.0).to(tl.float32)
        if norm_weight is not None:
            b_weight *= tl.load(norm_weight + o, mask=m, other=0.0).to(tl.float32)
            b_folded = cast(b_weight, folded.dtype.element_ty)
            tl.store(folded + row * WIDTH + o, b_folded, mask=m)
            b_weight = b_folded.to(tl.float32)
        b_sum += b_weight
    b_total = tl.sum(b_shift, axis=0)
    if bias is not None:
        b_total += tl.load(bias + row).to(tl.float32)
    tl.store(column_sums + row, tl.sum(b_sum, axis=0))
    tl.store(shift + row, b_total)


def norm_backward(
    grad_out: Tensor, rows: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, need_params: bool, programs: int,
    config: RowConfig,
) -> NormGrads:  # fmt: skip
    """``Dense.norm_backward``; the sums of ``programs`` row sets are added in a fixed order."""
    num_rows, width = rows.shape
    programs = min(num_rows, programs)
    grad_rows = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
    partials = mean.new_empty(programs, 2, width) if need_params else None
    # The two sums over rows stay in registers.
    _, block, num_warps = config.tile(width, 1, whole_blocks=2)
    launch(
        norm_backward_kernel, programs, rows.device,
        grad_out, rows, norm[0], mean, rstd, grad_rows, partials, num_rows, grad_out.stride(0), rows.stride(0),
        WIDTH=width, BLOCK=block, num_warps=num_warps, num_stages=1,
    )  # fmt: skip
    return NormGrads(grad_rows, *norm_param_grads(None if partials is None else partials.sum(0), norm))


def fold_norm(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """``(norm_weight * weight, its row sums, shift)``, the sums and the shift in fp32."""
    rows, width = weight.shape
    folded = weight if norm[0] is None else torch.empty_like(weight, memory_format=torch.contiguous_format)
    column_sums, shift = (weight.new_empty(rows, dtype=torch.float32) for _ in range(2))
    launch(
        fold_norm_kernel, rows, weight.device,
        weight, bias, norm[0], norm[1], folded, column_sums, shift, weight.stride(0),
        WIDTH=width, BLOCK=1024, num_warps=4, num_stages=1,
    )  # fmt: skip
    return folded, column_sums, shift
