"""What a patch changed, how to undo it, and what serves the model while it holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from types import MethodType, TracebackType
from typing import Any, NamedTuple

from torch import nn

_ABSENT = object()
"""Stands for an attribute that the instance did not have of its own."""

_MARK = "_igva_kernels_patch"
"""The attribute of a patched module that holds its ``_Mark``."""


class _Edit(NamedTuple):
    of: Any
    name: str
    old: Any
    """The instance's own value, or ``_ABSENT``."""
    new: Any


class PatchHandle:
    """The changes that one ``patch`` made; ``revert``, or the end of a ``with`` block, undoes them exactly.

    Printed, it says what was replaced, which implementation serves it where the model is now, and what is left to plain
    PyTorch and why.
    """

    def __init__(self) -> None:
        self._edits: list[_Edit] = []
        self._copies: list[tuple[nn.Module, weakref.ref[nn.Module]]] = []
        self._notes: list[Callable[[], str]] = []

    def set(self, of: Any, name: str, value: Any) -> None:
        """Give an instance, a module or a config, its own attribute ``name`` until ``revert``.

        Raises:
            ValueError: another patch holds the module.
        """
        if isinstance(of, nn.Module):
            if is_held(of, but_by=self):
                raise ValueError(f"model: its {type(of).__name__} is patched already; revert that patch first")
            vars(of)[_MARK] = _Mark(self, of, of)
        self._edits.append(_Edit(of, name, vars(of).get(name, _ABSENT), value))
        vars(of)[name] = value

    def note(self, line: Callable[[], str]) -> None:
        """Add a line to what the handle prints; it is computed when it is printed, as models move."""
        self._notes.append(line)

    def revert(self) -> None:
        """Restore every attribute to the very object that was there, also in the copies that were made of the modules
        since (peft's ``modules_to_save``, ``copy.deepcopy``). A second call does nothing.

        A method that accelerate's hooks have moved aside or back is found where it is.

        Raises:
            ValueError: an attribute was replaced or wrapped after the patch, and restoring it would undo that too.
                Nothing has been restored then.
        """
        edits = [*self._edits, *self._edits_of_copies()]
        places = [_place(edit) for edit in edits]  # all of them are found before one is restored
        for edit, place in zip(reversed(edits), reversed(places), strict=True):
            _restore(edit, place)
        for of in {id(edit.of): edit.of for edit in edits}.values():
            vars(of).pop(_MARK, None)
        self._edits.clear()
        self._copies.clear()
        self._notes.clear()

    def _edits_of_copies(self) -> Iterator[_Edit]:
        for original, reference in self._copies:
            duplicate = reference()
            if duplicate is None:
                continue
            # What the edits replaced, as it would be in the copy: bound to it, and with its submodules.
            same: dict[int, Any] = {id(original): duplicate}
            for name, child in original._modules.items():
                if child is not None and name in duplicate._modules:
                    same[id(child)] = duplicate._modules[name]
            for edit in self._edits:
                if edit.of is original:
                    old = edit.old if edit.old is _ABSENT else deepcopy(edit.old, dict(same))
                    new = vars(duplicate).get(edit.name)
                    if isinstance(edit.new, MethodType):
                        new = MethodType(edit.new.__func__, duplicate)
                    yield _Edit(duplicate, edit.name, old, new)

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
        if not self._edits:
            return "PatchHandle(reverted)"
        changes = dict.fromkeys(f"{type(edit.of).__name__}.{edit.name}" for edit in self._edits)
        return "\n".join(["PatchHandle", *(f"  {line()}" for line in self._notes), f"  replaced: {', '.join(changes)}"])


def is_held(module: nn.Module, but_by: PatchHandle | None = None) -> bool:
    """Whether a patch, other than that of ``but_by``, holds the module or the one that it was copied from."""
    mark = vars(module).get(_MARK)
    return isinstance(mark, _Mark) and mark.handle not in (None, but_by)


class _Mark:
    """Lies in a patched module. It is copied with the module, and so the patch learns of the copy."""

    def __init__(
        self, handle: PatchHandle | None = None, module: nn.Module | None = None, original: nn.Module | None = None
    ) -> None:
        self.handle, self.original = handle, original
        self.module = None if module is None else weakref.ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        duplicate = None if self.module is None else memo.get(id(self.module()))
        if self.handle is None or self.original is None or duplicate is None:
            return _Mark()
        self.handle._copies.append((self.original, weakref.ref(duplicate)))
        return _Mark(self.handle, duplicate, self.original)

    def __reduce__(self) -> Any:
        return _Mark, ()  # what is unpickled belongs to no patch


def _place(edit: _Edit) -> str:
    """The attribute where an edit's value is now.

    Raises:
        ValueError: it is not there any more.
    """
    # accelerate's hooks keep a module's own forward in _old_forward, and put it back when they are removed.
    names = ("forward", "_old_forward") if edit.name in ("forward", "_old_forward") else (edit.name,)
    for name in sorted(names, key=lambda name: name != edit.name):
        if _is_same(vars(edit.of).get(name, _ABSENT), edit.new):
            return name
    now = vars(edit.of).get(edit.name, _ABSENT)
    what = f"by {describe(now)}" if callable(now) else "to another value"
    raise ValueError(
        f"revert: {edit.name!r} of a {type(edit.of).__name__} was rebound since, {what}; undo that first "
        f"(accelerate's mixed precision: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
    )


def _restore(edit: _Edit, place: str) -> None:
    of, old = edit.of, edit.old
    if place == edit.name:
        if old is _ABSENT:
            del vars(of)[place]
        else:
            vars(of)[place] = old
    elif place == "forward":  # the hooks that were there at the patch are gone
        del vars(of)[place]
        if getattr(old, "__func__", None) is not type(of).forward:
            vars(of)[place] = old
    else:  # hooks were added after the patch
        vars(of)[place] = MethodType(type(of).forward, of) if old is _ABSENT else old


def _is_same(now: Any, new: Any) -> bool:
    """Whether it is the value that was set; a bound method may have been bound anew."""
    plain = isinstance(new, (MethodType, str, int))
    return now is new or (plain and type(now) is type(new) and bool(now == new))


def describe(function: Any) -> str:
    """What a callable is and where it comes from, for an error message."""
    inner = getattr(function, "__func__", function)
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{getattr(inner, '__module__', type(inner).__module__)}.{name}"
