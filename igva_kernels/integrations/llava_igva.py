"""The reference model: its connectors and its fuser are told which implementation to run."""

from __future__ import annotations

from functools import partial

from torch import nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.integrations.lazy import check_patch_impl, explain, served_by
from igva_kernels.nn import DeformableFuser, LayerMixProjector
from igva_kernels.ops.deform_attn.op import OPERATOR as ATTENTION
from igva_kernels.ops.weighted_mix.op import OPERATOR

DESCRIPTION = "LLaVA-IGVA and other models with a LayerMixProjector"


def matches(model: nn.Module) -> bool:
    """Whether there is a connector to patch."""
    return any(isinstance(module, LayerMixProjector) for module in model.modules())


def apply(model: nn.Module, edits: PatchHandle, impl: str = "auto") -> None:
    """Set ``impl`` on every connector and fuser."""
    for name, module in model.named_modules():
        if isinstance(module, DeformableFuser):
            check_patch_impl(ATTENTION, impl, module.gamma1)
            edits.set(module, "impl", impl)
            edits.note(partial(_fuser_line, name, module, impl))
        if isinstance(module, LayerMixProjector):
            check_patch_impl(OPERATOR, impl, next(module.parameters()), module.activation)
            edits.set(module, "impl", impl)
            edits.note(partial(_line, name, module, impl))


def _fuser_line(name: str, module: DeformableFuser, impl: str) -> str:
    return f"{name}: deformable attention {served_by(ATTENTION, impl, module.gamma1)[1]}"


def _line(name: str, module: LayerMixProjector, impl: str) -> str:
    return f"{name or type(module).__name__}: {explain(module.connector, module.activation, impl)}"
