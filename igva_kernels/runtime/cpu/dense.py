"""Dense steps on the CPU: products by our kernels or by torch's libraries, activations in C++."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from igva_kernels.runtime import native
from igva_kernels.runtime.cpu import products
from igva_kernels.runtime.dense import Dense
from igva_kernels.runtime.operands import activation_of, address, dtype_of, matrix
from igva_kernels.runtime.routes import is_explaining, took

PRODUCT_BYTES = 24 << 20
"""The most bytes that one of our products works in, where nothing else is said: with less, it packs operands again."""

STREAM_BYTES = 4 << 20
"""Results of more bytes than this are written around the cache, which would not hold them until they are read."""


class Operand(NamedTuple):
    """``act(tensor)``, an operand ``[rows, depth]`` of a product, with any strides; the product applies the activation
    as it reads the tensor."""

    tensor: Tensor
    activation: str | None = None

    def native(self, compiled: Any) -> tuple:
        """As the C++ module takes it."""
        tensor = self.tensor
        activation = activation_of(compiled, self.activation)
        return dtype_of(compiled, tensor.dtype), tensor.data_ptr(), tensor.shape, tensor.stride(), activation


class CpuDense(Dense):
    """``Dense`` with the products that ``products`` chooses and activations by the C++ module."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``y = act(z)`` and, if asked for and not ``y`` itself, ``z = x @ weight.T + bias``; x is ``[M, K]``."""
        z = x.new_empty((x.shape[0], weight.shape[0])) if keep_z and activation is not None else None
        y = x.new_empty((x.shape[0], weight.shape[0]))
        linear_into(x, weight, bias, activation, y, z)
        return y, z

    def linear_into(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """As in ``Dense``."""
        linear_into(x, weight, bias, None, out)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` in the dtype of both, accumulated in fp32 or fp64; either may be a transposed view."""
        product = b.new_empty((a.shape[0], b.shape[1]))
        linear_into(a, b.t(), None, None, product)
        return product

    def linear_grad_input(
        self, grad_out: Tensor, weight: Tensor | None, z: Tensor | None, activation: str | None, need_y: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """As in ``Dense``."""
        if weight is not None and multiplies(grad_out, weight):
            grad_z, grad_bias = linear_grad(grad_out, weight, z, activation, need_bias)
            y = activate(z, activation) if need_y and z is not None and activation is not None else z
            return grad_z, y, grad_bias
        if activation is None:
            return super().linear_grad_input(grad_out, weight, z, activation, need_y, need_bias)
        assert z is not None
        grad_z = torch.empty_like(z)
        y = torch.empty_like(z) if need_y else None
        if weight is not None:
            torch.mm(grad_out, weight, out=grad_z)
        activation_grad(grad_out if weight is None else grad_z, z, activation, grad_z, y)
        return grad_z, y, grad_z.sum(0) if need_bias else None


# ---- products --------------------------------------------------------------------------------------------------------


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether our own products compute ``x @ weight``, and not torch's library."""
    is_wide = torch.float64 in (x.dtype, weight.dtype)
    own = products.is_own(weight.dtype) and not is_wide and x.numel() > 0 and weight.numel() > 0
    if is_explaining():
        reason = products.route(torch.float64 if is_wide else weight.dtype).reason
        took(f"products in {str(weight.dtype)[6:]}, cpu", products.OWN if own else products.TORCH, reason)
    return own


def linear_into(
    x: Tensor | Operand, weight: Tensor | Operand, bias: Tensor | None, activation: str | None, y: Tensor,
    z: Tensor | None = None, most: int = PRODUCT_BYTES,
) -> None:  # fmt: skip
    """``act(x @ weight.T + bias)`` into ``y``, and its value before the activation into ``z``.

    Args:
        x: ``[M, K]``, any strides; in the dtype of ``weight``, or any but fp64 where our products multiply.
        weight: ``[N, K]``, any strides.
        bias: ``[N]`` or None, any stride.
        activation: its name, or None.
        y: ``[M, N]``, where the elements of a row lie together.
        z: the same, or None.
        most: the most bytes of scratch memory.
    """
    x, weight = (each if isinstance(each, Operand) else Operand(each) for each in (x, weight))
    if multiplies(x.tensor, weight.tensor):
        compiled, threads = module(), torch.get_num_threads()
        bias = None if bias is None else dense_fp32(bias)
        memory = scratch(y, threads, most)
        compiled.linear(
            x.native(compiled), weight.native(compiled), address(bias), activation_of(compiled, activation),
            matrix(compiled, y), matrix(compiled, z), floats(memory), threads,
        )  # fmt: skip
        return
    a, b = (each.tensor if each.activation is None else activate(each.tensor, each.activation) for each in (x, weight))
    out = y if z is None else z
    if bias is None:
        torch.mm(a, b.t(), out=out)
    else:
        torch.addmm(bias.to(b.dtype), a, b.t(), out=out)
    if activation is not None or z is not None:
        epilogue(out, activation, y, None)


def linear_grad(
    grad_out: Tensor, weight: Tensor, z: Tensor | None, activation: str | None, need_bias: bool,
    lent: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``grad_z = (grad_out @ weight) * act'(z)`` and, if asked for, ``grad_z.sum(0)``, by our own product."""
    compiled, threads = module(), torch.get_num_threads()
    grad_z = weight.new_empty((grad_out.shape[0], weight.shape[1]))
    sums = weight.new_empty(weight.shape[1], dtype=torch.float32) if need_bias else None
    memory = scratch(grad_z, threads, lent=lent, strip_sums=need_bias)
    compiled.linear_grad(
        Operand(grad_out).native(compiled), Operand(weight.t()).native(compiled), activation_of(compiled, activation),
        matrix(compiled, z if activation is not None else None), matrix(compiled, grad_z), address(sums),
        floats(memory), threads,
    )  # fmt: skip
    return grad_z, None if sums is None else sums.to(weight.dtype)


def scratch(
    result: Tensor | tuple[int, int], threads: int, most: int = PRODUCT_BYTES, lent: Tensor | None = None,
    strip_sums: bool = False,
) -> Tensor:  # fmt: skip
    """Memory for one of our products to work in.

    Args:
        result: ``[M, N]``, or only its shape where it is not written.
        threads: how many are to work.
        most: the most bytes, unless a product needs more at least.
        lent: memory of a tensor that is written later, which is taken if it is large enough for a product.
        strip_sums: whether the product sums its columns.
    """
    shape, dtype = (result.shape, result.dtype) if isinstance(result, Tensor) else (result, None)
    if lent is not None:
        memory = lent.view(-1).view(torch.uint8)
        memory = memory[: memory.numel() // 4 * 4].view(torch.float32)
        wanted = module().product_scratch(shape, dtype != torch.float32, strip_sums, threads, memory.numel())
        if wanted <= memory.numel():
            return memory
    wanted = module().product_scratch(shape, dtype != torch.float32, strip_sums, threads, most // 4)
    return torch.empty(wanted, dtype=torch.float32, device="cpu")  # whatever the default device is


def floats(memory: Tensor) -> tuple[int, int]:
    """``Scratch``."""
    return memory.data_ptr(), memory.numel()


def dense_fp32(vector: Tensor) -> Tensor:
    """A bias as our products read it."""
    return vector if vector.dtype == torch.float32 and vector.is_contiguous() else vector.to(torch.float32).contiguous()


# ---- activations -----------------------------------------------------------------------------------------------------


def activate(x: Tensor, activation: str) -> Tensor:
    """``act(x)`` in the dtype of x ``[M, N]``."""
    x = x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
    y = torch.empty_like(x)
    epilogue(x, activation, y, None)
    return y


def epilogue(x: Tensor, activation: str | None, y: Tensor, z: Tensor | None) -> None:
    """``act(x)`` into ``y`` and, where it is given, ``x`` into ``z``; all ``[rows, columns]``."""
    compiled = module()
    compiled.epilogue(
        matrix(compiled, x), activation_of(compiled, activation), matrix(compiled, y), matrix(compiled, z),
        torch.get_num_threads(),
    )  # fmt: skip


def activation_grad(grad_y: Tensor, z: Tensor, activation: str, grad_z: Tensor, y: Tensor | None) -> None:
    """``grad_y * act'(z)`` into ``grad_z`` and, where it is given, ``act(z)`` into ``y``; all ``[rows, columns]``."""
    compiled = module()
    compiled.activation_grad(
        matrix(compiled, grad_y), matrix(compiled, z), activation_of(compiled, activation),
        matrix(compiled, grad_z), matrix(compiled, y), torch.get_num_threads(),
    )  # fmt: skip


def is_streamed(out: Tensor) -> bool:
    """Whether kernels write this result, fresh memory of torch's, around the cache."""
    return out.nbytes > STREAM_BYTES


def module() -> Any:
    """The compiled module.

    Raises:
        NotImplementedError: there is none.
    """
    found, reason = native.load()
    if found is None:
        raise NotImplementedError(f"impl='cpu': {reason}")
    return found
