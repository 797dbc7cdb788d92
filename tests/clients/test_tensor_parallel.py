"""torch's tensor parallelism in two processes: on the projector's Linears, and as transformers plans it for Llama."""

import json
from pathlib import Path

import pytest
from recipe import torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of both ranks, ``{case: outcome}``."""
    file = tmp_path_factory.mktemp("parallel") / "outcomes.json"
    torchrun(Path(__file__).with_name("tensor_parallel.py"), file)
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("kind", "first"), [("plain", ""), ("patched", "patch"), ("patched", "parallel"), ("reference", "")]
)
def test_a_projector_of_two_ranks_computes_loss_and_gradients_of_one(kind, first, client_row, outcomes):
    client_row("tensor parallelism: projector", kind)
    assert [outcome[f"projector {kind} {first}"] for outcome in outcomes] == ["same", "same"]


@pytest.mark.parametrize("kind", ["plain", "patched", "reference"])
def test_a_language_model_of_two_ranks_answers_as_one(kind, client_row, outcomes):
    client_row("tensor parallelism: tp_plan", kind)
    assert [outcome[f"language model {kind}"] for outcome in outcomes] == ["same", "same"]
