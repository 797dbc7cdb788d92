"""The recipe of ``examples`` on a handful of drawn pictures, for the tests of training."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import draw_shapes
import pytest
import shapes_model
import torch
import train_llava_igva
from torch import Tensor

import igva_kernels as ik
from igva_kernels.models import LlavaIgvaForConditionalGeneration

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"
HELPERS = Path(__file__).parent
WORKER = HELPERS.parent / "training" / "distributed" / "worker.py"
CONNECTORS = {"native": {"impl": "auto", "patch": False}, "patched": {"impl": "reference", "patch": True}}
"""What must train as the plain connector does, ``impl="reference"``."""


class Result(NamedTuple):
    """What a run left behind."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def make_inputs(folder: Path) -> None:
    """A checkpoint, and samples of which every third has no image: some micro-batches have none at all."""
    draw_shapes.write_dataset(folder, pictures=12, held_out=1)
    samples = json.loads((folder / "train.json").read_text())
    for sample in samples[::3] + samples[1:13:3]:
        del sample["image"]
        question = sample["conversations"][0]
        question["value"] = question["value"].removeprefix("<image>\n")
    (folder / "mixed.json").write_text(json.dumps(samples))
    shapes_model.save_checkpoint(folder / "base", vision_dim=16, text_dim=32, text_layers=2)


def arguments(inputs: Path, output: Path, *more: str, **options: Any) -> list[str]:
    """The recipe's command line: eight samples and four steps of SGD, whatever the number of processes.

    An option that is None is a flag.
    """
    given = {
        "model_name_or_path": inputs / "base",
        "data_path": inputs / "mixed.json",
        "image_folder": inputs / "images",
        "sentence_embeds": inputs / "embeds.safetensors",
        "version": "checkpoint",
        "balance_coefficient": 0.1,
        "output_dir": output,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    pairs = [[f"--{name}"] if value is None else [f"--{name}", str(value)] for name, value in given.items()]
    return [*(word for pair in pairs for word in pair), "--use_cpu", *more]


def run_recipe(argv: list[str], patch: bool = False) -> None:
    """Run the recipe in this process; with ``patch`` its model is patched as soon as it is loaded."""
    load = train_llava_igva.load_model

    def load_patched(args: train_llava_igva.ModelArguments) -> torch.nn.Module:
        model = load(args)
        ik.patch(model)
        return model

    train_llava_igva.load_model = load_patched if patch else load
    try:
        train_llava_igva.main(argv)
    finally:
        train_llava_igva.load_model = load


def result(output: Path) -> Result:
    """Read what a run left behind."""
    log = [entry for entry in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    return Result(
        [entry["loss"] for entry in log],
        [entry["grad_norm"] for entry in log],
        weights(output),
    )


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint as the model names them: under ZeRO-3, transformers saves them without renaming."""
    model, loading = LlavaIgvaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    return model.state_dict()


def launch(folder: Path, runs: list[dict[str, Any]], processes: int = 2) -> None:
    """Do the runs in the processes of one launch of ``worker.py``."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    torchrun(WORKER, file, processes=processes)


def torchrun(script: Path, *arguments: str | Path, processes: int = 2) -> None:
    """Run a script in processes that find each other."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    run_command([sys.executable, *launcher, script, *arguments])


def run_command(command: list[str | Path], timeout: float = 600) -> None:
    """A subprocess that must succeed; what it wrote is in the error if it does not.

    A rank that waits for ever ends after ``timeout`` seconds.
    """
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        written, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # A launcher that is killed outright leaves its ranks behind, each with a core and locks.
        try:
            written, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            written, _ = process.communicate()
        pytest.fail(f"{command} had not ended after {timeout} s. It wrote:\n{written}")
    assert process.returncode == 0, written


def environment() -> dict[str, str]:
    """For processes of the recipe: where its modules are, and one thread each."""
    path = os.pathsep.join([str(EXAMPLES), str(HELPERS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def assert_same(actual: Result, expected: Result, tolerance: float = 2e-5) -> None:
    """Losses, gradient norms and every weight agree within rounding."""
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(torch.tensor(actual.losses), torch.tensor(expected.losses), **close)
    torch.testing.assert_close(torch.tensor(actual.grad_norms), torch.tensor(expected.grad_norms), **close)
    assert actual.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(actual.weights[name], weight, **close, msg=lambda text, name=name: f"{name}: {text}")
