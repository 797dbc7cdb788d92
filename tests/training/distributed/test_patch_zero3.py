"""Fused models under DeepSpeed ZeRO-3, as people train them: a weight is there in its owner's forward only."""

import json
from pathlib import Path

import pytest
from recipe import torchrun

pytest.importorskip("deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["transformers", "research"])
def test_zero3_trains_a_fused_model_as_the_plain_one(family, tmp_path):
    """Two processes on gloo, patched models and the reference model with a fuser and with injections. Allocators, the
    LayerNorms of VipLlava and TGIF, and a fuser own weights beside the Linears."""
    losses = tmp_path / "losses.json"
    torchrun(Path(__file__).with_name("zero3_worker.py"), family, losses)
    for found in json.loads(losses.read_text()).values():
        plain, *others = found.values()
        assert plain[-1] < 0.95 * plain[0]
        for fused in others:
            assert fused == pytest.approx(plain, rel=2e-5)
