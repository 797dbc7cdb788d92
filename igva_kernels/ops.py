"""The public operators, their registration with torch.library, and their gradients.

Three operators are registered under the namespace ``igva_kernels``, each with a hand-written schema, a fake, and a
backward operator of its own, so that a profiler, a dispatch mode and torch.compile see them. The plan travels as its
``code`` string. A forward returns ``(out, saved)``: every tensor that the backward needs and that is not an input is an
output, and what is saved depends on the gradients that are asked for (``Keep``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igva_kernels import dispatch, reference
from igva_kernels.backends.base import (
    Keep,
    LayerShape,
    MixArgs,
    Mixed,
    ProjectorGrads,
    ProjectorNeeds,
    ProjectorWeights,
    Signature,
    accumulation_dtype,
)
from igva_kernels.plan import MixPlan, is_tap
from igva_kernels.reference import ACTIVATIONS, Norm


def layer_mix(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None = None,
    *,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The mixed row ``A[m, g*D + d] = sum over entries (l, c, s) of block g of s * w[b, c] * h_l[image(b), skip + p, d]``.

    Args:
        hidden_states: the L hidden states, a sequence of tensors ``[I, T, D]``: separate allocations, any batch and
            token strides (they may differ between layers), last dimension contiguous. They are never stacked nor copied.
            A layer that the plan does not use may be None.
        plan: which layers go where.
        mix_weights: ``[B, C]`` or ``[1, C]`` (broadcast), used in fp32 (fp64 with fp64 layers), differentiable; None
            where the plan has no columns.
        skip_tokens: tokens left out at the start of every state (1 for CLIP's CLS); P = T - skip_tokens.
        image_index: int64 ``[B]``, the image that each row of the batch reads; None where row b reads image b. Out of
            range: ValueError on a CPU, NaN rows on a GPU.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        ``[B, P, G*D]`` in the layers' dtype, accumulated in fp32 and rounded once.

    Raises:
        ValueError: shapes, devices or values that do not fit; the message names the argument.
        TypeError: wrong types or dtypes.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    call = _Call(hidden_states, plan, mix_weights, skip_tokens, image_index, impl)
    if call.impl == "reference":
        return reference.layer_mix(
            call.layers, call.plan, call.mix_weights, skip_tokens=skip_tokens, image_index=image_index
        )
    keep = Keep.SOURCES if call.mix_weights_need_grad else Keep.NOTHING
    rows, _ = torch.ops.igva_kernels.layer_mix(
        call.layers, call.mix_weights, image_index, call.code, skip_tokens, keep.value, call.impl
    )
    return rows


def layer_mix_linear(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    norm: Norm | None = None,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``act(norm?(A) @ weight.T + bias)``, A as in ``layer_mix``.

    Args:
        hidden_states: as in ``layer_mix``.
        plan: as in ``layer_mix``.
        mix_weights: as in ``layer_mix``.
        weight: ``[H, G*D]``; A is rounded once to its dtype (or to autocast's).
        bias: ``[H]`` or None.
        activation: None, "gelu" (erf), "gelu_tanh", "relu" or "silu".
        norm: None or ``(weight or None, bias or None, eps)``: LayerNorm over the whole row of A, statistics in fp32 from
            the unrounded mix, one rounding after.
        skip_tokens: as in ``layer_mix``.
        image_index: as in ``layer_mix``.
        impl: as in ``layer_mix``.

    Returns:
        ``[B, P, H]`` in the dtype of ``weight`` (or autocast's).

    Raises:
        ValueError, TypeError, NotImplementedError: as in ``layer_mix``.
    """
    call = _Call(hidden_states, plan, mix_weights, skip_tokens, image_index, impl)
    weights, norm = call.check_projector(ProjectorWeights(weight, bias, None, None), activation, norm, "")
    if call.impl == "reference":
        return reference.layer_mix_linear(
            call.layers, call.plan, call.mix_weights, weight, bias,
            activation=activation, norm=norm, skip_tokens=skip_tokens, image_index=image_index,
        )  # fmt: skip
    return call.project("layer_mix_linear", weights, activation, norm)


def layer_mix_mlp(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str | None = "gelu",
    norm: Norm | None = None,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``act(norm?(A) @ weight1.T + bias1) @ weight2.T + bias2``, A as in ``layer_mix``: the whole connector.

    Args:
        hidden_states: as in ``layer_mix``.
        plan: as in ``layer_mix``.
        mix_weights: as in ``layer_mix``.
        weight1: ``[N, G*D]``; A is rounded once to its dtype (or to autocast's).
        bias1: ``[N]`` or None.
        weight2: ``[H, N]``.
        bias2: ``[H]`` or None.
        activation: as in ``layer_mix_linear``.
        norm: as in ``layer_mix_linear``.
        skip_tokens: as in ``layer_mix``.
        image_index: as in ``layer_mix``.
        impl: as in ``layer_mix``.

    Returns:
        ``[B, P, H]`` in the dtype of ``weight1`` (or autocast's).

    Raises:
        ValueError, TypeError, NotImplementedError: as in ``layer_mix``.
    """
    call = _Call(hidden_states, plan, mix_weights, skip_tokens, image_index, impl)
    weights, norm = call.check_projector(ProjectorWeights(weight1, bias1, weight2, bias2), activation, norm, "1")
    if call.impl == "reference":
        return reference.layer_mix_mlp(
            call.layers, call.plan, call.mix_weights, weight1, bias1, weight2, bias2,
            activation=activation, norm=norm, skip_tokens=skip_tokens, image_index=image_index,
        )  # fmt: skip
    return call.project("layer_mix_mlp", weights, activation, norm)
