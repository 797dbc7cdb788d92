"""What the connector needs of an image, kept so that many instructions can read it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix import MixPlan


@dataclass(frozen=True)
class ImageFeatures:
    """Encoded images: the sources of a plan, and the rest of the plan, to be run once an instruction is known.

    IGVA keeps 5 states per image instead of 25. Everything downstream of the tower, including the summaries that the
    allocator reads, is computed from them, so one encoded image serves any number of instructions.
    """

    sources: tuple[Tensor, ...]
    """S states ``[I, T, D]``, CLS included, in the order in which ``plan`` numbers them."""
    made_of: MixPlan
    """What each source is made of: one block per source, over the states of the tower. Connectors that read different
    layers can have the same ``plan``, so this tells their features apart."""
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
        return replace(self, sources=tuple(source[at] for source in self.sources))

    def to(self, *args: Any, **kwargs: Any) -> ImageFeatures:
        """The same features on another device or in another dtype; arguments as in ``Tensor.to``."""
        return replace(self, sources=tuple(source.to(*args, **kwargs) for source in self.sources))

    @property
    def nbytes(self) -> int:
        """Bytes of all sources."""
        return sum(source.nbytes for source in self.sources)

    @staticmethod
    def cat(features: Sequence[ImageFeatures]) -> ImageFeatures:
        """All images, in order.

        Raises:
            ValueError: there is nothing to join, or the sources are made or mixed by different plans.
        """
        plans = {(f.made_of, f.plan) for f in features}
        if len(plans) != 1:
            raise ValueError(
                f"features: got {len(features)} ImageFeatures of {len(plans)} plans, need at least one, all of one plan"
            )
        joined = (torch.cat(column) for column in zip(*(f.sources for f in features), strict=True))
        return replace(features[0], sources=tuple(joined))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; ``ImageFeatures.load`` reads it back."""
        from safetensors.torch import save_file

        tensors = {str(i): source.contiguous() for i, source in enumerate(self.sources)}
        plans = {"made_of": self.made_of, "plan": self.plan}
        save_file(tensors, path, metadata={name: json.dumps(plan.to_dict()) for name, plan in plans.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> ImageFeatures:
        """The features that ``save`` wrote.

        Raises:
            ValueError: the file holds something else, or was written before files said what sources are made of.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            if "plan" not in metadata:
                raise ValueError(f"path: {os.fspath(path)!r} holds no image features")
            if "made_of" not in metadata:
                raise ValueError(
                    f"path: {os.fspath(path)!r} is of an older version and does not say which layers its sources are "
                    f"made of, need a file that does; encode the images again"
                )
            made_of, plan = (MixPlan.from_dict(json.loads(metadata[name])) for name in ("made_of", "plan"))
            return cls(tuple(file.get_tensor(str(i)) for i in range(made_of.num_blocks)), made_of, plan)


class ImageFeatureCache:
    """Remembers encoded images by their content, so that the same picture is encoded only once.

    ::

        encode = ImageFeatureCache(model.encode_images, max_bytes=2 << 30)
        model.generate(**prompt, image_features=encode(pixel_values))

    The least recently used images are dropped at the limit. Threads may share a cache (two that meet a new picture at
    the same time both encode it). Call ``clear`` when the tower's weights change, which outdates what is remembered.

    Args:
        encode: computes the features of I images from ``[I, 3, height, width]``.
        max_bytes: most bytes that the remembered features may take, on the device where ``encode`` leaves them.

    Raises:
        ValueError: ``max_bytes`` is negative.
    """

    def __init__(self, encode: Callable[[Tensor], ImageFeatures], max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes: got {max_bytes}, need 0 or more")
        self.max_bytes = max_bytes
        self.nbytes = 0
        """Bytes of the remembered features."""
        self.hits = 0
        """Images that did not have to be encoded."""
        self.misses = 0
        """Images that were encoded."""
        self._encode = encode
        self._images: OrderedDict[bytes, ImageFeatures] = OrderedDict()
        self._generation = 0  # how often it was cleared
        self._lock = threading.Lock()

    def __call__(self, pixel_values: Tensor) -> ImageFeatures:
        """The features of ``pixel_values`` ``[I, 3, height, width]``; all new images are encoded in one batch."""
        keys = [_content(image) for image in pixel_values]
        if not keys:
            return self._encode(pixel_values)
        with self._lock:
            generation = self._generation
            known = {key: self._images[key] for key in keys if key in self._images}
        new = {key: at for at, key in enumerate(keys) if key not in known}
        if new:
            encoded = self._encode(pixel_values[list(new.values())])
            known |= {key: encoded[at] for at, key in enumerate(new)}
        with self._lock:
            self.misses += len(new)
            self.hits += len(keys) - len(new)
            if generation == self._generation:  # or the weights have changed since
                for key in dict.fromkeys(keys):
                    self._remember(key, known[key])
        return ImageFeatures.cat([known[key] for key in keys])

    def __len__(self) -> int:
        """How many images are remembered."""
        return len(self._images)

    def clear(self) -> None:
        """Forget every image; those that another thread is encoding at the moment are not remembered either."""
        with self._lock:
            self._images.clear()
            self.nbytes = 0
            self._generation += 1

    def _remember(self, key: bytes, features: ImageFeatures) -> None:
        if key in self._images:
            self._images.move_to_end(key)
            return
        if features.nbytes > self.max_bytes:
            return
        # A copy, because a view would keep the whole batch alive that the image was encoded in.
        self._images[key] = replace(features, sources=tuple(source.clone() for source in features.sources))
        self.nbytes += features.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._images.popitem(last=False)[1].nbytes


def _content(image: Tensor) -> bytes:
    data = image.detach().cpu().contiguous()
    digest = hashlib.blake2b(repr((data.dtype, data.shape)).encode(), digest_size=20)
    digest.update(data.view(torch.uint8).numpy())
    return digest.digest()
