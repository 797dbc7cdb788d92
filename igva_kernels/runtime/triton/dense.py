"""Dense steps by Triton kernels, or by cuBLAS where the model of the card says that it is faster.

    linear, linear_grad_input    one Triton GEMM with the rest in its epilogue, or cuBLAS and small kernels
    norm_backward                Triton
    matmul                       cuBLAS

``cost`` chooses where there is a choice, from shapes alone: the same call takes the same kernels in every step.
"""

from __future__ import annotations

from torch import Tensor

from igva_kernels.runtime.config import Config, of_device
from igva_kernels.runtime.dense import Dense, Norm, NormGrads
from igva_kernels.runtime.routes import took
from igva_kernels.runtime.triton import cost, gemm
from igva_kernels.runtime.triton import norm as norm_kernels


class TritonDense(Dense):
    """``Dense`` by Triton kernels and cuBLAS."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool
    ) -> tuple[Tensor, Tensor | None]:
        chosen = cost.linear(config_of(x), x.shape[0], *weight.shape, x.dtype, activation is not None)
        is_own = chosen is not None and can_read(x, weight)
        tell("products, triton: linear", "linear", x, ("cuBLAS and the activation", "one Triton kernel")[is_own])
        if chosen is not None and is_own:
            return gemm.linear(x, weight, bias, activation, keep_z, chosen)
        return super().linear(x, weight, bias, activation, keep_z)

    def linear_grad_input(
        self, grad_out: Tensor, weight: Tensor | None, z: Tensor | None, activation: str | None, need_y: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        if weight is not None and z is not None and activation is not None:
            chosen = cost.linear_grad_input(config_of(z), *z.shape, weight.shape[0], z.dtype, need_y, need_bias)
            is_own = chosen is not None and can_read(grad_out, weight)
            taken = ("cuBLAS and small kernels", "one Triton kernel")[is_own]
            tell("products, triton: linear_grad_input", "linear_grad_input", z, taken)
            if chosen is not None and is_own:
                return gemm.linear_grad_input(grad_out, weight, z, activation, need_y, need_bias, chosen)
        return super().linear_grad_input(grad_out, weight, z, activation, need_y, need_bias)

    def norm_backward(
        self, grad_out: Tensor, rows: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, need_params: bool
    ) -> NormGrads:
        chosen = config_of(rows)
        # Two programs per SM: enough loads in flight, few partial sums.
        programs = 2 * chosen.rates.sms
        return norm_kernels.norm_backward(
            grad_out, rows, norm, mean, rstd, need_params, programs, chosen.rows["norm_backward"]
        )


def tell(what: str, kernel: str, tensor: Tensor, taken: str) -> None:
    """Tells ``explain`` whether a Triton product was taken, and why."""
    took(what, taken, lambda: cost.why(config_of(tensor), kernel, tensor.dtype))


def config_of(tensor: Tensor) -> Config:
    """The configuration of the card that a tensor is on."""
    return of_device(tensor.device.index if tensor.is_cuda else None)


def can_read(*operands: Tensor) -> bool:
    """Whether the GEMMs take these; on a card 16 bytes at a time, since with narrower loads cuBLAS is faster."""
    contiguous = all(operand.stride(-1) == 1 for operand in operands)
    return contiguous and (config_of(operands[0]).interpreted or all(map(gemm.is_aligned, operands)))
