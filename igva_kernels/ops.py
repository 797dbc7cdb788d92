"""The public operators: one call checks its arguments, chooses a backend, and runs one registered operator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from igva_kernels import dispatch, reference
from igva_kernels.backends.base import Keep, ProjectorWeights
from igva_kernels.checks import check_image_index, check_layers, check_mix_weights, check_weight
from igva_kernels.context import autocast_dtype, constant_under_compile, saveable
from igva_kernels.library import OPS
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
    """The mixed row ``A``: layers weighted, summed and concatenated in one pass.

    ``A[m, g*D + d] = sum over entries (l, c, s) of block g of s * w[b, c] * h_l[image(b), skip + p, d]``.

    Args:
        hidden_states: the L hidden states, a sequence of tensors ``[I, T, D]``: separate allocations, any batch and
            token strides (they may differ between layers). They are never stacked nor copied, unless the last dimension
            is not contiguous. A layer that the plan does not use may be None.
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
            call.layers, call.plan, call.mix_weights, skip_tokens=skip_tokens, image_index=call.image_index
        )
    keep = Keep.SOURCES if call.mix_weights_need_grad else Keep.NOTHING
    rows, _ = OPS.layer_mix(
        call.layers, call.mix_weights, call.image_index, call.code, skip_tokens, keep.value, call.impl
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
        norm: None or ``(weight or None, bias or None, eps)``: LayerNorm over the whole row of A, statistics in fp32
            from the unrounded mix, one rounding after.
        skip_tokens: as in ``layer_mix``.
        image_index: as in ``layer_mix``.
        impl: as in ``layer_mix``.

    Returns:
        ``[B, P, H]`` in the dtype of ``weight`` (or autocast's).

    Raises:
        ValueError, TypeError, NotImplementedError: as in ``layer_mix``.
    """
    call = _Call(hidden_states, plan, mix_weights, skip_tokens, image_index, impl, weight, bias, norm)
    weights, norm = call.check_projector(ProjectorWeights(weight, bias, None, None), activation, norm, "")
    if call.impl == "reference":
        return reference.layer_mix_linear(
            call.layers, call.plan, call.mix_weights, weights.weight1, weights.bias1,
            activation=activation, norm=norm, skip_tokens=skip_tokens, image_index=call.image_index,
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
    weights = ProjectorWeights(weight1, bias1, weight2, bias2)
    call = _Call(hidden_states, plan, mix_weights, skip_tokens, image_index, impl, weights, norm)
    weights, norm = call.check_projector(weights, activation, norm, "1")
    if call.impl == "reference":
        return reference.layer_mix_mlp(
            call.layers, call.plan, call.mix_weights, *weights,
            activation=activation, norm=norm, skip_tokens=skip_tokens, image_index=call.image_index,
        )  # fmt: skip
    return call.project("layer_mix_mlp", weights, activation, norm)


@constant_under_compile
def _lower(code: str, num_states: int | None, length: int) -> tuple[tuple[int, ...], str, int, int, bool]:
    """``(layers in use, code of the compact plan, C, G, only taps)`` of a plan for ``length`` hidden states.

    A function of constants only, so that torch.compile evaluates it while tracing.
    """
    return _lower_once(code, num_states, length)


@cache
def _lower_once(code: str, num_states: int | None, length: int) -> tuple[tuple[int, ...], str, int, int, bool]:
    layers, plan = MixPlan(MixPlan.from_code(code).blocks, num_states).resolve(length).compact()
    only_taps = all(is_tap(block) for block in plan.reduced()[0].blocks)
    return layers, plan.code, plan.num_columns, plan.num_blocks, only_taps


@constant_under_compile
def _plan(code: str) -> MixPlan:
    return MixPlan.from_code(code)


class _Call:
    """The checked arguments of one call."""

    def __init__(
        self,
        hidden_states: Sequence[Tensor | None],
        plan: MixPlan,
        mix_weights: Tensor | None,
        skip_tokens: int,
        image_index: Tensor | None,
        impl: str,
        *parameters: Any,
    ) -> None:
        if not isinstance(plan, MixPlan):
            raise TypeError(f"plan: need a MixPlan, got {type(plan).__name__}")
        if isinstance(hidden_states, Tensor) or not isinstance(hidden_states, Sequence):
            raise TypeError(
                f"hidden_states: need a sequence of tensors [I, T, D], got {type(hidden_states).__name__}; "
                f"pass the states as they are, not stacked"
            )
        used, self.code, num_columns, self.num_blocks, self.only_taps = _lower(
            plan.code, plan.num_states, len(hidden_states)
        )
        self.layers = check_layers(hidden_states, used)
        first = self.layers[0]
        num_images, num_tokens, self.width = first.shape
        if isinstance(skip_tokens, bool) or not isinstance(skip_tokens, int):
            raise TypeError(f"skip_tokens: need an int, got {type(skip_tokens).__name__}")
        if not 0 <= skip_tokens <= num_tokens:
            raise ValueError(f"skip_tokens: got {skip_tokens}, need 0 to {num_tokens}, the tokens of a hidden state")
        self.skip_tokens = skip_tokens
        self.impl = dispatch.select(impl, first.device, first.dtype, self.layers, mix_weights, parameters)
        # What plain torch saves for its backward is copied where it must be; an operator does so itself.
        self.copies = self.impl == "reference" and torch.is_grad_enabled()
        self.image_index = image_index
        num_rows = num_images
        if image_index is not None:
            check_image_index(image_index, first.device, num_images, self.impl == "reference")
            num_rows = image_index.shape[0]
            self.image_index = saveable(image_index) if self.copies else image_index
        self.mix_weights = check_mix_weights(mix_weights, num_columns, num_rows, first)
        self.mix_weights_need_grad = (
            self.mix_weights is not None and self.mix_weights.requires_grad and torch.is_grad_enabled()
        )

    @property
    def plan(self) -> MixPlan:
        """The plan over the layers in use."""
        return _plan(self.code)

    def check_projector(
        self, weights: ProjectorWeights, activation: str | None, norm: Norm | None, first: str
    ) -> tuple[ProjectorWeights, Norm | None]:
        """Weights and norm as the implementation reads them; ``first`` numbers the first Linear."""
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, need None or one of {', '.join(map(repr, ACTIVATIONS))}")
        weight1, bias1, weight2, bias2 = weights
        row = self.num_blocks * self.width
        device = self.layers[0].device
        check_weight(f"weight{first}", weight1, device, weight1, (None, row))
        check_weight(f"bias{first}", bias1, device, weight1, (weight1.shape[0],))
        if weight2 is not None:
            check_weight("weight2", weight2, device, weight1, (None, weight1.shape[0]))
            check_weight("bias2", bias2, device, weight1, (weight2.shape[0],))
        if norm is not None:
            if not isinstance(norm, (tuple, list)) or len(norm) != 3:
                raise TypeError(f"norm: need None or (weight or None, bias or None, eps), got {norm!r}")
            norm_weight, norm_bias, eps = norm
            check_weight("norm[0]", norm_weight, device, norm_weight, (row,))
            check_weight("norm[1]", norm_bias, device, norm_bias, (row,))
            norm = (norm_weight, norm_bias, float(eps))
        if self.copies:
            weights = ProjectorWeights(*map(saveable, weights))
            norm = None if norm is None else (saveable(norm[0]), saveable(norm[1]), norm[2])
        dtype = None if self.impl == "reference" else autocast_dtype(device)
        if dtype is not None and weight1.dtype != torch.float64:
            weights = ProjectorWeights(*(None if weight is None else weight.to(dtype) for weight in weights))
        return weights, norm

    def project(self, name: str, weights: ProjectorWeights, activation: str | None, norm: Norm | None) -> Tensor:
        """Run the registered operator ``name``; what it keeps depends on the gradients that are asked for."""
        weight1, bias1, weight2, bias2 = weights
        norm_weight, norm_bias, norm_eps = (None, None, None) if norm is None else norm
        keep, keep_z = Keep.NOTHING, False
        if torch.is_grad_enabled():
            into_rows = self.mix_weights_need_grad or any(layer.requires_grad for layer in self.layers)
            into_norm = _requires_grad(norm_weight) or _requires_grad(norm_bias)
            if self.mix_weights_need_grad:
                keep = Keep.SOURCES
            elif weight1.requires_grad or into_norm or (into_rows and norm is not None):
                keep = Keep.SOURCES if self.only_taps else Keep.ROWS  # taps lie there anyway
            into_z = into_rows or into_norm or weight1.requires_grad or _requires_grad(bias1)
            keep_z = (activation is not None and into_z) or _requires_grad(weight2)
        args = [self.layers, self.mix_weights, self.image_index, weight1, bias1, norm_weight, norm_bias]
        if weight2 is not None:
            args += [weight2, bias2]
        op = getattr(OPS, name)
        out, _ = op(*args, self.code, self.skip_tokens, norm_eps, activation, keep.value, keep_z, self.impl)
        return out


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
