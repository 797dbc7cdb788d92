"""The members one after the other on a GPU by CUDA kernels."""

from __future__ import annotations

from igva_kernels.ops.layer_project.steps import LayerProject
from igva_kernels.ops.weighted_mix.cuda import IMPLEMENTATION as MEMBER

IMPLEMENTATION = LayerProject(MEMBER)
