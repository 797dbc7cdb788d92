"""The mix by Triton kernels. See ``WeightedMix`` for every method.

    mix and its gradients    Triton, always
    mix_linear               where all blocks are taps, a GEMM that reads the layers itself; or the mix and ``linear``

``cost`` chooses where there is a choice, from shapes alone: the same call takes the same kernels in every step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.program import Shares
from igva_kernels.ops.weighted_mix.steps import Keep, LayerShape, MixArgs, Mixed, Projector, WeightedMix
from igva_kernels.ops.weighted_mix.triton import cost, gemm
from igva_kernels.ops.weighted_mix.triton import mix as mix_kernels
from igva_kernels.runtime.config import GemmConfig
from igva_kernels.runtime.dense import Norm
from igva_kernels.runtime.triton import norm as norm_kernels
from igva_kernels.runtime.triton.common import KERNEL_ACTIVATIONS
from igva_kernels.runtime.triton.dense import TritonDense, can_read, config_of, tell


class TritonWeightedMix(TritonDense, WeightedMix):
    """The operator by Triton kernels and cuBLAS."""

    def activations(self) -> Collection[str]:
        return KERNEL_ACTIVATIONS

    def mix(self, args: MixArgs, dtype: torch.dtype, norm: Norm | None = None, keep: Keep = Keep.NOTHING) -> Mixed:
        return mix_kernels.mix(args, dtype, norm, keep, config_of(args.layers[0]).rows["weighted_mix.mix"])

    def mix_weights_grad(self, grad_rows: Tensor, blocks: Sequence[int], args: MixArgs) -> Tensor:
        rows = config_of(grad_rows).rows["weighted_mix.mix_weights_grad"]
        return mix_kernels.mix_weights_grad(grad_rows, blocks, args, rows)

    def layer_grads(
        self, grad_rows: Tensor, shares: Shares, mix_weights: Tensor | None, image_index: Tensor | None,
        shape: LayerShape,
    ) -> list[Tensor]:  # fmt: skip
        rows = config_of(grad_rows).rows["weighted_mix.layer_grads"]
        return mix_kernels.layer_grads(grad_rows, shares, mix_weights, image_index, shape, rows)

    def mix_linear(
        self, args: MixArgs, projector: Projector, keep: Keep, keep_z: bool
    ) -> tuple[Tensor, Tensor | None, Mixed]:
        weight, bias, _, _, norm, activation = projector
        chosen = self._prologue(args, projector, keep)
        taken = "the mix kernel, then the product" if chosen is None else "one kernel that reads the layers"
        tell("weighted_mix, triton: first product", "weighted_mix.mix_linear", weight, taken)
        if chosen is None:
            return super().mix_linear(args, projector, keep, keep_z)
        if norm is None:
            y, z = gemm.mix_linear(args, weight, bias, activation, keep_z, chosen)
            return y, z, Mixed(None)
        rows = config_of(weight).rows["weighted_mix.mix"]
        stats = mix_kernels.mix(args, weight.dtype, norm, Keep.NOTHING, rows, stats_only=True)
        assert stats.mean is not None and stats.rstd is not None
        folded, column_sums, shift = norm_kernels.fold_norm(weight, bias, norm)
        fold = (stats.mean, stats.rstd, column_sums)
        y, z = gemm.mix_linear(args, folded, shift, activation, keep_z, chosen, fold)
        return y, z, stats

    def _prologue(self, args: MixArgs, projector: Projector, keep: Keep) -> GemmConfig | None:
        """The tile of a GEMM that reads the layers itself, where that is faster and nothing else needs the rows."""
        weight, needs_rows = projector.weight1, keep == Keep.ROWS or (keep == Keep.SOURCES and args.program.num_sums)
        # One row offset serves all layers, and their tiles go to the matrix units as they are.
        layouts = {(layer.stride(0), layer.stride(1), layer.dtype) for layer in args.layers}
        if needs_rows or len(layouts) > 1 or args.layers[0].dtype != weight.dtype:
            return None
        chosen = cost.mix_linear(
            config_of(weight), args.plan, args.width, args.num_rows * args.num_patches, weight.shape[0], weight.dtype,
            projector.activation is not None, projector.norm is not None,
        )  # fmt: skip
        return chosen if chosen is not None and can_read(weight, *args.layers) else None


IMPLEMENTATION = TritonWeightedMix()
