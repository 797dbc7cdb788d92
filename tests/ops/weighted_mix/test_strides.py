"""Strides, beyond what every operator must do with them."""

import harness
import pytest
import strides
import torch
from recording import registered_calls
from seeds import seeded

import igva_kernels as ik
from igva_kernels import MixPlan
from igva_kernels.ops.weighted_mix.cases import Case
from igva_kernels.ops.weighted_mix.steps import MixArgs

ROWS_KEPT = Case(
    "the mixed row is kept, before its norm", "layer_mix_mlp", MixPlan.igva_uniform(4, 2), 2, 5, 8, 12,
    image_index=(1, 0, 1), activation="gelu", norm_eps=1e-5, trainable_tower=True,
)  # fmt: skip


@pytest.mark.parametrize("layout", strides.LAYOUTS)
def test_a_row_that_is_kept_may_have_any_strides(impl, layout):
    for operator, args in registered_calls(ROWS_KEPT, impl, seeded(), detached=True).items():
        strides.check(operator, args, layout, at_once=harness.INTERPRETED)


@pytest.mark.parametrize("layout", ["every other", "expanded"])
def test_what_the_kernels_can_read_is_never_copied(layout):
    layers = [strides.LAYOUTS[layout](torch.randn(3, 5, 8)) for _ in range(3)]
    index = torch.tensor([2, 0])
    plan = MixPlan.weighted_sum([0, 1], residual=2)
    args = MixArgs(layers, plan, torch.rand(2, 2), index, 1)
    assert all(given is read for given, read in zip(layers, args.layers, strict=True))
    assert args.image_index is index


@pytest.mark.parametrize("layout", ["column of a matrix", "two last swapped", "expanded last"])
def test_a_layer_without_adjacent_channels_gets_its_gradient(impl, layout):
    """Autograd does not see the copy that the kernels read."""
    layer = strides.LAYOUTS[layout](torch.randn(2, 4, 6)).requires_grad_()
    plan = MixPlan.weighted_sum([0], num_states=1)
    out = ik.layer_mix([layer], plan, torch.full((2, 1), 3.0), impl=impl)
    (grad,) = torch.autograd.grad(out.sum(), layer)
    assert torch.equal(grad, torch.full((2, 4, 6), 3.0))
