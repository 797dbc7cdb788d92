"""The Triton kernels of the injection, compiled without a GPU at the shapes of DeepStack."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
pytest.importorskip("triton")

from triton_build import build, record

from igva_kernels.ops.inject_tokens.triton import IMPLEMENTATION


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("width", [4096, 3584])
@pytest.mark.parametrize("capability", [90, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 100))])
def test_every_access_of_a_tensor_is_16_bytes_wide_and_its_offset_has_64_bits(capability, width, monkeypatch):
    hidden, features, rows = meta(2, 4096, width), meta(3000, width), meta(2, 4096, dtype=torch.int32)
    gate = meta(3000, dtype=torch.float32)

    def calls():
        IMPLEMENTATION.inject(hidden, features, rows, gate, False)
        IMPLEMENTATION.features_grad(hidden, features, rows, gate, 3000, (True, True))

    launches = record(monkeypatch, calls)
    assert len(launches) == 2
    for launch in launches:
        built = build(launch, capability)
        assert built.stack == 0
        assert "ld.global.v4.b32" in built.ptx and "st.global.v4.b32" in built.ptx
        products = [line for line in built.ttir.splitlines() if "arith.muli" in line]
        assert any("i64" in line for line in products) and not [line for line in products if "xi32>" in line]
