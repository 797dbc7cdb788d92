"""Judges every backend that can run here against fp64, forward and gradients, beside plain torch in the same dtype.

The rule is that of ``igva_kernels.testing``; the calls are the cases of every operator in the registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from igva_kernels.registry import REFERENCE, all_backends, backends, operators
from igva_kernels.runtime.cpu.products import is_emulated
from igva_kernels.testing import MAX_DRAWS, SPECIFICATION, Case, Judge, Verdict, draws

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Row(NamedTuple):
    """One backend in one case and dtype."""

    case: str
    dtype: str
    backend: str
    device: str
    verdicts: list[Verdict]

    @property
    def ok(self) -> bool:
        """Whether every result keeps the rule."""
        return all(verdict.ok for verdict in self.verdicts)

    @property
    def worst(self) -> Verdict:
        """The result nearest to its error budget, or furthest beyond it; NaN counts as furthest."""
        return max(self.verdicts, key=lambda v: (not v.ok, v.error / v.budget))


def is_slow(dtype_name: str, device: str) -> bool:
    """Whether plain torch takes minutes for a real shape: on a CPU that has no arithmetic for the dtype."""
    return device == "cpu" and is_emulated(DTYPES[dtype_name])


def verify(chosen: Sequence[str] = (), dtypes: Sequence[str] = (), quick: bool = False, seed: int = 0) -> Iterator[Row]:
    """Judges backends, and yields each row as soon as it is complete.

    Args:
        chosen: the backends; if none is named, every one that can run here. Each is judged in the operators and dtypes
            that it serves.
        dtypes: among "fp32", "bf16" and "fp16"; if none is named, all of them, except that real shapes leave out those
            that are slow on the device (``is_slow``).
        quick: leave out the real shapes.
        seed: of the draws.

    Raises:
        NotImplementedError: a backend that is named cannot run here; the message says why.
        KeyError: there is no backend or dtype of that name.
    """
    statuses = {status.name: status for status in backends()}
    for name in chosen:
        if not statuses[name].available:
            raise NotImplementedError(f"backend {name!r} cannot run here: {statuses[name].reason}")
    names = [name for name in chosen or all_backends() if statuses[name].available]
    for device in dict.fromkeys(device for name in names for device in statuses[name].devices):
        here = [name for name in names if device in statuses[name].devices]
        # Triton on a CPU is its interpreter: correct, but real shapes would take it hours.
        large = [name for name in here if name == REFERENCE or device in all_backends()[name].devices]
        quickly = [dtype for dtype in DTYPES if not is_slow(dtype, device)]
        for operator in operators().values():
            for case in operator.cases():
                if case.is_large and quick:
                    continue
                able, fitting = (large, quickly) if case.is_large else (here, list(DTYPES))
                for dtype in dtypes or fitting:
                    at = torch.device(device), DTYPES[dtype]
                    serving = [name for name in able if operator.why_not(name, *at, *case.demands) is None]
                    yield from judge(case, dtype, serving, device, seed)


def judge(case: Case, dtype_name: str, names: Sequence[str], device: str, seed: int = 0) -> Iterator[Row]:
    """Judges backends in one case and dtype; after the first draw, only results that need more draws are computed."""
    if not names:
        return
    dtype = DTYPES[dtype_name]
    judges = {name: Judge(dtype) for name in names}
    for draw in draws(judges.values()):
        inputs = case.draw(seed * MAX_DRAWS + draw, dtype, device)
        pending = {result for judge in judges.values() for result in judge.pending}
        oracle = case.run(inputs.double(), SPECIFICATION, pending)
        plain = case.run(inputs, REFERENCE, pending)
        for name, judge in judges.items():
            for result, value in case.run(inputs, name, pending).items():
                # Plain torch rounds as often as it touches a value.
                once = name != REFERENCE and case.is_rounded_once(result)
                judge.add(value, oracle[result], plain[result], result, rounded_once=once)
    for name, judge in judges.items():
        yield Row(case.name, dtype_name, name, device, judge.verdicts)
