"""The Triton backend where it cannot run: what it says, what importing it touches, where it launches."""

import contextlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import igva_kernels as ik
from igva_kernels.ops.weighted_mix.op import OPERATOR
from igva_kernels.runtime import config, triton
from igva_kernels.runtime.triton import BACKEND, dense, gemm, launch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_without_triton_it_imports_and_says_why_not():
    code = """
import sys
sys.modules["triton"] = None
import torch
from igva_kernels.runtime.triton import BACKEND
print(BACKEND.why_not(torch.device("cuda"), torch.float32))
"""
    assert "pip install triton" in run(code)


def test_importing_it_touches_no_driver():
    code = """
import torch
def driver(*args):
    raise AssertionError("touched the driver")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = driver
from igva_kernels.runtime.triton import BACKEND
print(BACKEND.why_not(torch.device("cpu"), torch.float32))
"""
    assert "TRITON_INTERPRET=1" in run(code)


def test_it_says_what_it_cannot_serve():
    assert "float64" in BACKEND.why_not(CUDA, torch.float64)
    assert "TRITON_INTERPRET=1" in BACKEND.why_not(CPU, torch.float32)
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1"):
        ik.layer_mix([torch.randn(1, 2, 8)], ik.MixPlan.concat([0], 1), impl="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_there_is_no_gpu():
    assert "no CUDA device" in BACKEND.why_not(CUDA, torch.bfloat16)


@pytest.fixture
def two_cards(monkeypatch):
    """An H100 and a T4."""
    triton._why_not_cuda.cache_clear()
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    yield
    triton._why_not_cuda.cache_clear()


def test_each_card_is_asked_for_its_own_capability(two_cards):
    assert OPERATOR.select("triton", torch.device("cuda:0"), torch.bfloat16, (), None) == "triton"
    with pytest.raises(NotImplementedError, match=r"on 'cuda:1': .* compute capability 8.0, this card has 7.5"):
        OPERATOR.select("triton", torch.device("cuda:1"), torch.bfloat16, (), None)


def test_without_a_c_compiler_it_says_why_not(two_cards, monkeypatch):
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "install gcc" in BACKEND.why_not(torch.device("cuda:0"), torch.bfloat16)


@pytest.mark.parametrize(("width", "start", "fused"), [(2048, 0, True), (2047, 0, False), (2048, 1, False)])
def test_rows_that_no_wide_load_can_read_go_to_cublas(width, start, fused, monkeypatch):
    # A card on which Triton's product is as good as cuBLAS, so that its epilogue decides.
    shipped = config.shipped("sm_90")
    tiles = {name: tuple(replace(tile, efficiency=1.0) for tile in tiles) for name, tiles in shipped.gemms.items()}
    monkeypatch.setattr(dense, "config_of", lambda tensor: replace(shipped, gemms=tiles))
    calls = []
    monkeypatch.setattr(gemm, "linear", lambda *args: calls.append(args))
    rows = torch.empty(16 * 576 * width + start, dtype=torch.bfloat16)[start:].view(-1, width)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias: torch.zeros(1))
    dense.TritonDense().linear(rows, torch.empty(4096, width, dtype=torch.bfloat16), None, "gelu", False)
    assert bool(calls) == fused


def test_a_launch_goes_to_the_tensors_device(monkeypatch):
    current, seen = [], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((grid, list(current), options))

    monkeypatch.setattr(torch.cuda, "device", device)
    launch.launch(Kernel(), 7, torch.device("cuda:1"))
    assert seen == [((7,), [torch.device("cuda:1")], {"enable_fp_fusion": True})]
    launch.launch(Kernel(), 0, torch.device("cuda:1"))
    assert len(seen) == 1
