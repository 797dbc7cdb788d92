"""The Triton kernels of deformable attention, compiled without a GPU at the shapes of MMFuser, of Deformable DETR and
of Layer_Select_Fuse with every layer."""

import os
from itertools import product

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_build import build, carried_bounds, record, specialised

from igva_kernels.ops.deform_attn.geometry import BOXES, GRID, POINTS, Geometry
from igva_kernels.ops.deform_attn.triton import IMPLEMENTATION

DETECTOR = ((67, 100), (34, 50), (17, 25), (9, 13))
SHAPES = {
    "MMFuser": (((24, 24),) * 4, 16, 64, GRID),
    "detector": (DETECTOR, 8, 32, POINTS),
    "detector, boxes": (DETECTOR, 8, 32, BOXES),
    "24 layers": (((24, 24),) * 24, 16, 64, GRID),
}


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(monkeypatch, dtype, shapes, heads, width, origin):
    """The kernels of a step of one image, by name."""
    geometry = Geometry(shapes, (4,) * len(shapes), origin, True)
    queries = geometry.rows[0] if origin == GRID else sum(geometry.rows)
    sampling = meta(1, queries, heads * geometry.num_points * 2)
    logits = meta(1, queries, heads * geometry.num_points)
    per_level = {GRID: 0, POINTS: 2, BOXES: 4}[origin]
    reference = meta(1, queries, len(shapes) * per_level) if per_level else None
    levels, grads = (geometry.levels([meta(1, sum(geometry.rows), heads, width, dtype=dtype)]) for _ in range(2))
    grad = meta(1, queries, heads * width, dtype=dtype)

    def calls():
        IMPLEMENTATION.attend(levels, sampling, logits, reference, geometry)
        IMPLEMENTATION.attend_grad(grad, levels, sampling, logits, reference, geometry, grads, (True, True), False)

    return {kernel.__name__: (kernel, *rest) for kernel, *rest in record(monkeypatch, calls)}


def targets():
    """Of these, a few are compiled in every run."""
    for capability, (shape, dtype) in product((90, 80, 100), product(SHAPES, (torch.bfloat16, torch.float32))):
        is_quick = capability == 90 and (dtype == torch.bfloat16 or shape == "MMFuser")
        yield pytest.param(capability, dtype, shape, marks=[] if is_quick else [pytest.mark.slow])


@pytest.mark.parametrize(("capability", "dtype", "shape"), targets())
def test_kernels_gather_16_bytes_at_a_time_keep_to_their_registers_and_fuse_no_position(
    capability, dtype, shape, monkeypatch
):
    built = {name: build(each, capability) for name, each in launches(monkeypatch, dtype, *SHAPES[shape]).items()}
    # For 24 levels in fp32 the compiler moves two words of a thread out of the registers of an sm_80.
    spilled = 8 if (capability, dtype, shape) == (80, torch.float32, "24 layers") else 0
    assert [*built] == ["attend_kernel", "places_grad_kernel", "levels_grad_kernel", "convert_kernel"]
    for name, each in built.items():
        assert each.stack <= spilled, name
        products = [line for line in each.ttir.splitlines() if "arith.muli" in line]
        assert any("i64" in line for line in products) and not [line for line in products if "xi32>" in line], name
        # Four corners of 16 bytes, whatever the number of levels: their loop is not unrolled.
        gathers = name in ("attend_kernel", "places_grad_kernel")
        fused = each.ptx.count("fma.rn.f32") + each.ptx.count("fma.rn.f32x2")
        assert fused == (4 * 16 // dtype.itemsize if gathers else 0), name
        if gathers:
            assert each.ptx.count("ld.global.v4.b32") >= 4, name
    # Neighbours in a row are added by neighbours in a warp, with no exchange between them.
    added = built["levels_grad_kernel"]
    assert added.ptx.count("atom.global.gpu.relaxed.add.u64") == 4 * 4 and added.shared <= 64


@triton.jit
def from_the_pass_before(out, LEVELS: tl.constexpr, HOW: tl.constexpr):
    """Loops over all points, whose levels begin where the ones before ended."""
    first = 0
    for level in range(LEVELS):
        last = first + 4
        if HOW == "condition":
            if tl.load(out) > 0:
                last = first + 5
        elif HOW == "loop":
            for _ in range(3):
                last += 1
        if HOW == "from the level":
            for i in range(level * 4, level * 4 + 4):
                tl.store(out + i, level)
        else:
            for i in range(first, last):
                tl.store(out + i, level)
        first = last


@pytest.mark.parametrize("how", ["directly", "condition", "loop", "from the level"])
def test_a_loop_that_begins_where_the_pass_before_ended_is_found(how):
    """The compiler gets it wrong, on a card only."""
    given = {"signature": {"out": "*i32", "LEVELS": "constexpr", "HOW": "constexpr"}}
    source = ASTSource(from_the_pass_before, **given, constexprs={(1,): 3, (2,): how})
    ttir = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    assert len(carried_bounds(ttir)) == (how != "from the level")


def test_images_of_another_size_compile_nothing_anew(monkeypatch):
    found = []
    for shapes in (DETECTOR, ((64, 128), (32, 64), (16, 32), (1, 16))):
        launched = launches(monkeypatch, torch.bfloat16, shapes, *SHAPES["detector"][1:])
        found.append({name: specialised(each) for name, each in launched.items()})
    assert found[0] == found[1]
