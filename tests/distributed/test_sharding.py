"""The recipe in two processes on gloo: DDP, ZeRO and FSDP2 train what one process with the plain connector trains.

Each run has a frozen tower, the balance term, accumulation, clipping, and micro-batches without an image.
"""

import importlib.util
from pathlib import Path

import pytest
from recipe import CONFIGS, arguments, assert_same, launch, make_inputs, result
from transformers import AutoProcessor

from igva_kernels.models import LlavaIgvaForConditionalGeneration

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install igva-kernels[train]"
)

CONNECTORS = {"native": {"impl": "auto", "patch": False}, "patched": {"impl": "reference", "patch": True}}
TWO_RANKS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Checkpoint, pictures, samples."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def plain(inputs):
    """One process, one micro-batch, the plain connector: what every other run must equal."""
    output = inputs / "plain"
    launch(inputs, [{"argv": arguments(inputs, output, impl="reference"), "patch": False}], processes=1)
    return result(output)


def run_two(inputs: Path, name: str, *more: str, **options):
    """Both connectors in two processes."""
    runs = [
        {
            "argv": arguments(inputs, inputs / f"{name}_{kind}", *more, impl=how["impl"], **TWO_RANKS, **options),
            "patch": how["patch"],
        }
        for kind, how in CONNECTORS.items()
    ]
    launch(inputs, runs)
    return [result(inputs / f"{name}_{kind}") for kind in CONNECTORS]


def test_ddp(inputs, plain):
    for trained in run_two(inputs, "ddp"):
        assert_same(trained, plain)


@needs_deepspeed
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero(inputs, plain, stage):
    for trained in run_two(inputs, f"zero{stage}", deepspeed=CONFIGS / f"zero{stage}.json"):
        assert_same(trained, plain)
    model = LlavaIgvaForConditionalGeneration.from_pretrained(inputs / f"zero{stage}_native")
    assert model.config.balance_coefficient == 0.1
    assert AutoProcessor.from_pretrained(inputs / f"zero{stage}_native").chat_template
