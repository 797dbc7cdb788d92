"""``verify`` with a fault planted in a kernel: whatever is wrong by one entry, one rounding or one stride is caught."""

from dataclasses import replace
from functools import reduce

import harness
import pytest
import torch
from seeds import seeded

from igva_kernels import MixPlan, testing, verify
from igva_kernels.ops.weighted_mix import cases
from igva_kernels.ops.weighted_mix.cases import MIX_WEIGHTS_GRAD, OUTPUT, Case
from igva_kernels.testing import SPECIFICATION, Judge, draws, relative_error

KERNELS = harness.quick_impls("weighted_mix")[:1]
pytestmark = pytest.mark.skipif(not KERNELS, reason="no kernels to plant a fault in")

BLOCK, INDEXED, NORM, SUM, MIX = (
    next(case for case in cases.SMALL_CASES if case.name == name)
    for name in ("igva, trainable tower", "several instructions an image", "concat + LayerNorm", "weighted sum + norm",
                 "mix alone")
)  # fmt: skip
SEEDS = range(seeded(), seeded() + 3)
RUN = Case.run


def caught(monkeypatch, case, dtype, seed, run):
    """The results of ``case`` that are wrong by the rule if the kernel's are those of ``run``, and the others."""

    def planted(self, inputs, impl, only=()):
        return RUN(self, inputs, impl, only) if impl in ("reference", SPECIFICATION) else run(self, inputs, impl, only)

    with monkeypatch.context() as patch:
        patch.setattr(Case, "run", planted)
        patch.setattr(testing, "MAX_DRAWS", 8)  # 256 would say the same, and take long
        (row,) = verify.judge(case, dtype, KERNELS, "cpu", seed)
    wrong = {verdict.name for verdict in row.verdicts if not verdict.ok}
    assert row.ok == (not wrong)
    return wrong, {verdict.name for verdict in row.verdicts} - wrong


# ---- a kernel that reads or computes something else ----


def layers(change):
    """One of the states is changed."""

    def fault(case, inputs):
        states = list(inputs.layers)
        at = case.plan.blocks[-1][0].layer
        states[at] = change(states[at])
        return case, inputs._replace(layers=states)

    return fault


def weights(change):
    return lambda case, inputs: (case, inputs._replace(mix_weights=change(inputs.mix_weights)))


def param(name, change):
    return lambda case, inputs: (case, inputs._replace(params={**inputs.params, name: change(inputs.params[name])}))


def scale(change):
    """One entry of the plan has another scale."""

    def fault(case, inputs):
        *blocks, last = case.plan.blocks
        first = last[0]._replace(scale=change(last[0].scale))
        return replace(case, plan=MixPlan((*blocks, (first, *last[1:])), case.plan.num_states)), inputs

    return fault


def one_row_skipped(state):
    state = state.clone()
    state[0, 3] = 0
    return state


def swapped(dim):
    return lambda x: x.index_select(dim, torch.tensor([1, 0, *range(2, x.shape[dim])]))


def without_the_last(dim):
    """What a product makes of a weight if it forgets the last of its depth (dim 1) or of its columns (dim 0)."""
    return lambda x: torch.cat([x.narrow(dim, 0, x.shape[dim] - 1), torch.zeros_like(x.narrow(dim, 0, 1))], dim)


def to_tf32(x):
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


READS = {
    "a token further": (BLOCK, layers(lambda x: x.roll(1, dims=1))),
    "an image further": (BLOCK, layers(lambda x: x.roll(1, dims=0))),
    "an element further": (BLOCK, layers(lambda x: x.roll(1, dims=2))),
    "the image of another row": (INDEXED, lambda case, inputs: (replace(case, image_index=(1, 0, 0, 1)), inputs)),
    "a layer left out": (BLOCK, scale(lambda s: 0.0)),
    "a layer left out in one row": (BLOCK, layers(one_row_skipped)),
    "1/6 for 1/5": (BLOCK, scale(lambda s: s * 5 / 6)),
    "the weights of another row": (BLOCK, weights(lambda w: w.roll(1, dims=0))),
    "two weights swapped": (BLOCK, weights(swapped(1))),
    "two columns of weight1 swapped": (BLOCK, param("weight1", swapped(1))),
    "two rows of weight2 swapped": (BLOCK, param("weight2", swapped(0))),
    "the end of a depth left out": (BLOCK, param("weight1", without_the_last(1))),
    "the edge of a panel left out": (BLOCK, param("weight2", without_the_last(0))),
    "bias1 one further": (BLOCK, param("bias1", lambda b: b.roll(1))),
    "bias2 one further": (BLOCK, param("bias2", lambda b: b.roll(1))),
    "no bias1": (BLOCK, param("bias1", torch.zeros_like)),
    "no bias2": (BLOCK, param("bias2", torch.zeros_like)),
    "norm bias one further": (NORM, param("norm bias", lambda b: b.roll(1))),
    "no norm weight": (SUM, param("norm weight", torch.ones_like)),
}  # fmt: skip
IN_FP32 = {
    "another eps": (NORM, lambda case, inputs: (replace(case, norm_eps=1e-6), inputs)),
    "another GELU": (BLOCK, lambda case, inputs: (replace(case, activation="gelu_tanh"), inputs)),
    "products in TF32": (BLOCK, param("weight1", to_tf32)),
    "a layer in 16 bits": (BLOCK, layers(lambda x: x.bfloat16().to(x.dtype))),
}  # fmt: skip


def run_with(fault):
    def run(self, inputs, impl, only):
        case, changed = fault(self, inputs)
        return RUN(case, changed, impl, only)

    return run


def touched(case, seed, dtype, fault):
    """The results that the fault changes, by how much."""
    inputs = case.draw(seed, dtype, "cpu")
    # The fault is planted before the inputs become fp64, so that rounding to 16 bits or TF32 is a change in fp64 too.
    changed_case, changed = fault(case, inputs)
    exact = RUN(case, inputs.double(), "reference")
    wrong = RUN(changed_case, changed.double(), "reference")
    return {name: relative_error(wrong[name], exact[name]) for name in exact}


@pytest.mark.parametrize("name", [*READS, *IN_FP32])
def test_in_fp32_every_result_that_a_fault_touches_is_wrong(name, monkeypatch):
    case, fault = (READS | IN_FP32)[name]
    for seed in SEEDS:
        changes = touched(case, seed, torch.float32, fault)
        wrong, right = caught(monkeypatch, case, "fp32", seed, run_with(fault))
        assert {result for result, change in changes.items() if change > 3e-6} <= wrong
        assert {result for result, change in changes.items() if change == 0} <= right
        assert wrong


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READS)
def test_in_16_bits_every_fault_is_caught(name, dtype, monkeypatch):
    case, fault = READS[name]
    for seed in SEEDS:
        assert caught(monkeypatch, case, dtype, seed, run_with(fault))[0]


# ---- a result that is written wrongly ----


def entry(x):
    """The last one is off by as much as entries are large."""
    x = x.clone()
    x.view(-1)[-1] += x.double().square().mean().sqrt()
    return x


def slightly(x):
    """The last one is off by a thousandth of that."""
    x = x.clone()
    x.view(-1)[-1] += 1e-3 * x.double().square().mean().sqrt()
    return x


def missing(x):
    x = x.clone()
    x[0] = 0
    return x


def twice(x):
    """A slice was written where the next one belongs."""
    x = x.clone()
    x[..., 1] = x[..., 0]
    return x


RESULTS = [OUTPUT, MIX_WEIGHTS_GRAD, "grad weight1", "grad bias1", "grad weight2", "grad bias2", "grad layer 3"]
WRITES = {"one entry": entry, "a row missing": missing, "a column twice": twice, "nothing": torch.zeros_like}


def run_and(change, wrong):
    def run(self, inputs, impl, only):
        results = RUN(self, inputs, impl, only)
        return {name: change(value) if name == wrong else value for name, value in results.items()}

    return run


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WRITES)
def test_a_result_that_is_written_wrongly_is_the_one_that_is_caught(name, dtype, result, monkeypatch):
    for seed in SEEDS:
        assert caught(monkeypatch, BLOCK, dtype, seed, run_and(WRITES[name], result))[0] == {result}


@pytest.mark.parametrize("result", RESULTS)
def test_in_fp32_an_entry_that_is_slightly_off_is_caught(result, monkeypatch):
    for seed in SEEDS:
        assert caught(monkeypatch, BLOCK, "fp32", seed, run_and(slightly, result))[0] == {result}


# ---- one rounding more ----


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_mix_that_rounds_its_groups_is_caught(dtype, monkeypatch):
    """Plain torch rounds as often, so that the norm of the error cannot tell."""

    def run(self, inputs, impl, only):
        results = RUN(self, inputs, impl, only)
        if OUTPUT in results:
            states, weights = [x if x is None else x[:, self.skip :] for x in inputs.layers], inputs.mix_weights
            groups = [
                sum(e.scale * states[e.layer].float() for e in self.plan.blocks[1] if e.column == k) for k in range(3)
            ]
            mixed = sum(weights[:, k, None, None] * g.to(verify.DTYPES[dtype]) for k, g in enumerate(groups))
            results[OUTPUT] = torch.cat([results[OUTPUT][..., : self.width], mixed.to(verify.DTYPES[dtype])], -1)
        return results

    for seed in SEEDS:
        assert caught(monkeypatch, MIX, dtype, seed, run)[0] == {OUTPUT}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_over_rows_in_16_bits_is_caught(dtype):
    def judge(total):
        judge = Judge(dtype)
        for _ in draws([judge]):
            grad = torch.randn(600, 48).to(dtype)
            judge.add(total(grad), grad.double().sum(0), grad.sum(0))
        return judge.verdicts[0]

    assert judge(lambda grad: grad.float().cumsum(0)[-1].to(dtype)).ok
    assert not judge(lambda grad: reduce(torch.add, grad)).ok
