"""``pytest benchmarks/``: the quick suite through pytest-benchmark, every provider checked before it is timed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.measure import draw, exact_results, verdicts
from benchmarks.providers import PLAIN, providers
from benchmarks.workloads import quick_suite

WORKLOADS = {workload.title: workload for workload in quick_suite("cpu")}
CASES = [(title, name) for title, workload in WORKLOADS.items() for name in providers(workload, "cpu")]


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    """Inputs, fp64 results and plain results of the workload that was drawn last."""
    return {}


@pytest.mark.parametrize(("title", "name"), CASES)
def test_workload(benchmark: Any, drawn: dict[str, Any], title: str, name: str) -> None:
    workload = WORKLOADS[title]
    found = providers(workload, "cpu")
    if title not in drawn:
        drawn.clear()
        inputs = draw(workload, "cpu")
        drawn[title] = inputs, exact_results(workload, inputs), found[PLAIN].bind(inputs).call()
    inputs, exact, plain = drawn[title]
    call = found[name].bind(inputs).call
    if not found[name].is_floor:
        for verdict in verdicts(workload, call(), exact, plain):
            assert verdict.ok, str(verdict)
    benchmark.group = title
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
