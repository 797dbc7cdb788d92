"""The weighted mix of layers, and the projector over it: ``layer_mix``, ``layer_mix_linear``, ``layer_mix_mlp``."""

from igva_kernels.ops.weighted_mix.api import check_impl, layer_mix, layer_mix_linear, layer_mix_mlp
from igva_kernels.ops.weighted_mix.plan import Entry, MixPlan, is_tap

__all__ = ["Entry", "MixPlan", "check_impl", "is_tap", "layer_mix", "layer_mix_linear", "layer_mix_mlp"]
