"""Several connectors over the same hidden states, in one call where nothing stands between their modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from igva_kernels.nn.projector import Connector, LayerMixProjector, MixInput, connect, is_one_operator
from igva_kernels.nn.sharding import is_untouched
from igva_kernels.ops.layer_project import layer_project
from igva_kernels.ops.weighted_mix import MixPlan


class LayerProjectors(nn.ModuleList):
    """J projectors that read the same hidden states, each with a plan of its own: ``LayerMixProjector``s in a list.

    The keys of the ``state_dict`` are those of the list (``0.linear_1.weight``). The call is one operator while every
    projector and its children are plain; otherwise each projector is called as the module that it is (a unit of FSDP
    or DeepSpeed, one with hooks, or a stand-in that peft has put there).
    """

    def forward(
        self,
        hidden_states: Sequence[Tensor | None],
        mix_weights: Tensor | Sequence[Tensor | None] | None = None,
        *,
        plans: Sequence[MixPlan] | None = None,
        image_index: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """J tensors ``[B, P, H]``, as each projector returns it; together, they are parts of one tensor.

        Args:
            hidden_states: L states ``[I, T, D]``; those that no plan uses may be None.
            mix_weights: ``[B, K]`` or ``[1, K]`` for all projectors, or a sequence of J, None for a plan without
                columns.
            plans: J plans that replace the projectors' own.
            image_index: int64 ``[B]``, the image that each row reads; None where row b reads image b.

        Raises:
            ValueError, TypeError, NotImplementedError: as in ``layer_project``.
        """
        weights = self._one_each("mix_weights", mix_weights, mix_weights is None or isinstance(mix_weights, Tensor))
        own_plans = self._one_each("plans", plans, plans is None)
        projectors: list[Any] = list(self)
        calls = list(zip(projectors, weights, own_plans, strict=True))
        if all(_is_plain(projector) for projector in projectors):
            mixed = [projector.mix_input(hidden_states, w, plan, image_index) for projector, w, plan in calls]
            return connect_all(mixed, [projector.connector for projector in projectors])
        return tuple(projector(hidden_states, w, plan=plan, image_index=image_index) for projector, w, plan in calls)

    def _one_each(self, name: str, given: Any, is_shared: bool) -> list[Any]:
        if is_shared:
            return [given] * len(self)
        if len(given) != len(self):
            raise ValueError(f"{name}: need {len(self)} entries, one for each projector, got {len(given)}")
        return list(given)


def connect_all(mixed: Sequence[MixInput], connectors: Sequence[Connector]) -> tuple[Tensor, ...]:
    """What ``connect`` returns for each connector: in one call, and then parts of one tensor, where all of them are
    plain and of one form.

    Args:
        mixed: the input of each; they share the hidden states and the image index.
        connectors: the modules of each.
    """
    if not connectors or not _is_one_call(mixed, connectors):
        return tuple(connect(own, modules) for own, modules in zip(mixed, connectors, strict=True))
    first, firsts, seconds = mixed[0], [c.linear_1 for c in connectors], [c.linear_2 for c in connectors]
    norms = [None if c.norm is None else (c.norm.weight, c.norm.bias, c.norm.eps) for c in connectors]
    out = layer_project(
        first.hidden_states, [own.plan for own in mixed], [own.mix_weights for own in mixed],
        [linear.weight for linear in firsts], [linear.bias for linear in firsts],
        [linear.weight for linear in seconds], [linear.bias for linear in seconds], activation=first.activation,
        norm=norms, skip_tokens=first.skip_tokens, image_index=first.image_index, impl=first.impl,
    )  # fmt: skip
    return out.unbind()  # not by an index, whose gradient would be as large as the whole


def _is_plain(projector: nn.Module) -> bool:
    return type(projector) is LayerMixProjector and is_untouched(projector)


def _is_one_call(mixed: Sequence[MixInput], connectors: Sequence[Connector]) -> bool:
    """Whether one operator can do all that happens, because the modules are plain and differ in numbers only."""
    if not all(is_one_operator(modules) for modules in connectors):
        return False
    forms = [_form(own, modules) for own, modules in zip(mixed, connectors, strict=True)]
    return all(form == forms[0] for form in forms)


def _form(mixed: MixInput, modules: Connector) -> tuple[Any, ...]:
    """What members of one call have in common."""
    norm, linear_1, _, linear_2 = modules
    present = [norm is None or (norm.weight is None, norm.bias is None), linear_1.bias is None, linear_2.bias is None]
    kinds = (linear_1.weight.dtype, linear_1.weight.device, linear_2.weight.shape[0])
    return (*present, *kinds, mixed.skip_tokens, mixed.activation, mixed.impl)
