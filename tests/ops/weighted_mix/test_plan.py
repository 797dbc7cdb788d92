"""MixPlan: the blocks each constructor makes, negative indices, the reduced form, plain data."""

import dataclasses
import json
import math
import pickle
import subprocess
import sys

import plain_torch
import pytest
import torch

from igva_kernels import MixPlan
from igva_kernels.ops.weighted_mix.plan import Entry, Term, is_tap, terms


def taps(*layers):
    return tuple((Entry(layer),) for layer in layers)


def mean(layers):
    layers = list(layers)
    return tuple(Entry(layer, None, 1 / len(layers)) for layer in layers)


def test_igva_has_the_base_first_and_then_the_weighted_group_means():
    plan = MixPlan.igva()
    base, mixed = plan.blocks
    assert base == (Entry(23),)
    assert mixed == tuple(Entry(1 + 6 * k + i, k, 1 / 6) for k in range(4) for i in range(6))
    assert (plan.num_blocks, plan.num_columns, plan.num_states) == (2, 4, 25)
    assert plan.layers == tuple(range(1, 25))
    assert plan.weighted_blocks == (1,)


def test_igva_uniform_is_igva_with_equal_weights():
    states = [torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(25)]
    weights = torch.full((2, 4), 0.25, dtype=torch.float64)
    assert MixPlan.igva_uniform().num_columns == 0
    torch.testing.assert_close(
        plain_torch.layer_mix(states, MixPlan.igva_uniform()), plain_torch.layer_mix(states, MixPlan.igva(), weights)
    )


def test_igva_takes_explicit_groups_of_unequal_size():
    plan = MixPlan.igva(5, [[1, 2], [-1]], base=-1)
    assert plan.blocks == ((Entry(5),), (Entry(1, 0, 0.5), Entry(2, 0, 0.5), Entry(5, 1, 1.0)))


def test_igva_groups_that_do_not_divide_the_layers_propose_some_that_do():
    with pytest.raises(ValueError, match=r"groups: 5 does not divide num_layers=24; try groups=4"):
        MixPlan.igva(24, 5)
    with pytest.raises(ValueError, match="groups: every group needs"):
        MixPlan.igva(24, [[1], []])


def test_dense_connector_has_its_repos_layer_sets():
    assert MixPlan.dense_connector("sci").blocks == taps(23, 7, 15)
    assert MixPlan.dense_connector("dci").blocks == (*taps(23), mean(range(12)), mean(range(12, 24)))
    siglip = MixPlan.dense_connector("dci", tower="siglip")
    assert siglip.blocks == (*taps(26), mean(range(13)), mean(range(13, 26)))
    assert siglip.num_states == 27


@pytest.mark.parametrize(
    ("strategy", "tower", "blocks"),
    [
        ("18", "clip", taps(18, 23)),
        ("3-18-23", "clip", taps(3, 18, 23)),
        ("former", "clip", (mean(range(1, 13)), *taps(23))),
        ("latter", "clip", (mean(range(13, 25)), *taps(23))),
        ("all", "clip", (mean(range(1, 13)), mean(range(13, 25)), *taps(23))),
        ("3-18-23", "siglip", taps(3, 20, 25)),
        ("latter", "siglip", (mean(range(15, 27)), *taps(25))),
    ],
)
def test_layer_select_has_its_repos_layer_sets_with_the_base_last(strategy, tower, blocks):
    assert MixPlan.layer_select(strategy, tower).blocks == blocks


@pytest.mark.parametrize("call", [lambda: MixPlan.layer_select("3-18"), lambda: MixPlan.dense_connector("sti")])
def test_an_unknown_strategy_names_the_ones_there_are(call):
    with pytest.raises(ValueError, match="need one of"):
        call()


def test_weighted_sum_has_a_column_a_layer_and_the_residual_without():
    plan = MixPlan.weighted_sum([1, 2], residual=-2, num_states=4)
    assert plan.blocks == ((Entry(1, 0), Entry(2, 1), Entry(2)),)
    assert plan.num_columns == 2


def test_negative_layers_resolve_at_once_where_the_number_of_states_is_known():
    assert MixPlan.concat([-2, 0], num_states=5).blocks == taps(3, 0)
    unresolved = MixPlan.concat([-2, 0])
    assert unresolved.layers == (-2, 0)
    assert unresolved.resolve(5) == MixPlan.concat([3, 0], num_states=5)


def test_another_number_of_states_than_the_recorded_one_is_refused():
    with pytest.raises(ValueError, match="made for 25 hidden states, got 24"):
        MixPlan.igva().resolve(24)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="layer 7, got 5 hidden states"):
        MixPlan.concat([7]).resolve(5)
    with pytest.raises(ValueError, match="layer -6 is not among 5"):
        MixPlan.concat([-6], num_states=5)


@pytest.mark.parametrize("blocks", [(), ((),)])
def test_a_plan_needs_entries(blocks):
    with pytest.raises(ValueError, match="at least one block"):
        MixPlan(blocks)


@pytest.mark.parametrize("entry", [(1,), ("a", None, 1.0), (1, 0.5, 1.0), (1, None, None), (True, None, 1.0)])
def test_a_malformed_entry_is_a_type_error(entry):
    with pytest.raises(TypeError, match="an entry is"):
        MixPlan(((entry,),))


@pytest.mark.parametrize("blocks", [5, [3], [[3]], [[([1], None, 1.0)]]])
def test_blocks_that_are_no_sequences_of_entries_are_a_type_error(blocks):
    with pytest.raises(TypeError, match="blocks: need sequences of entries"):
        MixPlan(blocks)


def test_a_negative_column_is_refused():
    with pytest.raises(ValueError, match="columns count from 0"):
        MixPlan((((1, -1, 1.0),),))


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_a_scale_that_is_not_finite_is_refused(scale):
    """The code of a plan could not be read back."""
    with pytest.raises(ValueError, match="scales are finite"):
        MixPlan((((1, None, scale),),))


def test_equal_plans_are_equal_hashable_and_picklable():
    assert MixPlan.igva() == MixPlan.igva()
    assert len({MixPlan.igva(), MixPlan.igva(), MixPlan.igva_uniform()}) == 2
    assert pickle.loads(pickle.dumps(MixPlan.igva())) == MixPlan.igva()
    with pytest.raises(AttributeError):
        MixPlan.igva().num_states = 3


@pytest.mark.parametrize("plan", [MixPlan.igva(), MixPlan.concat([-2, 1]), MixPlan.weighted_sum([1, 2], -1)])
def test_a_plan_travels_through_json_and_through_its_code(plan):
    assert MixPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert MixPlan.from_code(plan.code).blocks == plan.blocks


def test_a_plan_can_be_rebuilt_from_its_fields_as_fsdp2_does_to_cast_the_arguments_of_a_module():
    plan = MixPlan.igva(8)
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    assert dataclasses.replace(plan, **fields) == plan


def test_terms_gather_entries_of_equal_column_and_scale():
    block = (Entry(1, 0, 0.5), Entry(2, 1, 1.0), Entry(3, 0, 0.5), Entry(4))
    assert terms(block) == (Term(0, 0.5, (1, 3)), Term(1, 1.0, (2,)), Term(None, 1.0, (4,)))


def test_compact_drops_unused_layers_and_renumbers():
    layers, plan = MixPlan.concat([7, 3, 7], num_states=9).compact()
    assert layers == (3, 7)
    assert plan.blocks == taps(1, 0, 1)
    assert plan.num_states == 2


def test_igva_reduces_to_five_sources_of_which_the_base_is_a_tap():
    sources, plan = MixPlan.igva().reduced()
    assert sources.num_blocks == 5
    assert [is_tap(block) for block in sources.blocks] == [True, False, False, False, False]
    assert plan.blocks == ((Entry(0),), tuple(Entry(1 + k, k) for k in range(4)))


def test_a_single_layer_stays_a_tap_and_its_scale_moves_out():
    sources, plan = MixPlan((((3, 0, 0.5), (4, 1, 0.25)),)).reduced()
    assert sources.blocks == taps(3, 4)
    assert plan.blocks == ((Entry(0, 0, 0.5), Entry(1, 1, 0.25)),)


@pytest.mark.parametrize(
    ("plan", "formula"),
    [
        (MixPlan.igva(6, 2), "[h5 | w_0·mean(h1..h3) + w_1·mean(h4..h6)]"),
        (MixPlan.igva(6, 3), "[h5 | Σ_k w_k·{mean(h1, h2), mean(h3, h4), mean(h5, h6)}]"),
        (MixPlan.weighted_sum(range(1, 5), -2, 7), "[Σ_k w_k·{h1..h4} + h5]"),
        (MixPlan.concat([-2, 1]), "[h-2 | h1]"),
        (MixPlan((((0, 1, 0.5), (2, 1, 0.5), (3, None, 2.0), (0, 0, 1.0)),)), "[w_1·mean(h0, h2) + w_0·h0 + 2·h3]"),
    ],
)
def test_a_plan_prints_as_its_formula(plan, formula):
    assert str(plan) == formula


def test_a_plan_from_another_process_is_found_among_equal_ones():
    write = "import pickle, sys, igva_kernels as ik; sys.stdout.buffer.write(pickle.dumps(ik.MixPlan.concat([1, 2])))"
    plan = pickle.loads(subprocess.check_output([sys.executable, "-c", write]))
    assert plan in {MixPlan.concat([1, 2])}
