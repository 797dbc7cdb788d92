"""Calls without gradients whose layout is known: the same result as the long way, and nothing overlooked."""

import gc
import weakref

import pytest
import torch
from block import IGVA, make
from recording import Called, Dispatched
from threads import in_threads
from torch.autograd import forward_ad

import igva_kernels as ik
from igva_kernels.ops.weighted_mix import api, inference
from igva_kernels.runtime import layouts
from igva_kernels.testing import relative_error


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(inference, "_CHECKED", layouts.Layouts())


@pytest.fixture
def long_ways(monkeypatch):
    """What passed the checks, in order."""
    passed, check = [], api.check_mix
    monkeypatch.setattr(api, "check_mix", lambda *args: passed.append(args) or check(*args))
    return passed


def mlp(states, weights, params, impl, **options):
    return ik.layer_mix_mlp(states, IGVA, weights, *params, skip_tokens=1, impl=impl, **options)


CALLS = {
    "mix": lambda states, weights, _, impl: ik.layer_mix(states, IGVA, weights, skip_tokens=1, impl=impl),
    "weights of one row": lambda states, weights, _, impl: ik.layer_mix(states, IGVA, weights[:1], impl=impl),
    "linear": lambda states, weights, params, impl: ik.layer_mix_linear(
        states, IGVA, weights, *params[:2], activation="gelu", impl=impl
    ),
    "mlp": mlp,
    "no bias": lambda states, weights, params, impl: mlp(states, weights, (params[0], None, params[2], None), impl),
    "norm": lambda states, weights, params, impl: mlp(
        states, weights, params, impl, norm=(torch.ones(params[0].shape[1], dtype=params[0].dtype), None, 1e-5)
    ),
    "images by index": lambda states, weights, params, impl: mlp(
        states, weights[:1].expand(3, -1), params, impl, image_index=torch.tensor([1, 0, 1])
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_the_second_call_of_a_layout_has_the_bits_of_the_first_and_is_not_checked_again(name, dtype, impl, long_ways):
    first, second = (make(dtype=dtype) for _ in range(2))
    expected = [CALLS[name](*given, impl) for given in (first, second)]
    seen = len(long_ways)
    again = [CALLS[name](*given, impl) for given in (first, second)]
    assert seen == 1 and len(long_ways) == 1
    for actual, right in zip(again, expected, strict=True):
        assert torch.equal(actual, right) and actual.dtype == right.dtype and actual._version == right._version
    assert torch.equal(expected[0], _the_long_way(CALLS[name], first, impl))


def _the_long_way(call, given, impl):
    with torch.enable_grad():
        return call(*given, impl)


@torch.no_grad()
def test_a_known_layout_hides_no_wrong_argument(quick_impl):
    states, weights, params = make()
    mlp(states, weights, params, quick_impl)
    freed, flat = params[0].clone(), torch.cat([torch.zeros(16), params[0].flatten()])
    part = flat[16:].view_as(params[0])  # as sharded training keeps weights
    mlp(states, weights, (part, *params[1:]), quick_impl)
    for memory in (freed, flat):
        memory.untyped_storage().resize_(0)
    gone = weights.clone()
    gone.untyped_storage().resize_(0)

    def with_first(changed):
        return [states[0], changed, *states[2:]]  # the plan reads no layer 0

    wrong = {
        "hidden_states": [
            *((with_first(x), weights, params) for x in (None, 3, states[1][:, :-1], states[1].double())),
            (states[:-1], weights, params), ("states", weights, params),
        ],
        "mix_weights": [(states, w, params) for w in (weights[:, :-1], None, [0.5], gone)],
        "weight1": [(states, weights, (w, *params[1:])) for w in (params[0][:, :-1], freed, part)],
        "bias2": [(states, weights, (*params[:3], params[3][:-1]))],
    }  # fmt: skip
    for name, calls in wrong.items():
        for given in calls:
            with pytest.raises((ValueError, TypeError), match=name):
                mlp(*given, quick_impl)
    for options, name in (({"activation": "swish"}, "activation"), ({"image_index": torch.zeros(2)}, "image_index")):
        with pytest.raises((ValueError, TypeError), match=name):
            mlp(states, weights, params, quick_impl, **options)
    with pytest.raises(ValueError, match="impl"):
        mlp(states, weights, params, "cudnn")
    ik.layer_mix_linear(states, IGVA, weights, *params[:2], activation="gelu", skip_tokens=1, impl=quick_impl)
    with pytest.raises(TypeError, match="weight2"):  # of another operator, the rest is the same
        mlp(states, weights, (*params[:2], None, None), quick_impl)

    def indexed(*images):
        return mlp(states, weights, params, quick_impl, image_index=torch.tensor(images))

    indexed(0, 1)
    with pytest.raises(ValueError, match="image_index"):  # values are looked at in every call
        indexed(0, 2)


@torch.no_grad()
def test_what_happens_around_a_call_of_a_known_layout_is_noticed(quick_impl, long_ways):
    states, weights, params = make()
    expected = mlp(states, weights, params, quick_impl)

    def call():
        return mlp(states, weights, params, quick_impl)

    for mode in (Called, Dispatched):
        with mode() as around:
            call()
            call()  # by now the layout is known in this mode, too
        assert [func.name() for func, _ in around.calls].count("igva_kernels::projector") == 2, mode.__name__
    with torch.profiler.profile() as profiled:
        call()
    assert any("projector" in event.name for event in profiled.events())
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype == torch.bfloat16
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weights, torch.ones_like(weights))
        for impl, error in ((quick_impl, True), ("auto", False)):
            if error:
                with pytest.raises(NotImplementedError, match="tangent"):
                    mlp(states, dual, params, impl)
            else:
                with torch.enable_grad():
                    assert forward_ad.unpack_dual(mlp(states, dual, params, impl)).tangent is not None
    with torch.enable_grad():
        learned = params[0].clone().requires_grad_()
        mlp(states, weights, (learned, *params[1:]), quick_impl).sum().backward()
    assert learned.grad is not None
    mapped = torch.vmap(lambda w: mlp(states, w, params, "auto"))(weights.expand(2, *weights.shape))
    assert relative_error(mapped[0], expected) < 1e-5
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), expected)
    assert torch.equal(torch.jit.trace(call, (), check_trace=False)(), expected)
    checked = len(long_ways)
    with torch.inference_mode():
        assert call().is_inference()
    assert torch.equal(call(), expected) and len(long_ways) == checked + 1  # inference mode is a layout of its own


@torch.no_grad()
def test_a_tensor_that_is_not_what_its_memory_says_goes_the_long_way(quick_impl):
    states, weights, params = make()
    expected = [mlp(given, weights, params, quick_impl) for given in (states, [-state for state in states])]
    without_bias = mlp(states, weights, (*params[:3], torch.zeros_like(params[3])), quick_impl)
    negative = [torch._neg_view(state) for state in states]
    zero = torch._efficientzerotensor(params[3].shape)
    for _ in range(2):
        assert torch.equal(mlp(negative, weights, params, quick_impl), expected[1])
        assert torch.equal(mlp(states, weights, params, quick_impl), expected[0])
        assert torch.equal(mlp(states, weights, (*params[:3], zero), quick_impl), without_bias)

    class Own(torch.Tensor):
        pass

    own = [state.as_subclass(Own) for state in states]
    assert isinstance(mlp(own, weights, params, quick_impl), Own)


@torch.no_grad()
def test_a_known_layout_keeps_no_tensor_alive(quick_impl):
    states, weights, params = make()
    mlp(states, weights, params, quick_impl)
    known = [weakref.ref(tensor) for tensor in (*states, weights, *params)]
    del states, weights, params
    gc.collect()
    assert not any(ref() is not None for ref in known)


def test_one_layout_too_many_makes_all_forgotten_and_a_torch_without_guards_knows_none(monkeypatch):
    monkeypatch.setattr(layouts, "MOST", 3)
    known = layouts.Layouts()
    keys = [layouts.Key(("constant",), [torch.zeros(n)]) for n in range(1, 5)]
    for key in keys[:3]:
        known.put(key, key)
    assert [known.get(key) is key for key in keys] == [True, True, True, False]
    assert known.get(layouts.Key(("other",), keys[0].tensors)) is None
    assert known.get(layouts.Key(("constant",), [None])) is None
    known.put(keys[3], keys[3])
    assert [known.get(key) is key for key in keys] == [False, False, False, True]
    monkeypatch.setattr(layouts, "_guard", lambda tensors: None)
    known.put(keys[0], keys[0])
    assert known.get(keys[0]) is None


def test_threads_with_layouts_of_their_own_get_their_own_results(quick_impl, monkeypatch):
    monkeypatch.setattr(layouts, "MOST", 4)  # they make each other forget
    given = [make(images=1 + client) for client in range(4)]
    with torch.no_grad():
        expected = [mlp(*each, quick_impl) for each in given]

    @torch.no_grad()
    def run(client):
        return all(torch.equal(mlp(*given[client], quick_impl), expected[client]) for _ in range(50))

    assert all(in_threads(run))
