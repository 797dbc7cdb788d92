"""What the CUDA backend decides on the host, as pure functions: plans, layouts, grids, and who serves a call."""

import re
import subprocess
import sys
import types
from dataclasses import replace
from itertools import pairwise

import plain_torch
import pytest
import torch

from igva_kernels import MixPlan
from igva_kernels.ops.weighted_mix.cuda import gemm
from igva_kernels.ops.weighted_mix.cuda.program import norm_row_fits
from igva_kernels.ops.weighted_mix.plan import is_tap
from igva_kernels.ops.weighted_mix.steps import Keep, MixArgs, Projector
from igva_kernels.runtime import config
from igva_kernels.runtime.config import ProductSize
from igva_kernels.runtime.cuda import BACKEND, launch
from igva_kernels.runtime.cuda.dense import allows_vectors, chunks

IGVA = MixPlan.igva(6, 3)


def mix_args(plan=IGVA, images=2, tokens=9, width=64, dtype=torch.bfloat16, index=None, skip=1):
    layers, plan = plan.compact()
    weights = torch.rand(images, plan.num_columns) if plan.num_columns else None
    return MixArgs([torch.zeros(images, tokens, width, dtype=dtype) for _ in layers], plan, weights, index, skip)


@pytest.mark.parametrize(
    ("width", "stride", "offset", "dtype", "expected"),
    [
        (64, 64, 0, torch.bfloat16, True),
        (60, 64, 0, torch.bfloat16, False),
        (64, 65, 0, torch.bfloat16, False),
        (64, 64, 1, torch.bfloat16, False),
        (12, 12, 0, torch.float32, True),
        (12, 12, 4, torch.float32, True),
        (12, 12, 0, torch.bfloat16, False),
        (2, 2, 0, torch.float64, True),
    ],
)
def test_vectors_need_every_address_to_be_a_multiple_of_16_bytes(width, stride, offset, dtype, expected):
    storage = torch.zeros(4096, dtype=dtype)
    assert storage.data_ptr() % 16 == 0
    layer = storage.as_strided((2, 3, width), (3 * stride, stride, 1), offset)
    assert allows_vectors(width, [layer]) is expected


def test_the_rows_of_the_project_fit_the_norm_kernel_and_wider_ones_do_not():
    assert norm_row_fits(5 * 1152, torch.bfloat16) and norm_row_fits(24 * 1024, torch.float32)
    assert not norm_row_fits(25 * 1024, torch.bfloat16)
    assert not norm_row_fits(13 * 1024, torch.float64)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 7), True), ((8, 9), True), ((9, 0), True),
        ((10, 0), True), ((10, 3), True), ((11, 0), True), ((12, 0), True), ((12, 1), True), ((13, 0), True),
    ],
)  # fmt: skip
def test_machine_code_and_ptx_decide_where_the_module_runs(capability, expected):
    assert launch.runs_on(["80", "86", "89", "90", "90a", "100", "120"], "90", capability) is expected


def test_without_ptx_a_newer_device_is_not_served():
    assert not launch.runs_on(["80"], None, (9, 0))
    assert not launch.runs_on(["90a"], None, (9, 1))


# ---- the fused GEMM ----


def fused_why_not(args, norm=None, hidden=256, activation="gelu", keep=Keep.NOTHING, weight=None, bias=None):
    if weight is None:
        weight = torch.zeros(hidden, args.plan.num_blocks * args.width, dtype=args.layers[0].dtype)
    return gemm.why_not(args, Projector(weight, bias, norm=norm, activation=activation), keep)


@pytest.mark.parametrize("plan", [IGVA, MixPlan.concat([-2, 3, 3], 7), MixPlan.weighted_sum(range(5), -1, 6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_gemm_serves_the_plans_of_the_project(plan, dtype):
    assert fused_why_not(mix_args(plan, dtype=dtype)) is None
    assert fused_why_not(mix_args(plan, dtype=dtype), keep=Keep.SOURCES) is None


def with_layer(args, index, layer):
    layers = list(args.layers)
    layers[index] = layer
    return MixArgs(layers, args.plan, args.mix_weights, args.image_index, args.skip_tokens)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: fused_why_not(mix_args(index=torch.zeros(2, dtype=torch.int64))), "image_index"),
        (lambda: fused_why_not(mix_args(), norm=(None, None, 1e-5)), "LayerNorm"),
        (lambda: fused_why_not(mix_args(), keep=Keep.ROWS), "kept for backward"),
        (lambda: fused_why_not(mix_args(), activation="silu"), "GELU only"),
        (lambda: fused_why_not(mix_args(dtype=torch.float32)), "bf16 or fp16"),
        (lambda: fused_why_not(mix_args(), weight=torch.zeros(256, 128)), "bf16 or fp16"),
        (lambda: fused_why_not(mix_args(width=96)), "multiple of 64"),
        (lambda: fused_why_not(mix_args(), hidden=100), "multiple of 8"),
        (lambda: fused_why_not(mix_args(MixPlan.concat(range(9), 9))), "8 taps"),
        (lambda: fused_why_not(mix_args(skip=9)), "nothing to compute"),
        (lambda: fused_why_not(mix_args(), hidden=0), "nothing to compute"),
        (lambda: fused_why_not(with_layer(mix_args(), 4, torch.zeros(2, 10, 64).bfloat16()[:, 1:])), "not flat"),
        (lambda: fused_why_not(with_layer(mix_args(), 0, torch.zeros(2, 9, 65).bfloat16()[..., 1:])), "16 bytes"),
        (lambda: fused_why_not(mix_args(), weight=torch.zeros(128, 256).bfloat16().t()), "not contiguous"),
        (lambda: fused_why_not(mix_args(), weight=torch.zeros(1, 128).bfloat16().expand(256, 128)), "not contiguous"),
        (lambda: fused_why_not(mix_args(), bias=torch.zeros(257).bfloat16()[1:]), "not contiguous"),
    ],
)
def test_every_other_layout_falls_back_to_two_kernels_with_a_reason(call, reason):
    assert reason in call()


def test_only_the_taps_must_be_flat():
    args = mix_args()
    padded = torch.zeros(2, 10, 64).bfloat16()[:, 1:]
    assert fused_why_not(with_layer(args, 0, padded)) is None  # layer 0 is mixed: mixers follow any stride
    one_image = with_layer(mix_args(images=1), 4, torch.zeros(1, 10, 64).bfloat16()[:, 1:])
    assert fused_why_not(one_image) is None


MEAN = [(1, None, 0.5), (2, None, 0.5)]


@pytest.mark.parametrize(
    "plan",
    [
        MixPlan((MEAN, [(0, None, 1.0)], [(3, 0, 1.0)], [(4, None, 1.0)], [(0, None, 1.0)]), 5),
        MixPlan.concat([2, 0], 3),
        MixPlan.weighted_sum(range(5)),
        IGVA.compact()[1],
    ],
)
def test_every_block_is_multiplied_once_from_where_it_lies_and_taps_wait_for_nothing(plan):
    lowered, mixed = gemm.lower(plan), [g for g, block in enumerate(plan.blocks) if not is_tap(block)]
    operands = gemm.operands(lowered, 64)
    assert sorted(position for _, _, position, _ in operands) == [*range(plan.num_blocks)]
    waits = [is_mixed for *_, is_mixed in operands]
    assert waits == sorted(waits)
    for source, column, position, is_mixed in operands:
        if is_mixed:
            assert (source, column) == (len(lowered.taps), mixed.index(position) * 64)
        else:
            assert (lowered.taps[source], column) == (plan.blocks[position][0].layer, 0)
    assert (lowered.mixed is None) == (not mixed)
    if mixed:  # what the mixers compute, over the layers that they read
        layers = torch.randn(6, 1, 2, 3).double().unbind()
        weights = torch.rand(1, plan.num_columns).double() if plan.num_columns else None
        rows = plain_torch.layer_mix(layers, MixPlan(tuple(plan.blocks[g] for g in mixed), 6), weights)
        read = [layers[layer] for layer in lowered.mixed_layers]
        assert torch.equal(plain_torch.layer_mix(read, lowered.mixed, weights), rows)


@pytest.mark.parametrize("rows", [1, 128, 129, 577, 64 * 577])
@pytest.mark.parametrize("columns", [8, 256, 4096])
def test_whole_clusters_of_tiles_cover_every_row_and_column(rows, columns):
    tiles = gemm.row_tiles(rows)
    assert tiles % gemm.CLUSTER == 0 and (tiles - gemm.CLUSTER) * gemm.TILE_M < rows <= tiles * gemm.TILE_M
    assert gemm.num_counters(rows) == gemm.FIRST_FLAG + tiles
    for multiprocessors in (1, 6, 132, 133):
        idle, busy = (gemm.form(rows, columns, mixes, multiprocessors) for mixes in (False, True))
        assert idle.tile_n == busy.tile_n
        assert idle.grid % gemm.CLUSTER == busy.grid % gemm.CLUSTER == 0
        assert 0 < idle.grid <= busy.grid <= max(multiprocessors, gemm.CLUSTER)
        assert idle.grid == busy.grid or idle.grid >= tiles * chunks(columns, idle.tile_n)


@pytest.mark.parametrize(("images", "tile_n"), [(1, gemm.NARROW), (2, gemm.NARROW), (4, gemm.WIDE), (16, gemm.WIDE)])
def test_few_images_take_narrow_tiles_since_wide_ones_leave_multiprocessors_idle(images, tile_n):
    """One image has 3 x 16 pairs of wide tiles and 3 x 22 of narrow ones, for the 66 pairs of an H100."""
    assert gemm.form(images * 577, 4096, True, 132).tile_n == tile_n


def test_no_two_launches_that_may_overlap_share_counters():
    counters, first, second = gemm.Counters(), torch.device("cuda", 0), torch.device("cuda", 1)
    of_stream = [counters.take(first, stream, False, 100) for stream in (0, 7, 0)]
    assert of_stream[0] == of_stream[2] != of_stream[1]
    captured = [counters.take(first, 7, True, 100) for _ in range(3)]
    assert len({*of_stream, *captured}) == 5
    parts = sorted([(part, counters.OF_A_STREAM) for part in {*of_stream}] + [(part, 128) for part in captured])
    assert all(part + size <= after for (part, size), (after, _) in pairwise(parts))
    assert counters.take(second, 7, False, 100) == 0  # every device has counters of its own


def test_counters_that_are_used_up_are_not_handed_out_twice():
    counters, device = gemm.Counters(), torch.device("cuda", 0)
    assert counters.take(device, 0, False, counters.OF_A_STREAM + 1) is None
    parts = [counters.take(device, 0, True, gemm.COUNTERS // 4) for _ in range(5)]
    assert parts == [i * gemm.COUNTERS // 4 for i in range(4)] + [None]
    assert counters.take(device, 0, False, 100) is None


def test_only_the_streams_that_torch_keeps_for_good_share_counters():
    assert [gemm.is_of_torch(number) for number in (0, 3, 67, 0x7F0012345680)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("switch", "measured", "size", "taken", "reason"),
    [
        (None, None, ProductSize(10**6, 4096), False, "nobody has measured"),
        (None, ProductSize(9232, 4096), ProductSize(9232, 4096), True, ""),
        (None, ProductSize(9232, 4096), ProductSize(9231, 4096), False, "9231"),
        (None, ProductSize(9232, 4096), ProductSize(10**6, 256), False, "256"),
        ("0", ProductSize(9232, 4096), ProductSize(10**6, 4096), False, "=0 switches it off"),
        ("1", None, ProductSize(1, 8), True, ""),
    ],
)
def test_the_fused_gemm_is_taken_where_it_was_measured_to_be_faster_or_where_it_is_forced(
    switch, measured, size, taken, reason, monkeypatch
):
    monkeypatch.delenv(gemm.SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(gemm.SWITCH, switch)
    shipped = replace(config.shipped("sm_90"), faster_from={gemm.KERNEL: measured} if measured else {})
    monkeypatch.setattr(gemm, "of_device", lambda index: shipped)
    monkeypatch.setattr(gemm, "why_not_capability", lambda index: None)
    assert (gemm.why_not_device(0, size) is None) == taken and reason in (gemm.why_not_device(0, size) or "")
    monkeypatch.setattr(gemm, "why_not_capability", lambda index: "too old")
    assert gemm.why_not_device(0, size) is not None


# ---- who serves a call ----


def test_the_backend_refuses_with_a_reason():
    assert "CUDA tensors" in BACKEND.why_not(torch.device("cpu"), torch.float32)
    assert "torch.int8" in BACKEND.why_not(torch.device("cuda"), torch.int8)
    if not torch.cuda.is_available():
        assert BACKEND.why_not(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("no _cuda"), "no nvcc was found"),
        (ImportError("undefined symbol"), "does not load: undefined"),
    ],
)
def test_a_missing_module_says_why(monkeypatch, error, reason):
    def fail(name):
        raise error

    monkeypatch.setattr(launch.importlib, "import_module", fail)
    monkeypatch.setattr(launch.native, "build_info", lambda: {"cuda": {"reason": "no nvcc was found"}})
    launch.load.cache_clear()
    assert reason in launch.load()[1]
    launch.load.cache_clear()


@pytest.mark.parametrize(
    ("versions", "capability", "reason"),
    [
        ((12080, 13000), (9, 0), "driver supports CUDA 12.8|this one supports CUDA 12.8"),
        ((13010, 13000), (9, 0), None),
        ((13000, 13000), (7, 5), "compute capability 7.5; rebuild with IGVA_KERNELS_CUDA_ARCHS=75"),
    ],
)
def test_driver_and_capability_are_checked(monkeypatch, versions, capability, reason):
    monkeypatch.setattr(launch, "module", lambda: types.SimpleNamespace(versions=lambda: versions))
    monkeypatch.setattr(launch.native, "build_info", lambda: {"cuda": {"archs": ["80", "90a"], "ptx": "90"}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    launch._why_not_index.cache_clear()
    said = launch._why_not_index(0)
    launch._why_not_index.cache_clear()
    assert said is None if reason is None else re.search(reason, said)


def test_import_touches_no_driver_and_needs_no_module():
    script = """
import sys
sys.modules["igva_kernels._cuda"] = None
import torch
from igva_kernels.runtime.cuda import BACKEND
assert BACKEND.why_not(torch.device("cuda"), torch.float32)
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
