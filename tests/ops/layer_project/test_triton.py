"""The products of several members in one launch, in the interpreter: the bits of members apart, and when they share."""

from dataclasses import replace

import pytest
import torch
from bank import IGVA, LINEARS, MEAN, TAPS, make, member_by_member, trained
from recording import Dispatched

pytest.importorskip("triton")

import igva_kernels as ik
from igva_kernels.ops.layer_project import triton as kernels
from igva_kernels.ops.weighted_mix import triton as weighted_mix
from igva_kernels.runtime.config import GemmConfig, shipped
from igva_kernels.runtime.triton import dense

pytestmark = pytest.mark.interpreted


@pytest.fixture
def launches(monkeypatch):
    """The number of members of each shared launch."""
    seen, launch = [], kernels.launch

    def count(*args, **constants):
        seen.append(constants["MEMBERS"])
        launch(*args, **constants)

    monkeypatch.setattr(kernels, "launch", count)
    return seen


@pytest.mark.parametrize("change", ["own weights", "shared weights", "no bias", "norms", "one Linear", "no gradient"])
def test_members_in_one_launch_compute_what_they_compute_apart(change, launches):
    args = make((IGVA, TAPS, IGVA), norms=change == "norms", tokens=41, hidden=40)
    if change == "shared weights":
        args |= {name: args[name][0] for name in LINEARS}
    elif change == "no bias":
        args |= {"bias1": None, "bias2": None}
    elif change == "one Linear":
        args |= {"weight2": None, "bias2": None}
    leaves = [] if change == "no gradient" else trained(args)
    with torch.set_grad_enabled(bool(leaves)):
        out = ik.layer_project(**args, impl="triton")
        assert launches == ([3] if change == "one Linear" else [3, 3])
        expected = ik.layer_project(**args, impl="reference")
    torch.testing.assert_close(out, expected)
    if leaves:
        grad = torch.randn_like(out)
        actual, wanted = (torch.autograd.grad(result, leaves, grad) for result in (out, expected))
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plans", [(IGVA,), (IGVA, MEAN)], ids=["one", "rows of two widths"])
def test_members_of_which_none_is_like_the_others_are_launched_apart(plans, launches):
    args = make(plans)
    out, expected = ik.layer_project(**args, impl="triton"), member_by_member(args, impl="triton")
    assert not launches
    assert all(map(torch.equal, out, expected))


def test_a_member_that_fills_the_card_has_a_launch_of_its_own(launches, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_WAVES", 0.0)
    ik.layer_project(**make((IGVA, TAPS)), impl="triton")
    assert not launches


@pytest.mark.parametrize(("efficiency", "tma", "shared"), [(None, False, 0), (0.95, True, 0), (0.95, False, 3)])
def test_only_a_tile_that_was_measured_by_pointers_is_shared_on_a_card(efficiency, tma, shared, launches, monkeypatch):
    tile = GemmConfig(128, 128, 64, 8, 3, 1, tma, efficiency)
    card = replace(shipped("sm_90"), gemms={"linear": (tile,), "weighted_mix.mix_linear": (tile,)})
    for module in (kernels, dense, weighted_mix):
        monkeypatch.setattr(module, "config_of", lambda tensor: card)
    args = make((IGVA, TAPS, IGVA), tokens=129, width=64, hidden=64, dtype=torch.bfloat16)
    with torch.no_grad():
        ik.layer_project(**args, impl="triton")
    assert launches == [shared] * (2 if shared else 0)


def test_the_backward_of_members_in_one_launch_is_that_of_each(launches):
    args = make((IGVA, TAPS))
    out = ik.layer_project(**args, impl="triton")
    with Dispatched() as seen:
        out.sum().backward()
    assert launches == [2, 2]
    assert seen.ours == ["projector_backward"] * 2
