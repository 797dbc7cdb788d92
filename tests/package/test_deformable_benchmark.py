"""The benchmark of deformable attention at tiny sizes: whatever it times gives the results of the published code."""

import pytest
import torch

pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
from benchmarks import deformable

MAPS = ((5, 6), (2, 3))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    for name, value in {"GRID": (3, 3), "HEADS": 2, "WIDTH": 32}.items():
        monkeypatch.setattr(deformable, name, value)


@pytest.mark.plain_memory
def test_every_part_agrees_with_the_published_code_and_has_a_line(restored_threads):
    torch.set_num_threads(1)  # such small work is not worth waiting for others
    rows = [*deformable.core(1, [2]), *deformable.block(1, [2])]
    rows += [*deformable.layers(1, MAPS, MAPS), *deformable.encoder(1, MAPS)]
    assert len(rows) == 2 * (4 + 2 + 3 + 1)
    assert all(row.plain > 0 and row.ours > 0 for row in rows)
    lines = [*deformable.lines(rows)]
    assert len(lines) == len(rows) + 3 and {line.count("|") for line in lines[:-1]} == {6}


def test_results_that_differ_are_not_timed():
    case = deformable.DeformCase("", 1, ((3, 3),), 2, 4)
    pair = [lambda seed=seed: case.draw(seed, torch.float32, "cpu").value for seed in (0, 1)]
    with pytest.raises(AssertionError, match="a pair: the results differ by"):
        deformable.compare("a pair", pair, 1)
