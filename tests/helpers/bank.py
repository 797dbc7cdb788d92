"""Random arguments of ``layer_project``, at small sizes, and the same by one call for each member."""

import torch

import igva_kernels as ik
from igva_kernels import MixPlan

IGVA, TAPS, MEAN = MixPlan.igva(4, 2), MixPlan.concat([-2, 1], 5), MixPlan(((((0, None, 0.5), (1, None, 0.5))),), 5)
PLANS = (IGVA, TAPS, MEAN)
LINEARS = ("weight1", "bias1", "weight2", "bias2")
WIDTH, HIDDEN = 8, 12


def make(plans=PLANS, images=2, tokens=5, dtype=torch.float32, norms=False, towers=False, hidden=HIDDEN, width=WIDTH):
    """The arguments by name; everything that may be trained is."""

    def draw(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    states = [torch.randn(images, tokens, width).to(dtype).requires_grad_(towers) for _ in range(5)]
    weights = [
        torch.randn(images, plan.num_columns).softmax(-1).requires_grad_() if plan.num_columns else None
        for plan in plans
    ]
    rows = [plan.num_blocks * width for plan in plans]
    args = {
        "hidden_states": states, "plans": list(plans), "mix_weights": weights,
        "weight1": [draw(hidden, row) for row in rows], "bias1": [draw(hidden) for _ in rows],
        "weight2": [draw(hidden, hidden) for _ in rows], "bias2": [draw(hidden) for _ in rows], "skip_tokens": 1,
    }  # fmt: skip
    return args | ({"norm": [(draw(row), draw(row), 1e-5) for row in rows]} if norms else {})


def member_by_member(args, **options):
    """The same by J calls of ``layer_mix_mlp``."""
    names = ("mix_weights", *LINEARS, "norm")
    own = {name: args.get(name) for name in names}
    common = {name: value for name, value in args.items() if name not in (*names, "plans", "hidden_states")}

    def at(name, j):
        given = own[name]
        shared = given is None or isinstance(given, torch.Tensor) or (name == "norm" and isinstance(given[2], float))
        return given if shared else given[j]

    return [
        ik.layer_mix_mlp(
            args["hidden_states"], plan, *(at(name, j) for name in names[:5]), norm=at("norm", j), **common, **options
        )
        for j, plan in enumerate(args["plans"])
    ]  # fmt: skip


def trained(args):
    leaves = torch.utils._pytree.tree_leaves(args)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
