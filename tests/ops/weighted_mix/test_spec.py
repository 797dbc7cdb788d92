"""The specification against the operator's formula entry by entry, and against the published code's steps."""

import plain_torch
import pytest
import torch
import torch.nn.functional as F

from igva_kernels import MixPlan

PLANS = {
    "igva": MixPlan.igva(6, 3),
    "igva_uniform": MixPlan.igva_uniform(6, 2),
    "concat": MixPlan.concat([-2, -5, 1], num_states=7),
    "weighted_sum": MixPlan.weighted_sum(range(1, 7), residual=-2, num_states=7),
    "uneven": MixPlan((((0, 0, 0.5), (1, 1, 0.25), (2, None, 2.0)), ((2, 1, -1.0), (3, 0, 0.5))), 7),
}


def entry_by_entry(states, plan, weights, skip, image_index):
    blocks = []
    for block in plan.blocks:
        total = 0
        for layer, column, scale in block:
            state = states[layer][:, skip:]
            state = state if image_index is None else state[image_index]
            total = total + scale * (1 if column is None else weights[:, column, None, None]) * state
        blocks.append(total)
    return torch.cat(blocks, -1)


@pytest.mark.parametrize("image_index", [None, [1, 0, 1]])
@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("name", PLANS)
def test_the_mix_is_the_sum_over_its_entries(name, skip, image_index):
    plan = PLANS[name]
    states = [torch.randn(2, 5, 4, dtype=torch.float64) for _ in range(7)]
    index = None if image_index is None else torch.tensor(image_index)
    rows = 2 if index is None else 3
    weights = torch.randn(rows, plan.num_columns, dtype=torch.float64) if plan.num_columns else None
    torch.testing.assert_close(
        plain_torch.layer_mix(states, plan, weights, skip_tokens=skip, image_index=index),
        entry_by_entry(states, plan, weights, skip, index),
    )


def test_the_block_is_igva_as_its_authors_compute_it():
    """Group means by stack and mean, times w, summed, behind the penultimate layer; Linear, GELU, Linear."""
    states = [torch.randn(2, 10, 8) for _ in range(25)]
    weights = torch.randn(2, 4).softmax(-1)
    w1, b1, w2, b2 = torch.randn(12, 16), torch.randn(12), torch.randn(12, 12), torch.randn(12)
    groups = [torch.stack(states[1 + 6 * k : 7 + 6 * k]).mean(0) for k in range(4)]
    fused = (torch.stack(groups, 1) * weights[:, :, None, None]).sum(1)
    row = torch.cat([states[-2][:, 1:], fused[:, 1:]], -1)
    expected = F.linear(F.gelu(F.linear(row, w1, b1)), w2, b2)
    actual = plain_torch.layer_mix_mlp(states, MixPlan.igva(), weights, w1, b1, w2, b2, skip_tokens=1)
    assert torch.equal(actual, expected)


def test_norm_is_layer_norm_over_the_whole_row():
    states = [torch.randn(2, 5, 4, dtype=torch.float64) for _ in range(3)]
    plan, w = MixPlan.concat([0, 2]), torch.randn(6, 8, dtype=torch.float64)
    gamma, beta = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    row = torch.cat([states[0], states[2]], -1)
    row = (row - row.mean(-1, keepdim=True)) / (row.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * gamma + beta
    actual = plain_torch.layer_mix_linear(states, plan, None, w, norm=(gamma, beta, 1e-5), activation="silu")
    torch.testing.assert_close(actual, F.silu(row @ w.T))
