"""What torch does around a call: torch.func, forward-mode AD, meta and fake tensors, inference tensors. Each gets plain
torch's answer or an error that says why not; nothing is dropped in silence."""

import warnings
from functools import partial

import pytest
import torch
from block import IGVA as PLAN
from block import NAMES
from block import named as make
from recording import Dispatched
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import igva_kernels as ik
from igva_kernels import MixPlan, registry
from igva_kernels.nn import LayerMixProjector, TextAllocator, WeightAllocator
from igva_kernels.runtime.context import FallbackWarning, warn_of_fallback

IMPLS = ["reference", "auto"]
OPS = torch.ops.igva_kernels


@pytest.fixture
def impl(quick_impl):
    """What torch does around a call does not depend on the kernels: no interpreter."""
    return quick_impl


def mlp(layers, mix_weights, weight1, bias1, weight2, bias2, norm_weight, norm_bias, **options):
    norm = (norm_weight, norm_bias, 1e-5)
    return ik.layer_mix_mlp(layers, PLAN, mix_weights, weight1, bias1, weight2, bias2, norm=norm, **options)


def of(name, args, **options):
    """``mlp`` as a function of the argument ``name`` (of one layer, for ``layers``), and that argument."""

    def run(value):
        layers = [*args["layers"][:5], value, args["layers"][6]]
        return mlp(**{**args, name: layers if name == "layers" else value}, **options)

    return run, args["layers"][5] if name == "layers" else args[name]


def tangent_of(run, value, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(value, tangent))).tangent


def operator_of(impl):
    """The registered operator itself, as a function of the mix weights."""
    layers, code = [torch.zeros(2, 5, 8) for _ in range(6)], PLAN.compact()[1].code
    return lambda mix_weights: OPS.layer_mix(layers, mix_weights, None, code, 0, "nothing", impl)[0]


# ---- torch.func and forward-mode AD ----


@pytest.mark.parametrize("name", ["layers", *NAMES])
def test_a_tangent_of_any_argument_reaches_the_output(name):
    args = make()
    run, value = of(name, args, impl="auto")
    plain, _ = of(name, args, impl="reference")
    tangent = torch.randn_like(value)
    expected = jvp(plain, (value,), (tangent,))[1]
    assert expected.norm() > 0.1
    torch.testing.assert_close(jvp(run, (value,), (tangent,))[1], expected)
    torch.testing.assert_close(tangent_of(run, value, tangent), expected)
    _, (output_of_grad,) = torch.autograd.functional.vjp(plain, (value,), torch.ones_like(expected))
    torch.testing.assert_close(expected.sum(), (output_of_grad * tangent).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "transform",
    [
        lambda run, x: grad(lambda x: run(x).square().sum())(x),
        lambda run, x: vjp(run, x)[1](torch.ones(2, 5, 12))[0],
        lambda run, x: vmap(run)(torch.stack([x, x + 1])),
        lambda run, x: jacfwd(run)(x),
        lambda run, x: jacrev(run)(x),
        lambda run, x: hessian(lambda x: run(x).square().sum())(x),
        lambda run, x: torch.autograd.functional.jacobian(run, x, vectorize=True, strategy="forward-mode"),
    ],
    ids=["grad", "vjp", "vmap", "jacfwd", "jacrev", "hessian", "forward-mode jacobian"],
)
def test_transforms_give_plain_torchs_answer(transform):
    args = make()
    results = [transform(*of("mix_weights", args, impl=impl)) for impl in IMPLS]
    torch.testing.assert_close(results[1], results[0])


def test_a_batch_of_image_indices():
    layers, index = make()["layers"], torch.tensor([[0, 1], [1, 1]])
    plan = MixPlan.igva_uniform(6, 3)
    rows = vmap(lambda index: ik.layer_mix(layers, plan, image_index=index))(index)
    torch.testing.assert_close(rows, torch.stack([ik.layer_mix(layers, plan, image_index=i) for i in index]))


def test_an_explicit_kernel_says_what_it_cannot_be_called_under(impl):
    run, value = of("weight1", make(), impl=impl)
    for transform, named in ((grad(lambda x: run(x).sum()), "torch.func's grad"), (vmap(run), "torch.func's vmap")):
        with pytest.raises(NotImplementedError, match=f"impl='{impl}' .* {named} is active.* impl='reference'"):
            transform(value.expand(2, 12, 16) if "vmap" in named else value)
    with pytest.raises(NotImplementedError, match="a tensor carries a tangent"):
        tangent_of(run, value, value)
    with forward_ad.dual_level():
        run(value)  # no tangent, no reason


def test_the_operators_themselves_lose_no_tangent(impl):
    operator, value = operator_of(impl), torch.rand(2, 3)
    for transform in (
        lambda: jvp(operator, (value,), (value,)),
        lambda: grad(lambda x: operator(x).sum())(value),
        lambda: vmap(operator)(torch.stack([value, value])),
        lambda: tangent_of(operator, value, value),
        lambda: tangent_of(operator, value.clone().requires_grad_(), value),
    ):
        with pytest.raises(NotImplementedError):
            transform()

    with Dispatched():
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            tangent_of(operator, value, value)
        with forward_ad.dual_level():
            assert operator(value).shape == (2, 5, 16)

    run, value = of("mix_weights", make(), impl=impl)
    out = run(value.requires_grad_())
    with pytest.raises(NotImplementedError, match="is_grads_batched"):
        torch.autograd.grad(out, value, torch.ones(3, *out.shape), is_grads_batched=True, retain_graph=True)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode AD"):
        torch.autograd.grad(out, value, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


@pytest.mark.plain_memory
def test_compiled_code_under_transforms():
    torch.compiler.reset()
    args = make()
    run, value = of("mix_weights", args, impl="auto")
    plain, _ = of("mix_weights", args, impl="reference")
    expected = grad(lambda x: plain(x).sum())(value)
    compiled = torch.compile(grad(lambda x: run(x).sum()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(value), expected)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(value), plain(value))
    with pytest.raises(NotImplementedError, match="forward-mode AD"):  # traced without a tangent, run with one
        tangent_of(compiled, value, value)


# ---- what "auto" says of it ----


@pytest.fixture
def anew():
    """Nothing has been said, and nothing chosen, before the test; nor after it."""
    for forget in (warn_of_fallback.cache_clear, registry.choose.cache_clear):
        forget()
    yield
    for forget in (warn_of_fallback.cache_clear, registry.choose.cache_clear):
        forget()


@pytest.mark.usefixtures("anew", "impl")
@pytest.mark.parametrize("wrap", [lambda call: call, partial(torch.compile, fullgraph=True, backend="eager")])
def test_auto_says_once_per_reason_that_plain_torch_serves_a_call(wrap):
    torch.compiler.reset()
    run, value = of("weight1", make(), impl="auto")
    plain, _ = of("weight1", make(), impl="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        run(value)
        grad(lambda x: plain(x).sum())(value)  # nobody asked for kernels
    said = "^weighted_mix: impl='auto' takes plain PyTorch, not kernels, because torch.func"
    with pytest.warns(FallbackWarning, match=said) as seen:
        wrap(grad(lambda x: run(x).sum()))(value)
    with pytest.warns(FallbackWarning, match="a tensor carries a tangent"):
        tangent_of(run, value, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        wrap(grad(lambda x: 2 * run(x).sum()))(value)
        tangent_of(run, value, value)
    assert sum(issubclass(warning.category, FallbackWarning) for warning in seen) == 1


@pytest.mark.usefixtures("anew")
def test_auto_says_why_kernels_for_the_device_cannot_serve_a_plan(impl, monkeypatch):
    operator, args, reason = registry.operators()["weighted_mix"], make(), "the plan is too large"
    monkeypatch.setattr(type(operator.implementation(impl)), "why_not_plan", lambda self, plan: reason)
    with pytest.warns(FallbackWarning, match=f"the {impl} backend cannot serve torch.float32 on 'cpu': {reason}"):
        mlp(**args)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        mlp(**args)
    demands = "gelu", PLAN.compact()[1].code
    device = torch.device("cpu")
    assert operator.passed_over(device, torch.float32, *demands) == {impl: reason}
    assert operator.passed_over(device, torch.float32, "gelu") == {}


@pytest.mark.parametrize("layernorm_eps", [None, 1e-5])
def test_the_projector_under_transforms(layernorm_eps):
    layers, weights = make()["layers"], torch.rand(2, 3)
    plain = LayerMixProjector(PLAN, 8, 12, layernorm_eps=layernorm_eps, impl="reference")
    fused = LayerMixProjector(PLAN, 8, 12, layernorm_eps=layernorm_eps)
    params = {name: p.detach() for name, p in plain.named_parameters()}
    two = {name: torch.stack([p, 2 * p]) for name, p in params.items()}

    def results(projector):
        def call(params, layer):
            return functional_call(projector, params, ([*layers[:5], layer, layers[6]], weights))

        return (
            grad(lambda params: call(params, layers[5]).square().sum())(params),
            vmap(call, (0, None))(two, layers[5]),
            jvp(lambda layer: call(params, layer), (layers[5],), (layers[5],))[1],
        )

    torch.testing.assert_close(results(fused), results(plain))


def test_the_allocator_under_transforms():
    sentences, summaries = torch.randn(2, 6), torch.randn(2, 3, 8)
    allocator = WeightAllocator(6, 8, 3, 16, 1, 2)
    params = {name: p.detach() for name, p in allocator.named_parameters()}
    grads = grad(lambda params: functional_call(allocator, params, (sentences, summaries))[:, 0].sum())(params)
    allocator(sentences, summaries)[:, 0].sum().backward()
    for name, parameter in allocator.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


# ---- meta and fake tensors ----


@pytest.mark.parametrize("impl", IMPLS)
def test_meta_tensors_give_a_meta_result(impl):
    args, index = make("meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    for options in ({}, {"image_index": index, "skip_tokens": 1}):
        rows = 4 if options else 2
        weights = args["mix_weights"][:1]
        out = mlp(**{**args, "mix_weights": weights}, impl=impl, **options)
        assert (out.shape, out.dtype, out.device.type) == ((rows, 5 - len(options) // 2, 12), torch.float32, "meta")
        mixed = ik.layer_mix([h.bfloat16() for h in args["layers"]], PLAN, weights, impl=impl, **options)
        assert (mixed.shape, mixed.dtype) == ((rows, 5 - len(options) // 2, 16), torch.bfloat16)
        one = ik.layer_mix_linear(args["layers"], PLAN, weights, args["weight1"], impl=impl, **options)
        assert (one.shape, one.device.type) == ((rows, 5 - len(options) // 2, 12), "meta")
    projector = LayerMixProjector(PLAN, 8, 12, layernorm_eps=1e-5, impl=impl).to("meta")
    projector(args["layers"], args["mix_weights"]).sum().backward()
    assert projector.linear_1.weight.grad.device.type == "meta"
    allocator = WeightAllocator(6, 8, 3, 16, 1, 2, impl=impl).to("meta")
    weights = allocator(torch.empty(2, 6, device="meta"), torch.empty(2, 3, 8, device="meta"))
    assert (weights.shape, weights.device.type) == ((2, 3), "meta")


@pytest.mark.parametrize("impl", IMPLS)
def test_fake_tensors_give_a_fake_result(impl):
    with FakeTensorMode():
        args = make()
        leaves = [args[name].requires_grad_() for name in NAMES]
        out = mlp(**args, image_index=torch.zeros(2, dtype=torch.int64), impl=impl)
        assert (out.shape, out.device.type) == ((2, 5, 12), "cpu")
        assert [g.shape for g in torch.autograd.grad(out.sum(), leaves)] == [leaf.shape for leaf in leaves]


# ---- inference tensors ----


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["layers", "image_index", *NAMES])
def test_any_argument_may_have_been_made_under_inference_mode(name, impl):
    args = {**make(), "image_index": torch.tensor([1, 0])}
    results = []
    for inference in (False, True):
        given = dict(args)
        with torch.inference_mode(inference):
            given[name] = [h.clone() for h in args["layers"]] if name == "layers" else args[name].clone()
        leaves = [args[other].requires_grad_() for other in NAMES if other != name]
        leaves += [] if name == "layers" else [h.requires_grad_() for h in args["layers"][1:]]
        out = mlp(**given, impl=impl)
        assert not out.is_inference()
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(results[1], results[0])


def test_nothing_but_an_inference_tensor_is_copied(impl):
    plan, weight = MixPlan.concat([0, 1]), torch.randn(12, 16, requires_grad=True)
    with torch.inference_mode():
        made_there = torch.randn(2, 5, 8)
    states, saved = [torch.randn(2, 5, 8), made_there], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = ik.layer_mix_linear(states, plan, None, weight, impl=impl)
    assert {states[0].data_ptr(), weight.data_ptr()} <= set(saved)
    assert made_there.data_ptr() not in saved
    out.sum().backward()
    with torch.inference_mode():
        assert ik.layer_mix_linear(states, plan, None, weight, impl=impl).is_inference()


def test_allocators_train_on_inference_tensors():
    with torch.inference_mode():
        sentences, summaries = torch.randn(2, 6), torch.randn(2, 3, 8)
    WeightAllocator(6, 8, 3, 16, 1, 2)(sentences, summaries).sum().backward()
    TextAllocator(6, 3)(sentences).sum().backward()


# ---- tensor subclasses ----


def test_subclasses_and_lazy_negations_as_arguments():
    class Named(torch.Tensor):
        pass

    args = make()
    expected = mlp(**args)
    named = mlp(**{**args, "layers": [h.as_subclass(Named) for h in args["layers"]]})
    torch.testing.assert_close(named.as_subclass(torch.Tensor), expected)
    negated = {name: torch._neg_view(-args[name]) for name in NAMES}
    torch.testing.assert_close(mlp([torch._neg_view(-h) for h in args["layers"]], **negated), expected)
