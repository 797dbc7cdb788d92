"""The injection by two Triton kernels.

    out[b, t] = hidden[b, t] + gate * features[rows[b, t]], rounded once; the bits of hidden[b, t] where the row is -1

Floor (T 4096, H 4096, V 3000, bf16, 4.3 TB/s): the states read and written, the features read = 92 MB = 21 us; an H100,
whose copies reach 2.4 TB/s, took 36 us. The gradient of the features reads and writes 25 MB each, one program per row,
so that the row's share of the gate's gradient is a sum in a fixed order.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.ops.inject_tokens.op import Injection
from igva_kernels.ops.inject_tokens.positions import gate_grad, is_one, new_row_dots, positions
from igva_kernels.runtime.config import RowConfig
from igva_kernels.runtime.triton.common import cast, kernel_with
from igva_kernels.runtime.triton.launch import launch

# 16 bytes of 16-bit elements per thread. ``tune`` has no choice to make: nothing is held, and nothing reused.
_TILE = RowConfig(elements=2048, num_warps=8)

kernel = kernel_with("num_features", "num_tokens")


@kernel
def inject_kernel(
    hidden, features, rows, gate, out, num_features, num_tokens, stride_hb, stride_ht, stride_f,
    REPLACE: tl.constexpr, ONE_GATE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile ``[BLOCK_P tokens, BLOCK_D]`` of one batch row."""
    TILES_D: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    tiles_t = tl.cdiv(num_tokens, BLOCK_P)
    b = (pid // TILES_D // tiles_t).to(tl.int64)
    o_t = ((pid // TILES_D) % tiles_t) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)[:, None]  # [BP, 1]
    o_d = ((pid % TILES_D) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]  # [1, BD]
    m_t = o_t < num_tokens
    m_d = o_d < WIDTH
    o_m = b * num_tokens + o_t

    b_row = tl.load(rows + o_m, mask=m_t, other=-1).to(tl.int64)  # [BP, 1]
    exists = (b_row >= 0) & (b_row < num_features)
    # What is replaced is not read.
    m_hidden = m_t & (b_row == -1) if REPLACE else m_t
    b_hidden = tl.load(hidden + b * stride_hb + o_t * stride_ht + o_d, mask=m_hidden & m_d, other=0.0)
    b_sum = b_hidden.to(tl.float32)
    if features is not None:
        b_feature = tl.load(features + b_row * stride_f + o_d, mask=exists & m_d, other=0.0).to(tl.float32)
        if gate is not None:
            b_feature *= tl.load(gate) if ONE_GATE else tl.load(gate + b_row, mask=exists, other=0.0)
        b_sum += b_feature
    b_out = cast(tl.where(exists, b_sum, float("nan")), out.dtype.element_ty)
    # A token without a row is moved, never computed with.
    tl.store(out + o_m * WIDTH + o_d, tl.where(b_row == -1, b_hidden, b_out), mask=m_t & m_d)


@kernel
def features_grad_kernel(
    grad, features, positions, gate, grad_features, row_dots, num_tokens, stride_gb, stride_gt, stride_f,
    ONE_GATE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of the features."""
    v = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + v)
    is_taken = position >= 0
    otherwise = tl.where(position == -1, 0.0, float("nan"))
    p_grad = grad + (position // num_tokens).to(tl.int64) * stride_gb + (position % num_tokens).to(tl.int64) * stride_gt
    b_dot = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.static_range(0, WIDTH, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        m_d = o_d < WIDTH
        b_grad = tl.load(p_grad + o_d, mask=m_d & is_taken, other=0.0).to(tl.float32)
        if row_dots is not None:
            b_feature = tl.load(features + v * stride_f + o_d, mask=m_d & is_taken, other=0.0)
            b_dot += b_grad * b_feature.to(tl.float32)
        if grad_features is not None:
            if gate is not None:
                b_grad *= tl.load(gate) if ONE_GATE else tl.load(gate + v)
            b_grad = cast(tl.where(is_taken, b_grad, otherwise), grad_features.dtype.element_ty)
            tl.store(grad_features + v * WIDTH + o_d, b_grad, mask=m_d)
    if row_dots is not None:
        tl.store(row_dots + v, tl.where(is_taken, tl.sum(b_dot, axis=0), otherwise))


class TritonInjection(Injection):
    """``Injection`` by the kernels above. A row out of range gives NaN, and so does the gradient of one taken twice."""

    def inject(
        self, hidden: Tensor, features: Tensor | None, rows: Tensor, gate: Tensor | None, replace: bool
    ) -> Tensor:
        """As in ``Injection``."""
        out, (batch, tokens, width) = hidden.new_empty(hidden.shape), hidden.shape
        block_p, block_d, num_warps = _TILE.tile(width, tokens)
        launch(
            inject_kernel, batch * triton.cdiv(tokens, block_p) * triton.cdiv(width, block_d), hidden.device,
            hidden, features, rows, gate, out, 2**31 - 1 if features is None else features.shape[0], tokens,
            *hidden.stride()[:2], 0 if features is None else features.stride(0),
            REPLACE=replace, ONE_GATE=is_one(gate), WIDTH=width, BLOCK_P=block_p, BLOCK_D=block_d,
            num_warps=num_warps, num_stages=1,
        )  # fmt: skip
        return out

    def features_grad(
        self, grad: Tensor, features: Tensor | None, rows: Tensor, gate: Tensor | None, num_features: int,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """As in ``Injection``."""
        (_, tokens, width), (need_features, need_gate) = grad.shape, needs
        out = grad.new_empty(num_features, width) if need_features else None
        row_dots = new_row_dots(gate, num_features, need_gate)
        block_d = min(triton.next_power_of_2(max(width, 1)), _TILE.elements)
        launch(
            features_grad_kernel, num_features, grad.device,
            grad, features, positions(rows, num_features), gate, out, row_dots, max(tokens, 1),
            *grad.stride()[:2], 0 if features is None else features.stride(0),
            ONE_GATE=is_one(gate), WIDTH=width, BLOCK_D=block_d, num_warps=_TILE.num_warps, num_stages=1,
        )  # fmt: skip
        return out, gate_grad(row_dots, gate)


IMPLEMENTATION = TritonInjection()
