"""The Triton kernels of the injection in the interpreter; ``test_every_operator`` has its cases."""

import harness
import injection_corners as corners
import pytest
import torch
from seeds import seeded

from igva_kernels.ops.inject_tokens.cases import InjectionCase
from igva_kernels.ops.inject_tokens.positions import positions

pytest.importorskip("triton")

from igva_kernels.ops.inject_tokens.triton import IMPLEMENTATION

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("corner", corners.CORNERS, ids=lambda corner: corner.__name__)
def test_corners(corner):
    corner("triton", IMPLEMENTATION, "cpu")


@pytest.mark.parametrize("width", [1, 2056, 2304])
def test_widths_that_no_tile_divides_obey_the_error_rule(width):
    case = InjectionCase("", 1, 4, width, 3, gate="rows", in_order=False)
    harness.assert_right(case, "bf16", "triton", "cpu", seeded())


def test_positions_name_the_one_token_that_takes_a_row():
    rows = torch.tensor([[-1, 2, 5, -7], [0, 2, 1, 9]], dtype=torch.int32)
    assert positions(rows, 5).tolist() == [4, 6, -2, -1, -1]
    assert positions(rows, 0).shape == (0,)
