"""The products of several members in one launch, compiled without a GPU at the shapes of internal direct fusion."""

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
pytest.importorskip("triton")

from triton_build import SHARED_MEMORY, build, record

from igva_kernels.ops.layer_project.triton import grouped_linear
from igva_kernels.runtime import config

ARCHITECTURES = {80: "sm_80", 90: "sm_90", 100: "sm_100"}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
ROWS, WIDTH, HIDDEN = 576, 1024, 4096


def meta(*shape):
    return [torch.empty(*shape, dtype=torch.bfloat16, device="meta") for _ in range(3)]


@pytest.mark.parametrize("second", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("capability", "i"),
    [
        (90, 0),
        *(pytest.param(c, i, marks=pytest.mark.slow) for c in (80, 90, 100) for i in range(3) if (c, i) != (90, 0)),
    ],
)
def test_a_pointer_that_is_chosen_by_the_program_is_read_and_written_16_bytes_at_a_time(
    capability, i, second, monkeypatch
):
    tiles = config.shipped(ARCHITECTURES[capability]).gemms["linear"]
    tile = replace(tiles[min(i, len(tiles) - 1)], tma=False)
    length, activation = (HIDDEN, None) if second else (WIDTH, "gelu")
    outs, zs = meta(ROWS, HIDDEN), None if second else meta(ROWS, HIDDEN)
    (launch,) = record(
        monkeypatch,
        lambda: grouped_linear(meta(ROWS, length), meta(HIDDEN, length), meta(HIDDEN), activation, outs, zs, tile),
    )
    built = build(launch, capability)
    assert built.shared <= SHARED_MEMORY[capability]
    assert built.stack <= 64, f"{built.stack} bytes of stack a thread, {built.registers} registers"
    assert MATRIX_INSTRUCTION[capability] in built.ptx
    assert "cp.async.cg" in built.ptx
    assert built.ptx.count("st.global.v4.b32") == built.ptx.count("st.global") > 0
    assert not [line for line in built.ttir.splitlines() if "arith.muli" in line and "xi32>" in line]
