"""transformers' own common tests of models and processors pass over the reference model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers_sources import why_not

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "at_least"), [("ModelTest", 100), ("ProcessorTest", 30)])
def test_transformers_own_tests_pass_over_the_reference_model(kind, at_least):
    if reason := why_not():
        pytest.skip(reason)
    command = [
        sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-W", "ignore", "--tb=short",
        "-p", "no:cacheprovider", "-k", kind, "tests/helpers/transformers_mixins.py",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    print(done.stdout[-20_000:])
    assert done.returncode == 0
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least
