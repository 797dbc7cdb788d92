"""What ``ik.explain`` tells of the calls inside it."""

import pytest
import torch
from block import IGVA, make

import igva_kernels as ik


def call(impl="auto", grad=False, **options):
    states, weights, params = make(grad=grad)
    return ik.layer_mix_mlp(states, IGVA, weights, *params, impl=impl, **options)


def test_backend_kernels_and_reasons_are_told_also_of_calls_whose_layout_is_known():
    with torch.no_grad():
        call()
        with ik.explain() as routes:
            call()
            call()
    (chosen,) = routes.of("weighted_mix")
    assert chosen.taken == "cpu" and routes.choices[chosen] == 2 and "only one" in chosen.why
    assert [choice.taken for choice in routes.of("products in float32, cpu")] != []
    assert all(what in str(routes) for what in ("weighted_mix: cpu", "products in float32, cpu", "2 x"))
    call()
    assert routes.choices[chosen] == 2  # it has ended


@pytest.mark.filterwarnings("ignore::igva_kernels.FallbackWarning")
def test_what_was_asked_for_and_why_plain_torch_serves_are_told():
    states, weights, _ = make()
    with ik.explain() as outer, ik.explain() as inner:
        call("reference")
        torch.vmap(lambda w: ik.layer_mix(states, IGVA, w))(weights.expand(2, *weights.shape))
    assert outer.choices == inner.choices
    asked, mapped = (choice.why for choice in outer.of("weighted_mix") if choice.taken == "reference")
    assert "impl='reference'" in asked and "vmap" in mapped


def test_a_backward_and_compiled_code_tell_what_their_kernels_choose():
    with ik.explain() as routes:
        call(grad=True).sum().backward()
    forward = sum(routes.choices[choice] for choice in routes.of("products in float32, cpu"))
    assert forward > 2  # two products of the forward, and more of the backward
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), ik.explain() as routes:
        compiled()
    assert routes.of("weighted_mix, cpu: mixed rows")


def test_nothing_called_is_said_so():
    with ik.explain() as routes:
        torch.zeros(2)
    assert str(routes) == "no operator of igva_kernels was called" and routes.of("weighted_mix") == []


@pytest.mark.interpreted
@torch.no_grad()
def test_triton_tells_of_its_products(monkeypatch):
    with ik.explain() as routes:
        call("triton")
    assert [choice.taken for choice in routes.of("products, triton: linear")] != []
    assert routes.of("weighted_mix, triton: first product")[0].why == "the interpreter runs every kernel"
