"""What a patch changed, and how to undo it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import nn

_EDITED: WeakSet[nn.Module] = WeakSet()
"""The modules that a patch holds."""

_ABSENT = object()
"""Stands for an attribute that the instance did not have of its own."""


class _Edit(NamedTuple):
    module: nn.Module
    name: str
    old: Any
    """The instance's own value, or ``_ABSENT``."""
    new: Any


class PatchHandle:
    """The changes that one ``patch`` made; ``revert``, or the end of a ``with`` block, undoes them exactly."""

    def __init__(self) -> None:
        self._edits: list[_Edit] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Give the instance ``module`` its own attribute ``name`` (a forward, an option) until ``revert``.

        Raises:
            ValueError: another patch holds the module.
        """
        own = any(edit.module is module for edit in self._edits)
        if module in _EDITED and not own:
            raise ValueError(f"model: its {type(module).__name__} is patched already; revert that patch first")
        self._edits.append(_Edit(module, name, vars(module).get(name, _ABSENT), value))
        vars(module)[name] = value
        _EDITED.add(module)

    def revert(self) -> None:
        """Restore every attribute to the very object that was there; a second call does nothing.

        Raises:
            ValueError: an attribute was rebound after the patch; restoring it would undo that change too.
        """
        for module, name, _, new in self._edits:
            if vars(module).get(name, _ABSENT) is not new:
                raise ValueError(f"revert: {name!r} of a {type(module).__name__} was rebound since; undo that first")
        for module, name, old, _ in reversed(self._edits):
            if old is _ABSENT:
                del vars(module)[name]
            else:
                vars(module)[name] = old
            _EDITED.discard(module)
        self._edits.clear()

    @property
    def is_active(self) -> bool:
        """Whether there is something to revert."""
        return bool(self._edits)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()

    def __repr__(self) -> str:
        changes = ", ".join(f"{type(edit.module).__name__}.{edit.name}" for edit in self._edits)
        return f"PatchHandle({changes or 'reverted'})"
