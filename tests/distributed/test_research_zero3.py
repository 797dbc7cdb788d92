"""Models of the research repositories under DeepSpeed ZeRO-3, with which their scripts train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")


@pytest.mark.slow
def test_zero3_trains_a_patched_model_as_the_untouched_one(tmp_path):
    """Two processes on gloo; the allocators, and TGIF's LayerNorm, own weights beside the projector's Linears."""
    worker, losses = Path(__file__).with_name("research_zero3_worker.py"), tmp_path / "losses.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, losses]
    subprocess.run(command, check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}, timeout=600)
    for found in json.loads(losses.read_text()).values():
        plain, *others = found.values()
        assert plain[-1] < 0.95 * plain[0]
        for fused in others:
            assert fused == pytest.approx(plain, rel=2e-5)
