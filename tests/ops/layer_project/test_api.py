"""The public function: what each member computes and keeps, what is shared, and what is refused."""

from __future__ import annotations

import harness
import pytest
import torch
from bank import HIDDEN, IGVA, LINEARS, MEAN, PLANS, TAPS, make, member_by_member, trained
from recording import Dispatched
from torch.utils.checkpoint import checkpoint

import igva_kernels as ik
from igva_kernels import MixPlan
from igva_kernels.testing import measure_memory

IMPLS = harness.quick_impls("layer_project")
ALL_IMPLS = ["reference", *IMPLS]


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_every_member_is_layer_mix_mlp_to_the_last_bit(impl, norms, dtype):
    args = make(norms=norms, dtype=dtype)
    out, expected = ik.layer_project(**args, impl=impl), member_by_member(args, impl=impl)
    assert out.shape == (3, 2, 4, HIDDEN)
    assert all(part.is_contiguous() for part in out)
    assert_equal(out, expected)
    leaves, grad = trained(args), torch.randn_like(out)
    assert_equal(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, list(grad)))


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_one_member_is_layer_mix_mlp(impl):
    args = make((IGVA,), towers=True)
    out, (expected,) = ik.layer_project(**args, impl=impl), member_by_member(args, impl=impl)
    leaves = [leaf for leaf in trained(args) if leaf is not args["hidden_states"][0]]  # igva reads no embeddings
    assert_equal([out[0]], [expected])
    assert_equal(*(torch.autograd.grad(result.sum(), leaves) for result in (out, expected)))


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_a_member_may_be_one_linear(impl):
    args = make()
    args |= {"weight2": None, "bias2": None, "activation": "relu"}
    expected = [
        ik.layer_mix_linear(
            args["hidden_states"], plan, args["mix_weights"][j], args["weight1"][j], args["bias1"][j],
            activation="relu", skip_tokens=1, impl=impl,
        )
        for j, plan in enumerate(PLANS)
    ]  # fmt: skip
    out = ik.layer_project(**args, impl=impl)
    assert_equal(out, expected)
    leaves, grad = trained(args), torch.randn_like(out)
    assert_equal(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, list(grad)))


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_what_members_share_gets_the_sum_of_their_gradients(impl):
    args = make((IGVA, TAPS, IGVA), norms=True, towers=True)
    for name in (*LINEARS, "norm"):
        args[name] = args[name][0]
    expected = member_by_member(args, impl=impl)
    out = ik.layer_project(**args, impl=impl)
    assert_equal(out, expected)
    leaves, grad = [leaf for leaf in trained(args) if leaf is not args["hidden_states"][0]], torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(actual, torch.autograd.grad(expected, leaves, list(grad)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_mix_weights_may_be_one_for_all(impl):
    args = make((IGVA, IGVA))
    args["mix_weights"] = args["mix_weights"][0]
    expected, out = member_by_member(args, impl=impl), ik.layer_project(**args, impl=impl)
    assert_equal(out, expected)
    grads = (torch.autograd.grad(sum(r.sum() for r in result), args["mix_weights"]) for result in (out, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("only", ["hidden_states", "mix_weights", "weight1", "bias1", "weight2", "bias2", "norm"])
def test_only_the_gradients_that_are_asked_for_are_computed(only, impl):
    """Of one member; each of the others adds its work to no backward."""
    args = make(norms=True, towers=True)
    for leaf in trained(args):
        leaf.requires_grad_(False)
    own = args[only][1] if only != "mix_weights" else args[only][0]
    (leaf, *_) = trained({"own": [x.requires_grad_() for x in (own[:1] if only == "norm" else [own])]})
    out = ik.layer_project(**args, impl=impl)
    with Dispatched() as seen:
        (grad,) = torch.autograd.grad(out.sum(), leaf)
    expected = torch.autograd.grad(sum(r.sum() for r in member_by_member(args, impl=impl)), leaf)[0]
    torch.testing.assert_close(grad, expected)
    assert seen.ours.count("projector_backward") == (3 if only == "hidden_states" else 1)  # all plans read layer 1


@pytest.mark.parametrize("impl", IMPLS)
def test_a_layer_that_no_plan_reads_may_be_none_beside_a_trained_one(impl):
    args = make((TAPS, MixPlan.concat([3, 1], 5)), towers=True)
    full = torch.autograd.grad(ik.layer_project(**args, impl=impl).sum(), [args["hidden_states"][i] for i in (1, 3)])
    args["hidden_states"] = [args["hidden_states"][i] if i in (1, 3) else None for i in range(5)]
    states = [args["hidden_states"][i] for i in (1, 3)]
    assert_equal(torch.autograd.grad(ik.layer_project(**args, impl=impl).sum(), states), full)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_keeps_what_its_members_keep_and_no_second_copy_of_the_result(impl):
    args = make(images=1, tokens=65, hidden=192, width=96)
    out, memory = measure_memory(lambda: ik.layer_project(**args, impl=impl))
    expected, apart = measure_memory(lambda: member_by_member(args, impl=impl))
    assert out.nbytes == sum(part.nbytes for part in expected)
    few = 4096
    assert memory.kept <= apart.kept + few
    assert memory.peak <= apart.peak + few
    with torch.no_grad():
        out, memory = measure_memory(lambda: ik.layer_project(**args, impl=impl))
        assert memory.kept <= out.nbytes + few
        _, (peak, _) = measure_memory(lambda: member_by_member(args, impl=impl))
        assert memory.peak <= peak + few


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpointing_repeats_every_bit(impl):
    args = make(norms=True)
    leaves = trained(args)

    def run(*_):
        return ik.layer_project(**args, impl=impl)

    grads = [
        torch.autograd.grad(out.square().sum(), leaves)
        for out in (run(), checkpoint(run, *leaves, use_reentrant=False))
    ]
    assert_equal(*grads)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_autocast_casts_weights_and_rows_and_never_the_layers(impl):
    args = make()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ik.layer_project(**args, impl=impl), member_by_member(args, impl=impl)
    assert out.dtype == torch.bfloat16
    assert_equal(out, expected)
    assert all(grad.dtype == leaf.dtype for leaf, grad in zip(
        trained(args), torch.autograd.grad(out.sum(), trained(args)), strict=True
    ))  # fmt: skip


@pytest.mark.plain_memory
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("norms", [False, True])
def test_torch_compile_takes_a_call_with_its_backward_into_one_graph(norms, impl):
    args = make(norms=norms)
    leaves = trained(args)
    compiled = torch.compile(lambda: ik.layer_project(**args, impl=impl), fullgraph=True, backend="aot_eager")
    out, expected = compiled(), ik.layer_project(**args, impl=impl)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (out, expected)]
    torch.testing.assert_close(*grads)


# ---- errors ----


def without(args, name, j):
    return {name: [None if i == j else value for i, value in enumerate(args[name])]}


WRONG = {
    "plans no sequence": ({"plans": IGVA}, TypeError, "plans: need a sequence of MixPlans"),
    "no plan": ({"plans": []}, ValueError, "plans: need at least one MixPlan"),
    "a plan of another type": ({"plans": [IGVA, "taps", MEAN]}, TypeError, r"plans\[1\]: need a MixPlan, got str"),
    "too few weights": (
        {"weight1": [torch.rand(12, 16)] * 2}, ValueError, "weight1: need 3 entries, one for each plan, got 2",
    ),
    "no weight": ({"weight1": None}, TypeError, "weight1: need a tensor for all members or a sequence of 3"),
    "a wide weight": (
        lambda args: {"weight1": [*args["weight1"][:2], torch.rand(12, 9)]}, ValueError,
        r"weight1\[2\]: need shape \['any', 8\].*, got \[12, 9\]",
    ),
    "a weight for all that does not fit": (
        {"weight1": torch.rand(12, 16)}, ValueError, r"weight1: need shape \['any', 8\]",
    ),
    "a missing bias": (
        lambda args: without(args, "bias1", 1), ValueError, r"bias1\[1\]: got None, need one for every member",
    ),
    "a missing norm": (
        lambda args: without(args, "norm", 0), ValueError, r"norm\[0\]: got None, need one for every member",
    ),
    "a norm of two": (
        lambda args: {"norm": [*args["norm"][:2], (None, None)]}, TypeError,
        r"norm\[2\]: need None or \(weight or None, bias or None, eps\)",
    ),
    "a norm's weight that does not fit": (
        lambda args: {"norm": [*args["norm"][:2], (torch.rand(9), None, 1e-5)]}, ValueError,
        r"norm\[2\]\[0\]: need shape \[8\]",
    ),
    "a norm's weight that only some have": (
        lambda args: {"norm": [*args["norm"][:2], (None, None, 1e-5)]}, ValueError,
        r"norm\[2\]\[0\]: got None, need one for every member",
    ),
    "a bias without its weight": ({"weight2": None}, ValueError, "bias2: need None where weight2 is None"),
    "mix weights of a plan without columns": (
        lambda args: {"mix_weights": [args["mix_weights"][0], torch.rand(2, 2), None]}, ValueError,
        r"mix_weights\[1\]: got a tensor of shape \[2, 2\], need None",
    ),
    "no mix weights": ({"mix_weights": None}, ValueError, "mix_weights: got None, need a tensor"),
    "another width": (
        lambda args: {
            "weight2": [*args["weight2"][:2], torch.rand(13, 12)], "bias2": [*args["bias2"][:2], torch.rand(13)],
        },
        ValueError, r"weight2\[2\]: need 12 rows, the width of the result, as weight2\[0\], got 13",
    ),
    "another dtype": (
        lambda args: {name: [*args[name][:2], args[name][2].double()] for name in LINEARS},
        TypeError, r"weight1\[2\]: need dtype torch.float32 as weight1\[0\], got torch.float64",
    ),
    "a missing layer": (
        lambda args: without(args, "hidden_states", 1), ValueError, r"hidden_states\[1\]: the plan reads this layer",
    ),
    "an activation": ({"activation": "tanh"}, ValueError, "activation: got 'tanh'"),
    "an impl": ({"impl": "best"}, ValueError, "impl: got 'best'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_argument_and_the_member(case):
    change, error, message = WRONG[case]
    args = make(norms=True)
    with pytest.raises(error, match=message):
        ik.layer_project(**args | (change(args) if callable(change) else change))


def test_layers_of_two_members_must_be_alike():
    args = make((MixPlan.concat([1], 5), MixPlan.concat([2], 5)))
    args["hidden_states"][2] = args["hidden_states"][2].bfloat16()
    with pytest.raises(TypeError, match=r"hidden_states\[2\]: need one dtype for all layers"):
        ik.layer_project(**args)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_an_image_that_is_not_there_is_an_error_on_a_cpu(impl):
    args = make()
    args["mix_weights"][0] = args["mix_weights"][0][:1]
    with pytest.raises(ValueError, match="image_index"):
        ik.layer_project(**args, image_index=torch.tensor([0, 2]), impl=impl)
