"""The weight allocator at inference: ``nn.WeightAllocator`` in ``4 + 3 * blocks`` launches, 16 for IGVA's four blocks.

Its query is one row x per sample, so that the score of key k in head h is linear in x, and what the head adds to x is
linear in its probabilities p (d is the width of a head):

    score[h, k] = (x . U[k, h] + bq[h] . key[k, h]) / sqrt(d)         U[k, h] = Wq[h]^T key[k, h]
    attended    = sum over h, k of p[h, k] * T[k, h]  + bo            T[k, h] = Wo[:, h] value[k, h]

U and T need no sentence. With them nothing but the two products of the FFN is left between one block and the next:

    1  keys = cls_proj(summaries), x = sentence_proj(sentences)
    2  key and value projections of all blocks
    3  U and T of all blocks                                   so far nothing but x has seen the sentence
     per block: LayerNorm, attention, add, LayerNorm  |  Linear, ReLU  |  Linear, add
    4  LayerNorm, head, softmax

Scores, softmax, sums and the statistics of the norms are in fp32; what a product reads (keys, values, U, T, the
normalised rows, the hidden row of the FFN) is rounded once to the dtype of the module (simulated, bf16 and fp16: half
the error of the modules). Every sum has a fixed order.

Modelled floor, nothing timed: IGVA's 27 M parameters are 54 MB in bf16, 12.6 us at 4.3 TB/s, whatever the batch. At one
image each launch moves 2 to 16 MB and lasts 2 to 4 us, most of it latency: about 45 us as a CUDA graph, where the 70 to
80 kernels of the modules take 150 and more. U and T are, per sample, ``2 * blocks * K`` rows of ``heads * width``:
0.26 MB.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.ops.allocator.weights import AllocatorWeights
from igva_kernels.registry import Implementation
from igva_kernels.runtime.triton.common import activate, cast, dot, kernel
from igva_kernels.runtime.triton.dense import config_of
from igva_kernels.runtime.triton.gemm import gemm_tile, precision
from igva_kernels.runtime.triton.launch import launch

# The most elements of U, and of T, that one program of attend_kernel holds: 32 of each per thread of 16 warps.
_HELD = 16384


@triton.jit
def split_tile(
    x, weight, m, n, rows, columns, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``gemm_tile`` of ``x @ weight.T`` for few rows. As one chain, the K / 16 matrix instructions of a tile would take
    as long as its loads; here each of four warps takes a quarter of every step, and their sums are added at the end."""
    PART: tl.constexpr = BLOCK_K // 4
    o_m = m + tl.arange(0, BLOCK_M)
    o_n = n + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, 4).to(tl.int64)[:, None] * PART + tl.arange(0, PART)[None, :]  # [4, PART]
    p_x = x + o_m.to(tl.int64)[None, :, None] * K + o_k[:, None, :]
    m_x = (o_m < rows)[None, :, None]
    # Columns beyond the end read column 0 and are not stored.
    p_w = weight + tl.where(o_n < columns, o_n, 0).to(tl.int64)[None, None, :] * K + o_k[:, :, None]
    b_acc = tl.zeros([4, BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            b_x = tl.load(p_x + k, mask=m_x, other=0.0)
            b_w = tl.load(p_w + k)
        else:
            b_x = tl.load(p_x + k, mask=m_x & (o_k[:, None, :] < K - k), other=0.0)
            b_w = tl.load(p_w + k, mask=o_k[:, :, None] < K - k, other=0.0)
        b_acc = dot(b_x, b_w, b_acc, PRECISION)
    return tl.sum(b_acc, axis=0)


@kernel
def linear_kernel(
    xs, weights, biases, residual, ys, num_rows,
    TIMES: tl.constexpr, COLUMNS: tl.constexpr, LENGTHS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one of several products ``y = act(x @ weight.T + bias) + residual``, each a run of programs.

    The i-th product has ``TIMES[i] * num_rows`` rows.
    """
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    for i in tl.static_range(len(xs)):
        rows = TIMES[i] * num_rows
        tiles = tl.cdiv(rows, BLOCK_M) * TILES_N
        if (pid >= 0) & (pid < tiles):
            m = (pid // TILES_N) * BLOCK_M
            n = (pid % TILES_N) * BLOCK_N
            o_m = m + tl.arange(0, BLOCK_M)
            o_n = n + tl.arange(0, BLOCK_N)
            p_out = o_m.to(tl.int64)[:, None] * COLUMNS + o_n[None, :]
            m_out = (o_m < rows)[:, None] & (o_n < COLUMNS)[None, :]
            # Loaded before the product, so that its operands are on their way at the same time.
            b_bias = tl.load(biases[i] + o_n, mask=o_n < COLUMNS, other=0.0).to(tl.float32)
            if residual is not None:
                b_residual = tl.load(residual + p_out, mask=m_out, other=0.0).to(tl.float32)
            if BLOCK_M == 16:
                b_acc = split_tile(
                    xs[i], weights[i], m, n, rows, COLUMNS, LENGTHS[i], BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
                )
            else:
                b_acc = gemm_tile(
                    xs[i], weights[i], m, n, rows, COLUMNS, LENGTHS[i], LENGTHS[i], LENGTHS[i], True, False,
                    BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                )  # fmt: skip
            b_y = activate(b_acc + b_bias[None, :], ACTIVATION)
            if residual is not None:
                b_y += b_residual
            tl.store(ys[i] + p_out, cast(b_y, ys[i].dtype.element_ty), mask=m_out)
        pid -= tiles


@kernel
def fold_kernel(
    projected, query_weights, out_weights, us, ts, num_rows,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of U or T of one head of one block; ``projected[i]`` is keys and values ``[rows, 2 * WIDTH]``."""
    HEAD: tl.constexpr = WIDTH // HEADS
    TILES_N: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(num_rows, BLOCK_M) * TILES_N
    pid = tl.program_id(0)
    head = (pid // tiles) % HEADS
    m = ((pid % tiles) // TILES_N) * BLOCK_M
    n = (pid % TILES_N) * BLOCK_N
    o_m = m + tl.arange(0, BLOCK_M)
    o_n = n + tl.arange(0, BLOCK_N)
    p_out = o_m.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + o_n[None, :]
    m_out = (o_m < num_rows)[:, None] & (o_n < WIDTH)[None, :]
    for i in tl.static_range(len(projected)):
        if pid // (tiles * HEADS) == 2 * i:
            b_u = gemm_tile(
                projected[i] + head * HEAD, query_weights[i] + head * (HEAD * WIDTH), m, n, num_rows, WIDTH,
                2 * WIDTH, WIDTH, HEAD, False, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            tl.store(us[i] + p_out, cast(b_u, us[i].dtype.element_ty), mask=m_out)
        if pid // (tiles * HEADS) == 2 * i + 1:
            b_t = gemm_tile(
                projected[i] + WIDTH + head * HEAD, out_weights[i] + head * HEAD, m, n, num_rows, WIDTH,
                2 * WIDTH, WIDTH, HEAD, True, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            tl.store(ts[i] + p_out, cast(b_t, ts[i].dtype.element_ty), mask=m_out)


@triton.jit
def layer_norm(b_x, weight, bias, eps, o_c, WIDTH: tl.constexpr):
    """LayerNorm of the row ``b_x``, which is zero beyond its width, as the result is."""
    m_c = o_c < WIDTH
    b_weight = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_centred = tl.where(m_c, b_x - tl.sum(b_x, axis=0) / WIDTH, 0.0)
    rstd = tl.rsqrt(tl.sum(b_centred * b_centred, axis=0) / WIDTH + eps)
    return b_centred * rstd * b_weight + b_bias


@kernel
def attend_kernel(
    stream, norm, projected, query_bias, u, t, out_bias, norm_weight, norm_bias, eps, rows, scale,
    KEYS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row: ``x = norm?(stream)``, then ``LayerNorm(x + attention(x))``; BLOCK_HEADS heads at a time."""
    HEAD: tl.constexpr = WIDTH // HEADS
    b = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < WIDTH
    b_x = tl.load(stream + b * WIDTH + o_c, mask=m_c, other=0.0)
    b_sum = tl.load(out_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    # Pairs (head, key), of which the key varies faster.
    o_pair = tl.arange(0, BLOCK_HEADS * BLOCK_KEYS).to(tl.int64)
    o_key = o_pair % BLOCK_KEYS
    o_d = tl.arange(0, BLOCK_D)[None, :]
    for first in tl.static_range(0, HEADS, BLOCK_HEADS):
        o_head = first + o_pair // BLOCK_KEYS
        m_pair = ((o_key < KEYS) & (o_head < HEADS))[:, None]
        o_row = b * KEYS + o_key
        p_c = (o_row * (HEADS * WIDTH) + o_head * WIDTH)[:, None] + o_c[None, :]
        b_u = tl.load(u + p_c, mask=m_pair & m_c[None, :], other=0.0)
        b_t = tl.load(t + p_c, mask=m_pair & m_c[None, :], other=0.0)
        p_d = (o_head * HEAD)[:, None] + o_d
        m_d = m_pair & (o_d < HEAD)
        b_key = tl.load(projected + (o_row * (2 * WIDTH))[:, None] + p_d, mask=m_d, other=0.0).to(tl.float32)
        b_bias = tl.load(query_bias + p_d, mask=m_d, other=0.0).to(tl.float32)
        if first == 0:
            # Computed here, while U and T are on their way.
            if norm is not None:
                b_x = layer_norm(b_x, norm[0], norm[1], norm[2], o_c, WIDTH)
            b_sum += b_x
        b_score = tl.sum(b_key * b_bias, axis=1)
        b_score = (b_score + tl.sum(b_u.to(tl.float32) * b_x[None, :], axis=1)) * scale
        b_score = tl.where(o_key < KEYS, b_score, float("-inf")).reshape(BLOCK_HEADS, BLOCK_KEYS)
        b_p = tl.exp(b_score - tl.max(b_score, axis=1)[:, None])
        b_p = (b_p / tl.sum(b_p, axis=1)[:, None]).reshape(BLOCK_HEADS * BLOCK_KEYS)
        b_sum += tl.sum(b_p[:, None] * b_t.to(tl.float32), axis=0)
    b_row = layer_norm(b_sum, norm_weight, norm_bias, eps, o_c, WIDTH)
    tl.store(rows + b * WIDTH + o_c, cast(b_row, rows.dtype.element_ty), mask=m_c)


@kernel
def head_kernel(
    stream, norm_weight, norm_bias, eps, weight, bias, out,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row: ``softmax(norm(stream) @ weight.T + bias)``."""
    b = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < WIDTH
    o_k = tl.arange(0, BLOCK_COLUMNS)
    m_k = o_k < COLUMNS
    b_x = tl.load(stream + b * WIDTH + o_c, mask=m_c, other=0.0)
    b_x = layer_norm(b_x, norm_weight, norm_bias, eps, o_c, WIDTH)
    p_w = o_k.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
    b_w = tl.load(weight + p_w, mask=m_k[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    b_score = tl.sum(b_w * b_x[None, :], axis=1) + tl.load(bias + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_score = tl.where(m_k, b_score, float("-inf"))
    b_p = tl.exp(b_score - tl.max(b_score, axis=0))
    tl.store(out + b * COLUMNS + o_k, b_p / tl.sum(b_p, axis=0), mask=m_k)


class TritonAllocator(Implementation):
    """``ops.allocator`` by the kernels above."""

    def why_not(self, *demands: int) -> str | None:
        """None if an allocator of this hidden width and number of weights can be served, otherwise why not."""
        if not demands:
            return None
        width, columns = demands
        held = triton.next_power_of_2(width) * triton.next_power_of_2(columns)
        if held <= _HELD:
            return None
        return f"{columns} keys of width {width} are {held} elements per head, a program holds {_HELD}"

    def allocate(
        self, sentences: Tensor, summaries: Tensor, weights: AllocatorWeights, num_heads: int, eps: Sequence[float]
    ) -> Tensor:
        """``spec.allocate`` for dense tensors, where no gradient is asked for."""
        return allocate(sentences, summaries, weights, num_heads, eps, config_of(summaries).rates.sms)


IMPLEMENTATION = TritonAllocator()


def allocate(
    sentences: Tensor, summaries: Tensor, weights: AllocatorWeights, num_heads: int, eps: Sequence[float], sms: int
) -> Tensor:
    """``spec.allocate`` on a card with ``sms`` multiprocessors."""
    batch, keys, dim = summaries.shape
    width, dtype, device = weights.cls_weight.shape[0], summaries.dtype, summaries.device
    blocks, rows = weights.blocks, batch * keys

    def linear(*problems, activation=None, residual=None):
        xs, times, matrices, biases, ys = zip(*problems, strict=True)
        columns = matrices[0].shape[0]
        tile = _tile(batch * max(times), len(problems) * columns, dtype, sms)
        launch(
            linear_kernel, sum(_tiles(tile, n * batch, columns) for n in times), device,
            xs, matrices, biases, residual, ys, batch,
            TIMES=times, COLUMNS=columns, LENGTHS=tuple(x.shape[1] for x in xs), ACTIVATION=activation,
            PRECISION=precision(dtype), **tile,
        )  # fmt: skip

    key, stream = summaries.new_empty(rows, width), summaries.new_empty(batch, width, dtype=torch.float32)
    linear(
        (summaries.view(rows, dim), keys, weights.cls_weight, weights.cls_bias, key),
        (sentences, 1, weights.sentence_weight, weights.sentence_bias, stream),
    )  # fmt: skip
    projected = summaries.new_empty(len(blocks), rows, 2 * width).unbind()
    linear(
        *(
            (key, keys, block.in_proj_weight[width:], block.in_proj_bias[width:], y)
            for block, y in zip(blocks, projected, strict=True)
        )
    )
    us, ts = (tuple(side.unbind()) for side in summaries.new_empty(2, len(blocks), rows, num_heads, width))
    folds = 2 * len(blocks) * num_heads
    tile = _tile(rows, folds * width, dtype, sms)
    launch(
        fold_kernel, folds * _tiles(tile, rows, width), device,
        projected, tuple(block.in_proj_weight for block in blocks), tuple(block.out_proj_weight for block in blocks),
        us, ts, rows, WIDTH=width, HEADS=num_heads, PRECISION=precision(dtype), **tile,
    )  # fmt: skip

    block_c, block_keys = triton.next_power_of_2(width), triton.next_power_of_2(keys)
    block_heads = min(triton.next_power_of_2(num_heads), _HELD // (block_c * block_keys))
    x = summaries.new_empty(batch, width)
    for i, block in enumerate(blocks):
        norm = (blocks[i - 1].norm2_weight, blocks[i - 1].norm2_bias, eps[2 * i - 1]) if i else None
        launch(
            attend_kernel, batch, device,
            stream, norm, projected[i], block.in_proj_bias, us[i], ts[i], block.out_proj_bias,
            block.norm1_weight, block.norm1_bias, eps[2 * i], x, (width // num_heads) ** -0.5,
            KEYS=keys, HEADS=num_heads, WIDTH=width, BLOCK_KEYS=block_keys, BLOCK_HEADS=block_heads,
            BLOCK_D=triton.next_power_of_2(width // num_heads), BLOCK_C=block_c,
            num_warps=_warps(block_heads * block_keys * block_c), num_stages=1,
        )  # fmt: skip
        hidden = summaries.new_empty(batch, block.ffn1_weight.shape[0])
        linear((x, 1, block.ffn1_weight, block.ffn1_bias, hidden), activation="relu")
        linear((hidden, 1, block.ffn2_weight, block.ffn2_bias, stream), residual=x)
    out = stream.new_empty(batch, keys)
    launch(
        head_kernel, batch, device, stream, blocks[-1].norm2_weight, blocks[-1].norm2_bias, eps[-1],
        weights.head_weight, weights.head_bias, out,
        COLUMNS=keys, WIDTH=width, BLOCK_COLUMNS=block_keys, BLOCK_C=block_c,
        num_warps=_warps(block_keys * block_c), num_stages=1,
    )  # fmt: skip
    return out


def _tile(rows: int, columns: int, dtype: torch.dtype, sms: int) -> dict[str, int]:
    """The tile of a product. ``tune`` has no choice to make: at these sizes what counts is that every multiprocessor
    has a tile, with 32 to 64 KB of loads in flight. It is wide where that leaves no multiprocessor idle, otherwise as
    narrow as a matrix instruction; exact products in fp32 would lack the registers for a wide tile.
    """
    block_m = 16 if rows <= 16 else 64
    wide = dtype.itemsize == 2 and triton.cdiv(rows, block_m) * triton.cdiv(columns, 64) >= sms
    block_n = 64 if wide else 16
    row_bytes = 512 if block_m == block_n == 16 else 256
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": row_bytes // dtype.itemsize,
        "num_warps": 4, "num_stages": 3 if block_m == block_n == 64 else 4,
    }  # fmt: skip


def _tiles(tile: dict[str, int], rows: int, columns: int) -> int:
    return triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"])


def _warps(elements: int) -> int:
    return min(max(1, elements // 1024), 16)
