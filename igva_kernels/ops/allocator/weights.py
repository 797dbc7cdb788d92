"""The allocator's weights by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class AllocatorBlockWeights(NamedTuple):
    """Weights of a block of ``nn.WeightAllocator``, in the order of its ``parameters()``; C is the hidden width."""

    in_proj_weight: Tensor
    """``[3C, C]``: query, key and value projections."""
    in_proj_bias: Tensor
    out_proj_weight: Tensor
    out_proj_bias: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    ffn1_weight: Tensor
    ffn1_bias: Tensor
    ffn2_weight: Tensor
    ffn2_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor


class AllocatorWeights(NamedTuple):
    """Weights of ``nn.WeightAllocator``."""

    sentence_weight: Tensor
    """``[C, E]``."""
    sentence_bias: Tensor
    cls_weight: Tensor
    """``[C, D]``."""
    cls_bias: Tensor
    blocks: tuple[AllocatorBlockWeights, ...]
    head_weight: Tensor
    """``[K, C]``."""
    head_bias: Tensor

    @staticmethod
    def num_parameters(num_blocks: int) -> int:
        """How many parameters an allocator of this many blocks has, a shared one counted once per use."""
        return len(AllocatorWeights._fields) - 1 + num_blocks * len(AllocatorBlockWeights._fields)

    def misfit(self, width: int, columns: int, sentence: int, vision: int) -> str | None:
        """The parameter that has no shape of an allocator of C, K, E and D, in words; an FFN may have any width."""
        square, row = (width, width), (width,)
        needed = [(width, sentence), row, (width, vision), row]
        for block in self.blocks:
            inner = block.ffn1_weight.shape[0]
            needed += [(3 * width, width), (3 * width,), square, row, row, row]
            needed += [(inner, width), (inner,), (width, inner), row, row, row]
        needed += [(columns, width), (columns,)]
        given = [*self[:4], *(parameter for block in self.blocks for parameter in block), *self[-2:]]
        for i, (parameter, shape) in enumerate(zip(given, needed, strict=True)):
            if parameter.shape != shape:
                return f"parameter {i} has the shape {tuple(parameter.shape)}, need {shape}"
        return None

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> AllocatorWeights:
        """From a flat list in the order of ``parameters()``, in which a shared one appears once per use.

        Raises:
            ValueError: an allocator does not have this number of parameters.
        """
        size, others = len(AllocatorBlockWeights._fields), cls.num_parameters(0)
        if len(parameters) < others + size or (len(parameters) - others) % size:
            raise ValueError(
                f"parameters: got {len(parameters)} tensors, need {others} and {size} per block, of at least one block"
            )
        starts = range(4, len(parameters) - 2, size)
        blocks = tuple(AllocatorBlockWeights(*parameters[start : start + size]) for start in starts)
        sentence_weight, sentence_bias, cls_weight, cls_bias = parameters[:4]
        return cls(sentence_weight, sentence_bias, cls_weight, cls_bias, blocks, parameters[-2], parameters[-1])
