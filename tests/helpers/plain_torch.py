"""The public functions as plain torch computes them."""

from functools import partial

import torch
import torch.nn.functional as F

import igva_kernels as ik

layer_mix = partial(ik.layer_mix, impl="reference")
layer_mix_linear = partial(ik.layer_mix_linear, impl="reference")
layer_mix_mlp = partial(ik.layer_mix_mlp, impl="reference")


def deform_attn_core(levels, shapes, locations, weights):
    """Deformable attention as every public code without an extension computes it, by ``grid_sample``.

    ``levels`` are ``[B, H*W, Hd, dh]``, ``locations`` ``[B, Q, Hd, N, 2]`` from 0 to 1, ``weights`` ``[B, Q, Hd, N]``;
    one of each per level. Returns ``[B, Q, Hd * dh]``.
    """
    batch, _, heads, width = levels[0].shape
    sampled = []
    for level, size, where in zip(levels, shapes, locations, strict=True):
        pixels = level.permute(0, 2, 3, 1).reshape(batch * heads, width, *size)
        grid = (2 * where - 1).transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(pixels, grid, padding_mode="zeros", align_corners=False))
    weighted = torch.cat(sampled, -1) * torch.cat(list(weights), -1).transpose(1, 2).flatten(0, 1).unsqueeze(1)
    return weighted.sum(-1).view(batch, heads * width, -1).transpose(1, 2)
