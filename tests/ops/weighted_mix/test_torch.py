"""The operators as citizens of torch: compile, autocast, checkpointing, what is saved, what import touches."""

import subprocess
import sys
from functools import partial

import block
import plain_torch
import pytest
import torch
import torch.nn.functional as F
from block import IGVA
from torch.utils.checkpoint import checkpoint

import igva_kernels as ik
from igva_kernels import MixPlan
from igva_kernels.ops.weighted_mix.checks import compact
from igva_kernels.ops.weighted_mix.steps import Needs
from igva_kernels.testing import relative_error, within_rule

make = partial(block.make, grad=True)


@pytest.fixture
def impl(quick_impl):
    """What torch does around a call does not depend on the kernels: no interpreter."""
    return quick_impl


@pytest.mark.plain_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes_where_the_mixed_row_is_kept(impl, dtype):
    plan = MixPlan.igva_uniform(6, 3).compact()[1]
    states, _, (w1, b1, w2, b2) = make(dtype=dtype, layers_grad=True)
    args = (states[1:], None, None, w1, b1, None, None, w2, b2, plan.code, 1, 1e-5, "gelu", "rows", True, impl)
    torch.library.opcheck(torch.ops.igva_kernels.projector.default, args)


@pytest.mark.plain_memory
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ["gelu", None])
def test_no_two_gradients_share_memory_whichever_are_asked_for(impl, activation, norm):
    """opcheck compares results and arguments with the schema, which knows no alias, and with the fake kernel."""
    plan, rows, hidden = MixPlan.igva(4, 2).compact()[1], 2, 5
    sources = [torch.randn(1, 3, 4), torch.randn(1, rows, 4), torch.randn(1, rows, 4)]
    w1, w2, z, weights = torch.randn(hidden, 8), torch.randn(6, hidden), torch.randn(rows, hidden), torch.rand(1, 2)
    gamma, beta, eps = (torch.randn(8), torch.randn(8), 1e-5) if norm else (None, None, None)
    stats = [torch.randn(1, rows), torch.rand(1, rows)] if norm else []
    fields = [name for name in Needs._fields if norm or not name.startswith("norm")]
    for asked in (*([name] for name in fields), fields):
        needs = [name in asked for name in Needs._fields] + ["layers" in asked] * len(plan.layers)
        args = (
            torch.randn(1, rows, 6), sources, None, stats, z, weights, None, w1, gamma, beta, w2, plan.code, 1, eps,
            activation, [1, 3, 4], torch.float32, needs, impl,
        )  # fmt: skip
        operator = torch.ops.igva_kernels.projector_backward.default
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def test_a_second_derivative_is_refused_by_name(impl):
    states, weights, params = make()
    out = ik.layer_mix_mlp(states, IGVA, weights, *params, impl=impl).sum()
    (grad,) = torch.autograd.grad(out, weights, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("activation", ["gelu", None])
def test_a_result_may_be_changed_in_place_as_that_of_plain_torch(impl, activation):
    states, weights, params = make(layers_grad=True)
    calls = {
        "mix": lambda: ik.layer_mix(states, IGVA, weights, impl=impl),
        "linear": lambda: ik.layer_mix_linear(states, IGVA, weights, *params[:2], activation=activation, impl=impl),
        "mlp": lambda: ik.layer_mix_mlp(states, IGVA, weights, *params, activation=activation, impl=impl),
    }
    for call in calls.values():
        expected = torch.autograd.grad((call() * 2).square().sum(), weights)[0]
        out = call()
        out.mul_(2)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), weights)[0], expected)


# ---- compile ----


@pytest.mark.plain_memory
@pytest.mark.parametrize("plan", [IGVA, MixPlan.concat([-2, 1])], ids=["igva", "unresolved concat"])
def test_the_reference_compiles_without_a_graph_break_too(plan):
    torch.compiler.reset()
    states, weights, params = make(plan=plan)

    def run(states, weights, params):
        return ik.layer_mix_mlp(states, plan, weights, *params, skip_tokens=1, impl="reference")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(states, weights, params), run(states, weights, params))


@pytest.mark.plain_memory
@pytest.mark.parametrize(
    ("plan", "layers_grad"), [(IGVA, True), (MixPlan.concat([-2, 1]), False)], ids=["igva", "unresolved concat"]
)
def test_compiles_without_a_graph_break_forward_and_backward(impl, plan, layers_grad):
    torch.compiler.reset()
    states, weights, params = make(plan=plan, layers_grad=layers_grad)
    leaves = [*(() if weights is None else (weights,)), *params, *((states[1],) if layers_grad else ())]

    def run(states, weights, params):
        return ik.layer_mix_mlp(states, plan, weights, *params, skip_tokens=1, impl=impl) * 2

    results = []
    for call in (run, torch.compile(run, fullgraph=True)):
        out = call(states, weights, params)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


# ---- autocast and checkpointing ----


def test_autocast_casts_weights_and_the_row_but_never_the_layers(impl):
    for judge in within_rule(torch.bfloat16):
        states, weights, params = make(tokens=33, width=64, hidden=48)
        with torch.autocast("cpu", torch.bfloat16):
            out = ik.layer_mix_mlp(states, IGVA, weights, *params, impl=impl)
            plain = plain_torch.layer_mix_mlp(states, IGVA, weights, *params)
            assert ik.layer_mix(states, IGVA, weights, impl=impl).dtype == torch.float32
        assert out.dtype == plain.dtype == torch.bfloat16
        leaves = [weights, *params]
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        plain_grads = torch.autograd.grad(plain.float().square().sum(), leaves)
        exact_weights, *exact_params = (leaf.detach().double().requires_grad_() for leaf in leaves)
        exact = plain_torch.layer_mix_mlp([h.double() for h in states], IGVA, exact_weights, *exact_params)
        exact_grads = torch.autograd.grad(exact.square().sum(), [exact_weights, *exact_params])
        judge.add(out, exact, plain, "output")
        names = ("mix_weights", "weight1", "bias1", "weight2", "bias2")
        for name, leaf, *results in zip(names, leaves, grads, exact_grads, plain_grads, strict=True):
            assert results[0].dtype == leaf.dtype
            judge.add(*results, f"grad {name}")


def test_autocast_rounds_the_rows_of_a_norm_but_not_its_parameters(impl, monkeypatch):
    """Constant weights keep the rows in autocast's dtype. CUDA's LayerNorm takes no two dtypes; the CPU's would."""
    plan, eps, layer_norm = MixPlan.igva_uniform(4, 2), 1e-5, F.layer_norm

    def of_one_dtype(rows, shape, weight, bias, eps):
        assert rows.dtype == weight.dtype == bias.dtype
        return layer_norm(rows, shape, weight, bias, eps)

    for judge in within_rule(torch.bfloat16):
        states = [torch.randn(2, 33, 64) for _ in range(5)]
        leaves = [torch.randn(48, 128) / 12, torch.randn(48), 1 + torch.randn(128) / 10, torch.randn(128) / 10]
        results = []
        for name in (impl, "reference"):
            weight, bias, *norm = params = [leaf.clone().requires_grad_() for leaf in leaves]
            monkeypatch.setattr(F, "layer_norm", layer_norm if name == "reference" else of_one_dtype)
            with torch.autocast("cpu", torch.bfloat16):
                out = ik.layer_mix_linear(states, plan, None, weight, bias, norm=(*norm, eps), impl=name)
                results.append(torch.autograd.grad(out.float().square().sum(), params))
        weight, bias, *norm = params = [leaf.double().requires_grad_() for leaf in leaves]
        out = plain_torch.layer_mix_linear([h.double() for h in states], plan, None, weight, bias, norm=(*norm, eps))
        exact = torch.autograd.grad(out.square().sum(), params)
        for name, *triple in zip(
            ("weight", "bias", "norm weight", "norm bias"), results[0], exact, results[1], strict=True
        ):
            judge.add(*triple, f"grad {name}")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(impl, use_reentrant):
    states, weights, params = make()
    results = []
    for wrapped in (False, True):

        def run(weights, *params):
            return ik.layer_mix_mlp(states, IGVA, weights, *params, skip_tokens=1, impl=impl)

        out = checkpoint(run, weights, *params, use_reentrant=use_reentrant) if wrapped else run(weights, *params)
        out.square().sum().backward()
        results.append([leaf.grad.clone() for leaf in (weights, *params)])
        for leaf in (weights, *params):
            leaf.grad = None
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_inference_mode_and_no_grad_keep_nothing(impl):
    states, weights, params = make()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert saved_bytes(lambda: ik.layer_mix_mlp(states, IGVA, weights, *params, impl=impl)) == 0


# ---- what is saved for backward ----


def saved_bytes(run, besides=()):
    """Bytes that autograd saves in ``run``, each storage once, without those of the tensors ``besides``."""
    storages = {}
    ignored = {t.untyped_storage().data_ptr() for t in besides}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()  # noqa: F841  keeps the graph alive until it is counted
    return sum(size for pointer, size in storages.items() if pointer not in ignored)


def test_training_saves_the_reduced_sources_and_z_and_no_other_layer(impl):
    images, tokens, width, hidden = 2, 9, 16, 24
    states, weights, params = make(images, tokens, width, hidden)
    owned = [weights, *params]
    source = images * tokens * width * 4
    z = images * (tokens - 1) * hidden * 4
    run = lambda: ik.layer_mix_mlp(states, IGVA, weights, *params, skip_tokens=1, impl=impl)  # noqa: E731
    assert saved_bytes(run, owned) <= 4 * source + z  # base and three sums
    assert saved_bytes(run, [*owned, states[5]]) <= 3 * source + z  # the base is the tower's own tensor
    kept = saved_bytes(run, [*owned, *states])
    assert kept <= 3 * (source - images * width * 4) + z


def test_without_a_gradient_for_the_weights_only_the_row_and_z_are_saved(impl):
    images, tokens, width, hidden = 2, 9, 16, 24
    states, weights, params = make(images, tokens, width, hidden)
    weights = weights.detach()
    rows = images * (tokens - 1)
    run = lambda: ik.layer_mix_mlp(states, IGVA, weights, *params, skip_tokens=1, impl=impl)  # noqa: E731
    assert saved_bytes(run, [weights, *params]) == rows * (2 * width + hidden) * 4


@pytest.mark.parametrize("norm", [False, True])
def test_a_concat_saves_its_taps_where_they_lie_and_no_row(impl, norm):
    images, tokens, width, hidden = 2, 9, 16, 24
    plan = MixPlan.concat([-2, 1, 3])
    states, _, params = make(images, tokens, width, hidden, plan=plan)
    gamma, beta = torch.rand(48, requires_grad=True), torch.rand(48, requires_grad=True)
    options = {"norm": (gamma, beta, 1e-5) if norm else None, "skip_tokens": 1}
    leaves = [*params, *((gamma, beta) if norm else ())]
    run = lambda: ik.layer_mix_mlp(states, plan, None, *params, **options, impl=impl)  # noqa: E731
    rows = images * (tokens - 1)
    assert saved_bytes(run, [*leaves, *states]) == rows * (hidden + 2 * norm) * 4
    plain = plain_torch.layer_mix_mlp(states, plan.resolve(7), None, *params, **options)
    grads, expected = (torch.autograd.grad(out.square().sum(), leaves) for out in (run(), plain))
    for actual, wanted in zip(grads, expected, strict=True):
        assert relative_error(actual, wanted) < 1e-4


def test_a_frozen_first_linear_saves_no_row(impl):
    images, tokens, width, hidden = 2, 9, 16, 24
    states, weights, (w1, b1, w2, b2) = make(images, tokens, width, hidden)
    weights, w1, b1 = weights.detach(), w1.detach(), b1.detach()
    run = lambda: ik.layer_mix_mlp(states, IGVA, weights, w1, b1, w2, b2, impl=impl)  # noqa: E731
    assert saved_bytes(run, [weights, w1, b1, w2, b2]) == images * tokens * hidden * 4
    run = lambda: ik.layer_mix_mlp(states, IGVA, weights, w1, b1, w2.detach(), b2, impl=impl)  # noqa: E731
    assert saved_bytes(run, [weights, w1, b1, w2, b2]) == 0


def test_several_rows_of_an_image_save_its_sums_once(impl):
    images, tokens, width, hidden = 1, 9, 16, 24
    states, _, _ = make(images, tokens, width, hidden)
    weights = torch.rand(8, 3, requires_grad=True)
    index = torch.zeros(8, dtype=torch.int64)
    run = lambda: ik.layer_mix(states, IGVA, weights, image_index=index, impl=impl)  # noqa: E731
    assert saved_bytes(run, [weights, index, *states]) <= 3 * images * tokens * width * 4


@pytest.mark.parametrize("frozen", ["weights", "w1", "b1", "w2", "b2"])
def test_only_the_gradients_asked_for_are_computed(impl, frozen):
    states, weights, params = make()
    named = dict(zip(("weights", "w1", "b1", "w2", "b2"), (weights, *params), strict=True))
    named[frozen].requires_grad_(False)
    out = ik.layer_mix_mlp(states, IGVA, named["weights"], *params, impl=impl)
    expected = plain_torch.layer_mix_mlp(states, IGVA, named["weights"], *params)
    leaves = [leaf for name, leaf in named.items() if name != frozen]
    for actual, wanted in zip(
        torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):  # fmt: skip
        assert relative_error(actual, wanted) < 1e-4
    assert named[frozen].grad is None


# ---- import ----


def test_import_needs_torch_only_and_touches_no_driver():
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "PIL", "sentence_transformers", "matplotlib", "rich", "typer"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
before = set(sys.modules)
import igva_kernels
assert not torch.cuda.is_initialized()
assert "triton" not in set(sys.modules) - before, "triton is imported on first use"
igva_kernels.backends()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_torchs_flop_counter_may_be_imported_afterwards():
    script = """
import igva_kernels as ik
import torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    ik.layer_mix_linear([torch.rand(2, 5, 8)], ik.MixPlan.concat([0]), None, torch.rand(4, 8))
assert counter.get_total_flops() == 2 * 2 * 5 * 8 * 4, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_the_compiler_unpacks_as_a_constant_is_a_plain_tuple():
    """Torch 2.11 cannot unpack a named one."""
    assert type(compact(IGVA.code, IGVA.num_states, 7)) is tuple
