"""Modules: weight allocators, the projector over mixed layers, several such projectors, the fuser of layers by
deformable attention, injection into a language model, and the loss that keeps the weights balanced.

Symbols: B rows of the batch, I images, T tokens, P patches, D vision width, K weight columns, G blocks of a mixed row,
H language-model width, E width of the sentence embedding.
"""

from igva_kernels.nn.allocators import LearnedWeights, TextAllocator, WeightAllocator
from igva_kernels.nn.deformable import DeformableAttention, DeformableFuser, fuse
from igva_kernels.nn.injection import TokenInjection
from igva_kernels.nn.layer_projectors import LayerProjectors, connect_all
from igva_kernels.nn.losses import balance_loss, negative_entropy
from igva_kernels.nn.projector import (
    Connector,
    LayerMixLinear,
    LayerMixNorm,
    LayerMixProjector,
    MixInput,
    column_plan,
    column_summaries,
    connect,
    is_one_operator,
    is_plain,
    mixes_in_linear,
    takes_layers,
    widen,
)

__all__ = [
    "Connector",
    "DeformableAttention",
    "DeformableFuser",
    "LayerMixLinear",
    "LayerMixNorm",
    "LayerMixProjector",
    "LayerProjectors",
    "LearnedWeights",
    "MixInput",
    "TextAllocator",
    "TokenInjection",
    "WeightAllocator",
    "balance_loss",
    "column_plan",
    "column_summaries",
    "connect",
    "connect_all",
    "fuse",
    "is_one_operator",
    "is_plain",
    "mixes_in_linear",
    "negative_entropy",
    "takes_layers",
    "widen",
]
