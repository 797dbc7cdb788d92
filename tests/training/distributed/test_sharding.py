"""The recipe in two processes on gloo: DDP, ZeRO and FSDP2 train what one process with the plain connector trains.

Each run has a frozen tower, the balance term, accumulation, clipping, and micro-batches without an image.
"""

import importlib.util
import json
import sys

import pytest
import torch
from recipe import (
    CONFIGS,
    CONNECTORS,
    EXAMPLES,
    arguments,
    assert_same,
    launch,
    make_inputs,
    result,
    run_command,
    run_recipe,
)
from transformers import AutoProcessor

from igva_kernels.models import LlavaIgvaForConditionalGeneration

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install igva-kernels[train]"
)

TRAINED_TOWER = ["--unfreeze_vision_tower"]
ENGINES = {
    "ddp": {},
    "zero2": {"deepspeed": CONFIGS / "zero2.json"},
    "zero3": {"deepspeed": CONFIGS / "zero3.json"},
    "fsdp2": {"fsdp": None, "fsdp_config": CONFIGS / "fsdp2.json"},
}


def engines(slow):
    return [
        pytest.param(
            name, marks=[*([needs_deepspeed] if "zero" in name else []), *([pytest.mark.slow] * (name in slow))]
        )
        for name in ENGINES
    ]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Checkpoint, pictures, samples."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def run_plain(inputs, name, *more, **options):
    """One process, one micro-batch, the plain connector: what every other run must equal."""
    run_recipe(arguments(inputs, inputs / name, *more, impl="reference", **options))
    return result(inputs / name)


def both_connectors(inputs, name, *more, **options):
    """Runs of the native and of the patched connector: per rank and step, four micro-batches of one sample."""
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    return [
        {
            "argv": arguments(inputs, inputs / f"{name}_{kind}", *more, **split, impl=how["impl"], **options),
            "patch": how["patch"],
        }
        for kind, how in CONNECTORS.items()
    ]


def results(inputs, name):
    return [result(inputs / f"{name}_{kind}") for kind in CONNECTORS]


@pytest.fixture(scope="session")
def plain(inputs):
    return run_plain(inputs, "plain")


@pytest.mark.parametrize("engine", engines(slow=("zero2", "zero3", "fsdp2")))
def test_same_losses_and_weights(inputs, plain, engine):
    launch(inputs, both_connectors(inputs, engine, **ENGINES[engine]))
    for trained in results(inputs, engine):
        assert_same(trained, plain)
    saved = inputs / f"{engine}_native"
    assert LlavaIgvaForConditionalGeneration.from_pretrained(saved).config.balance_coefficient == 0.1
    assert AutoProcessor.from_pretrained(saved).chat_template


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["LayerMixLinear", None])
def test_fsdp2_with_other_units(inputs, plain, unit):
    config = json.loads((CONFIGS / "fsdp2.json").read_text())
    config["transformer_layer_cls_to_wrap"].remove("LayerMixProjector")
    config["transformer_layer_cls_to_wrap"] += [unit] if unit else []
    file = inputs / f"fsdp2_{unit}.json"
    file.write_text(json.dumps(config))
    launch(inputs, both_connectors(inputs, f"fsdp2_{unit}", fsdp=None, fsdp_config=file))
    for trained in results(inputs, f"fsdp2_{unit}"):
        assert_same(trained, plain)


@pytest.fixture(scope="session")
def plain_tower(inputs):
    return run_plain(inputs, "plain_tower", *TRAINED_TOWER)


@pytest.mark.parametrize("engine", engines(slow=ENGINES))
def test_bf16_checkpointing_a_trained_tower_and_resumption(inputs, plain, plain_tower, engine):
    """Everything else that is tested of an engine, in one launch, because starting it is slow."""
    name, options = engine, ENGINES[engine]
    saving = {**options, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    saving["per_device_train_batch_size"] = 4
    whole, resumed = inputs / f"{name}_whole", inputs / f"{name}_resumed"
    launch(
        inputs,
        [
            *both_connectors(inputs, f"{name}_bf16", bf16=True, **options),
            *both_connectors(inputs, f"{name}_tower", *TRAINED_TOWER, gradient_checkpointing=True, **options),
            {"argv": arguments(inputs, whole, **saving)},
            {"argv": arguments(inputs, resumed, **saving, resume_from_checkpoint=whole / "checkpoint-2")},
        ],
    )
    for trained in results(inputs, f"{name}_bf16"):
        torch.testing.assert_close(torch.tensor(trained.losses), torch.tensor(plain.losses), rtol=3e-2, atol=0)
    for trained in results(inputs, f"{name}_tower"):
        assert_same(trained, plain_tower)
    first, second = result(whole), result(resumed)
    assert second.losses == first.losses
    assert all(torch.equal(second.weights[key], weight) for key, weight in first.weights.items())


@pytest.mark.slow
def test_accelerate_launch(inputs, plain):
    output = inputs / "accelerate"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / "accelerate.yaml", "--num_processes", 2]
    script = [EXAMPLES / "train_llava_igva.py", *arguments(inputs, output, per_device_train_batch_size=4)]
    run_command([sys.executable, *map(str, (*launcher, *script))])
    assert_same(result(output), plain)
