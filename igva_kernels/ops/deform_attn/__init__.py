"""Multi-scale deformable attention: every query samples a few points of some feature maps."""

from igva_kernels.ops.deform_attn.api import deform_attn

__all__ = ["deform_attn"]
