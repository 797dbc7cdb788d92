"""The injection as torch sees it: schema, fake and gradients, and what implementations are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from igva_kernels.registry import Implementation, Operator
from igva_kernels.runtime.operands import adjacent
from igva_kernels.runtime.torch_op import define, no_second_derivative

OPERATOR = Operator("inject_tokens", __package__)


class Injection(Implementation):
    """The steps of the operator. The elements of a row of ``hidden`` ``[B, T, H]``, ``features`` ``[V, H]`` and
    ``grad`` ``[B, T, H]`` lie side by side; ``rows`` ``[B, T]`` is int32 and dense, as is ``gate`` (``[1]`` or ``[V]``,
    fp32, or fp64 for fp64 states)."""

    def inject(
        self, hidden: Tensor, features: Tensor | None, rows: Tensor, gate: Tensor | None, replace: bool
    ) -> Tensor:
        """The result, dense; tokens that would take a row of ``features`` become zeros where that is None."""
        raise NotImplementedError

    def features_grad(
        self, grad: Tensor, features: Tensor | None, rows: Tensor, gate: Tensor | None, num_features: int,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """The gradients of the features ``[V, H]`` in the dtype of ``grad`` and of the gate in its own, as far as
        ``needs`` asks for them; ``features`` are given where the gate's is asked for."""
        raise NotImplementedError


def _inject(given: SimpleNamespace) -> Tensor:
    _check_fits(given.hidden_states, given.features, given.token_rows, given.features.shape[0])
    hidden, features = adjacent(given.hidden_states), adjacent(given.features)
    rows = _int32(given.token_rows, features.shape[0])
    gate = None if given.gate is None else given.gate.contiguous()
    return OPERATOR.serving(given.impl, hidden).inject(hidden, features, rows, gate, given.mode == "replace")


def _check_fits(states: Tensor, features: Tensor | None, rows: Tensor, num_features: int) -> None:
    """Refuses what kernels would read beyond; the public function has checked it, and a direct call has not."""
    if rows.shape != states.shape[:2]:
        raise ValueError(f"token_rows: need shape {list(states.shape[:2])}, got {list(rows.shape)}")
    need = (num_features, states.shape[2])
    if features is not None and (features.shape != need or features.dtype != states.dtype):
        given = f"{list(features.shape)} of {features.dtype}"
        raise ValueError(
            f"features: need {list(need)} of {states.dtype}, got {given}; ik.inject_tokens takes any dtype"
        )


def _inject_fake(given: SimpleNamespace) -> Tensor:
    return given.hidden_states.new_empty(given.hidden_states.shape)


def _save(given: SimpleNamespace, output: Tensor) -> dict[str, Any]:
    trains_gate = given.gate is not None and given.gate.requires_grad
    return {
        "features": given.features if trains_gate else None, "token_rows": given.token_rows, "gate": given.gate,
        "num_features": given.features.shape[0], "mode": given.mode, "impl": given.impl,
    }  # fmt: skip


def _differentiate(grad: Tensor, needs: SimpleNamespace, saved: SimpleNamespace) -> dict[str, Any]:
    into_hidden = needs.hidden_states and saved.mode == "replace"
    asked = {"hidden_states": into_hidden, "features": needs.features, "gate": needs.gate}
    names = [name for name, need in asked.items() if need]
    grads: dict[str, Any] = {}
    if names:
        grads = dict(zip(names, _backward(**vars(saved), grad=grad, needs=list(asked.values())), strict=True))
    if needs.hidden_states and not into_hidden:
        grads["hidden_states"] = grad
    return grads


def _run_backward(given: SimpleNamespace) -> list[Tensor]:
    into_hidden, into_features, into_gate = given.needs
    _check_fits(given.grad, given.features, given.token_rows, given.num_features)
    implementation, grad = OPERATOR.serving(given.impl, given.grad), adjacent(given.grad)
    rows = _int32(given.token_rows, given.num_features)
    found: list[Tensor | None] = []
    if into_hidden:
        found.append(implementation.inject(grad, None, rows, None, True))
    if into_features or into_gate:
        features = None if given.features is None else adjacent(given.features)
        gate = None if given.gate is None else given.gate.contiguous()
        needs = (into_features, into_gate)
        found += implementation.features_grad(grad, features, rows, gate, given.num_features, needs)
    return [tensor for tensor in found if tensor is not None]


def _backward_fake(given: SimpleNamespace) -> list[Tensor]:
    into_hidden, into_features, into_gate = given.needs
    found = [given.grad.new_empty(given.grad.shape)] if into_hidden else []
    if into_features:
        found.append(given.grad.new_empty((given.num_features, given.grad.shape[2])))
    return [*found, torch.empty_like(given.gate, memory_format=torch.contiguous_format)] if into_gate else found


def _int32(rows: Tensor, num_features: int) -> Tensor:
    """The rows as kernels read them; one that is out of range stays out of range."""
    if rows.dtype == torch.int64:
        rows = rows.clamp(-2, num_features).to(torch.int32)
    return rows.contiguous()


_backward = define(
    "inject_tokens_backward(Tensor grad, Tensor? features, Tensor token_rows, Tensor? gate, SymInt num_features,"
    " str mode, bool[] needs, str impl) -> Tensor[]",
    _run_backward, _backward_fake, None, no_second_derivative,
)  # fmt: skip
inject_tokens = define(
    "inject_tokens(Tensor hidden_states, Tensor features, Tensor token_rows, Tensor? gate, str mode, str impl)"
    " -> Tensor",
    _inject, _inject_fake, _save, _differentiate,
)  # fmt: skip
