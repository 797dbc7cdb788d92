"""What a user can mend, told in one line: the commands print it without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DAMAGED = "it is damaged or incomplete; get it again"
LONGEST_REASON = 300
"""Characters that are kept of another package's message."""


class UserError(ValueError):
    """Something that was given cannot be used; the message names it and says what to do."""


@contextmanager
def reading(what: object, advice: str = DAMAGED) -> Iterator[None]:
    """Turns whatever another package raises while it reads ``what`` into a ``UserError``.

    It stands around calls of readers and constructors alone, which raise exceptions of every kind at a file that is not
    what it should be; in code of our own it would hide faults.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(said.split()) or type(error).__name__
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON].rsplit(' ', 1)[0]} ..."
        raise UserError(f"{what}: {reason.rstrip('.')}; {advice}") from error
