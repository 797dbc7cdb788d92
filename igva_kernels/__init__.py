"""Fused multi-layer visual feature fusion for LLaVA-style models.

The per-layer weighted sum and the projector that reads it, in one operator; features into the language model's layers.
"""

from igva_kernels.graphs import GraphLimitWarning, graphed
from igva_kernels.integrations import PatchHandle, patch, patched
from igva_kernels.ops.deform_attn import deform_attn
from igva_kernels.ops.inject_tokens import inject_tokens, token_rows
from igva_kernels.ops.layer_project import layer_project
from igva_kernels.ops.weighted_mix import MixPlan, layer_mix, layer_mix_linear, layer_mix_mlp
from igva_kernels.registry import BackendStatus, backends
from igva_kernels.runtime.context import FallbackWarning
from igva_kernels.runtime.routes import explain
from igva_kernels.streaming import HiddenStateStream, stream_hidden_states
from igva_kernels.version import __version__

__all__ = [
    "BackendStatus",
    "FallbackWarning",
    "GraphLimitWarning",
    "HiddenStateStream",
    "MixPlan",
    "PatchHandle",
    "__version__",
    "backends",
    "deform_attn",
    "explain",
    "graphed",
    "inject_tokens",
    "layer_mix",
    "layer_mix_linear",
    "layer_mix_mlp",
    "layer_project",
    "patch",
    "patched",
    "stream_hidden_states",
    "token_rows",
]
