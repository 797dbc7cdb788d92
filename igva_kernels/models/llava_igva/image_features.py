"""What the connector needs of an image, kept so that many instructions can read it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from igva_kernels.plan import MixPlan


@dataclass(frozen=True)
class ImageFeatures:
    """Encoded images: the sources of a plan, and what is left of the plan to do once an instruction is known.

    IGVA keeps 5 states an image instead of 25. Everything downstream of the tower can be had from them, the summaries
    that the allocator reads included, so one encoded image serves any number of instructions.
    """

    sources: tuple[Tensor, ...]
    """S states ``[I, T, D]``, CLS included, in the order in which ``plan`` counts them."""
    plan: MixPlan
    """The connector's plan over the sources."""

    def __len__(self) -> int:
        """I, the number of images."""
        return self.sources[0].shape[0]

    @property
    def num_tokens(self) -> int:
        """T, the tokens of a state."""
        return self.sources[0].shape[1]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> ImageFeatures:
        """The images at an index, a slice, or a sequence of indices; always as a batch."""
        at = slice(index, index + 1 or None) if isinstance(index, int) else index
        return ImageFeatures(tuple(source[at] for source in self.sources), self.plan)

    def to(self, *args: Any, **kwargs: Any) -> ImageFeatures:
        """The same features on another device or in another dtype; arguments as of ``Tensor.to``."""
        return ImageFeatures(tuple(source.to(*args, **kwargs) for source in self.sources), self.plan)

    @property
    def nbytes(self) -> int:
        """Bytes of all sources."""
        return sum(source.nbytes for source in self.sources)

    @staticmethod
    def cat(features: Sequence[ImageFeatures]) -> ImageFeatures:
        """The images of all, in order.

        Raises:
            ValueError: nothing to join, or features of different plans.
        """
        if not features or any(f.plan != features[0].plan for f in features):
            raise ValueError("features: need at least one ImageFeatures, all of one plan")
        joined = (torch.cat(column) for column in zip(*(f.sources for f in features), strict=True))
        return ImageFeatures(tuple(joined), features[0].plan)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; ``ImageFeatures.load`` reads it back."""
        from safetensors.torch import save_file

        tensors = {str(i): source.contiguous() for i, source in enumerate(self.sources)}
        save_file(tensors, path, metadata={"plan": json.dumps(self.plan.to_dict())})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> ImageFeatures:
        """The features that ``save`` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            if "plan" not in metadata:
                raise ValueError(f"path: {os.fspath(path)!r} holds no image features")
            plan = MixPlan.from_dict(json.loads(metadata["plan"]))
            return cls(tuple(file.get_tensor(str(i)) for i in range(len(file.keys()))), plan)
