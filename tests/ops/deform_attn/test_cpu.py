"""The C++ kernels of deformable attention on every instruction set of this machine."""

import deform_corners as corners
import harness
import pytest
import strides
import torch
from cpu_kernels import DTYPES, needs_module, within_rule
from seeds import seeded

from igva_kernels.ops.deform_attn.cases import CASES, DeformCase
from igva_kernels.ops.deform_attn.cpu import IMPLEMENTATION
from igva_kernels.ops.deform_attn.geometry import BOXES, GRID, IMAGE, POINTS, Geometry
from igva_kernels.testing import SPECIFICATION

pytestmark = needs_module


def assert_same(actual, expected):
    for name, right in expected.items():
        assert torch.equal(actual[name], right), name


@pytest.mark.parametrize("corner", corners.CORNERS, ids=lambda corner: corner.__name__)
def test_corners(isa, corner):
    corner("cpu", IMPLEMENTATION, "cpu")


@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: case.name)
def test_values_and_every_gradient_obey_the_error_rule(isa, case):
    harness.assert_right(case, "bf16", "cpu", "cpu", seeded())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(isa, dtype, restored_threads):
    """One, as many as there are heads or levels, and more than there is work for."""
    for case in (CASES[1], DeformCase("a head for many threads", 1, ((6, 7),), 1, 40, 3)):
        inputs = case.draw(seeded(), dtype, "cpu")
        torch.set_num_threads(1)
        expected = case.run(inputs, "cpu")
        for threads in (2, 3, 7, 64):
            torch.set_num_threads(threads)
            assert_same(case.run(inputs, "cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_levels_are_written_wholly_and_nothing_beside_them(isa, dtype):
    case = DeformCase("", 2, ((2, 3), (4, 1)), 2, 19, (2, 0), IMAGE, 5)
    inputs = case.draw(seeded(), dtype, "cpu")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [tensor.flatten(2).to(wide) for tensor in (inputs.sampling, inputs.logits)]
    around = [torch.full([n + 2 for n in level.shape], 7.0, dtype=dtype) for level in inputs.value]
    within = [level[1:-1, 1:-1, 1:-1, 1:-1].fill_(float("nan")) for level in around]
    geometry = Geometry(case.shapes, case.counts, case.reference, case.softmax)
    IMPLEMENTATION.attend_grad(inputs.grad_out, inputs.value, *rows, None, geometry, within, (True, True), False)
    expected = case.run(inputs, "cpu")
    for level, grad in enumerate(within):
        assert torch.equal(grad, expected[f"grad value {level}"])
        grad.fill_(7.0)
        assert (around[level] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_calls_obey_the_error_rule_in_any_layout(isa, dtype, restored_threads):
    """Any levels, points, heads and widths, forward and every gradient; `make sanitize` looks at the memory."""
    generator = torch.Generator().manual_seed(seeded())

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for number in range(8):
        levels, origin = pick(1, 2, 3, 5), pick(GRID, IMAGE, POINTS, BOXES)
        shapes = tuple((pick(1, 2, 3, 5), pick(1, 2, 4, 7)) for _ in range(levels))
        if origin == GRID:
            shapes = (shapes[0], *(pick(shapes[0], shapes[0][::-1]) for _ in shapes[1:]))
        points = pick(1, 2, 5, 18, tuple(pick(0, 1, 3) for _ in shapes))
        case = DeformCase(
            "random", pick(1, 2, 3), shapes, pick(1, 2, 5), pick(1, 3, 8, 17, 40, 64), points, origin,
            None if origin == GRID else pick(1, 4, 9), pick(True, False), pick(True, False),
        )  # fmt: skip
        torch.set_num_threads(pick(1, 2, 5))
        once = dtype != torch.float16  # small gradients are subnormal there, which round more coarsely
        layouts = [strides.LAYOUTS[pick(*list(strides.LAYOUTS)[:5])] for _ in range(5)]
        for i, judge in enumerate(within_rule(dtype)):
            inputs = case.draw(seeded(1000 * number + i), torch.float32 if dtype == torch.float64 else dtype, "cpu")
            inputs = inputs.double() if dtype == torch.float64 else inputs
            oracle, plain = case.run(inputs.double(), SPECIFICATION), case.run(inputs, "reference")
            moved = inputs._replace(
                value=[layouts[0](level) for level in inputs.value], sampling=layouts[1](inputs.sampling),
                logits=layouts[2](inputs.logits), grad_out=layouts[4](inputs.grad_out),
                reference=None if inputs.reference is None else layouts[3](inputs.reference),
            )  # fmt: skip
            for name, actual in case.run(moved, "cpu").items():
                judge.add(actual, oracle[name], plain[name], f"{case}: {name}", rounded_once=once)
