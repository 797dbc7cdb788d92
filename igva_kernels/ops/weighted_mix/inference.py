"""Calls without gradients go straight to the kernels once a call of the same layout has passed all checks.

At one image a kernel takes less time than Python needs to look at 25 states and to pass them through torch's
dispatcher. So what the checks found is remembered by the layout of the tensors, and what depends on more than the
layout is looked at in every call. A call that anything around it would notice goes the long way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.checks import Mix, compact, plan_of
from igva_kernels.ops.weighted_mix.op import OPERATOR
from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.steps import Keep, MixArgs, Projector
from igva_kernels.registry import REFERENCE, choose
from igva_kernels.runtime.context import autocast_dtype, is_plain, is_unobserved
from igva_kernels.runtime.layouts import Key, Layouts
from igva_kernels.runtime.routes import is_explaining


class Call(NamedTuple):
    """The arguments of a public operator, as they were given."""

    hidden_states: Any
    plan: Any
    mix_weights: Any
    skip_tokens: Any
    image_index: Any
    impl: Any
    projector: Projector | None = None
    names: tuple[str, ...] = ()
    """What errors call the projector's weights: which operator it is."""


class Checked(NamedTuple):
    """What is known of a call by its layout."""

    code: str
    """Of the plan over the layers in use."""
    plan: MixPlan
    strides: Sequence[tuple[int, ...]]
    """Of the layers in use."""
    wide: tuple[torch.dtype, int, int] | None
    """The dtype and shape that the mix weights get first; None where they have both."""


_CHECKED: Layouts[Checked] = Layouts()


def key_of(call: Call) -> Key | None:
    """What the call is remembered by; None where it must go the long way."""
    states, plan, mix_weights, skip_tokens, index, impl, projector, names = call
    if not is_unobserved() or is_explaining() or type(plan) is not MixPlan or type(states) not in (list, tuple):
        return None
    if type(skip_tokens) is not int or type(impl) is not str or impl == REFERENCE:
        return None
    used, code, *_ = compact(plan.code, plan.num_states, len(states))
    optional: list[Any] = [mix_weights, index]
    # The shape of a layer is part of its layout, too; as a constant it keeps the search short where batches vary.
    constants: tuple[Any, ...] = (code, skip_tokens, impl, names, getattr(states[used[0]], "shape", None))
    if projector is not None:
        *weights, norm, activation = projector
        if activation is not None and type(activation) is not str:
            return None
        optional, constants = optional + weights, (*constants, activation)
        if norm is not None:
            if type(norm) is not tuple or len(norm) != 3 or type(norm[2]) is not float:
                return None
            optional, constants = [*optional, *norm[:2]], (*constants, norm[2])
    given = [each for each in optional if each is not None]
    missing = tuple([each is None for each in optional])
    return Key((constants, missing), [states[layer] for layer in used] + given)


def run(call: Call, key: Key) -> Tensor | None:
    """The result, where a call of the same layout has passed the checks; otherwise None."""
    checked = _CHECKED.get(key)
    if checked is None:
        return None
    code, plan, strides, wide = checked
    layers, projector, mix_weights = key.tensors[: len(strides)], call.projector, call.mix_weights
    if not all([tensor.untyped_storage().size() for tensor in key.tensors[len(strides) :]]):
        return None  # a weight was freed, which its layout does not show
    first, activation = layers[0], None if projector is None else projector.activation
    backend = choose(OPERATOR.name, call.impl, first.device, first.dtype, (activation, code))
    if backend == REFERENCE:
        return None
    implementation = OPERATOR.implementation(backend)
    with torch._C._AutoDispatchBelowAutograd():  # as the dispatcher calls a kernel
        if wide is not None:
            mix_weights = mix_weights.to(wide[0]).expand(wide[1:])
        args = MixArgs(layers, plan, mix_weights, call.image_index, call.skip_tokens, strides)
        if projector is None:
            return implementation.mix(args, first.dtype).rows
        return implementation.project(args, projector, Keep.NOTHING, False)[0]


def remember(key: Key, call: Call, mix: Mix) -> None:
    """Remembers that a call has passed the checks, unless something must be made of its tensors first."""
    if _CHECKED.get(key) is not None:
        return
    if autocast_dtype(mix.layers[0].device) is not None or not all(map(is_plain, key.tensors)):
        return
    norm = () if call.projector is None or call.projector.norm is None else call.projector.norm[:2]
    dense = [each for each in (mix.image_index, *norm) if each is not None]
    strides = [layer.stride() for layer in mix.layers]
    if not all(each.is_contiguous() for each in dense) or any(stride[-1] != 1 for stride in strides):
        return
    wide = None
    if mix.mix_weights is not call.mix_weights:
        assert mix.mix_weights is not None
        wide = mix.mix_weights.dtype, *mix.mix_weights.shape
    _CHECKED.put(key, Checked(mix.code, plan_of(mix), strides, wide))
