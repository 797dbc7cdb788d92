"""The public functions: arguments are checked, an implementation is chosen, and one registered operator runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igva_kernels.ops.inject_tokens import op, spec
from igva_kernels.registry import REFERENCE
from igva_kernels.runtime.context import has_values, saveable
from igva_kernels.runtime.dense import accumulation_dtype, why_no_float

MODES = ("add", "replace")


def token_rows(mask: Tensor) -> Tensor:
    """Which row of the features each token takes, where the tokens of a mask take them in order.

    Nothing waits for the device, and the shape of the result does not depend on the values.

    Args:
        mask: bool ``[B, T]``, True at the tokens that take a feature.

    Returns:
        int32 ``[B, T]``: the number of each True, counted from 0 through all rows of the batch; -1 elsewhere.

    Raises:
        TypeError: ``mask`` is no bool tensor.
        ValueError: it is not ``[B, T]``.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: need a bool tensor [B, T], got {_kind(mask)}")
    if mask.dim() != 2:
        raise ValueError(f"mask: need shape [B, T], one value per token, got {list(mask.shape)}")
    return spec.token_rows(mask)


def inject_tokens(
    hidden_states: Tensor,
    features: Tensor,
    token_rows: Tensor,
    *,
    gate: Tensor | None = None,
    mode: str = "add",
    impl: str = "auto",
) -> Tensor:
    """Adds features to some of the tokens, or puts them there, in one pass and without waiting for the device.

    Where ``token_rows[b, t]`` is a row r of the features, token t of row b becomes ``hidden + gate * features[r]``
    (mode "add") or ``gate * features[r]`` ("replace"); elsewhere it stays. The sum is made in fp32 and rounded once, so
    that without a gate every bit is that of ``hidden[mask] += features``.

    The gradient of ``hidden_states`` is the gradient of the result (of "replace", without the tokens that were
    replaced); no hidden state is kept for the backward, and the features only where ``gate`` is trained.

    Args:
        hidden_states: ``[B, T, H]``, with any strides.
        features: ``[V, H]``, or ``[B, P, H]`` for V = B * P rows, in any floating dtype; they are rounded to the dtype
            of ``hidden_states`` first. V may be 0.
        token_rows: int32 or int64 ``[B, T]``: the row of the features for each token, -1 for none. No two tokens may
            take the same row. A row out of range, or one taken twice, raises a ValueError on a CPU; on a GPU the
            kernels give NaN: in the tokens with a row out of range, and in the gradient of a row taken twice.
        gate: None, or what the features are multiplied by, ``[1]`` or one number per row ``[V]``; used in fp32 (fp64
            with fp64 states), differentiable.
        mode: "add" or "replace".
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A new tensor ``[B, T, H]`` in the dtype of ``hidden_states``.

    Raises:
        ValueError: shapes, devices or values do not fit; the message names the argument.
        TypeError: wrong types or dtypes.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    features = _check(hidden_states, features, token_rows, gate, mode)
    device, dtype = hidden_states.device, hidden_states.dtype
    backend = op.OPERATOR.select(impl, device, dtype, (hidden_states, features, gate))
    if gate is not None:
        gate = gate.to(accumulation_dtype(dtype))
    if backend == REFERENCE:
        _check_rows(token_rows, features.shape[0])
        if torch.is_grad_enabled():  # plain torch saves these for its backward
            token_rows, gate = saveable(token_rows), saveable(gate)
            features = features if gate is None else saveable(features)
        return spec.inject_tokens(hidden_states, features, token_rows, gate, mode)
    return op.inject_tokens(
        hidden_states=hidden_states, features=features, token_rows=token_rows, gate=gate, mode=mode, impl=backend
    )


def _check(hidden_states: Any, features: Any, rows: Any, gate: Any, mode: Any) -> Tensor:
    """The features as ``[V, H]`` in the dtype of the hidden states."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, need 'add' or 'replace'")
    for name, tensor in {"hidden_states": hidden_states, "features": features, "gate": gate}.items():
        reason = None if tensor is None and name == "gate" else why_no_float(tensor)
        if reason is not None:
            raise TypeError(f"{name}: {reason}")
    if hidden_states.dim() != 3:
        raise ValueError(f"hidden_states: need shape [B, T, H], got {list(hidden_states.shape)}")
    batch, tokens, width = hidden_states.shape
    if not 2 <= features.dim() <= 3 or features.shape[-1] != width:
        raise ValueError(f"features: need shape [V, {width}] or [B, P, {width}], got {list(features.shape)}")
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64):
        hint = "; token_rows(mask) makes one of a mask" if isinstance(rows, Tensor) and rows.dtype == torch.bool else ""
        raise TypeError(f"token_rows: need an int32 or int64 tensor [B, T], got {_kind(rows)}{hint}")
    if rows.dim() != 2 or rows.shape[0] != batch or rows.shape[1] != tokens:
        raise ValueError(f"token_rows: need shape {[batch, tokens]} as the hidden states, got {list(rows.shape)}")
    features = features.reshape(-1, width) if features.dim() == 3 else features
    count = features.shape[0]
    if gate is not None and (gate.dim() != 1 or (gate.shape[0] != 1 and gate.shape[0] != count)):
        raise ValueError(f"gate: need shape [1] or [{count}], one number per row of features, got {list(gate.shape)}")
    for name, tensor in {"features": features, "token_rows": rows, "gate": gate}.items():
        if tensor is not None and tensor.device != hidden_states.device:
            raise ValueError(f"{name}: need device {hidden_states.device} as the hidden states, got {tensor.device}")
    return features.to(hidden_states.dtype)


def _check_rows(rows: Tensor, count: int) -> None:
    """For plain torch, where a negative row would wrap around; kernels check their own, in compiled code too."""
    if rows.device.type != "cpu" or not has_values(rows) or not rows.numel():
        return
    lowest, highest = int(rows.min()), int(rows.max())
    if lowest < -1 or highest >= count:
        raise ValueError(
            f"token_rows: need values from -1 to {count - 1}, the rows of the features, got values from {lowest} to "
            f"{highest}"
        )
    if count and int(torch.bincount(rows[rows >= 0], minlength=1).max()) > 1:
        raise ValueError("token_rows: no two tokens may take the same row of the features")


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
