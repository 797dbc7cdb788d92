"""What a backend is: a way to run kernels, whichever operator they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """A compiled module or a kernel compiler. Each is a folder of ``runtime`` that exports one as ``BACKEND``."""

    name: str
    rank: int
    """``impl="auto"`` asks the backend of the lowest rank first, unless a card's configuration has another order."""
    devices: tuple[str, ...]
    """Device types on which ``impl="auto"`` may choose it."""
    why_not: Callable[[torch.device, torch.dtype], str | None]
    """None if it can run here on tensors of this device and dtype, otherwise the reason why not. It is asked about any
    type of device that a backend names, whether or not this machine has one."""
    notes: Callable[[], list[str]] = list
    """What ``igva-kernels info`` should say about it on this machine, such as what it was built by."""
