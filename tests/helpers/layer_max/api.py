"""The public function."""

from collections.abc import Sequence

from torch import Tensor

from igva_kernels.registry import REFERENCE
from layer_max import spec
from layer_max.op import OPERATOR, forward


def layer_max(layers: Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """The elementwise maximum ``[I, T, D]`` of layers of one shape and dtype."""
    layers = list(layers)
    backend = OPERATOR.select(impl, layers[0].device, layers[0].dtype, layers)
    return spec.layer_max(layers) if backend == REFERENCE else forward(layers=layers, impl=backend)[0]
