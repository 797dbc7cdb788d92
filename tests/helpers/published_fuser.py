"""MMFuser's block in plain torch, as its repository computes it with the pure-torch core in place of the extension."""

import torch
from plain_torch import deform_attn_core
from seeds import seeded
from torch.nn.functional import layer_norm, linear

LINEARS = [
    f"{which}_attn.{name}"
    for which in ("cross", "self")
    for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
]
NORMS = ["query_norm", "feat_norm", "norm1"]
PARAMETERS = {f"{name}.{kind}" for name in (*LINEARS, *NORMS) for kind in ("weight", "bias")} | {"gamma1", "gamma2"}
"""Their names in a checkpoint of MMFuser or Layer_Select_Fuse."""


def published_fuser(weights, hidden_states, heads, points=4, skip=0, grid=None, eps=1e-6):
    """``[I, P, D]`` from the parameters by their names and the states: the levels, and the query behind them."""
    *levels, query = (state[:, skip:] for state in hidden_states)
    side = round(query.shape[1] ** 0.5)
    grid = grid or (side, side)

    def norm(name, x):
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def attend(name, asks, feats, count):
        def project(which, x):
            return linear(x, weights[f"{name}.{which}.weight"], weights[f"{name}.{which}.bias"])

        height, width = grid
        value = project("value_proj", feats).unflatten(-1, (heads, -1))
        offsets = project("sampling_offsets", asks).unflatten(-1, (heads, count, points, 2))
        scores = project("attention_weights", asks).unflatten(-1, (heads, -1)).softmax(-1)
        wide = torch.promote_types(value.dtype, torch.float32)
        y, x = torch.meshgrid(torch.arange(height, dtype=wide), torch.arange(width, dtype=wide), indexing="ij")
        reference = torch.stack([(x + 0.5) / width, (y + 0.5) / height], -1).flatten(0, 1)[:, None, None, None]
        locations = reference + offsets / torch.tensor([width, height])
        maps = value.to(wide).split(height * width, 1)
        shares = scores.to(wide).unflatten(-1, (count, points)).unbind(3)
        out = deform_attn_core(maps, [grid] * count, locations.to(wide).unbind(3), shares)
        return project("output_proj", out.to(value.dtype))

    a = attend("cross_attn", norm("query_norm", query), norm("feat_norm", torch.cat(levels, 1)), len(levels))
    rows = norm("norm1", a)
    return query + weights["gamma1"] * (a + weights["gamma2"] * attend("self_attn", rows, rows, 1))


def random_weights(fuser, seed=0, offset=1.5):
    """Gives a block parameters of a trained one's size, with offsets of some pixels that lie on no kink."""
    generator = torch.Generator().manual_seed(seeded(seed))

    def normal(parameter, mean, std):
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in fuser.named_parameters():
            if "sampling_offsets" in name:
                normal(parameter, 0, offset * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1))
            elif parameter.ndim > 1:
                normal(parameter, 0, parameter.shape[1] ** -0.5)
            else:
                normal(parameter, 1 if "norm" in name and "weight" in name else 0.5 * ("gamma" in name), 0.2)
    return fuser
