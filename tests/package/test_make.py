"""What `make` says and writes: steps, what an environment costs, how to leave CUDA out of it, what works with what."""

import importlib.util
import re
import sys
from pathlib import Path

import compatibility
import pytest

FILE = Path(__file__).parents[2] / "tools" / "steps.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="not a source tree")


@pytest.fixture
def steps(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("steps", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TIMES", tmp_path / "build" / "steps.txt")
    monkeypatch.setenv("MAKE_STARTED", "1")
    return module


def test_the_summary_has_the_steps_of_this_make_only(steps, capsys, monkeypatch):
    steps.run("an earlier one", [sys.executable, "-c", ""])
    monkeypatch.setenv("MAKE_STARTED", "2")
    for what in ("lint", "the tests"):
        steps.run(what, [sys.executable, "-c", ""])
    capsys.readouterr()
    steps.summary()
    assert re.fullmatch(r"time: lint \d s, the tests \d s\n", capsys.readouterr().out)
    assert (steps.duration(59.4), steps.duration(59.6), steps.duration(125)) == ("59 s", "1 min 0 s", "2 min 5 s")


def test_a_step_that_fails_ends_with_its_status(steps, capsys):
    steps.run("lint", [sys.executable, "-c", ""])
    with pytest.raises(SystemExit) as stop:
        steps.run("tests", [sys.executable, "-c", "raise SystemExit(3)"])
    assert stop.value.code == 3
    told = capsys.readouterr().out
    assert re.search(r"tests: FAILED after \d s", told) and re.search(r"time: lint \d s\n$", told)


@pytest.mark.parametrize(
    ("system", "cpu", "card", "said"),
    [
        ("Linux", False, None, "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"),
        ("Linux", False, "/bin/nvidia-smi", "adds about 3 GB of CUDA packages to that"),
        ("Linux", True, None, None),
        ("Darwin", False, None, None),
    ],
)
def test_the_way_around_cuda_is_told_where_it_helps(steps, capsys, monkeypatch, system, cpu, card, said):
    monkeypatch.setattr(steps.platform, "system", lambda: system)
    monkeypatch.setattr(steps.shutil, "which", lambda name: card)
    monkeypatch.setattr(steps, "torch_for_cpus", lambda: cpu)
    monkeypatch.setenv("MAKE_GOAL", "demo")
    steps.announce(Path(".venv-demo"), (630, 2200))
    told = capsys.readouterr().out
    assert ".venv-demo" in told and "630 MB" in told and "2.2 GB" in told
    assert (said in told) if said else "CUDA" not in told
    assert ("PIP_EXTRA_INDEX_URL" in told) == (said is not None and card is None)


def test_pip_knows_of_the_index_of_cpu_builds(steps, monkeypatch):
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", steps.CPU_TORCH)
    assert steps.torch_for_cpus()


PIP = """#!/bin/sh
echo 'Collecting torch'
echo '  Downloading torch-2.13.0.whl.metadata (31 kB)'
echo 'Downloading torch-2.13.0+cpu-cp311.whl (191.8 MB)'
echo 'Downloading mdurl-0.1.2.whl (9 kB)'
echo 'Installing collected packages: mdurl, torch'
exit %d
"""


@pytest.mark.parametrize("status", [0, 1])
def test_in_a_log_pip_has_a_line_a_large_package_and_all_lines_where_it_fails(steps, capsys, tmp_path, status):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PIP % status)
    python.chmod(0o755)
    assert steps.run_pip(tmp_path, "torch") == status
    told = capsys.readouterr().out
    assert told.startswith("    torch-2.13.0+cpu-cp311.whl (191.8 MB)\n    Installing collected packages")
    assert ("mdurl-0.1.2.whl" in told) == bool(status)


CLIENTS = """
import pytest
@pytest.mark.parametrize("client, model, passed", [
    ("good", "plain", "yes"), ("good", "patched", "yes"), ("good", "patched", "refused"),
    ("bad", "plain", "yes"), ("bad", "plain", "no"), ("bad", "reference", "skip"),
])
def test_it(record_property, client, model, passed):
    record_property("client", client)
    record_property("model", model)
    if passed == "skip":
        pytest.skip("no such library")
    record_property("passed", "yes")
    record_property("passed", passed)
    assert passed != "no"
"""


def test_a_cell_of_the_clients_is_the_worst_outcome_of_its_tests(tmp_path):
    (tmp_path / "test_clients.py").write_text(CLIENTS)
    found = compatibility.outcomes(sys.executable, str(tmp_path / "test_clients.py"))
    table = compatibility.table("client", compatibility.MODELS, compatibility.client_cells(found))
    assert table.splitlines()[2:] == ["| bad | FAILS |  | not run |", "| good | yes | yes, refused |  |"]


def test_a_layer_takes_bare_packages_without_what_they_require(steps, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(steps, "run_pip", lambda folder, *arguments: calls.append(arguments) or 0)
    monkeypatch.setattr(steps, "site_packages", lambda folder: tmp_path)
    steps.layer(tmp_path / "new", tmp_path / "base", ["trl"], ["numpy"], ["lmms-eval"], 700)
    constraints = tmp_path / "new" / "constraints.txt"
    assert [arguments[-1] for arguments in calls] == ["trl", "lmms-eval"]
    assert ["--no-deps" in arguments for arguments in calls] == [False, True]
    assert all(str(constraints) in arguments for arguments in calls)
    assert "torch==" in constraints.read_text() and "numpy==" not in constraints.read_text()
