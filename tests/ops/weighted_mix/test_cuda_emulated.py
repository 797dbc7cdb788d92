"""The CUDA backend with its own kernels, emulated on the CPU: values and gradients beside fp64, and the protocol of the
Hopper GEMM (stages, phases, tickets, flags, coordinates). What an emulation cannot show is the hardware's own rules."""

from dataclasses import replace
from importlib import import_module

import harness
import pytest
import strides
import torch
from cuda_tools import emulate, include
from products import activated_in_place
from recording import registered_calls
from seeds import seeded

import igva_kernels as ik
from igva_kernels import MixPlan, registry, verify
from igva_kernels.ops.weighted_mix import cases
from igva_kernels.ops.weighted_mix.cases import Case
from igva_kernels.ops.weighted_mix.cuda import IMPLEMENTATION as KERNELS
from igva_kernels.ops.weighted_mix.cuda import gemm
from igva_kernels.ops.weighted_mix.steps import Keep, MixArgs, Projector
from igva_kernels.runtime.activations import ACTIVATIONS

program = import_module("igva_kernels.ops.weighted_mix.cuda.program")  # its package has a function of that name
pytestmark = pytest.mark.skipif(include() is None, reason="the emulation needs the headers of a CUDA toolkit")

MULTIPROCESSORS = 2
QUICK = ("odd sizes", "several instructions an image", "concat + LayerNorm", "mix alone")


def forget():
    """Clears what was cached with another module: the backend of a call, and its plan."""
    registry.choose.cache_clear()
    program.mix_program.cache_clear()


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """CPU tensors go to the emulated module, and the fused GEMM is on."""
    module = emulate(monkeypatch)
    monkeypatch.setattr(gemm, "why_not_device", lambda index, size=None: None)
    monkeypatch.setattr(gemm, "multiprocessors", lambda device: MULTIPROCESSORS)
    forget()
    yield module
    forget()


def test_the_host_plans_with_the_constants_of_the_kernels(emulated):
    planned = {"tile_m": gemm.TILE_M, "wide": gemm.WIDE, "narrow": gemm.NARROW, "tile_k": gemm.TILE_K}
    planned |= {"cluster": gemm.CLUSTER, "taps": gemm.MAX_TAPS}
    assert planned | {"first_flag": gemm.FIRST_FLAG, "counters": gemm.COUNTERS} == emulated.GEMM_SM90


def judge(case, dtype):
    harness.assert_right(case, dtype, "cuda", "cpu", seeded())


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(c, d, id=f"{c.name}-{d}", marks=[] if c.name in QUICK and d != "fp16" else [pytest.mark.slow])
        for c in cases.SMALL_CASES
        for d in verify.DTYPES
    ],
)
def test_values_and_every_gradient_obey_the_error_rule(case, dtype):
    judge(case, dtype)


def test_fp64_matches_the_reference():
    states = [torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(7)]
    weights = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for impl in ("cuda", "reference"):
        out = ik.layer_mix(states, MixPlan.igva(6, 3), weights, skip_tokens=1, impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), [weights, *states[1:]])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", ["bf16", "fp16"])
def test_layers_of_fp32_are_rounded_once_to_the_weights_dtype(rows):
    states, dtype = [torch.randn(2, 5, 12) for _ in range(3)], verify.DTYPES[rows]
    plan = MixPlan.weighted_sum([0, 1, 2])
    weights = torch.rand(2, 3)
    weight = torch.eye(12, dtype=dtype)
    out = ik.layer_mix_linear(states, plan, weights, weight, impl="cuda")
    exact = ik.layer_mix([state.double() for state in states], plan, weights, impl="reference")
    torch.testing.assert_close(out.double(), exact, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_layer_may_stand_in_a_block_more_often_than_there_are_layers():
    plan = MixPlan((((0, None, 0.125),) * 9, ((0, 0, 0.5), (0, 1, 2.0), (0, 0, 0.5), (0, 1, 2.0))), 1)
    results = []
    state, weights = torch.randn(2, 5, 16), torch.rand(2, 2)
    for impl in ("cuda", "reference"):
        leaves = [state.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = ik.layer_mix([leaves[0]], plan, leaves[1], skip_tokens=1, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_without_the_fused_gemm_gelu_is_in_place_in_torchs_product_unless_z_is_kept(trained, monkeypatch):
    monkeypatch.setattr(gemm, "why_not_device", lambda index, size=None: "switched off")
    assert activated_in_place("cuda", trained, monkeypatch) == (not trained)


def test_what_a_plan_names_must_have_been_handed_in():
    """Of direct calls of the registered operators: what the public ones have checked before."""
    states = [torch.randn(1, 2, 8)]
    for plan, message in ((MixPlan.concat([0, 1]), "layer 1, got 1"), (MixPlan.concat([-1]), "resolved, got -1")):
        with pytest.raises(ValueError, match=message):
            torch.ops.igva_kernels.layer_mix(states, None, None, plan.code, 0, "nothing", "cuda")


STRIDED = Case("strided", "layer_mix_mlp", MixPlan.igva(4, 2), 3, 5, 8, 12, image_index=(2, 0, 2, 1),
               activation="gelu", norm_eps=1e-5, trainable_tower=True)  # fmt: skip


@pytest.mark.parametrize("layout", ["column of a matrix", "expanded", "two last swapped", "slice"])
@pytest.mark.parametrize("case", [STRIDED, replace(STRIDED, op="layer_mix", hidden=0, norm_eps=None)])
def test_a_registered_operator_gives_what_it_gives_for_a_dense_copy(case, layout):
    for operator, args in registered_calls(case, "cuda", seeded(), detached=True).items():
        strides.check(operator, args, layout, at_once=True)


@pytest.mark.parametrize("norm", [None, (None, None, 1e-5)])
def test_an_image_out_of_range_gives_nan_rows_and_reads_nothing(norm):
    states = [torch.randn(2, 5, 16, requires_grad=True) for _ in range(3)]
    index = torch.tensor([1, 7, 0, -1])
    weights = torch.rand(4, 2, requires_grad=True)
    plan = MixPlan.weighted_sum([0, 1], 2)
    out = ik.layer_mix_linear(states, plan, weights, torch.eye(16), image_index=index, norm=norm, impl="cuda")
    assert out[[1, 3]].isnan().all() and out[[0, 2]].isfinite().all()
    grads = torch.autograd.grad(out[[0, 2]].sum(), [weights, *states])
    assert grads[0][[1, 3]].isnan().all() and grads[0][[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_whose_parameters_do_not_begin_where_vectors_may_gives_the_same(dtype):
    states, plan = [torch.randn(2, 5, 16, requires_grad=True) for _ in range(2)], MixPlan.concat([0, 1])

    def results(weight, bias):
        out = ik.layer_mix_linear(states, plan, None, torch.eye(32), norm=(weight, bias, 1e-5), impl="cuda")
        return out, *torch.autograd.grad(out.square().sum(), states)

    weight, bias = torch.rand(2, 33).to(dtype)[:, 1:]
    assert weight.data_ptr() % 16 and bias.data_ptr() % 16
    torch.testing.assert_close(results(weight, bias), results(weight.clone(), bias.clone()))


def test_a_row_too_wide_for_a_multiprocessor_is_normalised_from_memory(monkeypatch):
    monkeypatch.setattr(program, "NORM_ROW_BYTES", 64)
    for case in cases.SMALL_CASES:
        if case.name in ("concat + LayerNorm", "igva + norm"):
            judge(case, "bf16")


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (2, 1, 16)])
def test_empty_inputs(shape):
    states = [torch.randn(shape) for _ in range(2)]
    skip = min(1, shape[1])
    out = ik.layer_mix(states, MixPlan.concat([0, 1]), skip_tokens=skip, impl="cuda")
    assert out.shape == (shape[0], shape[1] - skip, 32)


@pytest.mark.parametrize("layers", [1, 49, 64])
def test_as_many_layers_as_the_parameters_hold(layers):
    states = [torch.randn(1, 2, 8) for _ in range(layers)]
    plan, weights = MixPlan.weighted_sum(range(layers)), torch.rand(1, layers)
    expected = ik.layer_mix(states, plan, weights, impl="reference")
    torch.testing.assert_close(ik.layer_mix(states, plan, weights, impl="cuda"), expected)


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (MixPlan.weighted_sum(range(73)), "72 layers, the plan has 73"),
        (MixPlan.weighted_sum(range(65)), "64 weighted entries, the plan has 65"),
        (MixPlan((tuple((i % 5, None, 1.0 + i) for i in range(97)),)), "96 sums of layers, the plan has 97"),
        (MixPlan((tuple((i % 5, i // 5, 1.0) for i in range(165)),)), "160 layers in all blocks together"),
    ],
)
def test_a_plan_beyond_the_parameters_is_passed_over_before_its_forward_runs(plan, what):
    """Its backward may need more than its forward, and must not be the first to say so."""
    states = [torch.randn(1, 2, 8) for _ in range(1 + max(plan.layers))]
    weights = torch.rand(1, plan.num_columns, requires_grad=True) if plan.num_columns else None
    with pytest.raises(NotImplementedError, match=what):
        ik.layer_mix(states, plan, weights, impl="cuda")
    ik.layer_mix(states, plan, weights).sum()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_activations_and_their_slopes(activation, dtype):
    """103 rows: the second chunk of rows ends early."""
    z = torch.cat([torch.linspace(-12, 12, 101), torch.tensor([0.0, float("nan")])]).to(dtype)[:, None]
    grad = torch.randn_like(z)
    wide = z.double().requires_grad_()
    exact = ACTIVATIONS[activation](wide)
    (slope,) = torch.autograd.grad(exact, wide, grad.double())
    grad_z, y, _ = KERNELS.linear_grad_input(grad, None, z, activation, True, False)
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": 4 * eps, "atol": (32 if dtype == torch.float64 else 4) * eps, "equal_nan": True}
    torch.testing.assert_close(y.double(), exact.detach(), **tolerance)
    torch.testing.assert_close(grad_z.double(), slope, **tolerance)


def test_the_gradient_of_the_caller_is_not_overwritten():
    grad, z = torch.randn(3, 8), torch.randn(3, 8)
    before = grad.clone()
    KERNELS.linear_grad_input(grad, None, z, "gelu", False, False)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("columns", [7, 272])
@pytest.mark.parametrize("dtype", verify.DTYPES)
def test_the_bias_gradient_is_summed_before_rounding(dtype, columns):
    """Three chunks of rows of one sign: a sum in 16 bits, or of rounded rows, would be further from fp64."""
    dtype = verify.DTYPES[dtype]
    grad, z = torch.rand(150, columns).to(dtype), torch.rand(150, columns).to(dtype)
    grad_z, y, grad_bias = KERNELS.linear_grad_input(grad, None, z, "gelu", False, True)
    exact = ACTIVATIONS["gelu"].backward(grad.double(), z.double())
    assert y is None and grad_bias.dtype == dtype
    torch.testing.assert_close(grad_z.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-6)
    torch.testing.assert_close(grad_bias.double(), exact.sum(0), rtol=max(0.51 * torch.finfo(dtype).eps, 1e-6), atol=0)


# ---- the fused GEMM ----

FUSED = [
    Case("igva", "layer_mix_mlp", MixPlan.igva(6, 3), 2, 101, 64, 264, activation="gelu"),
    Case("three steps of K a block", "layer_mix_mlp", MixPlan.igva(6, 2), 1, 150, 192, 296, activation="gelu"),
    Case("no tap", "layer_mix_linear", MixPlan.weighted_sum(range(1, 6), -1, 7), 2, 66, 128, 520, skip=0),
]


@pytest.fixture
def fused(monkeypatch):
    """Calls of the fused GEMM."""
    calls = []
    run = gemm.run
    monkeypatch.setattr(gemm, "run", lambda *args: calls.append(args) or run(*args))
    return calls


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.name)
@pytest.mark.parametrize("multiprocessors", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_the_fused_gemm_obeys_the_error_rule_with_its_gradients(case, dtype, multiprocessors, fused, monkeypatch):
    monkeypatch.setattr(gemm, "multiprocessors", lambda device: multiprocessors)
    judge(case, dtype)
    assert fused


@pytest.mark.parametrize("plan", [MixPlan.concat([-2, -3, 1, 1], 6), MixPlan.dense_connector("dci")])
@pytest.mark.parametrize("skip", [0, 1, 3])
def test_the_fused_gemm_on_taps_and_constant_means(plan, skip, fused):
    case = Case("", "layer_mix_linear", plan, 3, 45, 64, 280, skip=skip, activation="gelu")
    judge(case, "bf16")
    assert fused


def test_the_fused_gemm_keeps_the_bits_of_the_mix_kernel():
    """Sums kept for backward are those of the two-kernel path, bit for bit; so is F, which the output shows."""
    case = FUSED[0]
    inputs = case.draw(seeded(1), torch.bfloat16, "cpu")
    args = [layer for layer in inputs.layers if layer is not None]
    plan = case.plan.compact()[1]
    call = MixArgs(args, plan, inputs.mix_weights, None, 1)
    two = KERNELS.mix(call, torch.bfloat16, None, Keep.SOURCES)
    width, row = plan.num_blocks * 64, two.rows.shape[-1]
    sums = [torch.empty_like(kept) for kept in two.sums]
    out, z = gemm.run(call, torch.eye(row, width, dtype=torch.bfloat16), None, None, False, sums)
    assert z is None
    assert torch.equal(out, two.rows.flatten(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(sums, two.sums, strict=True))


def test_the_ring_of_stages_wraps_without_losing_one():
    """Ten steps of K through four stages, with integers: every product counts, exactly."""
    states = [torch.randint(-4, 5, (2, 70, 320)).bfloat16() for _ in range(2)]
    weight = torch.randint(-4, 5, (272, 640)).bfloat16()
    call = MixArgs(states, MixPlan.concat([1, 0], 2), None, None, 1)
    out, _ = gemm.run(call, weight, None, None, False, [])
    exact = torch.cat([states[1][:, 1:], states[0][:, 1:]], -1).flatten(0, 1).float() @ weight.float().t()
    assert torch.equal(out, exact.bfloat16())


@pytest.fixture(
    params=[(1, 1), *(pytest.param((seed, 2), marks=pytest.mark.slow) for seed in (2, 3))], ids="seed {0[0]}".format
)
def any_order(request, monkeypatch):
    """Threads and copies run in a random order, on a card that has room for one or two clusters only."""
    seed, resident = request.param
    monkeypatch.setenv("IGVA_EMULATION_SEED", str(seed))
    monkeypatch.setenv("IGVA_EMULATION_RESIDENT", str(resident))
    monkeypatch.setattr(gemm, "multiprocessors", lambda device: 6)


def test_the_fused_gemm_is_exact_in_any_order_of_threads_and_copies(any_order):
    """Four pairs of tiles over three clusters, six steps per tile, half of them of F."""
    states = [torch.randint(-2, 3, (2, 150, 192)).bfloat16() for _ in range(5)]
    plan = MixPlan((((4, None, 1.0),), ((0, 0, 0.5), (1, 0, 0.5), (2, 1, 2.0), (3, None, 1.0))), 5)
    weights = torch.tensor([[2.0, 1.0], [4.0, 3.0]])
    weight = torch.randint(-2, 3, (272, 384)).bfloat16()
    out, _ = gemm.run(MixArgs(states, plan, weights, None, 1), weight, None, None, False, [])
    rows = ik.layer_mix([state.double() for state in states], plan, weights, skip_tokens=1, impl="reference")
    assert torch.equal(out, (rows @ weight.double().t()).flatten(0, 1).bfloat16())


def test_what_the_copy_engine_cannot_read_is_an_error_that_names_it():
    states = [torch.randn(1, 9, 72).bfloat16()[..., 4:68]]
    call = MixArgs(states, MixPlan.concat([0], 1), None, None, 0)
    with pytest.raises(RuntimeError, match="the tensor map of a tap"):
        gemm.run(call, torch.zeros(8, 64).bfloat16(), None, None, False, [])


@pytest.mark.parametrize("tile_n", [gemm.WIDE, gemm.NARROW])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_forms_add_the_bias_keep_z_and_store_what_is_kept(tile_n, skip, dtype, monkeypatch):
    """Two tiles of columns in either form, the second one not full."""
    monkeypatch.setattr(gemm, "form", lambda *_: gemm.Form(tile_n, 4))
    states = [torch.randint(-2, 3, (3, 45, 64)).to(dtype) for _ in range(2)]
    call = MixArgs(states, MixPlan((((1, None, 1.0),), ((0, None, 0.5), (1, None, 0.5))), 2), None, None, skip)
    weight, bias = torch.randint(-2, 3, (264, 128)).to(dtype), torch.randint(-4, 5, (264,)).to(dtype)
    rows = ik.layer_mix([state.double() for state in states], call.plan, skip_tokens=skip, impl="reference")
    exact = (rows @ weight.double().t()).flatten(0, 1)
    assert torch.equal(gemm.run(call, weight, None, None, True, [])[0], exact.to(dtype))
    y, z = gemm.run(call, weight, bias, "gelu", True, [])
    assert torch.equal(z, (exact + bias).to(dtype))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), torch.nn.functional.gelu(exact + bias), rtol=eps, atol=eps)
    again, none = gemm.run(call, weight, bias, "gelu", False, [])
    assert torch.equal(again, y) and none is None


def plan_of_groups(size, count, residual=False):
    """A tap, and the weighted sum of ``count`` means of ``size`` layers, with one layer more if there is a residual."""
    entries = [(layer, layer // size, 1.0 / size) for layer in range(size * count)]
    return MixPlan((((0, None, 1.0),), (*entries, *[(1, None, 1.0)] * residual)), size * count)


@pytest.mark.parametrize(
    ("plan", "images", "width"),
    [
        (plan_of_groups(1, 5), 1, 64),
        (plan_of_groups(2, 3, residual=True), 2, 64),
        (plan_of_groups(3, 4), 3, 64),
        (plan_of_groups(5, 2), 5, 128),
        (plan_of_groups(6, 1), 2, 64),
        (plan_of_groups(6, 3), 3, 576),
        (plan_of_groups(6, 2, residual=True), 1, 64),
        (plan_of_groups(7, 2), 4, 64),
        (plan_of_groups(8, 2), 1, 576),
        (MixPlan((*plan_of_groups(6, 4).blocks, plan_of_groups(6, 2).blocks[1]), 24), 2, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["alike", "each its own"])
def test_the_mixers_keep_the_bits_of_the_mix_kernel(plan, images, width, layout):
    """Groups of any size, rows that end inside a group, pieces that are not full, layers that lie as they like."""
    skip, tokens = (1, 27) if layout == "alike" else (0, 21)
    dtype = torch.bfloat16 if layout == "alike" else torch.float16
    states = [torch.randn(images, tokens, width).to(dtype) for _ in range(plan.num_states)]
    if layout == "each its own":
        for i in range(1, len(states)):
            room = torch.empty(images, tokens + i % 3, width + 8 * (i % 2), dtype=dtype)
            states[i] = room[:, i % 3 :, :width].copy_(states[i])
    call = MixArgs(states, plan, torch.rand(images, plan.num_columns), None, skip)
    two = KERNELS.mix(call, dtype, None, Keep.SOURCES)
    sums = [torch.full_like(kept, float("nan")) for kept in two.sums]
    out, _ = gemm.run(call, torch.eye(plan.num_blocks * width, dtype=dtype), None, None, False, sums)
    assert torch.equal(out, two.rows.flatten(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(sums, two.sums, strict=True))


def test_every_launch_leaves_its_counters_at_zero(any_order, monkeypatch):
    """Launches of several sizes in a row on one part of the counters: what is left of one would let a tile of F be read
    before it is mixed, or be waited for in vain."""
    monkeypatch.setattr(gemm, "counters", gemm.Counters())
    for images in (3, 1, 2):
        states = [torch.randn(images, 101, 64).bfloat16() for _ in range(7)]
        call = MixArgs(states, plan_of_groups(3, 2), torch.rand(images, 2), None, 1)
        out, _ = gemm.run(call, torch.eye(128).bfloat16(), None, None, False, [])
        assert torch.equal(out, KERNELS.mix(call, torch.bfloat16).rows.flatten(0, 1))
    assert gemm.counters.of_streams == {(torch.device("cpu"), 0): 0}


def test_without_a_part_of_the_counters_a_launch_brings_its_own(monkeypatch):
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **kw: made.append(zeros(*args, **kw)) or made[-1])
    monkeypatch.setattr(gemm.Counters, "take", lambda *_: None)
    case = FUSED[0]
    inputs = case.draw(seeded(2), torch.bfloat16, "cpu")
    with torch.no_grad():
        case.forward(inputs, "cuda")
    (own,) = (tensor for tensor in made if tensor.dtype == torch.int32)
    assert own.shape == (gemm.num_counters(2 * 101),) and not own.any()


def test_a_layout_that_is_not_flat_takes_two_kernels(fused):
    case = FUSED[0]
    inputs = case.draw(seeded(3), torch.bfloat16, "cpu")
    base = case.plan.blocks[0][0].layer
    flat = case.forward(inputs, "cuda")
    assert len(fused) == 1
    padded = torch.empty(2, 103, 64, dtype=torch.bfloat16)[:, 1:102]
    padded.copy_(inputs.layers[base])
    inputs.layers[base] = padded
    torch.testing.assert_close(case.forward(inputs, "cuda"), flat, rtol=2e-2, atol=2e-2)
    assert len(fused) == 1
    assert "not flat" in why_not_fused(case, inputs)


def why_not_fused(case, inputs):
    layers = [layer for layer in inputs.layers if layer is not None]
    args = MixArgs(layers, case.plan.compact()[1], inputs.mix_weights, None, case.skip)
    projector = Projector(inputs.params["weight1"], inputs.params["bias1"], activation="gelu")
    return KERNELS.why_not_fused(args, projector, Keep.NOTHING)
