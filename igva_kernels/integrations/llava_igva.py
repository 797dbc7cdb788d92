"""The reference model: its connectors are told which implementation to run."""

from __future__ import annotations

from torch import nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.nn import LayerMixProjector
from igva_kernels.ops.weighted_mix import check_impl

DESCRIPTION = "LLaVA-IGVA and other models with a LayerMixProjector"


def matches(model: nn.Module) -> bool:
    """Whether there is a connector to patch."""
    return any(isinstance(module, LayerMixProjector) for module in model.modules())


def apply(model: nn.Module, edits: PatchHandle, impl: str = "auto") -> None:
    """Set ``impl`` on every connector, after checking that it can serve it."""
    for module in model.modules():
        if isinstance(module, LayerMixProjector):
            weight = next(module.parameters())
            check_impl(impl, weight.device, weight.dtype, module.activation)
            edits.set(module, "impl", impl)
