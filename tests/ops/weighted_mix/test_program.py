"""A plan lowered to flat arrays computes what the plan says: random plans beside autograd of the formula."""

import plain_torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igva_kernels import MixPlan
from igva_kernels.ops.weighted_mix.plan import is_tap
from igva_kernels.ops.weighted_mix.program import BLOCK, PART, TERM, dots, lower, shares

LAYERS, COLUMNS, WIDTH = 4, 3, 2
ENTRY = st.tuples(
    st.integers(0, LAYERS - 1), st.sampled_from([None, *range(COLUMNS)]), st.sampled_from([1.0, 0.5, -2.0])
)
PLANS = st.lists(st.lists(ENTRY, min_size=1, max_size=6), min_size=1, max_size=4).map(
    lambda blocks: MixPlan(tuple(map(tuple, blocks)), LAYERS)
)
FIXED = [MixPlan.igva(3, 3), MixPlan.concat([1, 2, 2], 4), MixPlan(((((1, None, 0.5), (2, None, 0.5)),) * 2), 4),
         MixPlan((((0, 0, 1.0), (2, 1, 1.0), (0, 1, 1.0), (2, 0, 1.0)),), 4)]  # fmt: skip


def over_plans(test):
    """Random plans, the same ones every time."""
    return settings(
        max_examples=60, database=None, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )(given(PLANS | st.sampled_from(FIXED))(test))  # fmt: skip


def draw(plan):
    layers = [torch.randn(2, 3, WIDTH, dtype=torch.float64) for _ in range(LAYERS)]
    return layers, torch.rand(2, plan.num_columns, dtype=torch.float64) if plan.num_columns else None


def evaluate(steps, layers, weights):
    """The blocks of steps, and the sums that they keep, by the rules that ``Steps`` states."""
    blocks, kept, total, part, block = [], {}, 0, 0, 0
    for layer, end, scale, column, slot in zip(*steps, strict=True):
        total = total + layers[layer]
        if end >= TERM:
            part, total = part + scale * total, 0
        if end >= PART:
            if slot >= 0:
                assert slot not in kept, "a sum is kept once"
                kept[slot] = part
            block, part = block + (part if column < 0 else weights[:, column, None, None] * part), 0
        if end == BLOCK:
            blocks.append(block)
            block = 0
    assert not any(torch.is_tensor(open_end) for open_end in (total, part, block))
    return blocks, kept


@over_plans
def test_steps_compute_the_row_and_keep_every_sum_once(plan):
    program, (layers, weights) = lower(plan), draw(plan)
    blocks, kept = evaluate(program.steps, layers, weights)
    torch.testing.assert_close(torch.cat(blocks, -1), plain_torch.layer_mix(layers, plan, weights))
    sources, reduced = plan.reduced()
    summed = [block for block in sources.blocks if not is_tap(block)]
    assert [layer is None for layer in program.sources] == [not is_tap(block) for block in sources.blocks]
    assert sorted(kept) == [*range(len(summed))] == [*range(program.num_sums)]
    if summed:
        expected = plain_torch.layer_mix(layers, MixPlan(tuple(summed), LAYERS)).split(WIDTH, -1)
        alone, _ = evaluate(program.sum_steps, layers, None)
        for i, total in enumerate(expected):
            torch.testing.assert_close(kept[i], total)
            torch.testing.assert_close(alone[i], total)
    gathered = program.gather(layers, [kept[i] for i in sorted(kept)])
    torch.testing.assert_close(torch.cat(blocks, -1), plain_torch.layer_mix(gathered, reduced, weights))


@over_plans
def test_dots_are_the_gradient_of_the_weights(plan):
    if not plan.num_columns:
        return
    layers, weights = draw(plan)
    rows = plain_torch.layer_mix(layers, plan, weights.requires_grad_())
    grad_rows = torch.randn_like(rows)
    (expected,) = torch.autograd.grad(rows, weights, grad_rows)
    blocks = lower(plan).weighted_blocks
    taken, actual = [grad_rows[..., g * WIDTH : (g + 1) * WIDTH] for g in blocks], torch.zeros_like(expected)
    for position, layer, column, scale in zip(*dots(plan, blocks), strict=True):
        actual[:, column] += scale * (taken[position] * layers[layer]).sum((1, 2))
    torch.testing.assert_close(actual, expected)


@over_plans
def test_shares_are_the_gradients_of_the_layers_and_none_is_computed_twice(plan):
    layers, weights = draw(plan)
    needs = tuple(layer != 1 for layer in range(LAYERS))
    leaves = [layer.requires_grad_(need) for layer, need in zip(layers, needs, strict=True)]
    rows = plain_torch.layer_mix(leaves, plan, weights)
    if not rows.requires_grad:
        return
    grad_rows = torch.randn_like(rows)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected = iter(torch.autograd.grad(rows, wanted, grad_rows, allow_unused=True))
    found, own = shares(plan, needs)
    grads, grad, signature, signatures = [], 0, [], []
    for block, column, scale, end in zip(*found, strict=True):
        weight = 1 if column < 0 else weights[:, column, None, None]
        grad, signature = (
            grad + scale * weight * grad_rows[..., block * WIDTH : (block + 1) * WIDTH],
            [*signature, (block, column, scale)],
        )
        if end:
            grads, grad = [*grads, grad], 0
            signatures, signature = [*signatures, tuple(sorted(signature))], []
    assert len(set(signatures)) == len(signatures) == len(grads) == found.num_grads
    for need, which in zip(needs, own, strict=True):
        right = next(expected) if need else None
        assert (right is None) == (which is None)
        if which is not None:
            torch.testing.assert_close(grads[which], right)


def test_igva_needs_five_gradients_for_its_24_layers_and_keeps_four_sums():
    plan = MixPlan.igva().compact()[1]
    assert shares(plan, (True,) * 24)[0].num_grads == 5
    assert lower(plan).num_sums == 4
