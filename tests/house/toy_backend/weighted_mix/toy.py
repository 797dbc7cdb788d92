"""The mix on the toy backend: the three steps that every implementation must have; the rest is inherited."""

import torch
import torch.nn.functional as F

from igva_kernels.ops.weighted_mix import spec
from igva_kernels.ops.weighted_mix.program import dots
from igva_kernels.ops.weighted_mix.steps import Keep, Mixed, WeightedMix
from igva_kernels.runtime.dense import accumulation_dtype


class ToyWeightedMix(WeightedMix):
    def mix(self, args, dtype, norm=None, keep=Keep.NOTHING):
        options = {"skip_tokens": args.skip_tokens, "image_index": args.image_index}
        rows = spec.layer_mix(args.layers, args.plan, args.mix_weights, **options).to(dtype)
        sums = [
            spec.layer_mix(args.layers, source, skip_tokens=args.skip_tokens)
            for source in map(type(args.plan), [(block,) for block in args.plan.reduced()[0].blocks])
            if len(source.blocks[0]) > 1
        ]
        sums = sums if keep == Keep.SOURCES else []
        if norm is None:
            return Mixed(rows, None, sums)
        mean, rstd = rows.mean(-1), (rows.var(-1, correction=0) + norm[2]).rsqrt()
        normal = F.layer_norm(rows, rows.shape[-1:], *norm)
        return Mixed(normal, rows if keep == Keep.ROWS else None, sums, mean, rstd)

    def mix_weights_grad(self, grad_rows, blocks, args):
        grad = torch.zeros_like(args.mix_weights)
        for block, layer, column, scale in zip(*dots(args.plan, tuple(blocks)), strict=True):
            h = args.layers[layer][:, args.skip_tokens :]
            h = h if args.image_index is None else h[args.image_index]
            grad[:, column] += scale * (grad_rows[..., block * args.width :][..., : args.width] * h).sum((1, 2))
        return grad

    def layer_grads(self, grad_rows, shares, mix_weights, image_index, shape):
        rows = torch.arange(shape.num_images) if image_index is None else image_index
        grads, grad = [], 0.0
        for block, column, scale, end in zip(*shares, strict=True):
            weight = 1.0 if column < 0 else mix_weights[:, column, None, None]
            grad = grad + scale * weight * grad_rows[..., block * shape.width :][..., : shape.width]
            if end:
                full = grad.new_zeros(shape[:3], dtype=accumulation_dtype(shape.dtype))
                full[:, shape.skip_tokens :].index_add_(0, rows, grad)
                grads.append(full.to(shape.dtype))
                grad = 0.0
        return grads


IMPLEMENTATION = ToyWeightedMix()
