"""Strides: every tensor argument of every registered operator, in every layout."""

import pytest
import strides
import torch

import igva_kernels as ik
from igva_kernels.ops.weighted_mix.steps import MixArgs


@pytest.mark.parametrize("layout", strides.LAYOUTS)
@pytest.mark.parametrize("name", strides.REGISTERED)
def test_a_registered_operator_gives_what_it_gives_for_a_dense_copy(quick_impl, name, layout):
    strides.check_registered(name, strides.registered_calls(quick_impl)[name], layout)


@pytest.mark.parametrize("layout", ["column of a matrix", "expanded"])
@pytest.mark.parametrize("name", strides.REGISTERED)
def test_all_arguments_of_a_registered_operator_at_once(impl, name, layout):
    strides.check_registered_at_once(name, strides.registered_calls(impl)[name], layout)


@pytest.mark.parametrize("layout", ["every other", "expanded"])
def test_what_the_kernels_can_read_is_never_copied(layout):
    layers = [strides.LAYOUTS[layout](torch.randn(3, 5, 8)) for _ in range(3)]
    index = torch.tensor([2, 0])
    args = MixArgs(layers, strides.PLAN, torch.rand(2, 2), index, 1)
    assert all(given is read for given, read in zip(layers, args.layers, strict=True))
    assert args.image_index is index


@pytest.mark.parametrize("layout", ["column of a matrix", "two last swapped", "expanded last"])
def test_a_layer_without_adjacent_channels_gets_its_gradient(impl, layout):
    """The copy that the kernels read is none that autograd sees."""
    layer = strides.LAYOUTS[layout](torch.randn(2, 4, 6)).requires_grad_()
    plan = ik.MixPlan.weighted_sum([0], num_states=1)
    out = ik.layer_mix([layer], plan, torch.full((2, 1), 3.0), impl=impl)
    (grad,) = torch.autograd.grad(out.sum(), layer)
    assert torch.equal(grad, torch.full((2, 4, 6), 3.0))
