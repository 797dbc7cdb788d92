"""The public function: its arguments are checked, an implementation is chosen, and one registered operator runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.ops.layer_project import op
from igva_kernels.ops.layer_project.checks import check_bank
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.ops.weighted_mix.api import project_as_published, to_autocast, what_to_keep
from igva_kernels.registry import REFERENCE
from igva_kernels.runtime.dense import Norm


def layer_project(
    hidden_states: Sequence[Tensor | None],
    plans: Sequence[MixPlan],
    mix_weights: Tensor | Sequence[Tensor | None] | None,
    weight1: Tensor | Sequence[Tensor],
    bias1: Tensor | Sequence[Tensor | None] | None,
    weight2: Tensor | Sequence[Tensor | None] | None = None,
    bias2: Tensor | Sequence[Tensor | None] | None = None,
    *,
    activation: str | None = "gelu",
    norm: Norm | Sequence[Norm | None] | None = None,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """J projectors over J mixes of the same hidden states, in one call and one tensor.

    Member j is ``layer_mix_mlp`` of ``plans[j]`` with its own weights, or, where ``weight2`` is None,
    ``layer_mix_linear``: ``out[j] = act(norm?(A_j) @ weight1.T + bias1) @ weight2.T + bias2``. What the backward
    keeps, and the gradients, are those of J such calls; what several members share (a weight, a layer) gets the sum of
    their gradients, in the order of the members.

    ``mix_weights``, the weights, the biases and ``norm`` are either one for all members or a sequence of J.

    Args:
        hidden_states: the L hidden states, as in ``layer_mix``; one that no plan uses may be None.
        plans: J plans over these states.
        mix_weights: as in ``layer_mix``; in a sequence, None for a plan without columns.
        weight1: ``[N, G*D]``, where G is the plan's number of blocks; one dtype for all members. A_j is rounded once to
            it (or to autocast's).
        bias1: ``[N]`` or None; all members have one, or none has.
        weight2: ``[H, N]``, or None for members of a single Linear (H is then N). H is the same for all members.
        bias2: ``[H]`` or None; all members have one, or none has.
        activation: None, "gelu" (erf), "gelu_tanh", "relu" or "silu"; that of every member.
        norm: ``(weight or None, bias or None, eps)`` as in ``layer_mix_linear``, or None; in a sequence, all have one.
        skip_tokens: tokens left out at the start of every state.
        image_index: int64 ``[B]``, the image that each row of the batch reads, as in ``layer_mix``.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        ``[J, B, P, H]`` in the dtype of ``weight1`` (or autocast's); every ``out[j]`` is contiguous.

    Raises:
        ValueError: shapes, devices or values do not fit; the message names the argument, as in ``weight1[2]``.
        TypeError: wrong types or dtypes.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    linears = (weight1, bias1, weight2, bias2)
    bank = check_bank(hidden_states, plans, mix_weights, linears, norm, activation, skip_tokens, image_index)
    device, plans_of = bank.layers[0].device, [mix.code for mix in bank.mixes]
    weights = [mix.mix_weights for mix in bank.mixes if mix.mix_weights is not None]
    tensors = (bank.layers, weights, *bank.linears.values(), *bank.norms.values())
    backend = op.OPERATOR.select(impl, device, bank.layers[0].dtype, tensors, activation, *plans_of)
    members = list(zip(bank.mixes, bank.projectors, strict=True))
    if backend == REFERENCE:
        return torch.stack([project_as_published(mix, projector) for mix, projector in members])
    keeps = [what_to_keep(mix, projector) for mix, projector in members]
    return op.layer_project(
        layers=bank.layers, mix_weights=weights, image_index=image_index, plans=plans_of, reads=bank.reads,
        **{name: to_autocast(values, device) for name, values in bank.linears.items()}, **bank.norms,
        skip_tokens=skip_tokens, activation=activation, keep=[keep.value for keep, _ in keeps],
        keep_z=[keep_z for _, keep_z in keeps], impl=backend,
    )[0]  # fmt: skip
