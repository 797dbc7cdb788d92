"""The CUDA kernels of deformable attention, emulated on the CPU: those that keep a head in shared memory, and those
that gather it through the caches, which a card without shared memory would get."""

import deform_corners as corners
import harness
import pytest
import torch
from cuda_tools import emulate, include
from seeds import seeded

from igva_kernels import registry, verify
from igva_kernels.ops.deform_attn import cuda
from igva_kernels.ops.deform_attn.cases import CASES, DeformCase
from igva_kernels.ops.deform_attn.cuda import IMPLEMENTATION
from igva_kernels.ops.deform_attn.geometry import BOXES, IMAGE

pytestmark = pytest.mark.skipif(include() is None, reason="the emulation needs the headers of a CUDA toolkit")

RESIDENT, GATHERED = 227 << 10, 0
"""Bytes of shared memory."""
SMALL = [case for case in CASES if not case.is_large]


@pytest.fixture(autouse=True)
def module(monkeypatch):
    yield emulate(monkeypatch)
    registry.choose.cache_clear()


@pytest.fixture
def card(monkeypatch):
    """Sets what the card has."""

    def card(shared, multiprocessors=132):
        monkeypatch.setenv("IGVA_EMULATION_SHARED", str(shared))
        monkeypatch.setenv("IGVA_EMULATION_MULTIPROCESSORS", str(multiprocessors))

    return card


@pytest.mark.parametrize("dtype", verify.DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_values_and_every_gradient_obey_the_error_rule(case, dtype):
    harness.assert_right(case, dtype, "cuda", "cpu", seeded())


@pytest.mark.parametrize(("case", "dtype"), [*zip(SMALL, [*verify.DTYPES] * 2, strict=False)])
def test_what_is_gathered_through_the_caches_obeys_the_error_rule(case, dtype, card):
    card(GATHERED)
    harness.assert_right(case, dtype, "cuda", "cpu", seeded())


@pytest.mark.parametrize("shared", [RESIDENT, GATHERED])
@pytest.mark.parametrize("corner", corners.CORNERS, ids=lambda corner: corner.__name__)
def test_corners(corner, shared, card):
    card(shared)
    corner("cuda", IMPLEMENTATION, "cpu")


LONG = DeformCase("several slices of several passes", 1, ((14, 14),), 1, 8, 1)
WIDE = DeformCase("heads of more than 128 bytes", 1, ((3, 3), (3, 3)), 1, 72, 2)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_a_block_may_own_many_queries_or_few_and_several_levels_or_one(multiprocessors, card):
    card(RESIDENT, multiprocessors)
    harness.assert_right(LONG, "bf16", "cuda", "cpu", seeded())
    harness.assert_right(WIDE, "bf16", "cuda", "cpu", seeded())


def test_a_head_that_does_not_fit_as_a_whole_is_cut_into_narrower_parts(card, module, monkeypatch):
    fits, levels_grad = [], module.levels_grad
    monkeypatch.setattr(module, "levels_grad", lambda *args: fits.append(levels_grad(*args)) or fits[-1])
    for shared, does_fit in ((1600, True), (1300, True), (1000, True), (900, False)):  # rows of 96, 64 and 32 bytes
        card(shared)
        harness.assert_right(WIDE, "fp32", "cuda", "cpu", seeded())
        assert fits.pop() == does_fit


def test_few_images_at_a_time_have_the_same_gradients(card, monkeypatch):
    card(GATHERED)
    case = DeformCase("", 3, ((2, 3), (3, 2)), 2, 8, 2, BOXES, 4)
    inputs = case.draw(seeded(), torch.float32, "cpu")
    at_once = case.run(inputs, "cuda")
    monkeypatch.setattr(cuda, "POINTS_AT_A_TIME", 1)
    one_by_one = case.run(inputs, "cuda")
    assert all(torch.equal(one_by_one[name], result) for name, result in at_once.items())


@pytest.mark.parametrize("shared", [RESIDENT, GATHERED])
def test_the_order_in_which_threads_run_changes_no_bit(shared, card, monkeypatch):
    card(shared)
    case = DeformCase("", 1, ((5, 4), (3, 4)), 2, 16, 3, IMAGE, 40)
    inputs = case.draw(seeded(), torch.bfloat16, "cpu")
    in_order = case.run(inputs, "cuda")
    for seed in ("1", "2"):
        monkeypatch.setenv("IGVA_EMULATION_SEED", seed)
        assert all(torch.equal(result, in_order[name]) for name, result in case.run(inputs, "cuda").items())


def test_more_levels_than_a_kernel_has_parameters_for_are_refused_or_left_to_others():
    case = DeformCase("", 1, ((1, 1),) * (cuda.MAX_LEVELS + 1), 1, 8, 1)
    inputs = case.draw(seeded(), torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match="at most 64 levels, not 65"):
        case.run(inputs, "cuda")
    assert case.run(inputs, "auto").keys() == case.run(inputs, "reference").keys()
    count, places = len(case.shapes), (inputs.sampling.flatten(3, 4), inputs.logits.flatten(3, 4), None)
    direct = torch.ops.igva_kernels.deform_attn
    with pytest.raises(NotImplementedError, match="at most 64 levels, not 65"):
        direct(inputs.value, *places, [1] * 2 * count, [1] * count, "grid", True, "cuda")
