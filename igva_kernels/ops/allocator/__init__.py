"""The weight allocator at inference: ``allocate`` computes what ``nn.WeightAllocator`` does."""

from igva_kernels.ops.allocator.api import allocate, select
from igva_kernels.ops.allocator.weights import AllocatorBlockWeights, AllocatorWeights

__all__ = ["AllocatorBlockWeights", "AllocatorWeights", "allocate", "select"]
