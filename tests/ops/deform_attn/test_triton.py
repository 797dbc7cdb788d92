"""The Triton kernels of deformable attention in the interpreter; ``test_every_operator`` has its cases."""

import deform_corners as corners
import harness
import pytest
import torch
from seeds import seeded

import igva_kernels as ik
from igva_kernels.ops.deform_attn.cases import DeformCase
from igva_kernels.ops.deform_attn.geometry import BOXES, POINTS

pytest.importorskip("triton")

from igva_kernels.ops.deform_attn import triton as module

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("corner", corners.CORNERS, ids=lambda corner: corner.__name__)
def test_corners(corner):
    corner("triton", module.IMPLEMENTATION, "cpu")


def test_a_head_of_several_tiles_obeys_the_error_rule():
    case = DeformCase("", 1, ((3, 5), (2, 4)), 2, 257, 2, POINTS, 9)
    harness.assert_right(case, "bf16", "triton", "cpu", seeded())


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("grad_size", [2.0**-100, 2.0**100])
def test_the_integers_hold_gradients_and_weights_of_any_size(grad_size, softmax):
    case = DeformCase("", 1, ((4, 4),), 2, 4, 2, softmax=softmax)
    inputs = case.draw(seeded(), torch.float32, "cpu")
    weight_size = 1 if softmax else 2.0**-20 / grad_size
    sized = inputs._replace(grad_out=inputs.grad_out * grad_size, logits=inputs.logits * weight_size)
    (found,), (expected,) = (case.run(each, "triton", ["grad value 0"]).values() for each in (sized, inputs))
    assert torch.equal(found, expected * (grad_size * weight_size))


def test_the_sum_over_all_queries_fits_into_the_integers():
    queries, position = 64, torch.zeros(1, 64, 1, 1, 1, 2)
    value, largest = torch.zeros(1, 4, 1, 1, requires_grad=True), torch.finfo(torch.float32).max / 64
    for softmax in (True, False):
        weight = torch.ones(position.shape[:-1])
        out = ik.deform_attn(
            value, [(2, 2)], position + 0.25, weight, reference=None, softmax=softmax, impl="triton"
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out, value, torch.full_like(out, largest))
        assert grad.flatten().tolist() == [queries * largest, 0, 0, 0]


def test_the_gradients_of_levels_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    case = DeformCase("", 2, ((2, 3), (4, 1), (1, 5)), 1, 4, (2, 0, 1), BOXES, 4)
    inputs, asked = case.draw(seeded(), torch.float32, "cpu"), [f"grad value {level}" for level in range(3)]
    together = case.run(inputs, "triton", asked)
    monkeypatch.setattr(module, "_SCRATCH_BYTES", 0)
    for name, grad in case.run(inputs, "triton", asked).items():
        assert torch.equal(grad, together[name]), name


def test_the_integers_of_the_gradients_take_their_limit_or_one_level():
    assert [*module._groups([4, 5, 6, 30, 1], 2**21)] == [slice(0, 3), slice(3, 4), slice(4, 5)]
