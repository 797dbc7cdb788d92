"""The C++ kernels through the methods of the CPU backend, on every instruction set of this machine, against fp64."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import product
from pathlib import Path

import plain_torch
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import igva_kernels as ik
from igva_kernels import cli, testing
from igva_kernels.ops.weighted_mix import MixPlan, is_tap
from igva_kernels.ops.weighted_mix import cpu as backend
from igva_kernels.ops.weighted_mix.program import Shares, shares
from igva_kernels.ops.weighted_mix.steps import Keep, LayerShape, MixArgs, ProjectorWeights
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.runtime.cpu import dense, native
from igva_kernels.runtime.cpu import products as gemm
from igva_kernels.runtime.cpu.features import Cpu, allowed, this_cpu
from igva_kernels.testing import measure_memory, relative_error

MODULE, WHY_NOT = native.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=WHY_NOT)

CPU = backend.IMPLEMENTATION
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TAP_SHARE = Shares((0,), (-1,), (1.0,), (1,))
"""The gradient of a layer that is block 0 as it is."""
LOW = [torch.bfloat16, torch.float16]
PLANS = {
    "igva": MixPlan.igva(6, 3, -2).resolve(7).compact()[1],
    "uneven": MixPlan((((0, 1, 0.5), (1, 0, 0.5), (2, None, 0.25), (1, 1, 0.5)), ((2, None, 1.0),)), 3),
    "weighted_sum": MixPlan.weighted_sum([0, 1, 2, 3], residual=1, num_states=4),
    "concat": MixPlan.concat([2, 0], 3).compact()[1],
    "repeated": MixPlan(
        (((0, None, 0.125),) * 9, ((0, 0, 0.5), (0, 1, 2.0), (0, 0, 0.5), (0, 1, 2.0), (0, 1, 2.0))), 1
    ),
}
WIDTHS = [1, 7, 16, 67, 200]
"""Partial vectors, whole ones, and both with unrolled ones before them."""


def isas():
    """Every instruction set of this CPU, or the one that the environment names: it has a run of its own."""
    if MODULE is None:
        return ["none"]
    return [MODULE.isa()] if native.forced_isa() else MODULE.isas()


@pytest.fixture(params=isas())
def isa(request):
    best = MODULE.isa()
    MODULE.set_isa(request.param)
    yield request.param
    MODULE.set_isa(best)


def routes(name, depth):
    """A replacement of ``gemm.route``: products by torch in every dtype, or by a library that has fp32 only."""
    if name == "torch":
        return lambda dtype: gemm.Route("torch", dtype, None, "")
    library = name.removesuffix(" in fp32")
    fp32 = gemm.Route(library, torch.float32, depth if library == "oneDNN" else None, "")
    return lambda dtype: fp32._replace(library="torch", dtype=dtype) if dtype == torch.float64 else fp32


ROUTES = ["torch", "torch in fp32", "oneDNN in fp32"]
needs_onednn = pytest.mark.skipif(not this_cpu().onednn, reason="this torch has no oneDNN")


@pytest.fixture(params=[*ROUTES[:2], pytest.param(ROUTES[2], marks=needs_onednn)])
def products(request, monkeypatch):
    """Products by every library, whichever suits this CPU; in several blocks already at small sizes."""
    monkeypatch.setattr(gemm, "route", routes(request.param, 16))
    monkeypatch.setattr(backend, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(gemm, "BLOCK_ROWS", 32)
    monkeypatch.setattr(gemm, "TILE_BYTES", 16 * 16 * 4)
    return request.param


class Near:
    """The judge of fp64, where plain torch is the oracle itself: all is right to within a few roundings."""

    def add(self, actual, oracle, plain, name="result", rounded_once=False):
        assert relative_error(actual, oracle) <= 1e-13, name


def within_rule(dtype):
    """The error rule, by as many draws as it takes."""
    return iter([Near()]) if dtype == torch.float64 else testing.within_rule(dtype)


def make(plan, dtype, images=3, tokens=6, width=16, skip=1, index=None, layout="contiguous"):
    """MixArgs of random layers, and the same in fp64."""

    def layer(k):
        if layout == "tokens first" or (layout == "mixed" and k % 2):
            return torch.randn(tokens, images, width).to(dtype).transpose(0, 1)
        if layout == "strided" or layout == "mixed":
            return torch.randn(images, tokens + 2, width + 3).to(dtype)[:, 1:-1, 2:-1]
        return torch.randn(images, tokens, width).to(dtype)

    layers = [layer(k) for k in range(max(plan.layers) + 1)]
    index = None if index is None else torch.tensor(index)
    rows = images if index is None else len(index)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(rows, plan.num_columns, dtype=wide) if plan.num_columns else None
    args = MixArgs(layers, plan, weights, index, skip)
    return args, to64(args)


def to64(args):
    weights = None if args.mix_weights is None else args.mix_weights.double()
    return MixArgs([layer.double() for layer in args.layers], args.plan, weights, args.image_index, args.skip_tokens)


def plain_mix(args):
    return plain_torch.layer_mix(
        args.layers, args.plan, args.mix_weights, skip_tokens=args.skip_tokens, image_index=args.image_index
    )


def plain_sums(args):
    sums = MixPlan(tuple(block for block in args.plan.reduced()[0].blocks if not is_tap(block)))
    rows = plain_torch.layer_mix(args.layers, sums, skip_tokens=args.skip_tokens)
    return rows.split(args.width, dim=-1)


# ---- mix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("width", WIDTHS)
def test_mix_obeys_the_error_rule(isa, plan, dtype, width):
    for judge in within_rule(dtype):
        args, exact = make(PLANS[plan], dtype, width=width)
        judge.add(CPU.mix(args, dtype).rows, plain_mix(exact), plain_mix(args), rounded_once=True)


@pytest.mark.parametrize("layout", ["tokens first", "strided", "mixed"])
@pytest.mark.parametrize("skip", [0, 2, 6])
@pytest.mark.parametrize("index", [None, [2, 0, 2, 2, 1], [1]])
def test_mix_reads_any_layout_rows_and_tokens(isa, layout, skip, index):
    args, exact = make(PLANS["igva"], torch.float32, skip=skip, index=index, layout=layout)
    rows = CPU.mix(args, torch.float32).rows
    assert rows.shape == (5 if index and len(index) > 1 else 1 if index else 3, 6 - skip, 32)
    torch.testing.assert_close(rows.double(), plain_mix(exact), rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mix_rounds_to_another_dtype(isa, dtype, out):
    args, exact = make(PLANS["igva"], dtype, width=20)
    actual = CPU.mix(args, out).rows
    assert actual.dtype == out
    # Sums in fp32 are off by a few of its roundings, where terms cancel by more than the result's own.
    summed = torch.finfo(torch.float64 if dtype == out == torch.float64 else torch.float32).eps
    torch.testing.assert_close(actual.double(), plain_mix(exact), rtol=0.51 * torch.finfo(out).eps, atol=16 * summed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_taps_are_copied_bit_by_bit(isa, dtype):
    args, _ = make(PLANS["concat"], dtype, width=40)
    assert torch.equal(CPU.mix(args, dtype).rows, plain_mix(args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("width", [7, 67])
def test_norm_takes_its_statistics_from_the_unrounded_row(isa, dtype, affine, width):
    size = 2 * width
    for judge in within_rule(dtype):
        args, _ = make(PLANS["igva"], dtype, width=width, index=[2, 0, 2])
        args = replace(args, layers=[layer + 3 for layer in args.layers])  # a mean to cancel
        weight, bias = (torch.randn(size).to(dtype), torch.randn(size).to(dtype)) if affine else (None, None)
        mixed = CPU.mix(args, dtype, (weight, bias, 1e-5), Keep.ROWS)
        rows = plain_mix(to64(args))
        wide = [None if p is None else p.double() for p in (weight, bias)]
        plain = F.layer_norm(plain_mix(args), (size,), weight, bias, 1e-5)
        judge.add(mixed.rows, F.layer_norm(rows, (size,), *wide, 1e-5), plain, "normalised")
        judge.add(mixed.raw_rows, rows, plain_mix(args), "rows", rounded_once=True)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(mixed.mean.double(), rows.mean(-1), rtol=tolerance, atol=tolerance)
        rstd = (rows.var(-1, correction=0) + 1e-5).rsqrt()
        torch.testing.assert_close(mixed.rstd.double(), rstd, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [None, [2, 0, 2, 2]])
def test_kept_sums_are_written_once_an_image(isa, dtype, index):
    for judge in within_rule(dtype):
        args, exact = make(PLANS["igva"], dtype, width=20, index=index)
        mixed = CPU.mix(args, dtype, None, Keep.SOURCES)
        for triple in zip(mixed.sums, plain_sums(exact), plain_sums(args), strict=True):
            judge.add(*triple, "sums", rounded_once=True)
        judge.add(mixed.rows, plain_mix(exact), plain_mix(args), "rows", rounded_once=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_around_the_cache_changes_nothing(isa, dtype, monkeypatch):
    args, _ = make(PLANS["igva"], dtype, width=160)
    through = CPU.mix(args, dtype, None, Keep.SOURCES)
    monkeypatch.setattr(backend, "STREAM_BYTES", 0)
    around = CPU.mix(args, dtype, None, Keep.SOURCES)
    for a, b in zip([through.rows, *through.sums], [around.rows, *around.sums], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("index", [[0, 3], [-1, 0]])
def test_an_image_out_of_range_is_refused_before_memory_is_touched(index):
    args, _ = make(PLANS["igva"], torch.float32, index=index)
    grad = torch.ones(2, 5, 32)
    with pytest.raises(ValueError, match="image_index: need values from 0 to 2"):
        CPU.mix(args, torch.float32)
    with pytest.raises(ValueError, match="image_index"):
        CPU.mix_weights_grad(grad[..., 16:], [1], args)
    shape = LayerShape(3, 6, 16, torch.float32)
    with pytest.raises(ValueError, match="image_index"):
        CPU.layer_grads(grad, TAP_SHARE, None, args.image_index, 1, shape)


def test_what_a_plan_names_must_have_been_handed_in():
    """Of direct calls of the registered operators: what the public ones have checked before."""
    states, weights = [torch.randn(1, 2, 8)], torch.rand(1, 1)
    cases = {"layer 1, got 1": MixPlan.concat([0, 1]), "layer -1": MixPlan.concat([-1])}
    cases["weight column 1, got 1"] = MixPlan((((0, 1, 1.0),),))
    for message, plan in cases.items():
        with pytest.raises(ValueError, match=f"plan: it names {message}"):
            torch.ops.igva_kernels.layer_mix(states, weights, None, plan.code, 0, "nothing", "cpu")
    with pytest.raises(ValueError, match="plan: it names weight column 1, got 1"):
        CPU.layer_grads(
            torch.ones(1, 2, 8), Shares((0,), (1,), (1.0,), (1,)), weights, None, 0, LayerShape(1, 2, 8, torch.float32)
        )
    with pytest.raises(ValueError, match="image_index: need one for 3 rows of 1 images, got None"):
        CPU.layer_grads(torch.ones(3, 2, 8), TAP_SHARE, None, None, 0, LayerShape(1, 2, 8, torch.float32))


# ---- activations ---------------------------------------------------------------------------------------------------


def every_sixteen_bits(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_conversions_agree_with_torch(isa, dtype):
    low = every_sixteen_bits(dtype)[None]
    wide = torch.empty(low.shape)
    dense.epilogue(low.float(), None, narrow := torch.empty_like(low), None)
    assert torch.equal(narrow.isnan(), low.isnan())
    assert torch.equal(narrow[~low.isnan()], low[~low.isnan()])
    # Halfway cases and their neighbours, overflow and subnormals.
    bits = low.float().view(torch.int32)
    for shift in (-1, 1, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001):
        wide = (bits + shift).view(torch.float32)
        dense.epilogue(wide, None, narrow, None)
        assert torch.equal(narrow.nan_to_num(nan=7.0), wide.to(dtype).nan_to_num(nan=7.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_fp32_are_right_to_a_few_ulps(isa, activation):
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-30, 30, 601), -torch.logspace(-30, 0, 301)])[None]
    z = torch.empty_like(x)
    dense.epilogue(x, activation, y := torch.empty_like(x), z)
    assert torch.equal(x, z)
    exact_x = x.double().requires_grad_()
    exact = ACTIVATIONS[activation](exact_x)
    torch.testing.assert_close(y.double(), exact.detach(), rtol=5e-7, atol=5e-7)

    grad = torch.randn(x.shape)
    exact.backward(grad.double())
    again = torch.empty_like(x)
    dense.activation_grad(grad, x, activation, grad_z := torch.empty_like(x), again)
    assert torch.equal(again, y)
    torch.testing.assert_close(grad_z.double(), exact_x.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_what_is_not_finite_or_extreme(isa, activation, dtype):
    inf = float("inf")
    big = torch.finfo(dtype).max
    x = torch.tensor([[float("nan"), inf, -inf, big, -big, 0.0, -0.0, torch.finfo(dtype).tiny, 88.0, -88.0]]).to(dtype)
    dense.epilogue(x, activation, y := torch.empty_like(x), None)
    # fp64, because torch's own GELU of large fp32 values is infinite or NaN.
    torch.testing.assert_close(y, ACTIVATIONS[activation](x.double()).to(dtype), equal_nan=True)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_and_its_gradient_obey_the_error_rule(isa, activation, dtype, products):
    m, k, n, h = 37, 23, 50, 41
    for judge in within_rule(dtype):
        x, weight, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype) / k**0.5, torch.randn(n).to(dtype)
        weight2, grad = torch.randn(h, n).to(dtype) / h**0.5, torch.randn(m, h).to(dtype)

        def run(dtype):
            z = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).requires_grad_()  # noqa: B023
            y = z if activation is None else ACTIVATIONS[activation](z)
            (y @ weight2.to(dtype).t()).backward(grad.to(dtype))  # noqa: B023
            return z.detach(), y.detach(), z.grad

        (z64, y64, grad64), (z_plain, y_plain, grad_plain) = run(torch.float64), run(dtype)
        for keep_z in (False, True):
            y, z = CPU.linear(x, weight, bias, activation, keep_z)
            assert (z is not None) == (keep_z and activation is not None)
            judge.add(y, y64, y_plain, f"y, keep_z={keep_z}")
            if z is not None:
                judge.add(z, z64, z_plain, "z")
        z = z_plain
        grad_z, y, grad_bias = CPU.linear_grad_input(grad, weight2, z, activation, True, True)
        judge.add(grad_z, grad64, grad_plain, "grad_z")
        judge.add(grad_bias, grad64.sum(0), grad_plain.sum(0), "grad_bias")
        judge.add(y, y64, y_plain, "y again")
        judge.add(
            CPU.linear_grad_input(grad, None, torch.ones_like(grad), activation, False, False)[0],
            plain_grad(grad.double(), activation), plain_grad(grad, activation), "the identity",
        )  # fmt: skip


def plain_grad(grad, activation):
    z = torch.ones_like(grad).requires_grad_()
    (z.clone() if activation is None else ACTIVATIONS[activation](z)).backward(grad)
    return z.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", ["neither", "a", "b"])
def test_matmul_takes_transposed_views(dtype, transposed, products):
    for judge in within_rule(dtype):
        a = (torch.randn(45, 35).t() if transposed == "a" else torch.randn(35, 45)).to(dtype)
        b = (torch.randn(29, 45).t() if transposed == "b" else torch.randn(45, 29)).to(dtype)
        judge.add(CPU.matmul(a, b), a.double() @ b.double(), a @ b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_takes_slices_of_a_matrix(dtype, products):
    for judge in within_rule(dtype):
        a, b = torch.randn(35, 45).to(dtype), torch.randn(45, 60).to(dtype)
        for i, part in enumerate((b[:, 20:50], b.t().contiguous()[20:50].t(), b[:, ::2])):
            judge.add(CPU.matmul(a, part), a.double() @ part.double(), a @ part, f"slice {i}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_of_operands_and_bias(dtype, products):
    for judge in within_rule(dtype):
        a, b, c = torch.randn(35, 2, 45).to(dtype), torch.randn(29, 3, 45).to(dtype), torch.randn(29, 2).to(dtype)
        xs = (a[:, 1], a[0, :1].expand(35, 45), a[::2, 0], a[:, 0].t().contiguous().t(), a[:, 1].flip(0))
        weights = (b[:, 1], b[:, 2].t().contiguous().t(), b[0, :1].expand(29, 45), b.view(29, -1)[:, ::3])
        biases = (None, c[:, 1], c[0, :1].expand(29), c[:, 0].contiguous())
        for (i, x), (j, weight), (k, bias) in product(enumerate(xs), enumerate(weights), enumerate(biases)):
            wide = [t if t is None else t.double() for t in (x, weight, bias)]
            actual, z = CPU.linear(x, weight, bias, "relu", True)
            judge.add(z, F.linear(*wide), F.linear(x, weight, bias), f"x {i}, weight {j}, bias {k}")
            assert torch.equal(actual, z.relu())


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


# ---- gradients of the mix ------------------------------------------------------------------------------------------


def autograd_of_mix(args, grad_rows):
    args = MixArgs(
        [layer.detach().requires_grad_() for layer in args.layers], args.plan,
        None if args.mix_weights is None else args.mix_weights.detach().requires_grad_(),
        args.image_index, args.skip_tokens,
    )  # fmt: skip
    plain_mix(args).backward(grad_rows)
    return [layer.grad for layer in args.layers], args.mix_weights.grad if args.mix_weights is not None else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", ["igva", "uneven", "weighted_sum", "repeated"])
@pytest.mark.parametrize("index", [None, [2, 0, 2, 2]])
def test_gradients_of_the_mix_obey_the_error_rule(isa, dtype, plan, index):
    plan = PLANS[plan]
    for judge in within_rule(dtype):
        args, exact = make(plan, dtype, tokens=40, width=21, index=index)
        grad_rows = torch.randn(args.num_rows, args.num_patches, plan.num_blocks * args.width).to(dtype)
        exact_layers, exact_weights = autograd_of_mix(exact, grad_rows.double())
        plain_layers, plain_weights = autograd_of_mix(args, grad_rows)
        wanted, own = shares(plan, (True,) * len(args.layers))
        shape = LayerShape(3, 40, 21, dtype)
        grads = CPU.layer_grads(grad_rows, wanted, args.mix_weights, args.image_index, 1, shape)
        actual_layers = [grads[i] for i in own]
        for layer, triple in enumerate(zip(actual_layers, exact_layers, plain_layers, strict=True)):
            judge.add(*triple, f"layer {layer}")
        sources = args.program.gather(args.layers, CPU.mix(args, dtype, None, Keep.SOURCES).sums)
        blocks = plan.weighted_blocks
        taken = torch.cat([grad_rows[..., g * 21 : (g + 1) * 21] for g in blocks], dim=-1)
        actual_weights = CPU.mix_weights_grad(taken, blocks, args.over_sources(sources))
        assert actual_weights.dtype == args.mix_weights.dtype
        judge.add(actual_weights, exact_weights, plain_weights, "mix_weights")


@pytest.mark.parametrize("layer_dtype", [torch.bfloat16, torch.float64])
def test_gradients_cross_dtypes(isa, layer_dtype):
    args, exact = make(PLANS["igva"], layer_dtype, skip=0)
    grad_rows = torch.randn(3, 6, 32)
    _, exact_weights = autograd_of_mix(exact, grad_rows.double())
    sources = [*CPU.mix(args, layer_dtype, None, Keep.SOURCES).sums]
    sources.insert(0, args.layers[PLANS["igva"].blocks[0][0].layer])
    actual = CPU.mix_weights_grad(grad_rows[..., 16:], [1], args.over_sources(sources))
    assert relative_error(actual, exact_weights) < 0.02
    shape = LayerShape(3, 6, 16, layer_dtype)
    (actual,) = CPU.layer_grads(grad_rows, TAP_SHARE, None, None, 0, shape)
    assert torch.equal(actual, grad_rows[..., :16].to(layer_dtype))


def test_the_number_of_threads_changes_no_bit():
    plan = PLANS["uneven"]
    args, _ = make(plan, torch.float32, tokens=200, width=128, index=[0, 2, 2, 1, 0, 2])
    grad_rows = torch.randn(args.num_rows, args.num_patches, 2 * args.width)
    norm = (None, None, 1e-5)

    def run():
        mixed = CPU.mix(args, torch.bfloat16, norm, Keep.ROWS)
        kept = CPU.mix(args, torch.float32, None, Keep.SOURCES).sums
        sources = args.program.gather(args.layers, kept)
        dw = CPU.mix_weights_grad(grad_rows[..., : args.width], [0], args.over_sources(sources))
        wanted = Shares((0, 1, 1), (1, -1, -1), (0.5, 1.0, 2.0), (0, 1, 1))
        shape = LayerShape(3, 200, 128, torch.float32)
        layers = CPU.layer_grads(grad_rows, wanted, args.mix_weights, args.image_index, 1, shape)
        return [mixed.rows, mixed.raw_rows, mixed.mean, mixed.rstd, *kept, dw, *layers]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


# ---- the operator --------------------------------------------------------------------------------------------------


def projector(dtype, row, hidden=24, width=20):
    def draw(*shape):
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    return ProjectorWeights(draw(hidden, row), draw(hidden), draw(width, hidden), draw(width))


def plain_project(args, norm, weights, activation):
    weights = ProjectorWeights(*(None if w is None else w.to(args.layers[0].dtype) for w in weights))
    norm = None if norm is None else (*(p.to(args.layers[0].dtype) for p in norm[:2]), norm[2])
    options = dict(
        activation=activation, norm=norm, skip_tokens=args.skip_tokens, image_index=args.image_index
    )  # fmt: skip
    if weights.weight2 is None:
        return plain_torch.layer_mix_linear(args.layers, args.plan, args.mix_weights, *weights[:2], **options)
    return plain_torch.layer_mix_mlp(args.layers, args.plan, args.mix_weights, *weights, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["mlp", "linear", "no bias", "no activation", "norm", "shared images"])
@pytest.mark.parametrize("keep", Keep)
@pytest.mark.parametrize("keep_z", [False, True])
def test_project_obeys_the_error_rule_whatever_it_keeps(dtype, form, keep, keep_z, products):
    index = [2, 0, 2, 2] if form == "shared images" else None
    activation = None if form == "no activation" else "gelu"
    for judge in within_rule(dtype):
        args, exact = make(PLANS["igva"], dtype, tokens=10, width=20, index=index)
        weights = projector(dtype, 40)
        if form == "linear":
            weights = weights._replace(weight2=None, bias2=None)
        if form == "no bias":
            weights = weights._replace(bias1=None, bias2=None)
        norm = (torch.rand(40).to(dtype), torch.randn(40).to(dtype), 1e-5) if form == "norm" else None
        out, mixed, z = CPU.project(args, norm, weights, activation, keep, keep_z)

        plain = plain_project(args, norm, weights, activation)
        judge.add(out, plain_project(exact, norm, weights, activation), plain, "output")
        if keep_z and not (weights.weight2 is None and activation is None):
            first = weights._replace(weight2=None, bias2=None)
            z = z.view(args.num_rows, args.num_patches, -1)
            judge.add(z, plain_project(exact, norm, first, None), plain_project(args, norm, first, None), "z")
        if keep == Keep.ROWS:
            rows = mixed.rows if norm is None else mixed.raw_rows
            judge.add(rows, plain_mix(exact), plain_mix(args), "rows", rounded_once=True)
        if keep == Keep.SOURCES:
            for triple in zip(mixed.sums, plain_sums(exact), plain_sums(args), strict=True):
                judge.add(*triple, "sums", rounded_once=True)
        if norm is not None and keep != Keep.NOTHING:
            torch.testing.assert_close(mixed.mean.double(), plain_mix(exact).mean(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("skip", [5, 6])
def test_project_of_nothing_and_of_one_row(images, skip, products):
    args, exact = make(PLANS["igva"], torch.float32, images=images, skip=skip)
    weights = projector(torch.float32, 32)
    for keep in Keep:
        out, _, z = CPU.project(args, None, weights, "gelu", keep, True)
        assert out.shape == (images, 6 - skip, 20)
        assert z.shape == (images * (6 - skip), 24)
        torch.testing.assert_close(out.double(), plain_project(exact, None, weights, "gelu"), rtol=1e-5, atol=1e-5)


CLIP = MixPlan.igva(24, 4, -2).compact()[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [*ROUTES[:2], pytest.param(ROUTES[2], marks=needs_onednn)])
def test_inference_at_real_widths_needs_less_than_64_mib_beside_the_output(dtype, way, monkeypatch):
    if way == "torch" and gemm.is_emulated(dtype):
        pytest.skip("no instructions for it here, and torch is slow")
    monkeypatch.setattr(gemm, "route", routes(way, gemm.ONEDNN_DEPTH))
    layer = torch.randn(2, 577, 1024).to(dtype)
    args = MixArgs([layer] * len(CLIP.layers), CLIP, torch.rand(2, 4), None, 1)
    weights = projector(dtype, 2048, 4096, 4096)
    (out, _, _), memory = measure_memory(lambda: CPU.project(args, None, weights, "gelu", Keep.NOTHING, False))
    assert memory.kept <= out.nbytes + 4096
    assert memory.peak <= out.nbytes + (64 << 20)


# ---- anything ------------------------------------------------------------------------------------------------------


def test_random_calls_agree_with_the_reference_in_fp64():
    """A few; `make sanitize` runs 10,000 under AddressSanitizer and UBSan."""
    from fuzz_cpu import fuzz

    fuzz(200, number=1)


@pytest.mark.skipif(os.environ.get("IGVA_KERNELS_SANITIZE") != "1", reason="not `make sanitize`")
def test_the_sanitizers_are_in_the_module_that_is_tested():
    assert native.build_info()["sanitizers"] == "address,undefined"


# ---- OpenMP --------------------------------------------------------------------------------------------------------


def run_python(code, environment=None):
    """A process of its own, with these variables and none that concern OpenMP but them."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=inherited | (environment or {})
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_process_has_one_openmp_runtime_and_torch_brought_it():
    done = run_python(
        "import re, torch, igva_kernels.runtime.cpu.native as native\n"
        "omp = lambda line: re.match('lib(g|i)?omp', line.rsplit('/', 1)[-1])\n"
        "runtimes = lambda: {line.split()[-1] for line in open('/proc/self/maps') if omp(line)}\n"
        "before = runtimes()\n"
        "assert native.load()[0] is not None\n"
        "assert runtimes() == before and len(before) == 1, (before, runtimes())\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="how ELF resolves symbols")
def test_without_an_openmp_runtime_the_import_fails_and_nothing_crashes():
    done = run_python(
        "import importlib.machinery, importlib.util\n"
        f"loader = importlib.machinery.ExtensionFileLoader('_native', {MODULE.__file__!r})\n"
        "try:\n"
        "    importlib.util.module_from_spec(importlib.util.spec_from_loader('_native', loader))\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert native.build_info()["openmp"] == "OFF" or "GOMP" in done.stdout or "omp_" in done.stdout


def inputs_of_kernels():
    """Of every kernel, large enough for several threads."""
    torch.manual_seed(0)
    args, _ = make(PLANS["igva"], torch.float32, images=2, tokens=40, width=256, index=[1, 0, 1])
    sources = [torch.randn(2, 40 if is_tap(block) else 39, 256) for block in args.plan.reduced()[0].blocks]
    return args, args.over_sources(sources), torch.randn(3, 39, 512), torch.randn(50, 3000), torch.randn(50, 3000)


def every_kernel(args, sources, grad_rows, z, grad_y):
    """What each kernel returns; sums depend on shapes only, so that no number of threads may change a bit."""
    norm = (torch.ones(512), torch.zeros(512), 1e-5)
    mixed, normal = CPU.mix(args, torch.float32, None, Keep.SOURCES), CPU.mix(args, torch.float32, norm, Keep.ROWS)
    y, copy, grad_z, again = (torch.empty_like(z) for _ in range(4))
    dense.epilogue(z, "gelu", y, copy)
    dense.activation_grad(grad_y, z, "gelu", grad_z, again)
    shape = LayerShape(2, 40, 256, torch.float32)
    wanted = Shares((0, 1, 0), (-1, 0, -1), (1.0, 0.5, 2.0), (1, 0, 1))
    layers = CPU.layer_grads(grad_rows, wanted, args.mix_weights, args.image_index, 1, shape)
    weights = CPU.mix_weights_grad(grad_rows[..., 256:], [1], sources)
    of_mixes = [mixed.rows, *mixed.sums, normal.rows, normal.raw_rows, normal.mean, normal.rstd]
    return [*of_mixes, y, copy, grad_z, again, weights, *layers]


def assert_same(actual, expected):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.isfinite().all() and torch.equal(a, e), f"result {i}"


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_no_number_of_threads_changes_a_bit(isa, threads):
    inputs = inputs_of_kernels()
    torch.set_num_threads(1)
    alone = every_kernel(*inputs)
    torch.set_num_threads(threads)
    assert_same(every_kernel(*inputs), alone)


@pytest.mark.usefixtures("_threads")
def test_several_python_threads_call_the_kernels_at_once():
    inputs = inputs_of_kernels()
    alone = every_kernel(*inputs)
    results = [None] * 4

    def call(i):
        torch.set_num_threads(1 + i % 3)
        results[i] = [every_kernel(*inputs) for _ in range(5)]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(results))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for result in (result for of_one in results for result in of_one):
        assert_same(result, alone)


SMALL_TEAM = """
import ctypes, re, sys, torch, test_cpu_backend as tests

torch.use_deterministic_algorithms(True)
inputs = tests.inputs_of_kernels()
torch.set_num_threads(1)
alone = tests.every_kernel(*inputs)
torch.set_num_threads(4)
results = []
if sys.argv[1] == "nested":
    path = re.search(r"\\S*libgomp\\S*", open("/proc/self/maps").read())[0]
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: results.append(tests.every_kernel(*inputs)))
    ctypes.CDLL(path).GOMP_parallel(region, None, 2, 0)
else:
    results.append(tests.every_kernel(*inputs))
assert len(results) >= 1
for result in results:
    tests.assert_same(result, alone)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize(
    "setting",
    ["OMP_THREAD_LIMIT=1", "nested"]
    + [
        pytest.param(setting, marks=pytest.mark.slow)
        for setting in ("", "OMP_THREAD_LIMIT=3", "OMP_DYNAMIC=true", "OMP_MAX_ACTIVE_LEVELS=0")
    ],
)
def test_every_kernel_is_right_where_openmp_grants_fewer_threads_than_asked_for(setting):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    environment |= dict([setting.split("=")]) if "=" in setting else {}
    done = subprocess.run(
        [sys.executable, "-c", SMALL_TEAM, setting], capture_output=True, text=True, timeout=120,
        env=environment, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@needs_onednn
@pytest.mark.skipif(native.build_info().get("openmp") == "OFF", reason="built without OpenMP")
@pytest.mark.parametrize(
    ("variable", "value", "granted"),
    [
        ("OMP_THREAD_LIMIT", "1", (1, 1, 1)),
        pytest.param("OMP_NUM_THREADS", "1", (1, 2, 3), marks=pytest.mark.slow),
        pytest.param("OMP_DYNAMIC", "true", (1, 1, 1), marks=pytest.mark.slow),
        pytest.param("OMP_MAX_ACTIVE_LEVELS", "0", (1, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_fewer_threads_than_torch_asks_for_change_no_answer(variable, value, granted):
    """oneDNN leaves parts of a product undone there, so that it must not be asked."""
    done = run_python(
        "import torch, igva_kernels as ik\n"
        "from igva_kernels.runtime.cpu import native\n"
        "from igva_kernels.runtime.cpu import products as gemm\n"
        f"assert tuple(native.load()[0].granted_threads(n) for n in (1, 2, 3)) == {granted}\n"
        "torch.manual_seed(0)\n"
        "torch.set_num_threads(2)\n"
        "plan = ik.MixPlan.concat([0, 1])\n"
        "def run(impl, inputs):\n"
        "    inputs = [x.detach().clone().requires_grad_() for x in inputs]\n"
        "    out = ik.layer_mix_mlp(inputs[:2], plan, None, *inputs[2:], impl=impl)\n"
        "    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]\n"
        "own = gemm.route\n"
        "fp32 = gemm.Route('oneDNN', torch.float32, 512, '')\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    shapes = [(4, 200, 256)] * 2 + [(64, 512), (64,), (64, 64), (64,)]\n"
        "    inputs = [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes]\n"
        "    expected = run('reference', inputs)\n"
        "    for gemm.route in (own, lambda dtype: fp32):\n"
        "        for a, b in zip(run('cpu', inputs), expected, strict=True):\n"
        "            error = float((a - b).float().norm() / b.float().norm())\n"
        "            assert error < 8 * torch.finfo(dtype).eps, (dtype, tuple(a.shape), error)\n",
        {variable: value},
    )
    assert done.returncode == 0, done.stderr


# ---- when it cannot serve ------------------------------------------------------------------------------------------


def test_why_not_names_the_reason(monkeypatch):
    assert CPU.why_not(torch.device("cpu"), torch.float16) is None
    assert "cuda" in CPU.why_not(torch.device("cuda"), torch.float32)
    assert "torch.int8" in CPU.why_not(torch.device("cpu"), torch.int8)
    monkeypatch.setattr(native, "load", lambda: (None, "no compiler"))
    assert CPU.why_not(torch.device("cpu"), torch.float32) == "no compiler"


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="isa: this CPU or this build has no avx9000"):
        MODULE.set_isa("avx9000")


@pytest.mark.skipif(not native.forced_isa(), reason="the environment names no instruction set")
def test_plain_torch_is_held_to_the_set_that_the_environment_names():
    held = {"scalar": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}[native.forced_isa()]
    assert torch.backends.cpu.get_cpu_capability() == held
    assert (
        os.environ["ONEDNN_MAX_CPU_ISA"] == {"scalar": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}[MODULE.isa()]
    )


@pytest.fixture
def forced_isa(monkeypatch):
    """Sets the variable, and loads the module again as a new process would."""

    def force(name):
        monkeypatch.setenv("IGVA_KERNELS_CPU_ISA", name)
        native.load.cache_clear()
        return native.load()

    best = MODULE.isa()
    yield force
    native.load.cache_clear()
    MODULE.set_isa(best)


@pytest.mark.parametrize("name", MODULE.isas() if MODULE else [])
def test_the_environment_forces_an_instruction_set(name, forced_isa, capsys):
    module, _ = forced_isa(f" {name.upper()}")
    assert module.isa() == name
    if name != "avx512":
        assert gemm.choose(torch.float32, this_cpu()).library == "torch"
    assert cli.main(["info"]) == 0
    assert f"uses {name}, as IGVA_KERNELS_CPU_ISA says" in capsys.readouterr().out


def test_an_instruction_set_that_cannot_be_forced_is_named_and_breaks_nothing_else(forced_isa, capsys):
    module, reason = forced_isa("avx9000")
    assert module is None
    assert reason.startswith(
        "IGVA_KERNELS_CPU_ISA: got 'avx9000', need one of the sets of this CPU and this build: scalar"
    )
    assert cli.main(["info"]) == 0
    assert reason in capsys.readouterr().out
    states, plan = [torch.randn(1, 3, 4) for _ in range(2)], MixPlan.concat([0, 1])
    assert torch.equal(ik.layer_mix(states, plan), torch.cat(states, -1))
    with pytest.raises(NotImplementedError, match="IGVA_KERNELS_CPU_ISA: got 'avx9000'"):
        ik.layer_mix(states, plan, impl="cpu")
