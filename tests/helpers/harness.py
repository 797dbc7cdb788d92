"""Every implementation of every operator that can run in this process, from the registry: a new operator, backend or
activation is tested from the moment that it is there, and no test knows it by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

from igva_kernels import registry, verify
from igva_kernels.registry import Operator
from igva_kernels.runtime.backend import Backend
from igva_kernels.testing import Case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Subject(NamedTuple):
    """What is tested: one operator by one backend, on one type of device."""

    operator: Operator
    impl: str
    device: str


def subjects(operator: str | None = None, device: str | None = None) -> Iterator[Any]:
    """Params of pytest, one ``Subject`` each: of one operator or all, on one type of device or every one.

    A backend that serves CPU tensors although "auto" never asks it to is interpreted here. One that serves a GPU is
    skipped where there is none.
    """
    for each in registry.operators().values():
        for name, backend in registry.all_backends().items():
            if operator not in (None, each.name) or _implementation(each, name) is None:
                continue
            if device != "cuda" and backend.why_not(CPU, torch.float32) is None:
                marks = [] if CPU.type in backend.devices else [pytest.mark.interpreted]
                yield pytest.param(Subject(each, name, "cpu"), id=f"{each.name}-{name}", marks=marks)
            if device != "cpu" and CUDA.type in backend.devices:
                yield pytest.param(Subject(each, name, "cuda"), id=f"{each.name}-{name}-cuda", marks=on_a_gpu(backend))


def calls(
    large: bool = False, device: str | None = None, dtypes: Sequence[str] = tuple(verify.DTYPES), few: int | None = None
) -> list[Any]:
    """Params ``(subject, case, dtype)``: the cases of every operator for every subject.

    The interpreter is slow: it takes every case in the first dtype, and each of the others in some of the cases; what
    it leaves out is marked as slow. With ``few`` it takes only that many cases, the smallest.
    """
    found = []
    for subject in subjects(device=device):
        operator = subject.values[0].operator
        cases = [case for case in operator.cases() if case.is_large == large]
        if is_interpreted(subject) and few is not None:
            cases = sorted(cases, key=_size)[:few]
        for (i, case), (j, dtype) in product(enumerate(cases), enumerate(dtypes)):
            slow = is_interpreted(subject) and j and i % len(dtypes) != j - 1
            marks = [*subject.marks, *([pytest.mark.slow] if slow else [])]
            name = f"{subject.id}-{case.name}-{dtype}"
            found.append(pytest.param(subject.values[0], case, dtype, id=name, marks=marks))
    return found


def _size(case: Case) -> int:
    return sum(
        leaf.numel() for leaf in tree_leaves(case.draw(0, torch.float32, "cpu")) if isinstance(leaf, torch.Tensor)
    )


def smallest(operator: Operator) -> Case:
    """The smallest case of an operator: for tests of what no size changes."""
    return min(operator.cases(), key=_size)


def cases() -> list[Any]:
    """Params ``(case,)``: the small cases of every operator."""
    return [
        pytest.param(case, id=f"{operator.name}-{case.name}")
        for operator in registry.operators().values()
        for case in operator.cases()
        if not case.is_large
    ]


def impls(operator: str, *, interpreted: bool = True) -> list[Any]:
    """Params ``(impl,)``: the names of the backends that serve CPU tensors of this operator in this process.

    With ``interpreted=False`` only those that run without an interpreter: for tests that would last minutes in one.
    """
    found = [param for param in subjects(operator, "cpu") if interpreted or not is_interpreted(param)]
    return [pytest.param(param.values[0].impl, id=param.values[0].impl, marks=param.marks) for param in found]


def quick_impls(operator: str) -> list[str]:
    """The names of those backends that run without an interpreter."""
    return [param.values[0] for param in impls(operator, interpreted=False)]


def require(impl: str, dtype: torch.dtype) -> None:
    """Skips the test where the backend does not take such tensors."""
    reason = registry.all_backends()[impl].why_not(CPU, dtype)
    if reason is not None:
        pytest.skip(reason)


def is_interpreted(param: Any) -> bool:
    return any(mark.name == "interpreted" for mark in param.marks)


def on_a_gpu(backend: Backend) -> list[Any]:
    """The marks of a test that needs this backend on a GPU."""
    reason = backend.why_not(CUDA, torch.bfloat16)
    return [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]


def _implementation(operator: Operator, name: str) -> Any:
    try:
        return operator.implementation(name)
    except ImportError:  # the backend says so itself, in ``why_not``
        return None


def assert_right(case: Case, dtype: str, impl: str, device: str, seed: int) -> None:
    """The error rule, for an output and all its gradients."""
    for row in verify.judge(case, dtype, [impl], device, seed):
        assert row.ok, str(row.worst)
