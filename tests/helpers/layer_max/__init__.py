"""An operator that is not a weighted sum, as a newcomer would add it: the elementwise maximum over hidden states."""

from layer_max.api import layer_max

__all__ = ["layer_max"]
