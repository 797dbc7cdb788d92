"""The operators, the backends, and which implementation a call gets: ``impl=`` is resolved here for all of them.

An operator is a folder of ``ops``: its specification, its implementations (a module per backend, named after it, that
exports ``IMPLEMENTATION``) and the cases by which they are judged (``cases.py``). A backend is a folder of ``runtime``.
Both are found by listing these folders, so a new one appears in ``info``, ``verify``, the benchmarks and the tests.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from igva_kernels.runtime.backend import Backend
from igva_kernels.runtime.config import fastest_first
from igva_kernels.runtime.context import constant_under_compile, warn_of_fallback, why_only_torch
from igva_kernels.runtime.routes import is_explaining, took

if TYPE_CHECKING:
    from igva_kernels.testing import Case

REFERENCE = "reference"
"""The implementation that every operator has: the plain torch code that people write."""


class Implementation:
    """An operator's code for one backend."""

    def why_not(self, *demands: Any) -> str | None:
        """None if it can serve a call with these demands (constants of the call), otherwise the reason why not."""
        return None

    def notes(self) -> list[str]:
        """What ``igva-kernels info`` should say about it on this machine."""
        return []


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine."""

    name: str
    available: bool
    devices: tuple[str, ...]
    """Device types that it serves here."""
    reason: str
    """Why it cannot run; empty where it can."""


class Operator:
    """An operator of this package, known to the registry from its construction on.

    Args:
        name: as ``igva-kernels info`` prints it.
        package: the package with its implementations and cases.

    Raises:
        ValueError: an operator of another package has this name.
    """

    def __init__(self, name: str, package: str) -> None:
        self.name, self.package = name, package
        # What was chosen is remembered by name, so a second operator would get the backends of the first.
        known = _OPERATORS.get(name, self)
        if known.package != package:
            raise ValueError(f"operator {name!r}: both {known.package} and {package} define it; rename one of them")
        _OPERATORS[name] = self

    def implementation(self, backend: str) -> Any:
        """Its code for a backend, None if there is none. Importing it touches no driver.

        Raises:
            ImportError: what the backend builds on is missing, which its ``why_not`` says.
        """
        return getattr(self.module(backend), "IMPLEMENTATION", None)

    def serving(self, backend: str, tensor: Tensor) -> Any:
        """Its code for the backend that a registered call names. The public function chose it, but an exported program
        may have been moved to another device since.

        Raises:
            NotImplementedError: the backend cannot serve such a tensor.
        """
        choose(self.name, backend, tensor.device, tensor.dtype, ())
        return self.implementation(backend)

    def cases(self) -> Sequence[Case]:
        """The calls by which ``verify`` and the tests judge the implementations."""
        return getattr(self.module("cases"), "CASES", ())

    def module(self, name: str) -> ModuleType | None:
        """The module of this name in its package; None where there is none."""
        return _module(f"{self.package}.{name}")

    def why_not(self, backend: str, device: torch.device, dtype: torch.dtype, *demands: Any) -> str | None:
        """None if a backend can serve such a call here, otherwise the reason why not.

        Args:
            backend: its name.
            device: of the tensors.
            dtype: of the tensors.
            demands: the other constants of the call that decide it, as ``Implementation.why_not`` takes them.
        """
        if backend == REFERENCE:
            return None
        reason = all_backends()[backend].why_not(device, dtype)
        if reason is not None:
            return reason
        implementation = self.implementation(backend)
        if implementation is None:
            return f"the {backend} backend has no kernels for the operator {self.name}"
        return implementation.why_not(*demands)

    def select(self, impl: str, device: torch.device, dtype: torch.dtype, tensors: Sequence[Any], *demands: Any) -> str:
        """The backend that serves ``impl``, or "reference".

        Args:
            impl: a name, or "auto".
            device: of the tensors.
            dtype: of the tensors.
            tensors: of the call, also in sequences; anything that is not a tensor is ignored.
            demands: see ``why_not``.

        Raises:
            ValueError: no such ``impl``.
            NotImplementedError: an explicit ``impl`` that cannot serve the call.

        Warns:
            FallbackWarning: "auto" takes "reference" although kernels of the operator run on this device; once per
                reason.
        """
        if not isinstance(impl, str):
            raise _unknown(impl)
        backend = _choose(self.name, impl, device, dtype, demands)
        reason = None if backend == REFERENCE else why_only_torch(tensors)
        if is_explaining():
            _tell(self.name, impl, backend, device, dtype, demands, reason)
        if reason is None:
            return backend
        if impl != "auto":
            raise NotImplementedError(
                f"impl={impl!r} cannot serve the call while {reason}; impl='reference' or 'auto' can"
            )
        warn_of_fallback(self.name, reason)
        return REFERENCE

    def why_chosen(
        self, impl: str, backend: str, device: torch.device, dtype: torch.dtype, demands: tuple[Any, ...]
    ) -> str:
        """Why ``impl`` gives this backend."""
        if impl != "auto":
            return f"asked for by impl={impl!r}"
        passed = self.passed_over(device, dtype, *demands)
        others = [f"{name} cannot serve it: {reason}" for name, reason in passed.items()]
        if backend == REFERENCE:
            return "; ".join(["no backend has kernels for it here", *others])
        able = self.candidates(device, dtype, *demands)
        first = "the only one that can serve it"
        if len(able) > 1:
            first = f"the first of {', '.join(able)} in the table of this device"
        return "; ".join([first, *others])

    def passed_over(self, device: torch.device, dtype: torch.dtype, *demands: Any) -> dict[str, str]:
        """The backends that have kernels of this operator for such a device and cannot serve the call, each with the
        reason; one that cannot run on this machine at all is not among them."""
        reasons: dict[str, str] = {}
        for name, backend in all_backends().items():
            runs = device.type in backend.devices and backend.why_not(device, torch.float32) is None
            reason = self.why_not(name, device, dtype, *demands) if runs and self.implementation(name) else None
            if reason is not None:
                reasons[name] = reason
        return reasons

    def candidates(self, device: torch.device, dtype: torch.dtype, *demands: Any) -> list[str]:
        """The backends that "auto" may take for such a call, the fastest first."""
        able = [
            name
            for name, backend in all_backends().items()
            if device.type in backend.devices and self.why_not(name, device, dtype, *demands) is None
        ]
        return able if len(able) < 2 else fastest_first(device, able)


_OPERATORS: dict[str, Operator] = {}


def operators() -> dict[str, Operator]:
    """Every operator by name."""
    _import_folders("igva_kernels.ops")
    return _OPERATORS


@cache
def all_backends() -> dict[str, Backend]:
    """Every backend by name, in the order of ``Backend.rank``."""
    found = [importlib.import_module(name).BACKEND for name in _import_folders("igva_kernels.runtime")]
    return {backend.name: backend for backend in sorted(found, key=lambda backend: backend.rank)}


def backends() -> list[BackendStatus]:
    """What can run here and, for each backend that cannot, why."""
    known = all_backends().values()
    types = dict.fromkeys(["cpu", *(device for backend in known for device in backend.devices)])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    present = {"cpu", accelerator.type if accelerator else ""}
    statuses = [BackendStatus(REFERENCE, True, tuple(device for device in types if device in present), "")]
    for backend in known:
        reasons = {device: backend.why_not(torch.device(device), torch.float32) for device in types}
        devices = tuple(device for device, reason in reasons.items() if reason is None)
        reason = None if devices else reasons[backend.devices[0]]
        statuses.append(BackendStatus(backend.name, bool(devices), devices, reason or ""))
    return statuses


def implementations() -> tuple[str, ...]:
    """The values that ``impl=`` takes."""
    return "auto", REFERENCE, *all_backends()


def check_here(impl: str) -> None:
    """Checks that ``impl`` exists and can serve anything on this machine.

    Raises:
        ValueError: no such ``impl``.
        NotImplementedError: it cannot; the message says why.
    """
    if impl not in implementations():
        raise _unknown(impl)
    for status in backends():
        if status.name == impl and not status.available:
            raise NotImplementedError(f"impl={impl!r} cannot serve a model on this machine: {status.reason}")


@constant_under_compile
def _tell(
    operator: str, impl: str, backend: str, device: torch.device, dtype: torch.dtype, demands: tuple[Any, ...],
    only_torch: str | None,
) -> None:  # fmt: skip
    """Tells ``explain`` what was chosen; ``only_torch`` says why plain torch must serve what a backend could."""
    if only_torch is None:
        took(operator, backend, operators()[operator].why_chosen(impl, backend, device, dtype, demands))
    elif impl == "auto":
        took(operator, REFERENCE, f"because {only_torch}")


def _unknown(impl: Any) -> ValueError:
    return ValueError(f"impl: got {impl!r}, need one of {', '.join(map(repr, implementations()))}")


@constant_under_compile
def _choose(operator: str, impl: str, device: torch.device, dtype: torch.dtype, demands: tuple[Any, ...]) -> str:
    return choose(operator, impl, device, dtype, demands)


@cache
def choose(operator: str, impl: str, device: torch.device, dtype: torch.dtype, demands: tuple[Any, ...]) -> str:
    """``Operator.select`` as far as constants decide it. The result is remembered, so that no call asks twice."""
    if impl == REFERENCE:
        return impl
    chosen = operators()[operator]
    if impl == "auto":
        able = chosen.candidates(device, dtype, *demands)
        if able:
            return able[0]
        for name, why in chosen.passed_over(device, dtype, *demands).items():
            warn_of_fallback(operator, f"the {name} backend cannot serve {dtype} on {str(device)!r}: {why}")
        return REFERENCE
    if impl not in all_backends():
        raise _unknown(impl)
    reason = chosen.why_not(impl, device, dtype, *demands)
    if reason is not None:
        raise NotImplementedError(f"impl={impl!r} cannot serve {dtype} tensors on {str(device)!r}: {reason}")
    return impl


@cache
def _module(name: str) -> ModuleType | None:
    try:
        found = find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        found = None  # not even the package that it would be in exists
    return None if found is None else importlib.import_module(name)


@cache
def _import_folders(package: str) -> tuple[str, ...]:
    """Imports every package inside a package, and names them."""
    inner = pkgutil.iter_modules(importlib.import_module(package).__path__)
    names = tuple(f"{package}.{module.name}" for module in inner if module.ispkg)
    for name in names:
        importlib.import_module(name)
    return names
