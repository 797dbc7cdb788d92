"""One graph for all batch sizes: torch.compile's graphs are counted, not only the answers compared."""

import block
import pytest
import torch
from hosts import host_model
from tiny import igva_model
from torch._dynamo.testing import CompileCounterWithBackend

import igva_kernels as ik
from igva_kernels import MixPlan
from igva_kernels.nn import LayerMixProjector

pytestmark = pytest.mark.plain_memory

SIZES = (4, 2, 7, 4)
"""The first is the size of no other dimension, because torch.compile takes those of equal size for one."""


def assert_one_graph(call, draw, dynamic, backend="eager"):
    """``call`` on random arguments of every size, as it is and compiled; with backwards where an output has one."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter)
    for size in SIZES:
        args = draw(size)
        expected, actual = call(*args), compiled(*args)
        torch.testing.assert_close(actual, expected)
        if actual.requires_grad:
            actual.sum().backward()
    # By default the first size is a constant, and the second one says that it is none.
    assert counter.frame_count == (1 if dynamic else 2)


def draw(size):
    states, weights, params = block.make(images=size, grad=True)
    return states, weights, *params


def from_outside(h, w, *params, impl):
    return ik.layer_mix_mlp(h, block.IGVA, w, *params, skip_tokens=1, impl=impl)


def made_while_tracing(h, w, *params, impl):
    return ik.layer_mix_mlp(h, MixPlan.igva(6, 3), w, *params, skip_tokens=1, impl=impl)


def of_entries(h, w, *params, impl):
    plan = MixPlan([[(1, 0, 0.3), (-2, 2, 0.7)], [(4, None, 0.9)]])
    index = torch.arange(2 * len(w)) // 2
    return ik.layer_mix_linear(h, plan, torch.cat([w, w]), *params[:2], image_index=index, impl=impl)


def derived(h, w, *_, impl):
    sources, plan = MixPlan.igva(6, 3).reduced()
    return ik.layer_mix(ik.layer_mix(h, sources, impl=impl).split(8, -1), plan, w, impl=impl)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("function", [from_outside, made_while_tracing, of_entries, derived])
def test_functions(function, impl):
    assert_one_graph(lambda *args: function(*args, impl=impl), draw, dynamic=True)


@pytest.mark.parametrize("dynamic", [True, None])
def test_forward_and_backward(dynamic):
    call = lambda *args: made_while_tracing(*args, impl="auto")  # noqa: E731
    assert_one_graph(call, draw, dynamic, backend="aot_eager")


def test_a_batch_of_as_many_rows_as_the_plan_has_columns():
    states, weights, params = block.make(images=3)
    compiled = torch.compile(made_while_tracing, fullgraph=True, dynamic=True, backend="eager")
    expected = made_while_tracing(states, weights, *params, impl="auto")
    torch.testing.assert_close(compiled(states, weights, *params, impl="auto"), expected)


@pytest.mark.parametrize("dynamic", [True, None])
def test_the_projector(dynamic):
    projector = LayerMixProjector(block.IGVA, 8, 12, layernorm_eps=1e-5, skip_tokens=1)
    assert_one_graph(lambda *args: projector(*args), lambda size: draw(size)[:2], dynamic)


def test_the_projector_of_the_reference_model():
    projector = igva_model(impl="auto").model.multi_modal_projector
    call = lambda *args: projector(*args)  # noqa: E731
    assert_one_graph(call, lambda size: ([torch.randn(size, 5, 16) for _ in range(5)], torch.rand(size, 2)), True)


def test_a_patched_projector():
    model = host_model("Llava", -2)
    with ik.patch(model):
        call = lambda rows: model.model.multi_modal_projector(rows)  # noqa: E731
        assert_one_graph(call, lambda size: (torch.randn(size, 16, 16),), dynamic=True)


@pytest.mark.parametrize("dynamic", [True, pytest.param(None, marks=pytest.mark.slow)])
def test_a_patched_model_makes_its_plan_in_every_call(dynamic):
    """VipLlava, because Llava's own method splits its images into as many tensors, which need as many graphs."""
    model, images = host_model("VipLlava", [-2, -3]), lambda size: (torch.randn(size, 3, 56, 56),)
    with ik.patch(model):
        call = lambda images: model.model.get_image_features(images).pooler_output  # noqa: E731
        call(*images(1))  # transformers installs its hooks at the first call
        assert_one_graph(call, images, dynamic)
