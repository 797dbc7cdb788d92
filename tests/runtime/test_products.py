"""Who multiplies on a CPU, and our own products: every size, layout and dtype, on every instruction set."""

import sys
from itertools import product

import pytest
import torch
from cpu_kernels import CPU, LOW, MODULE, assert_same, needs_module, within_rule
from seeds import seeded
from threads import in_threads

from igva_kernels import cli
from igva_kernels.runtime import native
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.runtime.cpu import dense
from igva_kernels.runtime.cpu import products as gemm
from igva_kernels.runtime.cpu.dense import Operand
from igva_kernels.runtime.cpu.features import Cpu, allowed, this_cpu
from igva_kernels.testing import relative_error

pytestmark = needs_module

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TRIPLES = [(FP32,) * 3, (BF16,) * 3, (FP16,) * 3, (FP32, BF16, FP16), (FP16, FP32, BF16), (BF16, FP16, FP32)]
"""The dtypes of the two operands and of the result."""


def draw(*shape, dtype=FP32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


# ---- our products --------------------------------------------------------------------------------------------------

# A product is cut into strips of 96 rows and tiles of 64 columns, both into what the registers of a set hold (4 x 4, 6
# x 16 or 12 x 32), and a depth of 512 into chains of 176: see csrc/dense/cpu.
ROWS = [1, 3, 4, 5, 6, 7, 11, 12, 13, 95, 96, 97, 200]
COLUMNS = [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130]
DEPTHS = [1, 2, 7, 8, 9, 175, 176, 177, 352, 353, 511, 512, 513, 689, 1025, 1300]
LITTLE = 0
"""Bytes of scratch memory: a product takes the least that it can work in, and packs 96 rows at a time."""


def sizes():
    """Every size beside others that change from one to the next, and all at once at a seam."""
    longest = max(len(ROWS), len(COLUMNS), len(DEPTHS))
    found = [(ROWS[i % len(ROWS)], COLUMNS[5 * i % len(COLUMNS)], DEPTHS[i % len(DEPTHS)]) for i in range(longest)]
    return sorted({*found, (97, 65, 513), (96, 64, 512), (95, 63, 511), (1, 1, 1)})


def judge_linear(judge, x, weight, bias, activation, dtype, name="", **options):
    """One ``linear_into`` beside fp64 and plain torch, both from the same operands."""
    m, n = x.tensor.shape[0], weight.tensor.shape[0]
    y, z = (torch.empty(m, n, dtype=dtype) for _ in range(2))
    dense.linear_into(x, weight, bias, activation, y, z, **options)

    def run(wide):
        a, b = (t.to(wide) if act is None else ACTIVATIONS[act](t.to(wide)) for t, act in (x, weight))
        z = a @ b.t()
        z = z if bias is None else z + bias.to(wide)
        return z, z if activation is None else ACTIVATIONS[activation](z)

    for got, exact, plain, what in zip((z, y), run(torch.float64), run(FP32), "zy", strict=True):
        judge.add(got, exact, plain.to(dtype), f"{what} {name}")


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("dtypes", TRIPLES, ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes))
def test_every_size_obeys_the_error_rule(isa, dtypes):
    for (m, n, k), most in product(sizes(), (LITTLE, 1 << 30)):
        for judge in within_rule(dtypes[2]):
            x, weight = draw(m, k, dtype=dtypes[0]), draw(n, k, dtype=dtypes[1], scale=k**-0.5)
            judge_linear(judge, Operand(x), Operand(weight), draw(n), "gelu", dtypes[2], f"{m} x {n} x {k}", most=most)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_more_rows_than_a_block_holds(isa, dtype):
    """Three blocks, the last of them shorter."""
    for judge in within_rule(dtype):
        x, weight = draw(2 * 2304 + 5, 530, dtype=dtype), draw(33, 530, dtype=dtype, scale=530**-0.5)
        judge_linear(judge, Operand(x), Operand(weight), None, None, dtype, most=1 << 30)


def strided(x):
    wide = torch.full((2 * x.shape[0], 3 * x.shape[1]), float("nan"), dtype=x.dtype)
    wide[::2, 1::3] = x
    return wide[::2, 1::3]


LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": strided,
    "strided and transposed": lambda x: strided(x.t()).t(),
    "one row": lambda x: x[:1].expand(x.shape),
    "one column": lambda x: x[:, :1].expand(x.shape),
    "one number": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_operands_of_any_layout_and_with_an_activation(isa, dtype):
    m, n, k = 105, 77, 530
    for judge in within_rule(dtype):
        a, b = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype, scale=k**-0.5)
        for (i, of_x), (j, of_weight) in product(enumerate(LAYOUTS), enumerate(LAYOUTS)):
            acts = ((None, None), ("gelu", None), (None, "silu"))[(i + j) % 3]
            x, weight = Operand(LAYOUTS[of_x](a), acts[0]), Operand(LAYOUTS[of_weight](b), acts[1])
            judge_linear(judge, x, weight, None, None, dtype, f"{of_x} @ {of_weight}, {acts}")


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_the_gradient_of_a_linear_and_of_its_bias_obeys_the_error_rule(isa, dtype, activation):
    for judge in within_rule(dtype):
        for m, n, k in ((200, 65, 513), (97, 33, 177), (1, 3, 1300)):
            grad, weight = draw(m, k, dtype=dtype), draw(k, n, dtype=dtype, scale=k**-0.5)
            z = draw(m, n, dtype=dtype)

            def run(wide):
                y = grad.to(wide) @ weight.to(wide)  # noqa: B023
                leaf = z.to(wide).requires_grad_()  # noqa: B023
                return torch.autograd.grad(leaf if activation is None else ACTIVATIONS[activation](leaf), leaf, y)[0]

            exact, plain = run(torch.float64), run(dtype)
            for kind, lent in (("own", None), ("lent", torch.full((400_000,), float("nan")))):
                grad_z, grad_bias = dense.linear_grad(grad, weight, z, activation, True, lent)
                judge.add(grad_z, exact, plain, f"grad_z {m} x {n} x {k}, {kind}")
                judge.add(grad_bias, exact.sum(0), plain.sum(0), f"grad_bias {m} x {n} x {k}, {kind}")


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_nothing_is_written_beside_the_results(isa, dtype):
    """Rows with numbers between them, which fp32 results take as the memory of their sums."""
    for (m, n, k), activation in product(((97, 65, 513), (7, 33, 177), (1, 1, 1)), (None, "gelu")):
        x, weight, bias = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype, scale=k**-0.5), draw(n)
        around = [torch.full((m + 2, n + 5), 7.0, dtype=dtype) for _ in range(2)]
        y, z = (each[1:-1, 2:-3] for each in around)
        dense.linear_into(x, weight, bias, activation, y, z)
        expected = [torch.empty(m, n, dtype=dtype) for _ in range(2)]
        dense.linear_into(x, weight, bias, activation, *expected)
        assert_same((y, z), expected)
        for each in around:
            each[1:-1, 2:-3] = 7.0
            assert (each == 7.0).all()


@pytest.mark.usefixtures("own_products")
def test_nothing_is_written_beside_the_scratch_memory(isa):
    x, weight, z = draw(200, 530), draw(530, 65), draw(200, 65, dtype=BF16)
    compiled = dense.module()
    operands = Operand(x).native(compiled), Operand(weight.t()).native(compiled), 0, dense.activation_of(compiled, None)
    for most, dtype in product((LITTLE, 1 << 30), (FP32, BF16)):
        y = torch.empty(200, 65, dtype=dtype)
        wanted, least = (dense.scratch(y, 2, limit).numel() for limit in (most, LITTLE))
        around = torch.full((wanted + 64,), 7.0)
        compiled.linear(*operands, dense.matrix(compiled, y), None, (around[32:].data_ptr(), wanted), 2)
        assert (around[:32] == 7.0).all() and (around[-32:] == 7.0).all()
        with pytest.raises(ValueError, match="scratch: too small"):
            compiled.linear(*operands, dense.matrix(compiled, y), None, (around.data_ptr(), least - 1), 2)
    lent = torch.full((1 << 20,), 7.0, dtype=BF16)
    dense.linear_grad(x.bfloat16(), weight.bfloat16(), z, "gelu", True, lent)
    assert (lent != 7.0).any(), "it was not taken"


def products_of_every_kind(most=dense.PRODUCT_BYTES, lent=False):
    """Several strips, tiles, slices and, with little memory, blocks; the same numbers in every call."""
    torch.manual_seed(seeded(1))
    results = []
    for dtypes in TRIPLES[:4]:
        x, weight, bias = draw(437, 1100, dtype=dtypes[0]), draw(145, 1100, dtype=dtypes[1]), draw(145)
        y, z = (torch.empty(437, 145, dtype=dtypes[2]) for _ in range(2))
        dense.linear_into(Operand(x), Operand(weight, "relu"), bias, "gelu", y, z, most)
        memory = torch.full((dense.scratch(z, 8, most, strip_sums=True).numel(),), float("nan")) if lent else None
        results += [y, z, *dense.linear_grad(x, draw(1100, 145, dtype=dtypes[2]), z, "gelu", True, memory)]
    return results


@pytest.mark.usefixtures("own_products", "restored_threads")
def test_neither_threads_nor_memory_change_a_bit(isa):
    torch.set_num_threads(1)
    alone = products_of_every_kind()
    for threads, most, lent in ((1, 1 << 20, True), (2, LITTLE, False), (3, 1 << 30, True), (5, LITTLE, True)):
        torch.set_num_threads(threads)
        assert_same(products_of_every_kind(most, lent), alone)


@pytest.mark.usefixtures("own_products")
def test_neither_do_other_callers(isa):
    """Two Python threads, which draw their numbers one after the other."""
    torch.manual_seed(seeded(2))
    x, weight = draw(437, 1100, dtype=BF16), draw(145, 1100, dtype=BF16)
    alone = CPU.linear(x, weight, None, "gelu", True)
    for results in in_threads(lambda _: [CPU.linear(x, weight, None, "gelu", True) for _ in range(4)], clients=2):
        for each in results:
            assert_same(each, alone)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("k", [256, 512, 1024, 2048, 4096])
def test_a_long_product_is_as_exact_as_plain_torchs(isa, k):
    """The ratio of two means over 16 draws scatters by 0.7 %; at K = 256 it is 1.08, and less beyond."""
    ours = plain = 0.0
    for _ in range(16):
        x, weight = draw(64, k), draw(64, k)
        oracle = x.double() @ weight.double().t()
        ours += relative_error(CPU.matmul(x, weight.t()), oracle) / 16
        plain += relative_error(x @ weight.t(), oracle) / 16
    assert ours <= 1.2 * plain


# ---- who multiplies ------------------------------------------------------------------------------------------------


AMD, INTEL = "AuthenticAMD", "GenuineIntel"
AVX2, WIDE = ("avx2",), ("avx2", "avx512f")
OWN, TORCH = gemm.OWN, gemm.TORCH
EVERY = frozenset({*WIDE, "avx512bf16", "avx512fp16", "amxbf16", "amxfp16"})


@pytest.mark.parametrize(
    ("vendor", "isa", "features", "mkl", "onednn", "dtype", "library", "word"),
    [
        # fp32: ours, except where a library knows the CPU's AVX-512 better
        (AMD, "avx2", AVX2, True, True, FP32, OWN, "AVX2"),
        (INTEL, "avx2", AVX2, True, True, FP32, OWN, "AVX2"),
        ("", "avx2", AVX2, False, False, FP32, OWN, "AVX2"),
        (AMD, "avx512", WIDE, True, True, FP32, OWN, "Intel's CPUs only"),
        ("HygonGenuine", "avx512", WIDE, True, False, FP32, OWN, "Intel's CPUs only"),
        (INTEL, "avx512", WIDE, True, True, FP32, TORCH, "AVX-512 of Intel's CPUs"),
        ("", "avx512", WIDE, True, True, FP32, TORCH, "vendor of the CPU is unknown"),
        (AMD, "avx512", WIDE, False, True, FP32, TORCH, "not MKL"),
        (INTEL, "avx512", WIDE, False, True, FP32, TORCH, "not MKL"),
        # 16 bits: oneDNN where it and the CPU have instructions, ours elsewhere
        (AMD, "avx512", (*WIDE, "avx512bf16"), True, True, BF16, TORCH, "avx512bf16"),
        (INTEL, "avx512", (*WIDE, "amxbf16"), True, True, BF16, TORCH, "amxbf16"),
        (INTEL, "avx512", (*WIDE, "avx512fp16"), True, True, FP16, TORCH, "avx512fp16"),
        (INTEL, "avx512", (*WIDE, "amxfp16"), True, True, FP16, TORCH, "amxfp16"),
        ("", "scalar", ("bf16",), False, True, BF16, TORCH, "bf16"),
        ("", "scalar", ("fp16arith",), False, True, FP16, TORCH, "fp16arith"),
        ("", "scalar", ("asimdhp",), False, True, FP16, TORCH, "asimdhp"),
        (INTEL, "avx512", EVERY, True, False, BF16, OWN, "no instructions for bfloat16"),
        (INTEL, "avx512", EVERY, True, False, FP16, OWN, "no instructions for float16"),
        (INTEL, "avx512", (*WIDE, "avx512bf16"), True, True, FP16, OWN, "no instructions for float16"),
        (AMD, "avx2", AVX2, True, True, BF16, OWN, "no instructions for bfloat16"),
        # without vectors, without kernels, in fp64
        (AMD, "scalar", AVX2, True, True, FP32, TORCH, "fast with AVX2"),
        (AMD, "scalar", AVX2, True, True, BF16, TORCH, "fast with AVX2"),
        ("", "", (), False, False, FP32, TORCH, "fast with AVX2"),
        (AMD, "avx512", EVERY, True, True, torch.float64, TORCH, "in fp32"),
        (AMD, "avx2", AVX2, True, True, torch.float64, TORCH, "in fp32"),
    ],
)
def test_who_multiplies_follows_from_the_cpu_and_torch(vendor, isa, features, mkl, onednn, dtype, library, word):
    chosen = gemm.choose(dtype, Cpu(vendor, frozenset(features), mkl, onednn, isa))
    assert chosen.library == library
    assert word in chosen.reason


@pytest.mark.parametrize("isa_of", ["avx2", "avx512"])
def test_info_says_who_multiplies_and_why(isa_of, monkeypatch, capsys):
    cpu = Cpu(INTEL, frozenset((*WIDE, "avx512bf16") if isa_of == "avx512" else AVX2), True, True, isa_of)
    monkeypatch.setattr(gemm, "route", lambda dtype: gemm.choose(dtype, cpu))
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, dtype in (("fp32", FP32), ("bf16", BF16), ("fp16", FP16)):
        library, reason = gemm.choose(dtype, cpu)
        assert f"{f'products in {name}':22}{library}: {reason}" in lines


def test_a_dtype_without_instructions_is_emulated_by_torch(monkeypatch):
    cpu = Cpu(INTEL, frozenset((*WIDE, "avx512bf16")), True, True, "avx512")
    monkeypatch.setattr(gemm, "this_cpu", lambda: cpu)
    assert [gemm.is_emulated(d) for d in (FP32, BF16, FP16, torch.float64)] == [False, False, True, False]
    monkeypatch.setattr(gemm, "this_cpu", lambda: cpu._replace(onednn=False))
    assert [gemm.is_emulated(d) for d in LOW] == [True, True]


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
    assert known.isa == MODULE.isa()
    assert known.vendor or sys.platform != "linux" or "x86" not in native.build_info()["target"]
    assert ("avx2" in known.features) == ("avx2" in MODULE.isas())
    if sys.platform == "linux":
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        deciding = {"avx2", *EVERY}
        assert this_cpu().features & deciding == known.features & deciding
