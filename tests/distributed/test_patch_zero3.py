"""transformers models, patched, under DeepSpeed ZeRO-3: weights are there in their owner's forward only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")


@pytest.mark.slow
def test_zero3_trains_a_patched_model_as_the_untouched_one(tmp_path):
    """Two processes on gloo; VipLlava's LayerNorm is a second owner of weights."""
    worker, losses = Path(__file__).with_name("zero3_worker.py"), tmp_path / "losses.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, losses]
    subprocess.run(command, check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}, timeout=600)
    for found in json.loads(losses.read_text()).values():
        assert found["never"][-1] < 0.95 * found["never"][0]
        for when in ("before", "after"):
            assert found[when] == pytest.approx(found["never"], rel=2e-5)
