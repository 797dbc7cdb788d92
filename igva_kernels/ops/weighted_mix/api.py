"""The public operators. Every call goes the same way: its arguments are checked, an implementation is chosen, and one
registered operator runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix import inference, op, spec
from igva_kernels.ops.weighted_mix.checks import Mix, check_image_range, check_mix, check_projector, plan_of
from igva_kernels.ops.weighted_mix.inference import Call
from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.steps import Keep, Projector
from igva_kernels.registry import REFERENCE
from igva_kernels.runtime.context import autocast_dtype, records_gradients, saveable
from igva_kernels.runtime.dense import Norm


def layer_mix(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None = None,
    *,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The mixed row ``A``: layers weighted, summed and concatenated in one pass.

    ``A[m, g*D + d] = sum over entries (l, c, s) of block g of s * w[b, c] * h_l[image(b), skip + p, d]``.

    Args:
        hidden_states: the L hidden states, a sequence of tensors ``[I, T, D]``: separate allocations, any batch and
            token strides (they may differ between layers). They are never stacked or copied, unless the last dimension
            is not contiguous. A layer that the plan does not use may be None.
        plan: which layers go where.
        mix_weights: ``[B, C]`` or ``[1, C]`` (broadcast), used in fp32 (fp64 with fp64 layers), differentiable; None
            where the plan has no columns.
        skip_tokens: tokens left out at the start of every state (1 for CLIP's CLS); P = T - skip_tokens.
        image_index: int64 ``[B]``, the image that each row of the batch reads; None where row b reads image b. An
            index out of range raises a ValueError on a CPU. On a GPU the kernels return NaN rows for it; "reference"
            does what torch's indexing does.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        ``[B, P, G*D]`` in the layers' dtype, accumulated in fp32 and rounded once.

    Raises:
        ValueError: shapes, devices or values do not fit; the message names the argument.
        TypeError: wrong types or dtypes.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    return _run(Call(hidden_states, plan, mix_weights, skip_tokens, image_index, impl))


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
    """``act(norm?(A) @ weight.T + bias)``; A, and the arguments not described here, are those of ``layer_mix``.

    Args:
        weight: ``[H, G*D]``; A is rounded once to its dtype (or to autocast's).
        bias: ``[H]`` or None.
        activation: None, "gelu" (erf), "gelu_tanh", "relu" or "silu".
        norm: None or ``(weight or None, bias or None, eps)``: LayerNorm over the whole row of A, statistics in fp32
            from the unrounded mix, one rounding after.

    Returns:
        ``[B, P, H]`` in the dtype of ``weight`` (or autocast's).

    Raises:
        ValueError, TypeError, NotImplementedError: as in ``layer_mix``.
    """
    projector = Projector(weight, bias, None, None, norm, activation)
    names = ("weight", "bias")
    return _run(Call(hidden_states, plan, mix_weights, skip_tokens, image_index, impl, projector, names))


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
    """``act(norm?(A) @ weight1.T + bias1) @ weight2.T + bias2``: the whole connector.

    A is that of ``layer_mix``; ``activation`` and ``norm`` are those of ``layer_mix_linear``.

    Args:
        weight1: ``[N, G*D]``; A is rounded once to its dtype (or to autocast's).
        bias1: ``[N]`` or None.
        weight2: ``[H, N]``.
        bias2: ``[H]`` or None.

    Returns:
        ``[B, P, H]`` in the dtype of ``weight1`` (or autocast's).

    Raises:
        ValueError, TypeError, NotImplementedError: as in ``layer_mix``.
    """
    call = Call(
        hidden_states, plan, mix_weights, skip_tokens, image_index, impl,
        Projector(weight1, bias1, weight2, bias2, norm, activation), ("weight1", "bias1", "weight2", "bias2"),
    )  # fmt: skip
    return _run(call)


def check_impl(impl: str, device: torch.device, dtype: torch.dtype, activation: str | None = None) -> None:
    """Checks that ``impl`` can serve layers of this device and dtype.

    Raises:
        ValueError: no such ``impl``.
        NotImplementedError: an explicit ``impl`` cannot; the message says why.
    """
    op.OPERATOR.select(impl, device, dtype, (), activation)


def _run(call: Call) -> Tensor:
    key = inference.key_of(call)
    out = None if key is None else inference.run(call, key)
    if out is not None:
        return out
    mix = check_mix(call.hidden_states, call.plan, call.mix_weights, call.skip_tokens, call.image_index)
    projector = None if call.projector is None else check_projector(mix, call.projector, call.names)
    backend = _select(call.impl, mix, projector)
    if backend == REFERENCE:
        return _reference_rows(mix) if projector is None else project_as_published(mix, projector)
    if key is not None:
        inference.remember(key, call, mix)
    if projector is not None:
        return _project(backend, mix, projector)
    keep = Keep.SOURCES if mix.weights_need_grad else Keep.NOTHING
    return op.layer_mix(**_arguments(mix), keep=keep.value, impl=backend)[0]


def _select(impl: str, mix: Mix, projector: Projector | None) -> str:
    first, tensors, activation = mix.layers[0], [mix.layers, mix.mix_weights], None
    if projector is not None:
        *weights, norm, activation = projector
        tensors += [weights, norm]
    return op.OPERATOR.select(impl, first.device, first.dtype, tensors, activation, mix.code)


def _arguments(mix: Mix) -> dict[str, Any]:
    """What every registered operator takes of a mix."""
    return {
        "layers": mix.layers, "mix_weights": mix.mix_weights, "image_index": mix.image_index, "plan": mix.code,
        "skip_tokens": mix.skip_tokens,
    }  # fmt: skip


def _reference_rows(mix: Mix) -> Tensor:
    layers, mix_weights, index = mix.layers, mix.mix_weights, mix.image_index
    if index is not None:
        check_image_range(index, layers[0].shape[0])
    if torch.is_grad_enabled():
        # Plain torch saves these for its backward; of the layers it saves only what it computes from them.
        mix_weights, index = saveable(mix_weights), saveable(index)
    return spec.layer_mix_as_published(
        layers, plan_of(mix), mix_weights, skip_tokens=mix.skip_tokens, image_index=index
    )  # fmt: skip


def _project(backend: str, mix: Mix, projector: Projector) -> Tensor:
    *weights, norm, activation = projector
    norm_weight, norm_bias, norm_eps = (None, None, None) if norm is None else norm
    weight1, bias1, weight2, bias2 = to_autocast(weights, mix.layers[0].device)
    keep, keep_z = what_to_keep(mix, projector)
    return op.projector(
        **_arguments(mix), weight1=weight1, bias1=bias1, norm_weight=norm_weight, norm_bias=norm_bias, weight2=weight2,
        bias2=bias2, norm_eps=norm_eps, activation=activation, keep=keep.value, keep_z=keep_z, impl=backend,
    )[0]  # fmt: skip


def project_as_published(mix: Mix, projector: Projector) -> Tensor:
    """What ``impl="reference"`` runs: the published code for the mixed row, and plain torch for what reads it."""
    *weights, norm, activation = projector
    if torch.is_grad_enabled():
        weights = [saveable(weight) for weight in weights]
        norm = None if norm is None else (saveable(norm[0]), saveable(norm[1]), norm[2])
    return spec.project(_reference_rows(mix), *weights, activation=activation, norm=norm)


def to_autocast(weights: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Weights of one dtype as a registered operator takes them: in autocast's dtype, if it is on."""
    dtype = autocast_dtype(device)
    return [w if w is None or dtype is None or w.dtype == torch.float64 else w.to(dtype) for w in weights]


def what_to_keep(mix: Mix, projector: Projector) -> tuple[Keep, bool]:
    """What the backward will need of the mixed row, and whether it needs z."""
    if not records_gradients():
        return Keep.NOTHING, False
    weight1, bias1, weight2, _, norm, activation = projector
    into_rows = mix.weights_need_grad or any(layer.requires_grad for layer in mix.layers)
    into_norm = norm is not None and (_needs_grad(norm[0]) or _needs_grad(norm[1]))
    keep = Keep.NOTHING
    if mix.weights_need_grad:
        keep = Keep.SOURCES
    elif weight1.requires_grad or into_norm or (into_rows and norm is not None):
        keep = Keep.SOURCES if mix.only_taps else Keep.ROWS  # taps are inputs already
    into_z = into_rows or into_norm or weight1.requires_grad or _needs_grad(bias1)
    return keep, (activation is not None and into_z) or _needs_grad(weight2)


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
