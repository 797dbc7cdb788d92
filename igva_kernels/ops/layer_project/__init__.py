"""Several projectors over mixes of the same layers, in one call: ``layer_project``."""

from igva_kernels.ops.layer_project.api import layer_project

__all__ = ["layer_project"]
