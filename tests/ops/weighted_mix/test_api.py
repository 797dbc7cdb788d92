"""The public operators on every backend that runs here: values, gradients, dtypes, edges, errors."""

import re

import harness
import plain_torch
import pytest
import torch
from block import IGVA, NAMES, make, named
from recording import Dispatched

import igva_kernels as ik
from igva_kernels import MixPlan, registry
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.runtime.dense import FLOATS
from igva_kernels.testing import relative_error


@pytest.mark.parametrize("layers_grad", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck_in_fp64(impl, norm, layers_grad):
    harness.require(impl, torch.float64)
    plan = MixPlan((((0, 0, 0.5), (1, 1, 0.25), (2, None, 2.0)), ((2, 1, -1.0), (3, 1, -1.0))), 7)
    states = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=layers_grad) for _ in range(7)]
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    shapes = [(5, 8), (5,), (5, 5), (5,), (8,), (8,)]
    params = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(w, w1, b1, w2, b2, gamma, beta, *states):
        return ik.layer_mix_mlp(
            states, plan, w, w1, b1, w2, b2, norm=(gamma, beta, 1e-5) if norm else None,
            skip_tokens=1, image_index=torch.tensor([1, 0, 1]), impl=impl,
        )  # fmt: skip

    inputs = (w, *params, *states)
    if not norm:
        inputs = (w, *params[:4], *(p.detach() for p in params[4:]), *states)
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("bias", [True, False])
def test_activations_and_missing_biases(impl, activation, bias):
    # In fp32, two correct kernels may in rare cases see different sides of a ReLU's kink.
    dtype = torch.float64 if activation == "relu" else torch.float32
    harness.require(impl, dtype)
    states, weights, params = make(grad=True, dtype=dtype)
    w1, b1, w2, b2 = params if bias else (params[0], None, params[2], None)
    for op, args in ((ik.layer_mix_linear, (w1, b1)), (ik.layer_mix_mlp, (w1, b1, w2, b2))):
        leaves = [weights, *(p for p in args if p is not None)]
        results = []
        for one in (impl, "reference"):
            out = op(states, IGVA, weights, *args, activation=activation, impl=one)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for actual, expected in zip(*results, strict=True):
            assert actual.dtype == expected.dtype
            assert relative_error(actual, expected) < 1e-4


def test_strided_states_of_different_layouts_are_read_where_they_lie(impl):
    base, _, params = make(images=3, tokens=6)
    weights = torch.rand(3, 3)
    layouts = [
        lambda h: h,
        lambda h: torch.nn.functional.pad(h, (0, 5))[..., :8],  # token stride 13
        lambda h: torch.cat([h, h], 1)[:, :6],  # batch stride of 12 tokens
        lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),  # tokens before images
        lambda h: h[:1].expand(3, -1, -1),  # batch stride 0
        lambda h: torch.cat([h.new_zeros(3, 1, 8), h], 1)[:, 1:],  # an offset into its storage
        lambda h: h.mT.contiguous().mT,  # channels before tokens, as transformers' SigLIP returns them
    ]
    states = [layout(h) for layout, h in zip(layouts, base, strict=True)]
    for skip in (0, 2):
        actual = ik.layer_mix(states, IGVA, weights, skip_tokens=skip, impl=impl)
        expected = plain_torch.layer_mix([h.contiguous() for h in states], IGVA, weights, skip_tokens=skip)
        torch.testing.assert_close(actual, expected)
        mlp = ik.layer_mix_mlp(states, IGVA, weights, *params, skip_tokens=skip, impl=impl)
        torch.testing.assert_close(
            mlp, plain_torch.layer_mix_mlp(states, IGVA, weights, *params, skip_tokens=skip), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("skip", [0, 5])
def test_empty_and_single_batches(impl, images, skip):
    states, weights, params = make(images=images, grad=True)
    out = ik.layer_mix_mlp(states, IGVA, weights, *params, skip_tokens=skip, impl=impl)
    assert out.shape == (images, 5 - skip, 12)
    out.sum().backward()
    expected = [weights, *params]
    actual = [leaf.grad.clone() for leaf in expected]
    for leaf in expected:
        leaf.grad = None
    plain_torch.layer_mix_mlp(states, IGVA, weights, *params, skip_tokens=skip).sum().backward()
    for grad, leaf in zip(actual, expected, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-4)


def test_one_layer_is_enough(impl):
    h = torch.randn(2, 5, 8)
    assert torch.equal(ik.layer_mix([h], MixPlan.concat([0]), skip_tokens=1, impl=impl), h[:, 1:])


def test_one_row_of_weights_serves_the_whole_batch(impl):
    states, weights, params = make(grad=True)
    shared = weights.detach()[:1].clone().requires_grad_()
    out = ik.layer_mix_mlp(states, IGVA, shared, *params, impl=impl)
    expected = plain_torch.layer_mix_mlp(states, IGVA, shared.expand(2, -1), *params)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(out.square().sum(), shared)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), shared)
    assert relative_error(grad, expected_grad) < 1e-4


def test_several_rows_may_read_one_image(impl):
    states, _, params = make(images=2)
    index = torch.tensor([1, 9, 1, 9, 0, 9, 1, 9])[::2]
    weights = torch.rand(4, 3)
    repeated = [h[index] for h in states]
    torch.testing.assert_close(
        ik.layer_mix_mlp(states, IGVA, weights, *params, image_index=index, impl=impl),
        ik.layer_mix_mlp(repeated, IGVA, weights, *params, impl=impl),
    )


@pytest.mark.parametrize("bad", [[0, 2], [-1, 0]])
@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_an_image_out_of_range_is_refused(quick_impl, which, bad):
    states, weights, _ = make()
    with pytest.raises(ValueError, match="image_index: need values from 0 to 1"):
        ik.layer_mix(
            states, IGVA, weights, image_index=torch.tensor(bad), impl=quick_impl if which == "kernel" else "reference"
        )


def test_unused_layers_may_be_none_also_beside_a_trainable_one(impl):
    states, weights, _ = make(grad=True)
    states[3].requires_grad_()
    states[0] = None
    out = ik.layer_mix(states, IGVA, weights, impl=impl)
    (grad, grad_w) = torch.autograd.grad(out.square().sum(), [states[3], weights])
    expected = plain_torch.layer_mix(states, IGVA, weights)
    (expected_grad, expected_w) = torch.autograd.grad(expected.square().sum(), [states[3], weights])
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(grad_w, expected_w)


def test_nan_weights_and_layers_come_through_and_touch_their_own_row_only(impl):
    states, weights, params = make()
    weights = weights.clone()
    weights[0, 1] = float("nan")
    out = ik.layer_mix_mlp(states, IGVA, weights, *params, impl=impl)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    states[1][1, 3, 2] = float("inf")
    rows = ik.layer_mix(states, IGVA, torch.rand(2, 3), impl=impl)
    assert rows.isinf().sum() == 1


def test_layers_keep_their_dtype_and_the_row_takes_the_weights(impl):
    states, weights, params = make(dtype=torch.bfloat16)
    params = [p.float() for p in params]
    out = ik.layer_mix_mlp(states, IGVA, weights, *params, impl=impl)
    assert out.dtype == torch.float32
    exact = plain_torch.layer_mix_mlp(
        [h.double() for h in states], IGVA, weights.double(), *(p.double() for p in params)
    )
    assert relative_error(out, exact) < 1e-6  # the row was rounded to fp32, not to the layers' bf16
    assert ik.layer_mix(states, IGVA, weights, impl=impl).dtype == torch.bfloat16


@pytest.mark.parametrize("op", ["layer_mix", "layer_mix_linear", "layer_mix_mlp"])
def test_the_answer_does_not_depend_on_the_backend(impl, op):
    states, weights, params = make()
    args = {"layer_mix": [], "layer_mix_linear": params[:2], "layer_mix_mlp": params}[op]
    call = getattr(ik, op)
    expected = call(states, IGVA, weights, *args, impl="reference")
    for one in (impl, "auto"):
        torch.testing.assert_close(call(states, IGVA, weights, *args, impl=one), expected, rtol=1e-4, atol=1e-4)


# ---- errors ----


def wrong(**change):
    """A call of layer_mix_mlp with some arguments replaced."""
    states, weights, (w1, b1, w2, b2) = make()
    args = {
        "hidden_states": states, "plan": IGVA, "mix_weights": weights,
        "weight1": w1, "bias1": b1, "weight2": w2, "bias2": b2,
    }  # fmt: skip
    return args | {key: value(args) if callable(value) else value for key, value in change.items()}


def replace(index, value):
    """hidden_states with one state replaced."""
    return lambda args: [value(h) if i == index else h for i, h in enumerate(args["hidden_states"])]


MLP_ERRORS = {
    "too few layers": (dict(hidden_states=lambda a: a["hidden_states"][:5]), ValueError, "made for 7 hidden states"),
    "a stacked tensor": (dict(hidden_states=lambda a: torch.stack(a["hidden_states"])), TypeError, "not stacked"),
    "a missing layer": (dict(hidden_states=replace(2, lambda h: None)), ValueError, r"hidden_states\[2\].*got None"),
    "not a tensor": (dict(hidden_states=replace(2, lambda h: 3)), TypeError, r"hidden_states\[2\].*got int"),
    "another shape": (dict(hidden_states=replace(2, lambda h: h[:1])), ValueError, r"hidden_states\[2\]: need shape"),
    "two dimensions": (dict(hidden_states=replace(1, lambda h: h[0])), ValueError, r"hidden_states\[1\]: need shape"),
    "another dtype": (dict(hidden_states=replace(2, lambda h: h.half())), TypeError, r"hidden_states\[2\].*float16"),
    "integers": (dict(hidden_states=replace(1, lambda h: h.int())), TypeError, r"hidden_states\[1\].*int32"),
    "another device": (dict(hidden_states=replace(2, lambda h: h.to("meta"))), ValueError, "need all layers on"),
    "no plan": (dict(plan=[[1]]), TypeError, "plan: need a MixPlan, got list"),
    "no weights": (dict(mix_weights=None), ValueError, "mix_weights: got None, need a tensor .B, 3."),
    "weights for nothing": (dict(plan=MixPlan.igva_uniform(6, 3)), ValueError, "has no weight column"),
    "too many columns": (dict(mix_weights=torch.rand(2, 4)), ValueError, r"need shape \[2, 3\] or \[1, 3\]"),
    "too many rows": (dict(mix_weights=torch.rand(3, 3)), ValueError, r"need shape \[2, 3\] or \[1, 3\]"),
    "integer weights": (dict(mix_weights=torch.ones(2, 3, dtype=torch.int)), TypeError, "mix_weights: need a floating"),
    "weights elsewhere": (dict(mix_weights=torch.rand(2, 3, device="meta")), ValueError, "mix_weights: need device"),
    "a narrow weight1": (dict(weight1=torch.rand(12, 8)), ValueError, r"weight1: need shape \['any', 16\]"),
    "a missing weight1": (dict(weight1=None), TypeError, "weight1: need a floating tensor .*, got None"),
    "an empty weight1": (dict(weight1=torch.rand(0)), ValueError, "weight1.*a sharded weight is empty"),
    "a wrong bias1": (dict(bias1=torch.rand(11)), ValueError, r"bias1: need shape \[12\]"),
    "a wrong weight2": (dict(weight2=torch.rand(12, 13)), ValueError, "weight2: need shape"),
    "mixed weight dtypes": (dict(weight2=torch.rand(12, 12).half()), TypeError, "weight2: need dtype torch.float32"),
    "skip beyond T": (dict(skip_tokens=6), ValueError, "skip_tokens: got 6, need 0 to 5"),
    "skip not an int": (dict(skip_tokens=1.0), TypeError, "skip_tokens: need an int"),
    "a float index": (dict(image_index=torch.tensor([0.0, 1.0])), TypeError, "image_index: need an int64"),
    "an index matrix": (dict(image_index=torch.zeros(2, 1, dtype=torch.int64)), ValueError, "image_index: need shape"),
    "no image to index": (
        dict(hidden_states=lambda a: [h[:0] for h in a["hidden_states"]], image_index=torch.tensor([0])),
        ValueError, "image_index: got 1 rows, but the hidden states hold no image",
    ),
    "a wrong activation": (dict(activation="tanh"), ValueError, "activation: got 'tanh'"),
    "a wrong norm": (dict(norm=1e-5), TypeError, "norm: need None or"),
    "a wrong norm weight": (dict(norm=(torch.rand(8), None, 1e-5)), ValueError, r"norm\[0\]: need shape \[16\]"),
    "an unknown impl": (dict(impl="fast"), ValueError, "impl: got 'fast', need one of 'auto'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MLP_ERRORS)
def test_a_wrong_argument_is_named(name):
    change, error, message = MLP_ERRORS[name]
    with pytest.raises(error, match=message):
        ik.layer_mix_mlp(**wrong(**change))


NOT_COMPUTED = [
    dtype
    for name, dtype in vars(torch).items()
    if isinstance(dtype, torch.dtype) and dtype not in FLOATS and not re.match("q|bits", name)
]
"""Integers, complex numbers, float8, float4 and whatever this torch has."""


@pytest.mark.parametrize("dtype", NOT_COMPUTED, ids=str)
def test_a_dtype_that_cannot_be_computed_in_is_refused_by_the_name_of_the_argument(dtype):
    args = named()
    layers, weights, w1, norm_weight = args["layers"], args["mix_weights"], args["weight1"], args["norm_weight"]
    empty = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731  some have no kernel at all
    unserved = {name: empty(args[name].shape) for name in NAMES}
    parameters = [unserved[name] for name in ("weight1", "bias1", "weight2", "bias2")]
    calls = {
        r"hidden_states\[0\]": lambda: ik.layer_mix([empty(2, 5, 8)] * 7, MixPlan.concat([0])),
        "mix_weights": lambda: ik.layer_mix(layers, IGVA, unserved["mix_weights"]),
        "weight": lambda: ik.layer_mix_linear(layers, IGVA, weights, parameters[0]),
        "bias": lambda: ik.layer_mix_linear(layers, IGVA, weights, w1, parameters[1]),
        "weight1": lambda: ik.layer_mix_mlp(layers, IGVA, weights, *parameters),
        "weight2": lambda: ik.layer_mix_mlp(layers, IGVA, weights, w1, None, parameters[2], None),
        r"norm\[0\]": lambda: ik.layer_mix_linear(
            layers, IGVA, weights, w1, norm=(unserved["norm_weight"], None, 1e-5)
        ),
        r"norm\[1\]": lambda: ik.layer_mix_linear(
            layers, IGVA, weights, w1, norm=(norm_weight, unserved["norm_bias"], 1e-5)
        ),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name}: need a floating tensor .* got {dtype}"):
            call()


@pytest.mark.parametrize("freed", ["weight1", "bias1", "weight2", "bias2", "norm[0]", "norm[1]"])
def test_a_weight_whose_storage_was_freed_is_an_error_and_not_a_crash(freed):
    args = wrong()
    norm = [torch.ones(args["weight1"].shape[1], requires_grad=True) for _ in range(2)]
    weights = {"norm[0]": norm[0], "norm[1]": norm[1], **args}
    out = ik.layer_mix_mlp(**args, norm=(*norm, 1e-5))
    weights[freed].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{re.escape(freed)}: its storage has been freed"):
        ik.layer_mix_mlp(**args, norm=(*norm, 1e-5))
    if "bias" not in freed:  # no gradient reads those
        with pytest.raises(ValueError, match=f"{re.escape(freed)}: its storage has been freed"):
            out.sum().backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the request can be served here")
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_an_explicit_backend_that_cannot_serve_says_why(impl, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match=f"impl='{impl}' cannot serve torch.float32 tensors on 'cpu': "):
        ik.layer_mix_mlp(**wrong(), impl=impl)


def test_backends_tells_what_can_run_and_why_the_rest_cannot():
    statuses = {status.name: status for status in ik.backends()}
    assert [*statuses] == ["reference", *registry.all_backends()]
    for status in statuses.values():
        assert status.available == (not status.reason), status


def test_plain_torch_copies_no_state_that_was_made_under_inference_mode():
    with torch.inference_mode():
        states, _, _ = make()
    weights = torch.rand(2, 3, requires_grad=True)
    with Dispatched() as seen:
        ik.layer_mix(states, IGVA, weights, impl="reference").sum().backward()
    assert weights.grad is not None and "aten::clone" not in seen.names
