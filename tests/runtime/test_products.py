"""Which library multiplies on a CPU, and that it keeps the error rule."""

import sys

import pytest
import torch
from cpu_kernels import CPU, LOW, MODULE, needs_module, needs_onednn, routes
from torch.utils._python_dispatch import TorchDispatchMode

from igva_kernels import cli
from igva_kernels.runtime import native
from igva_kernels.runtime.cpu import products as gemm
from igva_kernels.runtime.cpu.features import Cpu, allowed, this_cpu
from igva_kernels.testing import relative_error

pytestmark = needs_module


@pytest.mark.parametrize("granted", [True, False])
@pytest.mark.parametrize("k", [256, 512, 1024, 2048, 4096])
def test_the_library_of_this_cpu_keeps_a_margin_to_the_rule(k, granted, monkeypatch):
    """The worst of many draws, each of thousands of numbers."""
    if not granted:
        monkeypatch.setattr(gemm, "_threads_are_granted", lambda: False)
    ours, plain = [], []
    for _ in range(12):
        x, weight = torch.randn(64, k), torch.randn(64, k)
        oracle = x.double() @ weight.double().t()
        ours.append(relative_error(CPU.matmul(x, weight.t()), oracle))
        plain.append(relative_error(x @ weight.t(), oracle))
    assert max(ours) <= 1.8 * min(plain)


class OneDnnCalls(TorchDispatchMode):
    """Records the operands of every product that is given to oneDNN."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("mkldnn::_linear_pointwise"):
            binary = func.name().endswith(".binary")
            self.operands.append((args[0], args[2 if binary else 1], args[3 if binary else 2]))
        return func(*args, **(kwargs or {}))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_is_given_nothing_that_it_computes_by_a_reference_loop_or_in_a_long_chain(dtype, monkeypatch):
    monkeypatch.setattr(gemm, "route", routes("oneDNN in fp32", gemm.ONEDNN_DEPTH))
    a, b = torch.randn(80, 2, 1100).to(dtype), torch.randn(96, 2, 1100).to(dtype)
    for x in (a[:, 0], a[:, 0].t().contiguous().t()):
        for weight in (b[:, 0], b[:, 0].contiguous(), b[:, 1].t().contiguous().t()):
            with OneDnnCalls() as calls:
                CPU.linear(x, weight, b[:, 0, 0], None, False)
            assert sum(x.shape[1] for x, _, _ in calls.operands) == 1100
            for x_part, tile, bias in calls.operands:
                assert x_part.shape[1] <= 512
                assert x_part.stride(1) == 1
                assert tile.is_contiguous() or tile.t().is_contiguous()
                assert bias is None or bias.is_contiguous()


# ---- which library multiplies --------------------------------------------------------------------------------------


AMD, INTEL = "AuthenticAMD", "GenuineIntel"
WIDE = ("avx2", "avx512f")


@pytest.mark.parametrize(
    ("vendor", "features", "mkl", "onednn", "library"),
    [
        (AMD, WIDE, True, True, "oneDNN"),
        ("HygonGenuine", WIDE, True, True, "oneDNN"),
        (INTEL, WIDE, True, True, "torch"),  # MKL uses it there
        ("", WIDE, True, True, "torch"),  # nobody knows
        (AMD, ("avx2",), True, True, "torch"),
        (AMD, WIDE, False, True, "torch"),  # another BLAS
        (AMD, WIDE, True, False, "torch"),
        ("", (), False, False, "torch"),
    ],
)
def test_onednn_multiplies_fp32_only_where_it_alone_uses_avx512(vendor, features, mkl, onednn, library):
    cpu = Cpu(vendor, frozenset(features), mkl, onednn)
    chosen = gemm.choose(torch.float32, cpu)
    assert chosen.library == library
    assert chosen.dtype == torch.float32
    assert chosen.depth == (512 if library == "oneDNN" else None)
    for dtype in LOW:
        wide = gemm.choose(dtype, cpu)
        assert wide[:3] == chosen[:3]
        assert chosen.reason in wide.reason
    assert gemm.choose(torch.float64, cpu)[:3] == ("torch", torch.float64, None)


@pytest.mark.parametrize("vendor", [AMD, INTEL, ""])
@pytest.mark.parametrize(
    ("dtype", "features"),
    [
        (torch.bfloat16, (*WIDE, "avx512bf16")),
        (torch.bfloat16, (*WIDE, "amxbf16")),
        (torch.bfloat16, ("bf16",)),
        (torch.float16, (*WIDE, "avx512fp16")),
        (torch.float16, ("fp16arith",)),
    ],
)
def test_low_precision_is_multiplied_as_it_is_where_the_cpu_and_onednn_can(vendor, dtype, features):
    cpu = Cpu(vendor, frozenset(features), True, True)
    assert gemm.choose(dtype, cpu)[:3] == ("torch", dtype, None)
    assert features[-1] in gemm.choose(dtype, cpu).reason
    assert gemm.choose(dtype, cpu._replace(onednn=False)).dtype == torch.float32
    (other,) = {*LOW} - {dtype}
    assert gemm.choose(other, cpu).dtype == torch.float32


def test_info_says_which_library_multiplies_and_why(monkeypatch, capsys):
    wide = gemm.choose(torch.float32, Cpu(AMD, frozenset(WIDE), True, True))
    monkeypatch.setattr(gemm, "route", lambda dtype: wide)
    text = "oneDNN, cut at an inner dimension of 512: MKL uses the AVX-512 of Intel's CPUs only"
    for granted, held in ((True, ""), (False, "; now torch, as OpenMP does not grant torch's threads")):
        monkeypatch.setattr(gemm, "_threads_are_granted", lambda granted=granted: granted)
        assert cli.main(["info"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [f"{f'products in {name}':22}{text}{held}" in lines for name in ("fp32", "bf16", "fp16")] == [True] * 3


EVERY = frozenset({*WIDE, "avx512bf16", "avx512fp16", "amxbf16", "amxfp16"})


@pytest.mark.parametrize(
    ("variable", "value", "left"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", {"avx2"}),
        ("DNNL_MAX_CPU_ISA", "avx2_vnni", {"avx2"}),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", {*WIDE}),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", {*WIDE, "avx512bf16"}),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16", {*WIDE, "avx512bf16", "avx512fp16"}),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", EVERY - {"amxfp16"}),
        ("ONEDNN_MAX_CPU_ISA", "ALL", EVERY),
        ("ONEDNN_MAX_CPU_ISA", "a typing error", EVERY),
        ("IGVA_KERNELS_CPU_ISA", "scalar", {"avx2"}),
        ("IGVA_KERNELS_CPU_ISA", "AVX2", {"avx2"}),
        ("IGVA_KERNELS_CPU_ISA", "avx512", EVERY),
    ],
)
def test_features_are_held_to_what_the_environment_allows(variable, value, left):
    assert allowed(EVERY, {variable: value}) == left
    assert allowed(frozenset({"bf16"}), {variable: value}) == {"bf16"}


def test_this_cpu_is_known_with_and_without_torchs_list_of_features(monkeypatch):
    known = this_cpu()
    assert known.vendor or sys.platform != "linux" or "x86" not in native.build_info()["target"]
    assert ("avx2" in known.features) == ("avx2" in MODULE.isas())
    if sys.platform == "linux":
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        deciding = {"avx2", *EVERY}
        assert this_cpu().features & deciding == known.features & deciding
