"""What an implementation executes: the mix, the projector over it, and their gradients, composed of a few steps.

``WeightedMix`` writes the composition once, in plain torch where a step has no kernel; a backend's subclass overrides
the steps for which it has kernels, or a whole composition where it fuses more. Nothing here is differentiated by
autograd: ``op`` registers the pairs ``mix`` / ``mix_backward`` and ``project`` / ``project_backward``.

Symbols: B rows of the batch, I images, T tokens, P = T - skip patches, D width of a layer, C weight columns, G blocks,
N width of the first Linear's output, H of the last one's (the language model's), M = B * P.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import Program, Shares, lower
from igva_kernels.registry import Implementation
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.runtime.dense import Dense, Norm, NormGrads, accumulation_dtype, layer_norm, norm_param_grads
from igva_kernels.runtime.operands import adjacent


class Keep(str, Enum):
    """What the forward keeps so that the backward can rebuild the mixed row."""

    NOTHING = "nothing"
    ROWS = "rows"
    """The mixed row itself, before any norm: enough where the mix weights take no gradient."""
    SOURCES = "sources"
    """The weight-free sums of ``plan.reduced()``; its taps are inputs already."""


@dataclass(eq=False)
class MixArgs:
    """The inputs of the mix, validated: layers ``[I, T, D]``, every one of them used by the plan.

    Kernels take any batch and token strides, but need adjacent channels and a dense index: a tensor laid out otherwise
    is copied here. So is every state of transformers' SigLIP, which has the layout of its patch convolution.
    """

    layers: Sequence[Tensor]
    plan: MixPlan
    mix_weights: Tensor | None
    """``[B, C]`` in fp32, or in fp64 where the layers are."""
    image_index: Tensor | None
    """``[B]`` int64, or None where row b reads image b."""
    skip_tokens: int
    strides: Sequence[tuple[int, ...]] = ()
    """Of the layers; who gives them has seen that the channels lie together and that the index is dense."""

    def __post_init__(self) -> None:
        if not self.strides:
            self.layers = [adjacent(layer) for layer in self.layers]
            self.strides = [layer.stride() for layer in self.layers]
            self.image_index = None if self.image_index is None else self.image_index.contiguous()

    @cached_property
    def program(self) -> Program:
        """The plan as kernels take it."""
        return lower(self.plan)

    @property
    def num_rows(self) -> int:
        """B."""
        return (self.layers[0] if self.image_index is None else self.image_index).shape[0]

    @property
    def num_patches(self) -> int:
        """P."""
        return self.layers[0].shape[1] - self.skip_tokens

    @property
    def width(self) -> int:
        """D."""
        return self.layers[0].shape[2]

    def new_rows(self, dtype: torch.dtype) -> Tensor:
        """Memory for the mixed rows ``[B, P, G*D]``."""
        shape = (self.num_rows, self.num_patches, self.plan.num_blocks * self.width)
        return self.layers[0].new_empty(shape, dtype=dtype)

    def new_sums(self) -> list[Tensor]:
        """Memory for the kept sums, ``[I, P, D]`` each."""
        first = self.layers[0]
        shape = (first.shape[0], self.num_patches, self.width)
        return [first.new_empty(shape) for _ in range(self.program.num_sums)]

    def new_stats(self, norm: Norm | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Memory for the mean and rstd of the rows, ``[B, P]`` each; without a norm there are none."""
        if norm is None:
            return None, None
        shape, dtype = (self.num_rows, self.num_patches), accumulation_dtype(self.layers[0].dtype)
        return self.layers[0].new_empty(shape, dtype=dtype), self.layers[0].new_empty(shape, dtype=dtype)

    @classmethod
    def over_sources(
        cls, plan: MixPlan, sources: Sequence[Tensor], mix_weights: Tensor | None, image_index: Tensor | None,
        skip_tokens: int,
    ) -> MixArgs:  # fmt: skip
        """The mix of ``plan`` from the sources of ``plan.reduced()``: taps with all T tokens, sums ``[I, P, D]``."""
        program = lower(plan)
        views = [
            source if layer is None else source[:, skip_tokens:]
            for layer, source in zip(program.sources, sources, strict=True)
        ]
        return cls(views, program.reduced, mix_weights, image_index, 0)


class LayerShape(NamedTuple):
    """What the backward must know of the layers it no longer has."""

    num_images: int
    num_tokens: int
    width: int
    dtype: torch.dtype
    skip_tokens: int

    def new_grads(self, like: Tensor, count: int) -> list[Tensor]:
        """Memory for gradients ``[I, T, D]`` of layers, on the device of ``like``."""
        return [like.new_empty(self[:3], dtype=self.dtype) for _ in range(count)]


class Mixed(NamedTuple):
    """What the mix returns."""

    rows: Tensor | None
    """``[B, P, G*D]``, normalised where a norm was given; None where they were never whole, or have been freed."""
    raw_rows: Tensor | None = None
    """Keep.ROWS with a norm: the rows before it."""
    sums: Sequence[Tensor] = ()
    """Keep.SOURCES: one ``[I, P, D]`` in the layers' dtype per source that is not a tap."""
    mean: Tensor | None = None
    """``[B, P]`` in the accumulation dtype, with a norm."""
    rstd: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Mixed:
        """The same with its rows in another dtype."""
        rows, raw_rows = (None if x is None else x.to(dtype) for x in (self.rows, self.raw_rows))
        return self._replace(rows=rows, raw_rows=raw_rows)


class Projector(NamedTuple):
    """What reads the mixed row: ``act(norm?(A) @ weight1.T + bias1) @ weight2.T + bias2``."""

    weight1: Tensor
    bias1: Tensor | None = None
    weight2: Tensor | None = None
    """None for a single Linear."""
    bias2: Tensor | None = None
    norm: Norm | None = None
    activation: str | None = None


class Projection(NamedTuple):
    """A call of ``WeightedMix.project``."""

    args: MixArgs
    projector: Projector
    keep: Keep
    keep_z: bool


class Needs(NamedTuple):
    """Which gradients are asked for."""

    mix_weights: bool
    layers: bool
    weight1: bool = False
    bias1: bool = False
    norm_weight: bool = False
    norm_bias: bool = False
    weight2: bool = False
    bias2: bool = False

    @property
    def rows(self) -> bool:
        """Whether a gradient reaches the mixed row as the first product reads it."""
        return self.mix_weights or self.layers or self.norm_weight or self.norm_bias

    @property
    def z(self) -> bool:
        """Whether a gradient reaches the result of the first product."""
        return self.rows or self.weight1 or self.bias1


class Saved(NamedTuple):
    """What the backward of the projector has of its forward."""

    sources: MixArgs | None
    """The mix over the reduced sources, with Keep.SOURCES."""
    rows: Tensor | None
    """The mixed row before the norm ``[B, P, G*D]``, with Keep.ROWS."""
    mean: Tensor | None
    """``[B, P]``, with a norm."""
    rstd: Tensor | None
    z: Tensor | None
    """``[M, N]``, where the activation or ``weight2`` needs it."""


class WeightedMix(Dense, Implementation):
    """The operator in plain torch around the steps that every implementation must have."""

    def activations(self) -> Collection[str]:
        """The activations that its kernels know."""
        return ACTIVATIONS

    def why_not(self, *demands: str | None) -> str | None:
        """See ``Implementation.why_not``; the demands are the activation and the code of the plan, as far as known."""
        activation, code, *_ = *demands, None, None
        if activation is not None and activation not in self.activations():
            return f"its kernels have no activation {activation!r}"
        return None if code is None else self.why_not_plan(MixPlan.from_code(code))

    def why_not_plan(self, plan: MixPlan) -> str | None:
        """None if its kernels take such a plan, forward and backward, otherwise the reason why not."""
        return None

    # ---- steps -----------------------------------------------------------------------------------------------------

    def mix(self, args: MixArgs, dtype: torch.dtype, norm: Norm | None = None, keep: Keep = Keep.NOTHING) -> Mixed:
        """The mixed rows, rounded once to ``dtype``; ``norm`` is applied to the unrounded rows."""
        raise NotImplementedError

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
        self, grad_rows: Tensor, shares: Shares, mix_weights: Tensor | None, image_index: Tensor | None,
        shape: LayerShape,
    ) -> list[Tensor]:  # fmt: skip
        """One gradient ``[I, T, D]`` in the layers' dtype per signature in ``shares``.

        ``grad_rows`` is ``[B, P, G*D]``. Skipped tokens get zeros; rows that share an image add in row order.
        """
        raise NotImplementedError

    def mix_linear(
        self, args: MixArgs, projector: Projector, keep: Keep, keep_z: bool
    ) -> tuple[Tensor, Tensor | None, Mixed]:
        """The first Linear of the mixed rows: ``(y [M, N], z [M, N] or None, mixed)``; rows not kept may be None."""
        mixed = self.mix(args, projector.weight1.dtype, projector.norm, keep)
        assert mixed.rows is not None
        rows = mixed.rows.flatten(0, 1)
        y, z = self.linear(rows, projector.weight1, projector.bias1, projector.activation, keep_z)
        return y, z, mixed

    def mix_weights_grad_of_linear(
        self, grad_z: Tensor, weight1: Tensor, blocks: Sequence[int], args: MixArgs
    ) -> Tensor:
        """``mix_weights_grad`` of ``grad_rows = grad_z @ weight1``; only the blocks that have columns are computed."""
        grad_rows = self.matmul(grad_z, take_blocks(weight1, blocks, args.width))
        shape = (args.num_rows, args.num_patches, len(blocks) * args.width)
        return self.mix_weights_grad(grad_rows.view(shape), blocks, args)

    # ---- compositions ----------------------------------------------------------------------------------------------

    def project(
        self, args: MixArgs, projector: Projector, keep: Keep, keep_z: bool, out: Tensor | None = None
    ) -> tuple[Tensor, Mixed, Tensor | None]:
        """``(out [B, P, H], mixed, z [M, N] if kept)``, in the memory of ``out`` ``[M, H]`` where that is given."""
        y, z, mixed = self.mix_linear(args, projector, keep, keep_z)
        if keep != Keep.ROWS or projector.norm is not None:
            # The rows are freed here, before the second product allocates its result.
            mixed = mixed._replace(rows=None)
        if projector.weight2 is not None:
            if keep_z and z is None:
                z = y
            out = y.new_empty((y.shape[0], projector.weight2.shape[0])) if out is None else out
            self.linear_into(y, projector.weight2, projector.bias2, out)
        else:
            out = y if out is None else out.copy_(y)
        # Not a view for autograd, which would refuse to let callers change it in place.
        return torch.ops.aten._unsafe_view(out, (args.num_rows, args.num_patches, out.shape[-1])), mixed, z

    def mix_backward(self, grad_rows: Tensor, sources: MixArgs) -> Tensor:
        """The gradient of the mix weights ``[B, C]`` from that of the mixed row ``[B, P, G*D]``."""
        blocks = sources.program.weighted_blocks
        return self.mix_weights_grad(take_blocks(grad_rows, blocks, sources.width), blocks, sources)

    def project_backward(
        self, grad_out: Tensor, saved: Saved, projector: Projector, needs: Needs
    ) -> dict[str, Tensor | None]:
        """The gradients that ``needs`` asks for, by its names; "rows" is what ``layer_grads`` reads."""
        grad, grads = grad_out.flatten(0, 1), {}
        if needs.bias2:
            grads["bias2"] = grad.sum(0)
        if needs.z or needs.weight2:
            grad_z, of_second = self._second_linear_backward(grad, saved.z, projector, needs)
            grads |= of_second
        if needs.z:
            rows, of_first = self._first_linear_backward(grad_z, saved, projector, needs)
            grads |= of_first
        if needs.rows:
            grads |= self._rows_backward(grad_z, rows, grad_out.shape[:2], saved, projector, needs)
        return grads

    def _second_linear_backward(
        self, grad: Tensor, z: Tensor | None, projector: Projector, needs: Needs
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The gradient of z ``[M, N]``, if it is needed, and those of "weight2" and "bias1"."""
        grads: dict[str, Tensor | None] = {}
        grad_z, y = grad, z
        if needs.z:
            grad_z, y, grads["bias1"] = self.linear_grad_input(
                grad, projector.weight2, z, projector.activation, needs.weight2, needs.bias1
            )
        elif projector.activation is not None:
            y = ACTIVATIONS[projector.activation](z)
        if needs.weight2:
            assert y is not None
            grads["weight2"] = self.matmul(grad.t(), y)
        return grad_z, grads

    def _first_linear_backward(
        self, grad_z: Tensor, saved: Saved, projector: Projector, needs: Needs
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        """The mixed rows before the norm, where there is one, and the gradient of "weight1"."""
        norm, rows, dtype = projector.norm, saved.rows, projector.weight1.dtype
        if not needs.weight1:
            if norm is not None and saved.sources is not None:
                rows = self.mix(saved.sources, dtype).rows
            return rows, {}
        if saved.sources is not None:
            mixed = self.mix(saved.sources, dtype, norm, Keep.ROWS)
            rows, normal = mixed.raw_rows, mixed.rows
        else:
            assert rows is not None
            normal = rows if norm is None else layer_norm(rows, norm)
        assert normal is not None
        return rows, {"weight1": self.matmul(grad_z.t(), normal.flatten(0, 1))}

    def _rows_backward(
        self, grad_z: Tensor, rows: Tensor | None, shape: torch.Size, saved: Saved, projector: Projector, needs: Needs
    ) -> dict[str, Tensor | None]:
        """The gradients of "rows" ``[B, P, G*D]``, "norm_weight", "norm_bias" and "mix_weights"."""
        norm, weight1, grads = projector.norm, projector.weight1, {}
        if norm is None and not needs.layers:
            assert saved.sources is not None
            blocks = saved.sources.program.weighted_blocks
            return {"mix_weights": self.mix_weights_grad_of_linear(grad_z, weight1, blocks, saved.sources)}
        grad_rows = self.matmul(grad_z, weight1)
        if norm is not None:
            assert rows is not None and saved.mean is not None and saved.rstd is not None
            of_params = needs.norm_weight or needs.norm_bias
            grad_rows, grads["norm_weight"], grads["norm_bias"] = self.norm_backward(
                grad_rows, rows.flatten(0, 1), norm, saved.mean.flatten(), saved.rstd.flatten(), of_params
            )
        grads["rows"] = grad_rows = grad_rows.view(*shape, weight1.shape[1])
        if needs.mix_weights:
            assert saved.sources is not None
            grads["mix_weights"] = self.mix_backward(grad_rows, saved.sources)
        return grads


class Shapes(WeightedMix):
    """Empty tensors of the shapes and dtypes that every implementation returns: what torch.compile asks for."""

    def mix(self, args: MixArgs, dtype: torch.dtype, norm: Norm | None = None, keep: Keep = Keep.NOTHING) -> Mixed:
        raw_rows = args.new_rows(dtype) if norm is not None and keep == Keep.ROWS else None
        sums = args.new_sums() if keep == Keep.SOURCES else []
        return Mixed(args.new_rows(dtype), raw_rows, sums, *args.new_stats(norm))

    def mix_weights_grad(self, grad_rows: Tensor, blocks: Sequence[int], args: MixArgs) -> Tensor:
        assert args.mix_weights is not None
        return args.mix_weights.new_empty(args.mix_weights.shape)

    def layer_grads(
        self, grad_rows: Tensor, shares: Shares, mix_weights: Tensor | None, image_index: Tensor | None,
        shape: LayerShape,
    ) -> list[Tensor]:  # fmt: skip
        return shape.new_grads(grad_rows, shares.num_grads)

    def norm_backward(
        self, grad_out: Tensor, rows: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, need_params: bool
    ) -> NormGrads:
        sums = mean.new_empty(2, rows.shape[-1]) if need_params else None
        return NormGrads(torch.empty_like(grad_out), *norm_param_grads(sums, norm))


def take_blocks(x: Tensor, blocks: Sequence[int], width: int) -> Tensor:
    """The blocks of the last dimension ``[..., G*D] -> [..., len(blocks)*D]``, a view where they are adjacent."""
    first, last = blocks[0], blocks[-1]
    if list(blocks) == list(range(first, last + 1)):
        return x[..., first * width : (last + 1) * width]
    return torch.cat([x[..., g * width : (g + 1) * width] for g in blocks], dim=-1)
