"""These tests run the Triton kernels on a CPU: TRITON_INTERPRET=1 pytest tests/triton_interpreter

Triton reads that variable when it is imported, so they need a process of their own.
"""

import os

import pytest
import torch

from igva_kernels import testing

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The interpreter is serial, and its small tensors gain nothing from threads that other workers need."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    """The interpreter is slow: one draw may acquit even a small result, but convicts none."""
    monkeypatch.setattr(testing, "FIRST_DRAWS", 1)
