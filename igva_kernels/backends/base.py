"""What a backend executes: the operator and its gradients, composed from a handful of kernels.

``Backend`` writes the composition once, in plain torch where a kernel is missing; a subclass overrides the kernels that
it has, or a whole step where it fuses more. Nothing here is differentiated by autograd: ``ops`` registers the pairs
``mix`` / ``mix_backward`` and ``project`` / ``project_backward``.

Symbols: B rows of the batch, I images, T tokens, P = T - skip patches, D width of a layer, C weight columns, G blocks,
H language-model width, M = B * P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from igva_kernels.plan import MixPlan, is_tap
from igva_kernels.reference import ACTIVATIONS, Norm

ACTIVATION_GRADS = {
    "gelu": lambda grad, z: torch.ops.aten.gelu_backward(grad, z),
    "gelu_tanh": lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate="tanh"),
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    "silu": lambda grad, z: torch.ops.aten.silu_backward(grad, z),
}


class Keep(str, Enum):
    """What the forward keeps so that the backward can rebuild the mixed row."""

    NOTHING = "nothing"
    ROWS = "rows"
    """The mixed row itself, before any norm: enough where the mix weights take no gradient."""
    SOURCES = "sources"
    """The weight-free sums of ``plan.reduced()``; its taps are inputs already."""


@dataclass(frozen=True)
class MixArgs:
    """The inputs of the mix, validated: layers ``[I, T, D]``, every one of them used by the plan.

    Kernels take any batch and token strides, but channels that are adjacent and an index that is dense: what lies
    otherwise is copied here. So is every state of transformers' SigLIP, laid out as its patch convolution leaves it.
    """

    layers: Sequence[Tensor]
    plan: MixPlan
    mix_weights: Tensor | None
    """``[B, C]`` in fp32, or in fp64 where the layers are."""
    image_index: Tensor | None
    """``[B]`` int64, or None where row b reads image b."""
    skip_tokens: int

    def __post_init__(self) -> None:
        layers = [x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in self.layers]
        object.__setattr__(self, "layers", layers)
        if self.image_index is not None:
            object.__setattr__(self, "image_index", self.image_index.contiguous())

    @property
    def num_rows(self) -> int:
        """B."""
        if self.image_index is not None:
            return self.image_index.shape[0]
        return self.layers[0].shape[0]

    @property
    def num_patches(self) -> int:
        """P."""
        return self.layers[0].shape[1] - self.skip_tokens

    @property
    def width(self) -> int:
        """D."""
        return self.layers[0].shape[2]

    def over_sources(self, sources: Sequence[Tensor]) -> MixArgs:
        """The same operator over the outputs of ``plan.reduced()``: taps with all T tokens, sums ``[I, P, D]``."""
        blocks, plan = self.plan.reduced()
        views = [
            source[:, self.skip_tokens :] if is_tap(block) else source
            for block, source in zip(blocks.blocks, sources, strict=True)
        ]
        return MixArgs(views, plan, self.mix_weights, self.image_index, 0)


Signature = tuple[tuple[int, int | None, float], ...]
"""Where a layer stands in the mixed row: its ``(block, column, scale)``. Layers with the same signature have the same
gradient, which is computed once: the 24 layers of IGVA need 5."""


class LayerShape(NamedTuple):
    """What the backward must know of the layers it no longer has."""

    num_images: int
    num_tokens: int
    width: int
    dtype: torch.dtype


class Mixed(NamedTuple):
    """What the mix returns."""

    rows: Tensor | None
    """``[B, P, G*D]``, normalised where a norm was given; None where ``project`` never held them whole."""
    kept: list[Tensor]
    """Keep.ROWS: the row before the norm, if there is one (else nothing: it is ``rows``). Keep.SOURCES: one
    ``[I, P, D]`` sum in the layers' dtype a source that is not a tap, in the order of ``plan.reduced()``."""
    mean: Tensor | None
    """``[B, P]`` in the accumulation dtype, with a norm."""
    rstd: Tensor | None


class ProjectorWeights(NamedTuple):
    """Weights of the projector; ``weight2`` is None for a single Linear."""

    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor | None
    bias2: Tensor | None


class ProjectorNeeds(NamedTuple):
    """Which gradients of the projector are asked for."""

    mix_weights: bool
    layers: bool
    weight1: bool
    bias1: bool
    norm_weight: bool
    norm_bias: bool
    weight2: bool
    bias2: bool

    @property
    def rows(self) -> bool:
        """Whether a gradient reaches the mixed row as the GEMM reads it."""
        return self.mix_weights or self.layers or self.norm_weight or self.norm_bias


class ProjectorGrads(NamedTuple):
    """Gradients of the projector; None where not asked for."""

    rows: Tensor | None
    """Of the mixed row before the norm ``[B, P, G*D]``, where layers need it."""
    mix_weights: Tensor | None
    weight1: Tensor | None
    bias1: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight2: Tensor | None
    bias2: Tensor | None


class AllocatorBlockWeights(NamedTuple):
    """Weights of a block of ``nn.WeightAllocator``, in the order of its ``parameters()``; C is the hidden width."""

    in_proj_weight: Tensor
    """``[3C, C]``: query, key and value projections."""
    in_proj_bias: Tensor
    out_proj_weight: Tensor
    out_proj_bias: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    ffn1_weight: Tensor
    ffn1_bias: Tensor
    ffn2_weight: Tensor
    ffn2_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor


class AllocatorWeights(NamedTuple):
    """Weights of ``nn.WeightAllocator``."""

    sentence_weight: Tensor
    sentence_bias: Tensor
    cls_weight: Tensor
    cls_bias: Tensor
    blocks: tuple[AllocatorBlockWeights, ...]
    head_weight: Tensor
    head_bias: Tensor

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> AllocatorWeights:
        """From a flat list in the order of ``parameters()``."""
        size = len(AllocatorBlockWeights._fields)
        starts = range(4, len(parameters) - 2, size)
        blocks = tuple(AllocatorBlockWeights(*parameters[start : start + size]) for start in starts)
        sentence_weight, sentence_bias, cls_weight, cls_bias = parameters[:4]
        return cls(sentence_weight, sentence_bias, cls_weight, cls_bias, blocks, parameters[-2], parameters[-1])


def check_image_range(image_index: Tensor, num_images: int) -> None:
    """Raise ValueError if a row of a CPU ``image_index`` reads an image that is not there."""
    if image_index.numel() and not 0 <= int(image_index.min()) <= int(image_index.max()) < num_images:
        raise ValueError(
            f"image_index: need values from 0 to {num_images - 1}, the images of the hidden states, got values from "
            f"{int(image_index.min())} to {int(image_index.max())}"
        )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 data."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Backend:
    """The operator in plain torch: correct on every device, the fallback of each step."""

    name: str

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if tensors of this device and dtype can be served, otherwise the reason why not."""
        raise NotImplementedError

    # ---- kernels ---------------------------------------------------------------------------------------------------

    def mix(self, args: MixArgs, dtype: torch.dtype, norm: Norm | None = None, keep: Keep = Keep.NOTHING) -> Mixed:
        """The mixed rows, rounded once to ``dtype``; ``norm`` is applied to the unrounded rows."""
        raise NotImplementedError

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_z: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``y = act(z)`` and, if asked for and not ``y`` itself, ``z = x @ weight.T + bias``; x is ``[M, K]``."""
        z = F.linear(x, weight, bias)
        if activation is None:
            return z, None
        return ACTIVATIONS[activation](z), z if keep_z else None

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` in the dtype of both, accumulated in fp32; either may be a transposed view."""
        return a @ b

    def linear_grad_input(
        self,
        grad_out: Tensor,
        weight: Tensor | None,
        z: Tensor | None,
        activation: str | None,
        need_y: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``grad_z = (grad_out @ weight) * act'(z)`` and, if asked for, ``y = act(z)`` again and ``grad_z.sum(0)``.

        ``weight`` is None for the identity. All matrices are ``[M, H]``; the sum accumulates in fp32, in a fixed order.
        """
        grad_z = grad_out if weight is None else self.matmul(grad_out, weight)
        y = z
        if activation is not None:
            assert z is not None
            grad_z = ACTIVATION_GRADS[activation](grad_z, z)
            y = ACTIVATIONS[activation](z) if need_y else None
        return grad_z, y, grad_z.sum(0) if need_bias else None

    def mix_weights_grad(self, grad_rows: Tensor, blocks: Sequence[int], args: MixArgs) -> Tensor:
        """``dw[b, c] = sum over p, d and the entries (l, c, s) of s * grad_A[b, p, g*D + d] * h_l[image(b), p, d]``.

        Args:
            grad_rows: ``[B, P, len(blocks) * D]``, those blocks of the gradient of the mixed row.
            blocks: which blocks of ``args.plan`` they are: every block that has a column.
            args: the mix over the reduced sources.

        Returns:
            ``[B, C]`` in the accumulation dtype, summed in a fixed order.
        """
        raise NotImplementedError

    def layer_grads(
        self,
        grad_rows: Tensor,
        signatures: Sequence[Signature],
        mix_weights: Tensor | None,
        image_index: Tensor | None,
        skip_tokens: int,
        shape: LayerShape,
    ) -> list[Tensor]:
        """``sum over (g, c, s) of s * w[b, c] * grad_A[b, p, g*D + d]``, one ``[I, T, D]`` a signature.

        ``grad_rows`` is ``[B, P, G*D]``. Skipped tokens get zeros; rows that share an image add in row order.
        """
        raise NotImplementedError

    def norm_backward(
        self, grad_out: Tensor, rows: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, need_params: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """LayerNorm's gradients: ``(grad_rows, grad_weight, grad_bias)``; all matrices ``[M, G*D]``, stats ``[M]``."""
        grad_rows = torch.empty_like(grad_out)
        weight = norm[0]
        param_grads = mean.new_zeros(2, rows.shape[-1])
        for start in range(0, rows.shape[0], 1024):  # fp32 temporaries stay small
            at = slice(start, start + 1024)
            grad = grad_out[at].to(mean.dtype)
            normal = (rows[at].to(mean.dtype) - mean[at, None]) * rstd[at, None]
            if need_params:
                param_grads += torch.stack([(grad * normal).sum(0), grad.sum(0)])
            grad = grad if weight is None else grad * weight.to(mean.dtype)
            projected = normal * (grad * normal).mean(-1, keepdim=True)
            grad_rows[at] = (rstd[at, None] * (grad - grad.mean(-1, keepdim=True) - projected)).to(grad_rows.dtype)
        if not need_params:
            return grad_rows, None, None
        return grad_rows, *(
            grad if p is None else grad.to(p.dtype) for grad, p in zip(param_grads, norm[:2], strict=True)
        )

    # ---- the allocator, at inference -------------------------------------------------------------------------------

    def why_not_allocate(self, width: int, num_weights: int) -> str | None:
        """None if ``allocate`` can serve this hidden width and K, otherwise the reason why not."""
        return f"the {self.name} backend has no kernels for it"

    def allocate(
        self, sentences: Tensor, summaries: Tensor, weights: AllocatorWeights, num_heads: int, eps: Sequence[float]
    ) -> Tensor:
        """What ``nn.WeightAllocator`` computes, ``[B, K]`` in fp32.

        Args:
            sentences: ``[B, E]`` in the dtype of the weights.
            summaries: ``[B, K, D]``, likewise.
            weights: of at least one block.
            num_heads: of every block.
            eps: of every block's two norms.
        """
        raise NotImplementedError

    # ---- the operator ----------------------------------------------------------------------------------------------

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
        """``linear`` of the mixed rows ``(y [M, N], z, mixed)``; the rows may be None where they need not be kept."""
        mixed = self.mix(args, weight.dtype, norm, keep)
        assert mixed.rows is not None
        y, z = self.linear(mixed.rows.flatten(0, 1), weight, bias, activation, keep_z)
        return y, z, mixed

    def project(
        self,
        args: MixArgs,
        norm: Norm | None,
        weights: ProjectorWeights,
        activation: str | None,
        keep: Keep,
        keep_z: bool,
    ) -> tuple[Tensor, Mixed, Tensor | None]:
        """``(out [B, P, H], mixed, z [M, H] if kept)``."""
        y, z, mixed = self.mix_linear(args, norm, weights.weight1, weights.bias1, activation, keep, keep_z)
        if keep != Keep.ROWS or norm is not None:
            # The rows end here, before the second GEMM allocates its result.
            mixed = mixed._replace(rows=None)
        if weights.weight2 is not None:
            if keep_z and z is None:
                z = y
            y, _ = self.linear(y, weights.weight2, weights.bias2, None, False)
        return y.view(args.num_rows, args.num_patches, y.shape[-1]), mixed, z

    def project_backward(
        self,
        grad_out: Tensor,
        args: MixArgs | None,
        rows: Tensor | None,
        norm: Norm | None,
        stats: tuple[Tensor, Tensor] | None,
        z: Tensor | None,
        weights: ProjectorWeights,
        activation: str | None,
        needs: ProjectorNeeds,
    ) -> ProjectorGrads:
        """Every gradient of ``project`` that is asked for.

        Args:
            grad_out: ``[B, P, H]``.
            args: the mix over the reduced sources, with Keep.SOURCES.
            rows: the mixed row before the norm ``[B, P, G*D]``, with Keep.ROWS.
            norm: as in the forward.
            stats: mean and rstd ``[B, P]``, with a norm.
            z: as kept by the forward ``[M, H]``.
            weights: as in the forward.
            activation: as in the forward.
            needs: the gradients that are asked for.
        """
        batch, patches = grad_out.shape[:2]
        grad = grad_out.flatten(0, 1)
        upstream = needs.rows or needs.weight1 or needs.bias1
        grad_weight2 = grad_bias2 = grad_weight1 = grad_bias1 = None
        if weights.weight2 is not None and needs.bias2:
            grad_bias2 = grad.sum(0)
        y = None
        if upstream:
            grad_z, y, grad_bias1 = self.linear_grad_input(
                grad, weights.weight2, z, activation, needs.weight2, needs.bias1
            )
        elif needs.weight2:
            assert z is not None
            y = z if activation is None else ACTIVATIONS[activation](z)
        if needs.weight2:
            assert y is not None
            grad_weight2 = self.matmul(grad.t(), y)
            del y
        if not upstream:
            return ProjectorGrads(None, None, None, None, None, None, grad_weight2, grad_bias2)

        normal = rows
        if args is not None and (needs.weight1 or norm is not None):
            mixed = self.mix(args, weights.weight1.dtype, norm, Keep.ROWS)
            normal, rows = mixed.rows, mixed.kept[0] if mixed.kept else mixed.rows
        elif norm is not None and rows is not None:
            normal = F.layer_norm(rows, rows.shape[-1:], *norm)
        if needs.weight1:
            assert normal is not None
            grad_weight1 = self.matmul(grad_z.t(), normal.flatten(0, 1))
        del normal

        grad_rows = grad_mix_weights = grad_norm_weight = grad_norm_bias = None
        if needs.rows and (needs.layers or norm is not None):
            grad_rows = self.matmul(grad_z, weights.weight1)
            if norm is not None:
                assert rows is not None and stats is not None
                mean, rstd = (stat.flatten() for stat in stats)
                grad_rows, grad_norm_weight, grad_norm_bias = self.norm_backward(
                    grad_rows, rows.flatten(0, 1), norm, mean, rstd, needs.norm_weight or needs.norm_bias
                )
            grad_rows = grad_rows.view(batch, patches, weights.weight1.shape[1])
        if needs.mix_weights:
            assert args is not None
            blocks = args.plan.weighted_blocks
            if grad_rows is None:
                grad_mix_weights = self.mix_weights_grad_of_linear(grad_z, weights.weight1, blocks, args)
            else:
                grad_mix_weights = self.mix_weights_grad(take_blocks(grad_rows, blocks, args.width), blocks, args)
        return ProjectorGrads(
            grad_rows if needs.layers else None, grad_mix_weights, grad_weight1, grad_bias1,
            grad_norm_weight if needs.norm_weight else None, grad_norm_bias if needs.norm_bias else None,
            grad_weight2, grad_bias2,
        )  # fmt: skip

    def mix_weights_grad_of_linear(
        self, grad_z: Tensor, weight1: Tensor, blocks: Sequence[int], args: MixArgs
    ) -> Tensor:
        """``mix_weights_grad`` of ``grad_rows = grad_z @ weight1``; only the blocks that have weights are computed."""
        grad_rows = self.matmul(grad_z, take_blocks(weight1, blocks, args.width))
        shape = (args.num_rows, args.num_patches, len(blocks) * args.width)
        return self.mix_weights_grad(grad_rows.view(shape), blocks, args)


def take_blocks(x: Tensor, blocks: Sequence[int], width: int) -> Tensor:
    """The blocks of the last dimension ``[..., G*D] -> [..., len(blocks)*D]``, a view where they are adjacent."""
    first, last = blocks[0], blocks[-1]
    if list(blocks) == list(range(first, last + 1)):
        return x[..., first * width : (last + 1) * width]
    return torch.cat([x[..., g * width : (g + 1) * width] for g in blocks], dim=-1)
