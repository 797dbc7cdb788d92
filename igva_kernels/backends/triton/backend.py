"""TritonBackend: which kernel serves which step.

    mix, its gradients, norm_backward     Triton, always
    linear, linear_grad_input,            one Triton GEMM with the rest in its epilogue, or cuBLAS and small kernels
    mix_weights_grad_of_linear
    mix_linear                            a GEMM that reads the layers itself, or mix and linear
    products without an epilogue          cuBLAS
    allocate                              Triton (allocator.py)

``cost`` chooses where there is a choice, from shapes alone: the same call takes the same kernels in every step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from igva_kernels.backends.base import (
    AllocatorWeights,
    Backend,
    Keep,
    LayerShape,
    MixArgs,
    Mixed,
    Signature,
)
from igva_kernels.backends.triton import cost
from igva_kernels.backends.triton.config import Config, GemmConfig, of_device
from igva_kernels.plan import is_tap
from igva_kernels.reference import Norm

try:
    from igva_kernels.backends.triton import allocator, gemm
    from igva_kernels.backends.triton import mix as mix_kernels
    from igva_kernels.backends.triton import norm as norm_kernels
    from igva_kernels.backends.triton.common import INTERPRETED

    _MISSING = None
except ImportError as error:
    _MISSING = f"Triton cannot be imported ({error}); `pip install triton`"

# aten's own kernels in place: no second [M, H] beside the product of cuBLAS.
_ACTIVATE_ = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda z: torch.ops.aten.gelu_(z, approximate="tanh"),
    "relu": torch.ops.aten.relu_,
    "silu": torch.ops.aten.silu_,
}


class TritonBackend(Backend):
    """The operator by Triton kernels and cuBLAS, on NVIDIA GPUs from compute capability 8.0 on."""

    name = "triton"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if _MISSING is not None:
            return _MISSING
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the Triton kernels compute in fp32 and take fp32, fp16 and bf16, not {dtype}"
        if INTERPRETED.value:
            return None if device.type == "cpu" else "under TRITON_INTERPRET=1 they take CPU tensors only"
        if device.type != "cuda":
            return "Triton kernels need a CUDA device; TRITON_INTERPRET=1 runs them on CPU tensors, slowly"
        return _why_not_cuda(device.index)

    def mix(self, args: MixArgs, dtype: torch.dtype, norm: Norm | None = None, keep: Keep = Keep.NOTHING) -> Mixed:
        return mix_kernels.mix(args, dtype, norm, keep, _config(args.layers[0]).rows["mix"])

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool
    ) -> tuple[Tensor, Tensor | None]:
        chosen = cost.linear(_config(x), x.shape[0], *weight.shape, x.dtype, activation is not None)
        if chosen is not None and _can_read(x, weight):
            return gemm.linear(x, weight, bias, activation, keep_z, chosen)
        if keep_z or activation is None:
            return super().linear(x, weight, bias, activation, keep_z)
        return _ACTIVATE_[activation](torch.nn.functional.linear(x, weight, bias)), None

    def linear_grad_input(
        self,
        grad_out: Tensor,
        weight: Tensor | None,
        z: Tensor | None,
        activation: str | None,
        need_y: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if weight is not None and z is not None and activation is not None:
            chosen = cost.linear_grad_input(_config(z), *z.shape, weight.shape[0], z.dtype, need_y, need_bias)
            if chosen is not None and _can_read(grad_out, weight):
                return gemm.linear_grad_input(grad_out, weight, z, activation, need_y, need_bias, chosen)
        return super().linear_grad_input(grad_out, weight, z, activation, need_y, need_bias)

    def mix_weights_grad(self, grad_rows: Tensor, blocks: Sequence[int], args: MixArgs) -> Tensor:
        return mix_kernels.mix_weights_grad(grad_rows, blocks, args, _config(grad_rows).rows["mix_weights_grad"])

    def mix_weights_grad_of_linear(
        self, grad_z: Tensor, weight1: Tensor, blocks: Sequence[int], args: MixArgs
    ) -> Tensor:
        chosen = cost.mix_weights_grad_of_linear(
            _config(grad_z), grad_z.shape[0], len(blocks) * args.width, grad_z.shape[1], grad_z.dtype
        )
        if chosen is not None and _can_read(grad_z, weight1, *args.layers):
            return gemm.mix_weights_grad_of_linear(grad_z, weight1, blocks, args, chosen)
        return super().mix_weights_grad_of_linear(grad_z, weight1, blocks, args)

    def layer_grads(
        self,
        grad_rows: Tensor,
        signatures: Sequence[Signature],
        mix_weights: Tensor | None,
        image_index: Tensor | None,
        skip_tokens: int,
        shape: LayerShape,
    ) -> list[Tensor]:
        rows = _config(grad_rows).rows["layer_grads"]
        return mix_kernels.layer_grads(grad_rows, signatures, mix_weights, image_index, skip_tokens, shape, rows)

    def norm_backward(
        self, grad_out: Tensor, rows: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, need_params: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        chosen = _config(rows)
        # Two programs an SM: enough loads in flight, few partial sums.
        programs = 2 * chosen.rates.sms
        return norm_kernels.norm_backward(
            grad_out, rows, norm, mean, rstd, need_params, programs, chosen.rows["norm_backward"]
        )

    def mix_linear(
        self,
        args: MixArgs,
        norm: Norm | None,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        keep: Keep,
        keep_z: bool,
    ) -> tuple[Tensor, Tensor | None, Mixed]:
        chosen = self._prologue(args, norm, weight, activation, keep)
        if chosen is None:
            return super().mix_linear(args, norm, weight, bias, activation, keep, keep_z)
        if norm is None:
            y, z = gemm.mix_linear(args, weight, bias, activation, keep_z, chosen)
            return y, z, Mixed(None, [], None, None)
        rows = _config(weight).rows["mix"]
        stats = mix_kernels.mix(args, weight.dtype, norm, Keep.NOTHING, rows, stats_only=True)
        assert stats.mean is not None and stats.rstd is not None
        folded, column_sums, shift = norm_kernels.fold_norm(weight, bias, norm)
        fold = (stats.mean, stats.rstd, column_sums)
        y, z = gemm.mix_linear(args, folded, shift, activation, keep_z, chosen, fold)
        return y, z, stats

    def why_not_allocate(self, width: int, num_weights: int) -> str | None:
        return allocator.why_not(width, num_weights)

    def allocate(
        self, sentences: Tensor, summaries: Tensor, weights: AllocatorWeights, num_heads: int, eps: Sequence[float]
    ) -> Tensor:
        return allocator.allocate(sentences, summaries, weights, num_heads, eps, _config(summaries).rates.sms)

    def _prologue(
        self, args: MixArgs, norm: Norm | None, weight: Tensor, activation: str | None, keep: Keep
    ) -> GemmConfig | None:
        """The tile of a GEMM that reads the layers itself, where one pays and nothing needs the rows as such."""
        needs_rows = keep == Keep.ROWS or (keep == Keep.SOURCES and not all(map(is_tap, args.plan.reduced()[0].blocks)))
        # One row offset serves all layers, and their tiles go to the matrix units as they are.
        layouts = {(layer.stride(0), layer.stride(1), layer.dtype) for layer in args.layers}
        if needs_rows or len(layouts) > 1 or args.layers[0].dtype != weight.dtype:
            return None
        chosen = cost.mix_linear(
            _config(weight), args.plan, args.width, args.num_rows * args.num_patches, weight.shape[0], weight.dtype,
            activation is not None, norm is not None,
        )  # fmt: skip
        return chosen if chosen is not None and _can_read(weight, *args.layers) else None


def _config(tensor: Tensor) -> Config:
    return of_device(tensor.device.index if tensor.is_cuda else None)


def _can_read(*operands: Tensor) -> bool:
    """Whether the GEMMs take these; on a card 16 bytes at a time, since with narrower loads cuBLAS is faster."""
    contiguous = all(operand.stride(-1) == 1 for operand in operands)
    return contiguous and (_config(operands[0]).interpreted or all(map(gemm.is_aligned, operands)))


@cache
def _why_not_cuda(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "only CUDA is supported, this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0, this card has {'.'.join(map(str, capability))}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launchers with a C compiler and finds none; install gcc or clang, or set CC"
    return None
