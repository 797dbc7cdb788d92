"""Every shipped configuration of the Triton kernels, compiled for its architecture at the shapes of the real model."""

import json
import os

import pytest
import torch

from igva_kernels import MixPlan
from igva_kernels.nn import WeightAllocator
from igva_kernels.ops.allocator.weights import AllocatorWeights
from igva_kernels.ops.weighted_mix.program import shares
from igva_kernels.ops.weighted_mix.steps import Keep, LayerShape, MixArgs

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
pytest.importorskip("triton")

from triton_build import SHARED_MEMORY, build, record, specialised

from igva_kernels.ops.allocator import triton as allocator
from igva_kernels.ops.weighted_mix.triton import gemm as mix_gemm
from igva_kernels.ops.weighted_mix.triton import mix
from igva_kernels.runtime import config
from igva_kernels.runtime.triton import gemm, norm

ARCHITECTURES = {80: "sm_80", 90: "sm_90", 100: "sm_100"}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
IGVA, VIP_LLAVA = MixPlan.igva().compact()[1], MixPlan.concat([-2, -5, -8, -11, 6], 25).compact()[1]
REDUCED = MixPlan.igva().reduced()[1]
D, H, T = 1024, 4096, 577


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def args(plan, index=False, same_strides=True, batch=2):
    layers = [meta(batch, T + 8 * (i + 1) * (not same_strides), D)[:, -T:] for i in range(plan.num_states)]
    weights = stat(batch, plan.num_columns) if plan.num_columns else None
    return MixArgs(layers, plan, weights, meta(batch, dtype=torch.int64) if index else None, 1)


def norm_of(width):
    return meta(width), meta(width), 1e-5


def stat(*shape):
    return meta(*shape, dtype=torch.float32)


M = 2 * (T - 1)

GEMMS = {
    "linear": lambda tile: gemm.linear(meta(M, 2 * D), meta(H, 2 * D), meta(H), "gelu", True, tile),
    "linear_grad_input": lambda tile: gemm.linear_grad_input(
        meta(M, H), meta(H, H), meta(M, H), "gelu", True, True, tile
    ),
    "weighted_mix.mix_linear": lambda tile: mix_gemm.mix_linear(
        args(VIP_LLAVA), meta(H, 5 * D), stat(H), "gelu", False, tile, (stat(2, T - 1), stat(2, T - 1), stat(H))
    ),
}

ROWS = {
    "mix": lambda rows: mix.mix(args(IGVA), torch.bfloat16, None, Keep.SOURCES, rows["weighted_mix.mix"]),
    "mix, image index and strides": lambda rows: mix.mix(
        args(IGVA, True, False), torch.bfloat16, None, Keep.SOURCES, rows["weighted_mix.mix"]
    ),
    "mix with norm": lambda rows: mix.mix(
        args(VIP_LLAVA), torch.bfloat16, norm_of(5 * D), Keep.ROWS, rows["weighted_mix.mix"]
    ),
    "mix_weights_grad": lambda rows: mix.mix_weights_grad(
        meta(2, T - 1, D), (1,), args(REDUCED), rows["weighted_mix.mix_weights_grad"]
    ),
    "layer_grads": lambda rows: mix.layer_grads(
        meta(2, T - 1, 2 * D), shares(IGVA, (True,) * 24)[0], stat(2, 4), meta(2, dtype=torch.int64),
        LayerShape(2, T, D, torch.bfloat16, 1), rows["weighted_mix.layer_grads"],
    ),
    "norm_backward": lambda rows: norm.norm_backward(
        meta(M, 5 * D), meta(M, 5 * D), norm_of(5 * D), stat(M), stat(M), True, 264, rows["norm_backward"]
    ),
    "fold_norm": lambda rows: norm.fold_norm(meta(H, 5 * D), meta(H), norm_of(5 * D)),
}  # fmt: skip


def shipped_tiles():
    """The first tile of every product in ``make test``, the others in ``make test-all``."""
    for capability, architecture in ARCHITECTURES.items():
        for name, tiles in config.shipped(architecture).gemms.items():
            for i in range(len(tiles)):
                marks = [pytest.mark.slow] if i else []
                yield pytest.param(capability, name, i, id=f"{architecture}-{name}-{i}", marks=marks)


def check(built, capability):
    assert built.shared <= SHARED_MEMORY[capability]
    assert built.stack <= 64, f"{built.stack} bytes of stack a thread, {built.registers} registers"
    # Offsets into tensors are products in 64 bits: a scalar of 32 bits is a tile's number or its first row.
    products = [line for line in built.ttir.splitlines() if "arith.muli" in line]
    assert any("i64" in line for line in products)
    assert not [line for line in products if "xi32>" in line]


@pytest.mark.parametrize(("capability", "name", "i"), [*shipped_tiles()])
def test_gemm(capability, name, i, monkeypatch):
    tile = config.shipped(ARCHITECTURES[capability]).gemms[name][i]
    (launch,) = record(monkeypatch, lambda: GEMMS[name](tile))
    built = build(launch, capability)
    check(built, capability)
    assert MATRIX_INSTRUCTION[capability] in built.ptx
    assert ("cp.async.bulk.tensor" in built.ptx) == (capability >= 90)
    # Results are stored 16 bytes at a time. Only the bias partials are narrower: one store per slice.
    partials = tile.slices if name == "linear_grad_input" else 0
    assert built.ptx.count("st.global.v4.b32") == built.ptx.count("st.global") - partials > 0


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("capability", [90, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 100))])
def test_rows(capability, name, monkeypatch):
    rows = config.shipped(ARCHITECTURES[capability]).rows
    for launch in record(monkeypatch, lambda: ROWS[name](rows)):
        built = build(launch, capability)
        check(built, capability)
        assert "ld.global.v4.b32" in built.ptx
        if name == "mix":
            # Every layer is loaded once, 16 bytes at a time; the other four loads are the weights.
            assert built.ptx.count("ld.global.v4.b32") == 24
            assert built.ptx.count("ld.global") == 28


def test_one_build_serves_every_batch(monkeypatch):
    """A last batch that is smaller, or the first single image, does not stop for the compiler."""
    shipped = config.shipped("sm_90")
    rows, tiles = shipped.rows, {name: tiles[0] for name, tiles in shipped.gemms.items()}

    def step(batch):
        m, layers, sources = batch * (T - 1), args(IGVA, True, batch=batch), args(REDUCED, True, batch=batch)
        taps = args(VIP_LLAVA, True, batch=batch)
        mix.mix(layers, torch.bfloat16, norm_of(2 * D), Keep.SOURCES, rows["weighted_mix.mix"])
        mix.mix_weights_grad(meta(batch, T - 1, D), (1,), sources, rows["weighted_mix.mix_weights_grad"])
        shape, weights = LayerShape(batch, T, D, torch.bfloat16, 1), layers.mix_weights
        signatures = shares(IGVA, (True,) * 24)[0]
        mix.layer_grads(
            meta(batch, T - 1, 2 * D), signatures, weights, layers.image_index, shape, rows["weighted_mix.layer_grads"]
        )
        norm.norm_backward(
            meta(m, 2 * D), meta(m, 2 * D), norm_of(2 * D), stat(m), stat(m), True, 264, rows["norm_backward"]
        )
        gemm.linear(meta(m, 2 * D), meta(H, 2 * D), meta(H), "gelu", True, tiles["linear"])
        gemm.linear_grad_input(meta(m, H), meta(H, H), meta(m, H), "gelu", True, True, tiles["linear_grad_input"])
        mix_gemm.mix_linear(taps, meta(H, 5 * D), meta(H), "gelu", False, tiles["weighted_mix.mix_linear"])

    builds = []
    for batch in (1, 3, 16):
        launches = record(monkeypatch, lambda batch=batch: step(batch))
        builds.append([(launch[0].__name__, specialised(launch)) for launch in launches])
    assert len({name for name, _ in builds[0]}) == 7
    assert builds[0] == builds[1] == builds[2]


@pytest.mark.parametrize(
    ("capability", "batch", "dtype"),
    [
        (90, 64, torch.bfloat16),
        *(pytest.param(*others, marks=pytest.mark.slow) for others in (
            (90, 1, torch.bfloat16), (90, 64, torch.float32), (80, 64, torch.bfloat16), (100, 64, torch.bfloat16),
        )),
    ],
)  # fmt: skip
def test_allocator(capability, batch, dtype, monkeypatch):
    with torch.device("meta"):
        weights = AllocatorWeights.of(list(WeightAllocator(768, D, 4).to(dtype).parameters()))
    inputs = meta(batch, 768, dtype=dtype), meta(batch, 4, D, dtype=dtype)
    launches = record(monkeypatch, lambda: allocator.allocate(*inputs, weights, 4, [1e-5] * 8, 132))
    assert len(launches) == 16
    # Up to the attention of the second block, the first that has a norm before it, and the head.
    for launch in (*launches[:7], launches[-1]):
        built = build(launch, capability)
        check(built, capability)
        if "BLOCK_M" in launch[2]:
            rows = launch[2]["BLOCK_M"]
            instruction = MATRIX_INSTRUCTION[capability] if rows == 64 else "mma.sync"
            assert (instruction in built.ptx) == (dtype == torch.bfloat16)
            assert "cp.async.cg" in built.ptx
        else:
            assert "ld.global.v4.b32" in built.ptx


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_the_other_dtypes_compile(dtype, monkeypatch):
    tile = config.shipped("sm_90").gemms["linear"][2]
    x, weight = meta(M, 2 * D, dtype=dtype), meta(H, 2 * D, dtype=dtype)
    (launch,) = record(monkeypatch, lambda: gemm.linear(x, weight, None, "gelu", False, tile))
    build(launch, 90)


@pytest.mark.parametrize("name", [path.stem for path in sorted(config.SHIPPED.glob("*.json"))])
def test_shipped_files_hold_at_most_three_tiles_and_survive_a_round_trip(name):
    shipped = config.shipped(name)
    assert json.loads(config.Config.from_json(shipped.to_json()).to_json()) == json.loads(shipped.to_json())
    assert all(1 <= len(tiles) <= 3 for tiles in shipped.gemms.values())


def test_a_card_finds_its_architecture():
    capabilities = {(8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_80"}
    assert {c: config.architecture(c) for c in capabilities} == capabilities
