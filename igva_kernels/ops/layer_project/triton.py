"""The members by Triton kernels: their products in one launch where one member would not fill the card, otherwise one
member after the other.

A launch of J products has the tiles of all members in a row, so that the last wave of one member is filled by the next.
As every Triton product, it is chosen only where its tile was measured. The memory is that of all members' rows at once,
which are few where this is chosen. The backward is member by member.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.ops.layer_project.steps import LayerProject
from igva_kernels.ops.weighted_mix.steps import Keep, Mixed, Projection
from igva_kernels.ops.weighted_mix.triton import IMPLEMENTATION as MEMBER
from igva_kernels.runtime.config import GemmConfig
from igva_kernels.runtime.triton.common import kernel
from igva_kernels.runtime.triton.cost import choose, cublas_us, pass_us, product_us
from igva_kernels.runtime.triton.dense import can_read, config_of
from igva_kernels.runtime.triton.gemm import gemm_tile, options, precision, store_activated, tile_of, tiles
from igva_kernels.runtime.triton.launch import launch

MAX_WAVES = 1.2
"""The most tiles of one member, as a multiple of the card's multiprocessors, with which members share a launch; with
more, a launch of its own leaves little of the card idle. Modelled, not measured."""


@triton.jit
def of_member(pointers, member, MEMBERS: tl.constexpr):
    """The pointer of a member, which the program knows only when it runs."""
    found = pointers[0]
    for j in tl.static_range(1, MEMBERS):
        found = tl.where(member == j, pointers[j], found)
    return found


@kernel
def grouped_linear_kernel(
    xs, weights, biases, ys, zs, num_rows, columns,
    MEMBERS: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One tile of one member's ``linear``: tiles in the order of member, then as one member has them."""
    per_member = tl.cdiv(num_rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    member = tl.program_id(0) // per_member
    m, n = tile_of(tl.program_id(0) % per_member, num_rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    b_acc = gemm_tile(
        of_member(xs, member, MEMBERS), of_member(weights, member, MEMBERS), m, n, num_rows, columns, K, K, K, True,
        False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    # Triton 3.6 has no device function that returns None.
    bias = None if biases is None else of_member(biases, member, MEMBERS)
    z = None if zs is None else of_member(zs, member, MEMBERS)
    store_activated(
        b_acc, bias, None, None, None, of_member(ys, member, MEMBERS), z, m, n, num_rows, columns, ACTIVATION, BLOCK_M,
        BLOCK_N, SLICES,
    )  # fmt: skip


def grouped_linear(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str | None,
    ys: Sequence[Tensor], zs: Sequence[Tensor] | None, tile: GemmConfig,
) -> None:  # fmt: skip
    """``z = x @ weight.T + bias`` and ``y = act(z)`` of every member into its dense ``ys`` and, if given, ``zs``.

    Members have the same shapes, dense rows and weights, and all or none of them a bias.
    """
    (rows, length), columns = xs[0].shape, weights[0].shape[0]
    dense = [bias.contiguous() for bias in biases if bias is not None]
    launch(
        grouped_linear_kernel, len(xs) * tiles(tile, rows, columns), xs[0].device,
        tuple(xs), tuple(weights), tuple(dense) or None, tuple(ys), None if zs is None else tuple(zs), rows, columns,
        MEMBERS=len(xs), K=length, ACTIVATION=activation, PRECISION=precision(xs[0].dtype), **options(tile),
    )  # fmt: skip


class TritonLayerProject(LayerProject):
    """``LayerProject`` with the products of several members in one launch."""

    def project(self, calls: Sequence[Projection], out: Tensor) -> list[tuple[Mixed, Tensor | None]]:
        """As in ``LayerProject``."""
        tile = _shared_tile(calls)
        if tile is None:
            return super().project(calls, out)
        projectors, outs = [call.projector for call in calls], [own.flatten(0, 1) for own in out.unbind()]
        mixed = [MEMBER.mix(c.args, c.projector.weight1.dtype, c.projector.norm, c.keep) for c in calls]
        rows = [m.rows.flatten(0, 1) for m in mixed if m.rows is not None]
        results = [
            m if c.keep == Keep.ROWS and c.projector.norm is None else m._replace(rows=None)
            for m, c in zip(mixed, calls, strict=True)
        ]
        first, activation, keep_z = projectors[0], projectors[0].activation, calls[0].keep_z
        shape = (rows[0].shape[0], first.weight1.shape[0])
        ys = outs if first.weight2 is None else [out.new_empty(shape) for _ in calls]
        zs = [out.new_empty(shape) for _ in calls] if keep_z and activation is not None else None
        grouped_linear(rows, [p.weight1 for p in projectors], [p.bias1 for p in projectors], activation, ys, zs, tile)
        if first.weight2 is not None:
            del mixed, rows  # freed before the second product, as those of one member are
            weights = [p.weight2 for p in projectors if p.weight2 is not None]
            grouped_linear(ys, weights, [p.bias2 for p in projectors], None, outs, None, tile)
        kept = zs or (ys if keep_z and first.weight2 is not None else [None] * len(calls))
        return list(zip(results, kept, strict=True))


def _shared_tile(calls: Sequence[Projection]) -> GemmConfig | None:
    """The tile of a launch for all members; None where each is to have its own."""
    args, first = calls[0].args, calls[0].projector
    if len(calls) < 2 or len({_shape(call) for call in calls}) > 1:
        return None
    weights = [w for call in calls for w in (call.projector.weight1, call.projector.weight2) if w is not None]
    config, rows = config_of(first.weight1), args.num_rows * args.num_patches
    dense = all(weight.is_contiguous() for weight in weights) and can_read(*weights)
    if not dense or not rows:
        return None
    products = [weight.shape for weight in (first.weight1, first.weight2) if weight is not None]
    # Members are read by pointers, so that only what was measured without TMA is known of their launch.
    candidates = [
        replace(tile, tma=False, efficiency=None if tile.tma else tile.efficiency) for tile in config.gemms["linear"]
    ]
    apart = sum(cublas_us(config, rows, n, k) for n, k in products)
    apart += pass_us(config, 2 * rows * len(first.weight1), first.weight1.dtype) if first.activation else 0.0
    tile = choose(
        config, candidates, first.weight1.dtype,
        lambda tile: sum(product_us(config, len(calls) * rows, n, k, tile) for n, k in products),
        len(calls) * apart,
    )  # fmt: skip
    few = tile is not None and tiles(tile, rows, len(first.weight1)) < MAX_WAVES * config.rates.sms
    return tile if few else None


def _shape(call: Projection) -> tuple[object, ...]:
    """What members of one launch have in common."""
    weight1, bias1, weight2, bias2, _, _ = call.projector
    second = None if weight2 is None else weight2.shape
    return weight1.shape, weight1.dtype, bias1 is None, second, bias2 is None, call.keep_z


IMPLEMENTATION = TritonLayerProject(MEMBER)
