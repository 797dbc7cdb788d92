"""The activations: for each its forward, its gradient, and the name by which every kernel language knows it.

This is the only list. A kernel that lacks one of these raises or is passed over by ``impl="auto"``; a name that is not
in it is a ValueError wherever it is given. How to add one is in CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise function of z. Its key in ``ACTIVATIONS`` is also its name in C++ and Triton."""

    forward: Callable[[Tensor], Tensor]
    """``act(z)``, differentiable any number of times."""
    backward: Callable[[Tensor, Tensor], Tensor]
    """``grad * act'(z)`` from ``(grad, z)``."""
    forward_: Callable[[Tensor], Tensor]
    """``forward`` in place."""
    hidden_acts: tuple[str, ...]
    """What transformers' configurations call it."""

    def __call__(self, z: Tensor) -> Tensor:
        """``act(z)``."""
        return self.forward(z)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(
        F.gelu, lambda grad, z: _aten.gelu_backward(grad, z), lambda z: _aten.gelu_(z), hidden_acts=("gelu",)
    ),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"),
        lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"),
        lambda z: _aten.gelu_(z, approximate="tanh"),
        hidden_acts=("gelu_pytorch_tanh", "gelu_new"),
    ),
    "relu": Activation(
        F.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0), lambda z: _aten.relu_(z), hidden_acts=("relu",)
    ),
    "silu": Activation(
        F.silu, lambda grad, z: _aten.silu_backward(grad, z), lambda z: _aten.silu_(z), hidden_acts=("silu", "swish")
    ),
}


def of_hidden_act(name: str) -> str:
    """The key in ``ACTIVATIONS`` of what a transformers configuration calls ``name``.

    Raises:
        KeyError: there is no such activation.
    """
    return {act: key for key, activation in ACTIVATIONS.items() for act in activation.hidden_acts}[name]


def hidden_acts() -> list[str]:
    """Every name that ``of_hidden_act`` knows."""
    return [act for activation in ACTIVATIONS.values() for act in activation.hidden_acts]


def check_activation(name: str | None, *, optional: bool = True) -> None:
    """Checks that ``name`` is a key of ``ACTIVATIONS``, or None where ``optional``.

    Raises:
        ValueError: it is not.
    """
    if name not in ACTIVATIONS and not (optional and name is None):
        need = "None or one of" if optional else "one of"
        raise ValueError(f"activation: got {name!r}, need {need} {', '.join(map(repr, ACTIVATIONS))}")
