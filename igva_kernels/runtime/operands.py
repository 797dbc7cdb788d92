"""What both compiled modules take of a call: dtypes, activations, addresses, strides (csrc/common/operands.h).

Each module has its own names of dtypes and activations, so it is the first argument wherever one is needed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
"""What the kernels read and write, by the names of the modules."""


@cache
def dtype_of(module: Any, dtype: torch.dtype) -> Any:
    """The module's name of a dtype."""
    return getattr(module.DType, DTYPES[dtype])


@cache
def activation_of(module: Any, name: str | None) -> Any:
    """The module's name of an activation.

    Raises:
        NotImplementedError: it has none of this name.
    """
    if name is not None and name not in activations(module):
        raise NotImplementedError(f"{module.__name__}: its kernels have no activation {name!r}")
    return getattr(module.Activation, name or "none")


@cache
def activations(module: Any) -> tuple[str, ...]:
    """The activations that the module's kernels know."""
    return tuple(name for name in module.Activation.__members__ if name != "none")


def address(tensor: Tensor | None) -> int:
    """The address of the first element; 0 where there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def adjacent(tensor: Tensor) -> Tensor:
    """The tensor with the elements of a row side by side, which kernels take for granted; a copy if need be."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def view(module: Any, tensor: Tensor) -> tuple:
    """A tensor ``[B, P, width]``, ``View``."""
    return dtype_of(module, tensor.dtype), tensor.data_ptr(), _adjacent(tensor)


def matrix(module: Any, tensor: Tensor | None) -> tuple | None:
    """A tensor ``[rows, columns]``, ``Matrix``; None where there is none."""
    if tensor is None:
        return None
    return dtype_of(module, tensor.dtype), tensor.data_ptr(), tensor.shape, _adjacent(tensor)


def _adjacent(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor whose last dimension lies together, which kernels take for granted."""
    strides = tensor.stride()
    if strides[-1] != 1 and tensor.shape[-1] > 1 and tensor.numel():  # an empty tensor may have any strides
        raise ValueError(f"kernels need the elements of a row side by side, got a tensor with strides {strides}")
    return strides


def norm(
    module: Any, weight: Tensor | None, bias: Tensor | None, eps: float, mean: Tensor | None, rstd: Tensor | None
) -> Any:
    """A LayerNorm, ``Norm``; ``mean`` and ``rstd`` have one element per row, in the accumulation dtype."""
    return module.Norm(_parameter(module, weight), _parameter(module, bias), eps, address(mean), address(rstd))


def _parameter(module: Any, tensor: Tensor | None) -> tuple:
    """``Parameter``; nothing reads the dtype of one that is not there."""
    return dtype_of(module, torch.float32 if tensor is None else tensor.dtype), address(tensor)
