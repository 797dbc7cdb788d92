"""Random arguments of the public functions, at small sizes."""

import torch

from igva_kernels import MixPlan

IGVA = MixPlan.igva(6, 3)
NAMES = ("mix_weights", "weight1", "bias1", "weight2", "bias2", "norm_weight", "norm_bias")


def make(
    images=2, tokens=5, width=8, hidden=12, dtype=torch.float32, plan=IGVA, rows=None, grad=False, layers_grad=False,
    device=None,
):  # fmt: skip
    """Seven hidden states, mix weights (None where the plan has none), and ``[weight1, bias1, weight2, bias2]``."""

    def draw(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    states = [draw(images, tokens, width).requires_grad_(layers_grad) for _ in range(7)]
    columns, row = plan.num_columns, plan.num_blocks * width
    weights = torch.randn(images if rows is None else rows, columns, device=device).softmax(-1) if columns else None
    params = [draw(*shape).requires_grad_(grad) for shape in ((hidden, row), (hidden,), (hidden, hidden), (hidden,))]
    return states, None if weights is None else weights.requires_grad_(grad), params


def named(device=None):
    """The arguments of ``layer_mix_mlp`` by name, those of a norm among them."""
    states, weights, params = make(device=device)
    norm = torch.randn(2, 16, device=device)
    return {"layers": states, **dict(zip(NAMES, (weights, *params, *norm), strict=True))}
