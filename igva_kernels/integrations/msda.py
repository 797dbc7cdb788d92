"""Stands in for ``MultiScaleDeformableAttention``, the CUDA extension of Deformable DETR, which many repositories ship.

    from igva_kernels.integrations import msda

    msda.register()  # before the repository is imported, which imports the extension
    from models.ops.modules import MSDeformAttn

The repository's own autograd function then calls this package's operator, on GPUs, and on CPUs, which the extension
does not serve. Nothing is built, any batch size will do, bf16 and fp16 are computed in fp32, and gradients are
deterministic. This happens on request only: importing this package registers nothing.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from igva_kernels.ops.deform_attn import deform_attn
from igva_kernels.ops.deform_attn.grads import deform_attn_grads
from igva_kernels.registry import check_here

NAME = "MultiScaleDeformableAttention"
"""The module that repositories import."""

_ABSENT = object()
"""Stands for no module of that name."""


def register(*, force: bool = False, impl: str = "auto") -> Registration:
    """Put a module named ``MultiScaleDeformableAttention`` into ``sys.modules``, with ``ms_deform_attn_forward`` and
    ``ms_deform_attn_backward`` as the extension has them.

    The sizes of the levels come as a tensor, and the operator needs them as integers. On a GPU, reading them waits for
    the device, once for each tensor that has not been changed since: transformers of this kind make one tensor for all
    of their layers.

    Args:
        force: replace a module of that name that is loaded or installed.
        impl: as in ``deform_attn``.

    Returns:
        What undoes it, by ``undo()`` or at the end of a ``with`` block.

    Raises:
        ValueError: there is a module of that name, and ``force`` is False; an unknown ``impl``.
        NotImplementedError: ``impl`` can serve nothing here.
    """
    check_here(impl)
    old = sys.modules.get(NAME, _ABSENT)
    if not force and old is not _ABSENT:
        raise ValueError(f"{NAME}: got a module that is loaded already, {old!r}; need force=True to replace it")
    if not force and (spec := find_spec(NAME)) is not None:
        raise ValueError(f"{NAME}: it is installed, at {spec.origin}; need force=True to use this package in its place")
    module = _module(impl)
    sys.modules[NAME] = module
    return Registration(module, old)


class Registration:
    """A module that was put into ``sys.modules``, until ``undo``."""

    def __init__(self, module: ModuleType, old: Any) -> None:
        self.module, self._old = module, old

    def undo(self) -> None:
        """Restore what was there. Code that has imported the module keeps it. A second call does nothing.

        Raises:
            ValueError: another module has taken the place since.
        """
        if self._old is self.module:
            return
        if sys.modules.get(NAME) is not self.module:
            raise ValueError(f"{NAME}: sys.modules has another module of that name since; undo that first")
        if self._old is _ABSENT:
            del sys.modules[NAME]
        else:
            sys.modules[NAME] = self._old
        self._old = self.module

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _module(impl: str) -> ModuleType:
    def ms_deform_attn_forward(
        value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_loc: Tensor, attn_weight: Tensor,
        im2col_step: int,
    ) -> Tensor:  # fmt: skip
        """The output ``[B, Q, Hd * dh]``; ``level_start_index`` and ``im2col_step`` are not needed."""
        shapes = _SIZES.of(spatial_shapes)
        return deform_attn(value, shapes, sampling_loc, attn_weight, reference=None, softmax=False, impl=impl)

    def ms_deform_attn_backward(
        value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_loc: Tensor, attn_weight: Tensor,
        grad_output: Tensor, im2col_step: int,
    ) -> list[Tensor]:  # fmt: skip
        """The gradients of ``value``, ``sampling_loc`` and ``attn_weight``."""
        shapes = _SIZES.of(spatial_shapes)
        return list(deform_attn_grads(grad_output, value, shapes, sampling_loc, attn_weight, impl=impl))

    module = ModuleType(NAME, __doc__)
    module.__spec__ = ModuleSpec(NAME, None, origin=__file__)  # without one, find_spec of this name would fail
    vars(module).update(
        ms_deform_attn_forward=ms_deform_attn_forward, ms_deform_attn_backward=ms_deform_attn_backward
    )  # fmt: skip
    return module


class Sizes:
    """The sizes in tensors on a device, each of which is read once, and again if it has been changed in place."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def of(self, shapes: Tensor) -> list[tuple[int, int]]:
        """(H, W) of each level, from a tensor ``[L, 2]``."""
        if shapes.device.type == "cpu" or shapes.is_inference():  # nothing waits; no version says what has changed
            return _read(shapes)
        version, sizes = self._known.get(shapes, (None, []))
        if version != shapes._version:
            sizes = _read(shapes)
            self._known[shapes] = shapes._version, sizes
        return sizes


def _read(shapes: Tensor) -> list[tuple[int, int]]:
    return [(height, width) for height, width in shapes.tolist()]


_SIZES = Sizes()
