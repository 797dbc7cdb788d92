"""Which route calls take, and why: backends and kernels say so where they choose, and ``explain`` listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from igva_kernels.runtime.context import constant_under_compile


class Choice(NamedTuple):
    """One choice that a call made."""

    what: str
    """What there was to choose: an operator (its backend), or a step of one on a backend."""
    taken: str
    why: str


class Routes:
    """The choices of all calls inside ``with explain() as routes``; printed, they are a table."""

    def __init__(self) -> None:
        self.choices: dict[Choice, int] = {}
        """How often each was made, in the order of the first time."""

    def of(self, what: str) -> list[Choice]:
        """The choices about something, in the order of the first time; several where calls differed."""
        return [choice for choice in self.choices if choice.what == what]

    def __str__(self) -> str:
        if not self.choices:
            return "no operator of igva_kernels was called"
        heads = [f"{choice.what}: {choice.taken}" for choice in self.choices]
        width = max(map(len, heads))
        return "\n".join(
            f"{head:{width}}  {count} x, {choice.why}"
            for head, (choice, count) in zip(heads, self.choices.items(), strict=True)
        )


_LISTENING: list[Routes] = []


@contextmanager
def explain() -> Iterator[Routes]:
    """Which backends and kernels the calls inside it take, and why.

    ::

        with ik.explain() as routes:
            model(**batch).loss.backward()
        print(routes)

    Calls in all threads count, because autograd runs a backward in threads of its own. What torch.compile compiled
    before has chosen its backends then, and tells only what its kernels choose; a replay of a CUDA graph tells nothing.
    """
    routes = Routes()
    _LISTENING.append(routes)
    try:
        yield routes
    finally:
        _LISTENING.remove(routes)


@constant_under_compile
def is_explaining() -> bool:
    """Whether anything listens."""
    return bool(_LISTENING)


def took(what: str, taken: str, why: Callable[[], str] | str) -> None:
    """Says what was chosen; the reason is asked for only where somebody listens."""
    if _LISTENING:
        choice = Choice(what, taken, why if isinstance(why, str) else why())
        for routes in tuple(_LISTENING):
            routes.choices[choice] = routes.choices.get(choice, 0) + 1
