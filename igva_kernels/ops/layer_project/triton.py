"""The members by Triton kernels, one after the other."""

from __future__ import annotations

from igva_kernels.ops.layer_project.steps import LayerProject
from igva_kernels.ops.weighted_mix.triton import IMPLEMENTATION as MEMBER

IMPLEMENTATION = LayerProject(MEMBER)
