"""The first Linear with the mix hidden behind it (gemm_sm90.cu): when it serves a call, and what it is told.

Its rows are flat, skipped tokens included, so a tap must lie as one matrix ``[I * T, D]``. Everything else takes the
mix kernel and torch's GEMM; ``why_not`` says why.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.cuda.program import mix_program
from igva_kernels.ops.weighted_mix.operands import layers, weights
from igva_kernels.ops.weighted_mix.plan import MixPlan, is_tap
from igva_kernels.ops.weighted_mix.steps import Keep, MixArgs, Projector
from igva_kernels.runtime.config import ProductSize, of_device
from igva_kernels.runtime.cuda import launch
from igva_kernels.runtime.cuda.dense import allow_vectors_at, allows_vectors, chunks
from igva_kernels.runtime.operands import activation_of, address, dtype_of, matrix

TILE_M, WIDE, NARROW, TILE_K, CLUSTER, MAX_TAPS = 128, 256, 192, 64, 2, 8
"""Rows, columns (of either form) and depth of a tile in elements, and blocks per cluster, as csrc/gemm/hopper.h has
them; the most taps, as gemm_sm90.h has them."""

FIRST_FLAG, COUNTERS = 32, 1 << 18
"""Counters of a launch before its flags, and the counters of the module, as gemm_sm90.h has them."""

SWITCH = "IGVA_KERNELS_FUSED_GEMM"
"""The environment variable that forces the fused GEMM on (1) or off (0). Where it is not set, the configuration of the
card says from which product on it was measured to be faster than the mix kernel and cuBLAS (docs/gpu.md)."""

KERNEL = "weighted_mix.gemm_sm90"
"""Its name there."""

Operands = tuple[int, int, int, bool]
"""A block of A: (tensor map, first column there, position in the mixed row, whether it is mixed)."""


class GemmPlan(NamedTuple):
    """How the kernel reads the mixed row."""

    taps: tuple[int, ...]
    """Layers that the copy engine reads in place, one tensor map each; the scratch F has the map after them."""
    tap_blocks: tuple[Operands, ...]
    """Multiplied first, since they wait for nothing."""
    mixed_blocks: tuple[int, ...]
    """Positions in the mixed row of the blocks that are mixed; they are the columns of F."""
    mixed: MixPlan | None
    """The mixed blocks, over ``mixed_layers``."""
    mixed_layers: tuple[int, ...]


@cache
def lower(plan: MixPlan) -> GemmPlan:
    """The plan as the kernel takes it."""
    mixed = tuple(g for g, block in enumerate(plan.blocks) if not is_tap(block))
    taps = [g for g in range(plan.num_blocks) if g not in mixed]
    layers = tuple(dict.fromkeys(plan.blocks[g][0].layer for g in taps))
    tap_blocks: tuple[Operands, ...] = tuple((layers.index(plan.blocks[g][0].layer), 0, g, False) for g in taps)
    if not mixed:
        return GemmPlan(layers, tap_blocks, (), None, ())
    mixed_layers, mixed_plan = MixPlan(tuple(plan.blocks[g] for g in mixed)).compact()
    return GemmPlan(layers, tap_blocks, mixed, mixed_plan, mixed_layers)


def operands(plan: GemmPlan, width: int) -> list[Operands]:
    """All blocks in the order of the multiplication: those of F after the taps."""
    scratch = [(len(plan.taps), i * width, g, True) for i, g in enumerate(plan.mixed_blocks)]
    return [*plan.tap_blocks, *scratch]


def why_not(args: MixArgs, projector: Projector, keep: Keep) -> str | None:
    """None if the kernel can serve the call on a Hopper GPU, otherwise why not: a function of shapes and layouts."""
    weight, bias, activation = projector.weight1, projector.bias1, projector.activation
    first, plan = args.layers[0], lower(args.plan)
    tokens = first.shape[1]
    if args.image_index is not None:
        return "with an image_index the rows of the batch are not those of the layers"
    if projector.norm is not None:
        return "it has no LayerNorm"
    if keep == Keep.ROWS:
        return "the mixed row is kept for backward, and this kernel never has it whole"
    if activation not in (None, "gelu"):
        return f"its epilogue has GELU only, not {activation}"
    if first.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != first.dtype:
        return f"it takes bf16 or fp16 throughout, not {first.dtype} layers and {weight.dtype} weights"
    if args.width % TILE_K:
        return f"a layer must be a multiple of {TILE_K} wide, not {args.width}"
    if weight.shape[0] % 8:
        return f"the output must be a multiple of 8 wide, not {weight.shape[0]}"
    if len(plan.taps) > MAX_TAPS or args.plan.num_blocks > 2 * MAX_TAPS:
        return f"it takes {MAX_TAPS} taps and {2 * MAX_TAPS} blocks, not {len(plan.taps)} and {args.plan.num_blocks}"
    if not first.numel() or not args.num_patches or not weight.shape[0]:
        return "there is nothing to compute"
    if first.shape[0] * tokens + CLUSTER * TILE_M >= 2**31:
        return f"it counts rows in 32 bits, not {first.shape[0] * tokens}"
    for layer in plan.taps:
        tap = args.layers[layer]
        if tap.shape[0] > 1 and tap.stride(0) != tokens * tap.stride(1):
            return f"layer {layer} is not flat: its images are {tap.stride(0)} elements apart, not T * {tap.stride(1)}"
        if tap.stride(1) < args.width:
            return f"layer {layer} has tokens that overlap"
    rows_overlap = weight.stride(0) < weight.shape[1]
    if weight.stride(1) != 1 or rows_overlap or (bias is not None and (bias.stride(0) != 1 or bias.data_ptr() % 4)):
        return "weight or bias is not contiguous"
    addresses = map(Tensor.data_ptr, args.layers)
    in_vectors = allow_vectors_at(args.width, first.element_size(), addresses, args.strides)
    if not in_vectors or not allows_vectors(weight.shape[1], [weight]):
        return "an address or a stride is not a multiple of 16 bytes"
    return None


def why_not_device(index: int, size: ProductSize | None = None) -> str | None:
    """None if this device runs the kernel and it is to be taken, otherwise why not.

    Args:
        index: of the device.
        size: of a call, with I * T rows; None asks whether it is taken for any.
    """
    switch = os.environ.get(SWITCH)
    if switch == "0":
        return f"{SWITCH}=0 switches it off"
    reason = why_not_capability(index)
    if reason is not None or switch == "1":
        return reason
    least = least_size(index)
    if least is None:
        return f"nobody has measured that it is faster on such a card; {SWITCH}=1 switches it on"
    if size is not None and (size.rows < least.rows or size.columns < least.columns):
        return (
            f"it was measured to be faster from {least.rows} rows and {least.columns} columns on, this product has "
            f"{size.rows} and {size.columns}; {SWITCH}=1 switches it on"
        )
    return None


def why_taken() -> str:
    """What ``explain`` tells of a call that took it."""
    return f"{SWITCH}=1" if os.environ.get(SWITCH) == "1" else "it was measured to be faster on such cards"


def least_size(index: int) -> ProductSize | None:
    """From which product on it was measured to be faster; None where nobody measured it."""
    return of_device(index).faster_from.get(KERNEL)


@cache
def why_not_capability(index: int) -> str | None:
    """None if this device can run the kernel, switched on or not, otherwise why not."""
    if not hasattr(launch.module(), "gemm_sm90"):
        return "the module was built without architecture 90a, or by an nvcc before 12.5"
    capability = torch.cuda.get_device_capability(index)
    return None if capability == (9, 0) else f"it needs compute capability 9.0, not {capability[0]}.{capability[1]}"


def row_tiles(rows: int) -> int:
    """The number of tiles of rows, in whole clusters."""
    return CLUSTER * chunks(rows, CLUSTER * TILE_M)


def num_counters(rows: int) -> int:
    """The number of int32 counters of a launch: those before the flags, and one flag per tile of rows."""
    return FIRST_FLAG + row_tiles(rows)


class Form(NamedTuple):
    """How a product is cut up."""

    tile_n: int
    """Columns of a tile: WIDE or NARROW."""
    grid: int
    """Blocks of the launch, in whole clusters."""


def form(rows: int, columns: int, mixes: bool, multiprocessors: int) -> Form:
    """The form with the shorter rounds of tiles; blocks that have no tile still mix.

    A tile takes as long as its multiplications, or as the copies of its 128 rows and its cluster's share of N columns
    from L2, which do not shrink alike: the mean of both, in columns of a wide tile.
    """
    most = max(CLUSTER, multiprocessors // CLUSTER * CLUSTER)

    def tiles(tile_n: int) -> int:
        return row_tiles(rows) * chunks(columns, tile_n)

    def cost(tile_n: int) -> int:
        return chunks(tiles(tile_n), most) * (tile_n + TILE_M + tile_n // CLUSTER)

    tile_n = min(WIDE, NARROW, key=cost)
    return Form(tile_n, most if mixes else min(most, tiles(tile_n)))


class Counters:
    """Parts of the module's counters, which every launch finds and leaves at zero (gemm_sm90.cu).

    Launches on one stream come one after the other and share a part. A launch that a graph captures gets a part of its
    own for good, because a graph may be replayed on any stream, but never beside itself: torch instantiates a capture
    once. Who takes the raw graph and instantiates it twice must not run both at once.
    """

    OF_A_STREAM = 1024

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.taken: dict[torch.device, int] = {}
        self.of_streams: dict[tuple[torch.device, int], int] = {}

    def take(self, device: torch.device, stream: int, captured: bool, count: int) -> int | None:
        """The first of ``count`` counters for a launch; None where no part is left that is large enough."""
        with self.lock:
            if captured:
                return self._part(device, chunks(count, FIRST_FLAG) * FIRST_FLAG)
            if count > self.OF_A_STREAM:
                return None
            if (device, stream) not in self.of_streams:
                part = self._part(device, self.OF_A_STREAM)
                if part is None:
                    return None
                self.of_streams[device, stream] = part
            return self.of_streams[device, stream]

    def _part(self, device: torch.device, size: int) -> int | None:
        first = self.taken.get(device, 0)
        if first + size > COUNTERS:
            return None
        self.taken[device] = first + size
        return first


counters = Counters()


def is_of_torch(stream_id: int) -> bool:
    """Whether a stream, by torch's number of it, is one that torch never destroys. The handle of another may be given
    to a new stream while its own work still runs, so two launches at once could get the same counters."""
    return stream_id == 0 or stream_id % 2 == 1  # the others have their address as a number (c10/cuda/CUDAStream.cpp)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(
    args: MixArgs, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool, sums: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """``(y, z if kept)``, each ``[M, N]``; the sums of ``plan.reduced()`` are written into ``sums``."""
    plan, first = lower(args.plan), args.layers[0]
    (images, tokens, width), columns = first.shape, weight.shape[0]
    rows = images * tokens
    y = first.new_empty((images * args.num_patches, columns))
    z = torch.empty_like(y) if keep_z and activation is not None else None
    native, mixed, flags = launch.module(), None, None
    dtype = dtype_of(native, first.dtype)
    with launch.on_device_of(first) as stream:
        if plan.mixed is not None:
            scratch = first.new_empty((rows, len(plan.mixed_blocks) * width))
            count, captured = num_counters(rows), first.is_cuda and torch.cuda.is_current_stream_capturing()
            lasts = captured or not first.is_cuda or is_of_torch(torch._C._cuda_getCurrentStream(first.device.index)[0])
            part = counters.take(first.device, stream, captured, count) if lasts else None
            if part is None:
                flags = torch.zeros(count, dtype=torch.int32, device=first.device)
            mixed = native.MixedBlocks(
                mix_program(plan.mixed, bool(sums)), layers(dtype, args, plan.mixed_layers), weights(args.mix_weights),
                [kept.data_ptr() for kept in sums], scratch.data_ptr(), address(flags), part or 0,
            )  # fmt: skip
        epilogue = native.Epilogue(address(bias), activation_of(native, activation), y.data_ptr(), address(z))
        cut = form(rows, columns, mixed is not None, multiprocessors(first.device))
        native.gemm_sm90(
            layers(dtype, args, plan.taps), operands(plan, width), matrix(native, weight), epilogue, mixed,
            native.GemmForm(*cut), stream,
        )  # fmt: skip
    return y, z
