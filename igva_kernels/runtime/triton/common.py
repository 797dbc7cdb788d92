"""What every kernel shares: how it is compiled, and device functions."""
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# The interpreter's own bf16 is wrong in two ways (up to Triton 3.9): tl.dot multiplies bit patterns, and fp32 -> bf16
# truncates. Under the interpreter ``cast`` and ``dot`` compute what the hardware computes.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def kernel_with(*plain: str) -> Callable[[Any], Any]:
    """``triton.jit`` for what is launched, with the integer arguments that are ``plain``.

    Triton compiles anew for an integer that is 1 or a multiple of 16. For a plain one that gains nothing, since no load
    depends on its alignment, and some change with every batch, as ``num_rows`` does in every kernel that has it.
    """
    return triton.jit(do_not_specialize=["num_rows", *plain])


kernel = kernel_with()


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


KERNEL_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
"""The activations of ``runtime.activations`` that ``value_and_slope`` knows."""


@triton.jit
def value_and_slope(z, ACTIVATION: tl.constexpr):
    """``(act(z), act'(z))``. A kernel that needs only one of them compiles nothing of the other."""
    if ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh u) = sigmoid(2 u)
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return z * s, s + z * (s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z))
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return z * s, s + z * (s * (1 - s))
    else:
        tl.static_assert(ACTIVATION == "relu", "no such activation in value_and_slope")
        # NaN stays NaN.
        return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """``act(z)``; z itself where there is no activation."""
    if ACTIVATION is None:
        return z
    else:
        value, _ = value_and_slope(z, ACTIVATION)
        return value
