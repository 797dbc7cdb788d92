"""The implementation for the CPU backend, one layer at a time."""

import torch
from torch import Tensor

from igva_kernels.registry import Implementation


class CpuLayerMax(Implementation):
    def layer_max(self, layers: list[Tensor]) -> Tensor:
        """Reads every layer once; nothing is stacked."""
        largest = layers[0].clone(memory_format=torch.contiguous_format)
        for layer in layers[1:]:
            torch.maximum(largest, layer, out=largest)
        return largest

    def backward(self, grad: Tensor, layers: list[Tensor]) -> list[Tensor]:
        largest = self.layer_max(layers)
        attained = [layer == largest for layer in layers]
        share = grad / sum(attained)
        return [(share * one).to(grad.dtype) for one in attained]


IMPLEMENTATION = CpuLayerMax()
