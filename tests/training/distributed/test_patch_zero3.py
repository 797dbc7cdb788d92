"""Patched models under DeepSpeed ZeRO-3, as people train them: a weight is there in its owner's forward only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["transformers", "research"])
def test_zero3_trains_a_patched_model_as_the_untouched_one(family, tmp_path):
    """Two processes on gloo. Allocators, and the LayerNorms of VipLlava and TGIF, own weights beside the Linears."""
    worker, losses = Path(__file__).with_name("zero3_worker.py"), tmp_path / "losses.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, worker, family, losses], check=True, env=environment, timeout=600)
    for found in json.loads(losses.read_text()).values():
        plain, *others = found.values()
        assert plain[-1] < 0.95 * plain[0]
        for fused in others:
            assert fused == pytest.approx(plain, rel=2e-5)
