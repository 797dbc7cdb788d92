"""The C++ kernels of the mix, on every instruction set of this machine, against fp64."""

from dataclasses import replace

import plain_torch
import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import (
    CPU,
    DTYPES,
    PLANS,
    ROUTES,
    make,
    named_step,
    needs_module,
    over_sources,
    plain_mix,
    plain_sums,
    routes,
    to64,
    within_rule,
)

import igva_kernels as ik
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.ops.weighted_mix.program import Shares, shares
from igva_kernels.ops.weighted_mix.steps import Keep, LayerShape, MixArgs, Projector
from igva_kernels.runtime.cpu import dense
from igva_kernels.runtime.cpu import products as gemm
from igva_kernels.testing import measure_memory, relative_error

pytestmark = needs_module

TAP_SHARE = Shares((0,), (-1,), (1.0,), (1,))
"""The gradient of a layer that is block 0 as it is."""
WIDTHS = [1, 7, 16, 67, 200]
"""Partial vectors, whole ones, and both with unrolled ones before them."""


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
    # Sums in fp32 are off by a few roundings of their terms; where terms cancel, that is more than the result's own.
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
    monkeypatch.setattr(dense, "STREAM_BYTES", 0)
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
    shape = LayerShape(3, 6, 16, torch.float32, 1)
    with pytest.raises(ValueError, match="image_index"):
        CPU.layer_grads(grad, TAP_SHARE, args.mix_weights, args.image_index, shape)


def test_what_a_plan_names_must_have_been_handed_in():
    """Of direct calls of the registered operators: what the public ones have checked before."""
    states, weights, shape = [torch.randn(1, 2, 8)], torch.rand(1, 1), LayerShape(1, 2, 8, torch.float32, 0)
    cases = {"layer 1, got 1": MixPlan.concat([0, 1]), "layer -1": MixPlan.concat([-1])}
    cases["weight column 1, got 1"] = MixPlan((((0, 1, 1.0),),))
    for message, plan in cases.items():
        with pytest.raises(ValueError, match=f"plan: it names {message}"):
            torch.ops.igva_kernels.layer_mix(states, weights, None, plan.code, 0, "nothing", "cpu")
    with pytest.raises(ValueError, match="plan: it names weight column 1, got 1"):
        CPU.layer_grads(torch.ones(1, 2, 8), Shares((0,), (1,), (1.0,), (1,)), weights, None, shape)
    with pytest.raises(ValueError, match="image_index: need one for 3 rows of 1 images, got None"):
        CPU.layer_grads(torch.ones(3, 2, 8), TAP_SHARE, None, None, shape)


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
        shape = LayerShape(3, 40, 21, dtype, args.skip_tokens)
        grads = CPU.layer_grads(grad_rows, wanted, args.mix_weights, args.image_index, shape)
        actual_layers = [grads[i] for i in own]
        for layer, triple in enumerate(zip(actual_layers, exact_layers, plain_layers, strict=True)):
            judge.add(*triple, f"layer {layer}")
        sources = args.program.gather(args.layers, CPU.mix(args, dtype, None, Keep.SOURCES).sums)
        blocks = plan.weighted_blocks
        taken = torch.cat([grad_rows[..., g * 21 : (g + 1) * 21] for g in blocks], dim=-1)
        actual_weights = CPU.mix_weights_grad(taken, blocks, over_sources(args, sources))
        assert actual_weights.dtype == args.mix_weights.dtype
        judge.add(actual_weights, exact_weights, plain_weights, "mix_weights")


@pytest.mark.parametrize("layer_dtype", [torch.bfloat16, torch.float64])
def test_gradients_cross_dtypes(isa, layer_dtype):
    args, exact = make(PLANS["igva"], layer_dtype, skip=0)
    grad_rows = torch.randn(3, 6, 32)
    _, exact_weights = autograd_of_mix(exact, grad_rows.double())
    sources = [*CPU.mix(args, layer_dtype, None, Keep.SOURCES).sums]
    sources.insert(0, args.layers[PLANS["igva"].blocks[0][0].layer])
    actual = CPU.mix_weights_grad(grad_rows[..., 16:], [1], over_sources(args, sources))
    assert relative_error(actual, exact_weights) < 0.02
    shape = LayerShape(3, 6, 16, layer_dtype, 0)
    (actual,) = CPU.layer_grads(grad_rows, TAP_SHARE, args.mix_weights, args.image_index, shape)
    assert torch.equal(actual, grad_rows[..., :16].to(layer_dtype))


# ---- the operator --------------------------------------------------------------------------------------------------


def projector(dtype, row, hidden=24, width=20):
    def draw(*shape):
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    return Projector(draw(hidden, row), draw(hidden), draw(width, hidden), draw(width))


def plain_project(args, norm, weights, activation):
    weights = Projector(*(None if w is None else w.to(args.layers[0].dtype) for w in weights[:4]))
    norm = None if norm is None else (*(p.to(args.layers[0].dtype) for p in norm[:2]), norm[2])
    options = dict(
        activation=activation, norm=norm, skip_tokens=args.skip_tokens, image_index=args.image_index
    )  # fmt: skip
    if weights.weight2 is None:
        return plain_torch.layer_mix_linear(args.layers, args.plan, args.mix_weights, *weights[:2], **options)
    return plain_torch.layer_mix_mlp(args.layers, args.plan, args.mix_weights, *weights[:4], **options)


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
        out, mixed, z = CPU.project(args, weights._replace(norm=norm, activation=activation), keep, keep_z)

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
        out, _, z = CPU.project(args, weights._replace(activation="gelu"), keep, True)
        assert out.shape == (images, 6 - skip, 20)
        assert z.shape == (images * (6 - skip), 24)
        torch.testing.assert_close(out.double(), plain_project(exact, None, weights, "gelu"), rtol=1e-5, atol=1e-5)


STEPS = {"mlp": 270, "norm": 270, "narrow": 23, "plain norm": 23, "shared images": 23}
"""The width of a layer: a row of two is deeper than a slice of a product, or narrower than a tile of its columns."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("keep", Keep)
def test_a_training_step_obeys_the_error_rule_whatever_it_keeps(isa, dtype, form, keep, monkeypatch):
    """By our own products, beside plain torch with torch's."""
    monkeypatch.setattr(gemm, "route", routes(gemm.OWN))
    width, index = STEPS[form], [2, 0, 2, 2] if form == "shared images" else None
    for judge in within_rule(dtype):
        args, exact = make(PLANS["igva"], dtype, tokens=45, width=width, index=index)
        affine = form == "norm"
        params = [torch.rand(2 * width).to(dtype), torch.randn(2 * width).to(dtype)] if affine else [None, None]
        weights = projector(dtype, 2 * width, 70, 33)._replace(activation="gelu")
        grad_out = torch.randn(args.num_rows, args.num_patches, 33).to(dtype)
        norm = (*params, 1e-5) if "norm" in form else None
        actual = named_step(args, weights._replace(norm=norm), grad_out, keep)
        actual.pop("z"), actual.pop("rows", None)
        expected, plain = (autograd_of_step(a, norm, weights, grad_out) for a in (exact, args))
        assert {"out", "bias1", "weight2", "bias2"} <= {*actual}
        assert ("weight1" in actual) == (keep != Keep.NOTHING)
        assert ("mix_weights" in actual) == (keep == Keep.SOURCES)
        for name, result in actual.items():
            judge.add(result, expected[name], plain[name], name)


def autograd_of_step(args, norm, weights, grad_out):
    """What ``named_step`` returns, by plain torch."""
    dtype = args.layers[0].dtype
    given = {**weights._asdict(), "norm_weight": norm and norm[0], "norm_bias": norm and norm[1]}
    given = {n: x.to(dtype) for n, x in given.items() if isinstance(x, torch.Tensor)} | {"mix": args.mix_weights}
    leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
    norm = None if norm is None else (leaves.get("norm_weight"), leaves.get("norm_bias"), norm[2])
    first = leaves["weight1"], leaves["bias1"], leaves["weight2"], leaves["bias2"]
    out = plain_torch.layer_mix_mlp(
        args.layers, args.plan, leaves["mix"], *first, activation=weights.activation, norm=norm,
        skip_tokens=args.skip_tokens, image_index=args.image_index,
    )  # fmt: skip
    out.backward(grad_out.to(dtype))
    return {"out": out.detach(), "mix_weights": leaves.pop("mix").grad, **{n: x.grad for n, x in leaves.items()}}


CLIP = MixPlan.igva(24, 4, -2).compact()[1]


@pytest.mark.plain_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ROUTES)
def test_inference_at_real_widths_needs_less_than_64_mib_beside_the_output(dtype, way, monkeypatch):
    if way == gemm.TORCH and gemm.is_emulated(dtype):
        pytest.skip("no instructions for it here, and torch is slow")
    monkeypatch.setattr(gemm, "route", routes(way))
    layer = torch.randn(2, 577, 1024).to(dtype)
    args = MixArgs([layer] * len(CLIP.layers), CLIP, torch.rand(2, 4), None, 1)
    weights = projector(dtype, 2048, 4096, 4096)
    (out, _, _), memory = measure_memory(
        lambda: CPU.project(args, weights._replace(activation="gelu"), Keep.NOTHING, False)
    )
    assert memory.kept <= out.nbytes + 4096
    assert memory.peak <= out.nbytes + (64 << 20)


@pytest.mark.plain_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_at_real_widths_needs_no_more_memory_than_plain_torch(dtype, monkeypatch):
    """Plain torch needs Z, its gradient and the sources; it is slow in 16 bits on a CPU without such instructions."""
    monkeypatch.setattr(gemm, "route", routes(gemm.OWN))
    layer, mix_weights = torch.randn(2, 577, 1024).to(dtype), torch.rand(2, 4, requires_grad=True)
    weights = [w.requires_grad_() for w in projector(dtype, 2048, 4096, 4096)[:4]]
    grad_out = torch.randn(2, 576, 4096).to(dtype)

    def step():
        layers = [layer] * len(CLIP.layers)
        out = ik.layer_mix_mlp(layers, CLIP, mix_weights, *weights, activation="gelu", skip_tokens=1, impl="cpu")
        return out.detach(), *torch.autograd.grad(out, [mix_weights, *weights], grad_out)

    results, memory = measure_memory(step)
    of_results = sum(x.nbytes for x in results)
    z, source = grad_out.nbytes, layer[:, 1:].nbytes
    assert memory.kept <= of_results + 4096
    assert memory.peak <= of_results + 2 * z + 4 * source + (3 << 20)


# ---- anything ------------------------------------------------------------------------------------------------------


def test_random_calls_agree_with_the_reference_in_fp64():
    """A few; `make sanitize` runs 10,000 under AddressSanitizer and UBSan."""
    from fuzz_cpu import fuzz

    fuzz(200, number=1)
