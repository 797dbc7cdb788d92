"""Every Triton kernel in the interpreter against fp64, by the rule of igva_kernels.testing."""

import dataclasses

import harness
import numpy as np
import plain_torch
import pytest
import torch
from products import activated_in_place
from seeds import seeded

import igva_kernels as ik
from igva_kernels import MixPlan, verify
from igva_kernels.nn import column_summaries
from igva_kernels.ops.weighted_mix.cases import Case
from igva_kernels.ops.weighted_mix.program import shares
from igva_kernels.ops.weighted_mix.steps import Keep, LayerShape, MixArgs, Projector
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.runtime.config import GemmConfig, of_device, shipped
from igva_kernels.runtime.dense import Dense
from igva_kernels.testing import within_rule

pytest.importorskip("triton")

from igva_kernels.ops.weighted_mix import triton as kernels
from igva_kernels.ops.weighted_mix.triton import IMPLEMENTATION as KERNELS
from igva_kernels.ops.weighted_mix.triton import gemm, mix
from igva_kernels.runtime.triton import dense
from igva_kernels.runtime.triton import gemm as dense_gemm

pytestmark = pytest.mark.interpreted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_plan(num_layers, columns):
    """Two blocks: the last layer, and ``columns`` uneven groups of all the layers, with uneven scales."""
    groups = [range(num_layers)[c::columns] for c in range(columns)]
    mixed = [(layer, c, 1 / (1 + c)) for c, group in enumerate(groups) for layer in group]
    return MixPlan((((num_layers - 1, None, 1.0),), tuple(mixed)), num_layers)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7, 8, 9, 15, 16, 17, 25, 28, 32, 33, 49])
def test_mix_of_1_to_49_layers_and_1_to_8_columns(num_layers):
    plan = make_plan(num_layers, min(num_layers, 1 + num_layers % 8))
    harness.assert_right(Case("", "layer_mix", plan, 1, 4, 24, trainable_tower=True), "fp32", "triton", "cpu", seeded())


@pytest.mark.parametrize("dtype", verify.DTYPES)
@pytest.mark.parametrize(("width", "index"), [(1, None), (7, (1, 1, 0)), (64, None), (136, (1, 1, 0)), (1280, None)])
def test_mix_of_odd_shapes(dtype, width, index):
    case = Case("", "layer_mix", make_plan(4, 2), 2, 5, width, skip=2, image_index=index, trainable_tower=True)
    harness.assert_right(case, dtype, "triton", "cpu", seeded())


def test_offsets_beyond_32_bits():
    """Two images 2**31 elements apart, in memory that numpy asks for and nobody fills."""
    stride = 2**31 + 16
    buffer = torch.from_numpy(np.zeros(stride + 64, np.float16))
    far = buffer.as_strided((2, 2, 16), (stride, 16, 1))
    far.copy_(torch.randn(2, 2, 16))
    weights = torch.rand(2, 2)
    near = far.clone()
    for plan in (make_plan(1, 1), MixPlan.concat([0], 1)):
        given = weights[:, : plan.num_columns] if plan.num_columns else None
        results = [ik.layer_mix([layer], plan, given, impl="triton") for layer in (far, near)]
        assert torch.equal(*results)
    w1 = torch.randn(8, 16).half()
    results = [ik.layer_mix_linear([x], plan, None, w1, activation="relu", impl="triton") for x in (far, near)]
    assert torch.equal(*results)


@pytest.mark.parametrize("index", [None, torch.tensor([1, 0, 1])])
@pytest.mark.parametrize("norm", [False, True])
def test_what_is_kept(index, norm):
    plan = MixPlan(
        (((0, None, 1.0),), ((1, 0, 0.5), (2, 0, 0.5), (3, 1, 2.0)), ((1, None, 0.5), (2, None, 0.5))), 4
    )  # fmt: skip
    layers = [torch.randn(2, 5, 16) for _ in range(4)]
    rows = 2 if index is None else 3
    args = MixArgs(layers, plan, torch.rand(rows, 2), index, 1)
    norm = (torch.rand(48), torch.randn(48), 1e-5) if norm else None
    mixed = KERNELS.mix(args, torch.float32, norm, Keep.SOURCES)
    # The sum that two blocks share is kept once, the single layers not at all.
    (total,) = mixed.sums
    torch.testing.assert_close(total, (layers[1] + layers[2])[:, 1:] / 2)
    plain = plain_torch.layer_mix(layers, plan, args.mix_weights, skip_tokens=1, image_index=index)
    if norm is None:
        torch.testing.assert_close(mixed.rows, plain, rtol=1e-5, atol=1e-5)
        return
    with_rows = KERNELS.mix(args, torch.float32, norm, Keep.ROWS)
    for result in (mixed, with_rows):
        torch.testing.assert_close(
            result.rows, torch.nn.functional.layer_norm(plain, (48,), *norm), rtol=1e-4, atol=1e-5
        )  # fmt: skip
        torch.testing.assert_close(result.mean, plain.mean(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.rstd, (plain.var(-1, unbiased=False) + 1e-5).rsqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(with_rows.raw_rows, plain, rtol=1e-5, atol=1e-5)


def test_an_image_that_does_not_exist_gives_nan_rows_and_nothing_else():
    layers = [torch.randn(2, 4, 16) for _ in range(3)]
    plan, weights = make_plan(3, 2), torch.rand(4, 2)
    index = torch.tensor([0, -1, 2, 1])
    args = MixArgs(layers, plan, weights, index, 1)
    rows = KERNELS.mix(args, torch.float32).rows
    good = [0, 3]
    expected = plain_torch.layer_mix(layers, plan, weights[good], skip_tokens=1, image_index=index[good])
    torch.testing.assert_close(rows[good], expected, rtol=1e-5, atol=1e-5)
    assert rows[[1, 2]].isnan().all()
    grad = torch.randn(4, 3, 32)
    dw = KERNELS.mix_weights_grad(
        grad[..., 16:], (1,),
        MixArgs.over_sources(plan, [layers[2], torch.randn(2, 3, 16), layers[1]], weights, index, 1),
    )  # fmt: skip
    assert dw[good].isfinite().all()
    assert dw[[1, 2]].isnan().all()
    shape = LayerShape(2, 4, 16, torch.float32, args.skip_tokens)
    (grads,) = KERNELS.layer_grads(grad, shares(MixPlan.concat([0]), (True,))[0], weights, index, shape)
    torch.testing.assert_close(grads[:, 1:], grad[good, :, :16])
    weight = torch.randn(8, 32)
    taps = dataclasses.replace(args, plan=MixPlan.concat([0, 1], 3))
    y, _, _ = KERNELS.mix_linear(taps, Projector(weight, activation="gelu"), Keep.NOTHING, False)
    assert y.view(4, 3, 8)[[1, 2]].isnan().all()
    assert y.view(4, 3, 8)[good].isfinite().all()


TILES = [
    GemmConfig(32, 32, 16, 4, 2, slices, tma, 1.0, group_m)
    for slices, tma, group_m in [(1, True, 1), (2, False, 2), (4, True, 8)]
]


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.slices} slices, {'TMA' if tile.tma else 'pointers'}")
def test_linear(tile, activation):
    x, weight, bias = torch.randn(70, 48), torch.randn(40, 48), torch.randn(40)
    y, z = dense_gemm.linear(x, weight, bias, activation, True, tile)
    expected = torch.nn.functional.linear(x, weight, bias)
    if activation is not None:
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
        expected = ACTIVATIONS[activation](expected)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.slices} slices, {'TMA' if tile.tma else 'pointers'}")
def test_linear_grad_input(tile, activation):
    grad, weight, z = torch.randn(70, 48), torch.randn(48, 40), torch.randn(70, 40)
    grad_z, y, grad_bias = dense_gemm.linear_grad_input(grad, weight, z, activation, True, True, tile)
    expected = ACTIVATIONS[activation].backward(grad @ weight, z)
    torch.testing.assert_close(grad_z, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, ACTIVATIONS[activation](z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_bias, expected.sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bias_gradient_is_summed_before_rounding(dtype):
    """600 rows of one sign: a sum in 16 bits, or of rounded rows, would be further from fp64 than its own rounding."""
    grad, weight, z = torch.rand(600, 48).to(dtype), torch.rand(48, 40).to(dtype), torch.rand(600, 40).to(dtype)
    _, y, grad_bias = dense_gemm.linear_grad_input(grad, weight, z, "gelu", False, True, TILES[0])
    exact = ACTIVATIONS["gelu"].backward(grad.double() @ weight.double(), z.double()).sum(0)
    assert y is None
    assert grad_bias.dtype == dtype
    torch.testing.assert_close(grad_bias.double(), exact, rtol=max(0.51 * torch.finfo(dtype).eps, 1e-6), atol=0)


def test_activations_at_the_edges():
    z = torch.tensor([[0.0, -0.0, 1e-30, -40.0, 40.0, float("nan"), 3.0, -3.0]])
    identity = torch.eye(8)
    for activation, fn in ACTIVATIONS.items():
        grad_z, y, _ = dense_gemm.linear_grad_input(torch.ones(1, 8), identity, z, activation, True, False, TILES[1])
        torch.testing.assert_close(y, fn(z), equal_nan=True, rtol=1e-5, atol=1e-6)
        expected = ACTIVATIONS[activation].backward(torch.ones(1, 8), z)
        if activation != "relu":
            torch.testing.assert_close(grad_z, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("taps", "index", "width", "norm"),
    [
        ([3, 0, 1, 2], None, 32, "no norm"),
        ([3, 0, 1, 2], [1, 0, 1], 40, "norm"),
        ([3, 0, 1, 2], None, 40, "norm without parameters"),
        ([2, 2, 0], [1, 0, 1], 32, "no norm"),
        ([4], None, 32, "norm"),
        ([4], [1, 0, 1], 40, "no norm"),
    ],
)
def test_a_gemm_that_reads_the_layers(taps, index, width, norm, dtype, monkeypatch):
    plan = MixPlan.concat(taps, 5)
    calls = []
    monkeypatch.setattr(gemm, "mix_linear", lambda *args, run=gemm.mix_linear: calls.append(1) or run(*args))
    row = plan.num_blocks * width
    w1, b1 = (torch.randn(72, row) / row**0.5).to(dtype), torch.randn(72).to(dtype)
    params = {
        "no norm": None,
        "norm": (torch.rand(row) + 0.5, torch.randn(row)),
        "norm without parameters": (None, None),
    }

    def run(impl, cast):
        given = params[norm]
        return ik.layer_mix_linear(
            [cast(layer) for layer in layers], plan, None, cast(w1), cast(b1), activation="gelu",
            norm=None if given is None else (*(None if p is None else cast(p.to(dtype)) for p in given), 1e-5),
            skip_tokens=1, image_index=None if index is None else torch.tensor(index), impl=impl,
        )  # fmt: skip

    for judge in within_rule(dtype):
        layers = [torch.randn(2, 9, width).to(dtype) + 0.5 for _ in range(5)]
        actual = run("triton", lambda x: x)
        assert calls
        judge.add(actual, run("reference", lambda x: x.double()), run("reference", lambda x: x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 10.0], ids=["centred", "mean 10"])
@pytest.mark.parametrize("outlier", [0.0, 300.0], ids=["even", "an outlier of 300"])
def test_a_folded_norm_is_as_exact_as_the_norm(outlier, shift, dtype):
    """The product of the raw rows is large where the mean is, and most of it is then subtracted."""

    def draw():
        states = [torch.randn(1, 40, 64) + shift for _ in range(3)]
        for state in states:
            state[..., 7] += outlier
        return [state.to(dtype) for state in states]

    weight, bias = (torch.randn(72, 192) / 192**0.5).to(dtype), torch.randn(72).to(dtype)
    norm = ((1 + 0.1 * torch.randn(192)).to(dtype), (0.1 * torch.randn(192)).to(dtype))

    def run(impl, cast):
        given = (*(cast(p) for p in norm), 1e-5)
        layers = [cast(state) for state in states]
        return ik.layer_mix_linear(
            layers, MixPlan.concat([0, 1, 2], 3), None, cast(weight), cast(bias), norm=given, impl=impl
        )  # fmt: skip

    for judge in within_rule(dtype):
        states = draw()
        judge.add(run("triton", lambda x: x), run("reference", lambda x: x.double()), run("reference", lambda x: x))


def test_fp32_products_follow_the_setting_of_torch():
    setting = torch.backends.cuda.matmul
    before = setting.allow_tf32
    try:
        for allowed, wanted in ((True, "tf32"), (False, "ieee")):
            setting.allow_tf32 = allowed
            assert dense_gemm.precision(torch.float32) == wanted
    finally:
        setting.allow_tf32 = before


@pytest.mark.parametrize("params", [True, False])
@pytest.mark.parametrize("width", [40, 64])
def test_norm_backward(width, params):
    rows, grad = torch.randn(9, width), torch.randn(9, width)
    norm = (torch.rand(width), torch.rand(width), 1e-5) if params else (None, None, 1e-5)
    mean, rstd = rows.mean(-1), (rows.var(-1, unbiased=False) + 1e-5).rsqrt()
    actual = KERNELS.norm_backward(grad, rows, norm, mean, rstd, params)
    expected = Dense().norm_backward(grad, rows, norm, mean, rstd, params)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_norm_have_the_dtype_of_its_parameters():
    """What the fake operator promises to compiled code: the engine of eager torch would convert in silence."""
    rows, weight, bias = torch.randn(9, 64).bfloat16(), torch.rand(64).half(), torch.rand(64)
    stats = rows.float().mean(-1), rows.float().var(-1, unbiased=False).rsqrt()
    grads = KERNELS.norm_backward(rows, rows, (weight, bias, 1e-5), *stats, True)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(dtype):
    layer = torch.cat(
        [torch.randn(2000), torch.tensor([1.00390625, 1.01171875, 0.0, float("inf"), 3e38, float("nan")])]
    )
    args = MixArgs([layer.view(1, 1, -1)], MixPlan((((0, None, 1.0),),), 1), None, None, 0)
    rows = KERNELS.mix(args, dtype).rows
    assert torch.equal(rows.nan_to_num(7.0), layer.to(dtype).view(1, 1, -1).nan_to_num(7.0))


@pytest.mark.parametrize("has_cls", [True, False])
def test_what_the_allocator_sees_is_one_launch(has_cls, monkeypatch):
    launches = []
    monkeypatch.setattr(mix, "launch", lambda *args, run=mix.launch, **kw: launches.append(args[0]) or run(*args, **kw))
    states, plan = [torch.randn(3, 5, 16) for _ in range(7)], MixPlan.igva(6, 3)
    summaries = column_summaries(states, plan, has_cls, impl="triton")
    assert len(launches) == 1
    groups = torch.stack([torch.stack(states[1 + 2 * k : 3 + 2 * k]).mean(0) for k in range(3)], 1)
    expected = groups[:, :, 0] if has_cls else groups.mean(2)
    torch.testing.assert_close(summaries, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_on_a_card_that_nobody_measured_torch_multiplies_and_gelu_is_in_place_unless_z_is_kept(trained, monkeypatch):
    for module in (dense, kernels):
        monkeypatch.setattr(module, "config_of", lambda tensor: shipped("sm_100"))
    assert activated_in_place("triton", trained, monkeypatch) == (not trained)


def test_the_interpreter_has_a_configuration_of_its_own():
    assert of_device(None).interpreted
