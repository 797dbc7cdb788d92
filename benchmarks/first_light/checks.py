"""Right or wrong, each kernel alone: the error rule of ``igva_kernels.testing`` on cases of the registry."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import igva_kernels as ik
from benchmarks.first_light.bench import DEVICE, IS_CARD, OPS, SHAPES, block, impl_here
from benchmarks.steps import figures
from benchmarks.workloads import Connector
from igva_kernels.ops.allocator.cases import CASES as ALLOCATOR
from igva_kernels.ops.deform_attn.cases import CASES as DEFORM
from igva_kernels.ops.inject_tokens.cases import CASES as INJECT
from igva_kernels.ops.layer_project.cases import CASES as PROJECT
from igva_kernels.ops.weighted_mix import cases as mix_cases
from igva_kernels.ops.weighted_mix.cases import Inputs
from igva_kernels.registry import operators
from igva_kernels.testing import Case, capture
from igva_kernels.verify import DTYPES, judge

KERNELS: dict[str, tuple[str, tuple[Case, ...]]] = {
    **{name: ("weighted_mix", tuple(c for c in mix_cases.CASES if c.op == op)) for name, op in OPS.items()},
    "deform": ("deform_attn", DEFORM), "inject": ("inject_tokens", INJECT), "project": ("layer_project", PROJECT),
    "allocator": ("allocator", ALLOCATOR),
}  # fmt: skip
"""The operator of each kernel that is checked, and its cases."""

REPLAYS = 200 if IS_CARD else 2


def env() -> bool:
    """What the figures depend on."""
    row: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "card": IS_CARD}
    for name in ("triton", "transformers", "pytest", "pytest-xdist", "pytest-timeout"):
        try:
            row[name] = version(name)
        except PackageNotFoundError:
            row[name] = None
    row |= {tool: shutil.which(tool) is not None for tool in ("nvcc", "ncu", "compute-sanitizer", "git")}
    if IS_CARD:
        card = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,memory.used", "--format=csv,noheader"]
        row |= {
            "name": card.name, "sms": card.multi_processor_count, "capability": [card.major, card.minor],
            "smi": _printed(query),
        }  # fmt: skip
    return figures(row, backends=lambda: [[b.name, b.available, b.reason[:300]] for b in ik.backends()])


def _printed(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def check(backend: str, kernel: str, few: bool = not IS_CARD) -> bool:
    """A kernel at a real shape and at two small ones; with ``few``, as in a rehearsal, only the latter."""
    operator, cases = KERNELS[kernel]
    small, large = ([case for case in cases if case.is_large == size] for size in (False, True))
    large = [] if few else large[:1]
    chosen = [(case, "bf16") for case in [*large, *small[:2]]] + [(case, "fp16") for case in large]
    return check_cases(operator, backend, chosen)


def check_overlapped(kernel: str) -> bool:
    """The GEMM that overlaps with the mix, at every batch size: small ones leave tiles to spare, large ones queue."""
    cases = [FewImages(block(kernel, batch)) for batch in SHAPES.batches]
    return check_cases("weighted_mix", "cuda", [(case, "bf16") for case in cases])


def check_cases(operator: str, backend: str, chosen: Iterable[tuple[Case, str]]) -> bool:
    """A row per case and dtype: the share of what the error rule allows, and whether two calls have the same bits."""
    oks = []
    for case, dtype in chosen:
        impl = impl_here(operators()[operator], backend, *case.demands)
        row = {"case": case.name, "B": case.batch, "dtype": dtype}
        oks.append(figures(row, error_rule=_verdict(case, dtype, impl), same_bits=_same_bits(case, dtype, impl)))
    return all(oks)


def _verdict(case: Case, dtype: str, impl: str) -> Callable[[], dict[str, Any]]:
    def verdict() -> dict[str, Any]:
        (row,) = judge(case, dtype, [impl], DEVICE)
        shares = {v.name: max(v.error / v.budget, v.worst_entry) for v in row.verdicts}
        finite = [share for share in shares.values() if share == share]
        found: dict[str, Any] = {"share_of_allowance": round(max(finite, default=0.0), 3), "ok": row.ok}
        if not row.ok:
            found["wrong"] = [str(v) for v in row.verdicts if not v.ok]
        return found

    return verdict


def _same_bits(case: Case, dtype: str, impl: str) -> Callable[[], bool]:
    def same_bits() -> bool:
        inputs = case.draw(0, DTYPES[dtype], DEVICE)
        one, two = case.run(inputs, impl), case.run(inputs, impl)
        return all(torch.equal(one[name], two[name]) for name in one)

    return same_bits


@dataclass(frozen=True)
class FewImages:
    """The case of a connector whose batch repeats a few images: drawing it takes no minutes."""

    connector: Connector

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connector.case, name)

    @property
    def name(self) -> str:
        """See ``testing.Case``."""
        return f"{self.connector.name}, B {self.connector.batch}"

    def draw(self, seed: int, dtype: torch.dtype, device: str) -> Inputs:
        """See ``testing.Case``."""
        named = {value: key for key, value in DTYPES.items()}
        return replace(self.connector, dtype=named[dtype]).draw(device, seed)


def replays() -> bool:
    """Replays of one graph on inputs that change, each beside an eager call: flags left set, tickets, races."""
    oks = []
    for batch in SHAPES.batches:
        connector = block("mlp", batch)
        impl = impl_here(operators()["weighted_mix"], "cuda", *connector.case.demands)

        def differing(connector: Connector = connector, impl: str = impl) -> int:
            inputs = connector.draw(DEVICE)
            assert inputs.mix_weights is not None
            states = [state for state in inputs.layers if state is not None]

            def call() -> torch.Tensor:
                return connector.case.forward(inputs, impl)

            with torch.no_grad():
                # In a rehearsal a "replay" is another call.
                graph, out = capture(call) if IS_CARD else (None, call())
                wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
                for i in range(REPLAYS):
                    states[i % len(states)].normal_()
                    inputs.mix_weights.copy_(torch.randn_like(inputs.mix_weights).softmax(-1))
                    out.fill_(float("nan"))
                    if graph is None:
                        out.copy_(call())
                    else:
                        graph.replay()
                    wrong += (out != call()).any()
                return int(wrong)

        oks.append(figures({"B": batch, "replays": REPLAYS}, wrong=differing))
    return all(oks)
