"""TritonBackend: which kernel serves which step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from igva_kernels.backends.base import Backend, Keep, LayerShape, MixArgs, Mixed, Signature
from igva_kernels.backends.triton import config
from igva_kernels.reference import Norm

try:
    from igva_kernels.backends.triton import mix as mix_kernels
    from igva_kernels.backends.triton.common import INTERPRETED

    _MISSING = None
except ImportError as error:
    _MISSING = f"Triton cannot be imported ({error}); `pip install triton`"


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
        return _why_not_cuda()

    def mix(self, args: MixArgs, dtype: torch.dtype, norm: Norm | None = None, keep: Keep = Keep.NOTHING) -> Mixed:
        return mix_kernels.mix(args, dtype, norm, keep, _config(args.layers[0]).rows["mix"])

    def mix_weights_grad(self, grad_rows: Tensor, blocks: Sequence[int], args: MixArgs) -> Tensor:
        rows = _config(grad_rows).rows["mix_weights_grad"]
        return mix_kernels.mix_weights_grad(grad_rows, blocks, args, rows)

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


def _config(tensor: Tensor) -> config.Config:
    return config.of_device(tensor.device.index if tensor.is_cuda else None)


@lru_cache(maxsize=None)
def _why_not_cuda() -> str | None:
    if torch.version.hip is not None:
        return "only CUDA is supported, this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0 or newer, the current device has {capability[0]}.{capability[1]}"
    return None
