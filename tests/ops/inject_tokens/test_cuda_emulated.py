"""The CUDA kernels of the injection, emulated on the CPU, in the cases and the corners of every GPU backend."""

import harness
import injection_corners as corners
import pytest
import strides
import torch
from cuda_tools import emulate, include
from recording import registered_calls
from seeds import seeded

import igva_kernels as ik
from igva_kernels import registry, verify
from igva_kernels.ops.inject_tokens.cases import CASES, InjectionCase
from igva_kernels.ops.inject_tokens.cuda import IMPLEMENTATION

pytestmark = pytest.mark.skipif(include() is None, reason="the emulation needs the headers of a CUDA toolkit")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulate(monkeypatch)
    yield
    registry.choose.cache_clear()


@pytest.mark.parametrize("dtype", verify.DTYPES)
@pytest.mark.parametrize("case", [case for case in CASES if not case.is_large], ids=lambda case: case.name)
def test_values_and_every_gradient_obey_the_error_rule(case, dtype):
    harness.assert_right(case, dtype, "cuda", "cpu", seeded())


def test_a_row_longer_than_a_block_of_threads_and_its_gate_obey_the_error_rule():
    case = InjectionCase("several vectors per thread", 1, 3, 4608, 3, gate="rows", in_order=False)
    harness.assert_right(case, "bf16", "cuda", "cpu", seeded())


@pytest.mark.parametrize("corner", corners.CORNERS, ids=lambda corner: corner.__name__)
def test_corners(corner):
    corner("cuda", IMPLEMENTATION, "cpu")


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_fp64_is_added_in_fp64(mode):
    case = InjectionCase("", 2, 5, 6, 4, gate="rows", mode=mode, in_order=False)
    inputs = case.draw(seeded(), torch.float32, "cpu").double()
    expected = case.run(inputs, "reference")
    for name, actual in case.run(inputs, "cuda").items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("layout", strides.LAYOUTS)
def test_a_registered_operator_gives_what_it_gives_for_a_dense_copy(layout):
    case = InjectionCase("", 2, 5, 24, 6, gate="rows", mode="replace", in_order=False)
    for operator, args in registered_calls(case, "cuda", seeded(), detached=True).items():
        strides.check(operator, args, layout, at_once=True)


def test_two_runs_give_the_same_bits():
    inputs = CASES[1].draw(seeded(), torch.bfloat16, "cpu")
    first, again = (CASES[1].run(inputs, "cuda") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert ik.inject_tokens(*inputs[:3], impl="cuda").dtype == torch.bfloat16
