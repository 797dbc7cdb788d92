"""The rule, and that ``verify`` catches a backend that breaks it."""

from dataclasses import replace

import pytest
import torch
from seeds import seeded

import igva_kernels as ik
from igva_kernels import registry, testing, verify
from igva_kernels.ops.weighted_mix import cases
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.testing import Judge, draws, measure_memory, relative_error, within_rule

CASE = cases.SMALL_CASES[0]


def judge_all(actual, oracle, plain, dtype=torch.float32):
    """The verdict after as many equal draws as it takes, and their number."""
    judge = Judge(dtype)
    count = 0
    for _ in draws([judge]):
        judge.add(actual, oracle, plain, "grad bias1")
        count += 1
    return judge.verdicts[0], count


def test_the_rule():
    oracle = torch.tensor([3.0, 4.0], dtype=torch.float64)
    plain = oracle + torch.tensor([0.0, 5e-3])
    assert relative_error(plain, oracle) == pytest.approx(1e-3)
    assert judge_all(oracle + torch.tensor([0.0, 9.9e-3]), oracle, plain)[0].ok
    wrong, _ = judge_all(oracle + torch.tensor([0.0, 10.1e-3]), oracle, plain)
    assert not wrong.ok
    assert str(wrong) == "grad bias1: error 2.020e-03 > budget 2.000e-03 (plain torch 1.000e-03)"
    # Half a unit of rounding is granted where plain torch is exact.
    assert judge_all(oracle * (1 + 0.4 * torch.finfo(torch.bfloat16).eps), oracle, oracle, torch.bfloat16)[0].ok


def test_nan_is_never_right_and_is_not_drawn_often():
    oracle = torch.ones(2, dtype=torch.float64)
    for plain in (oracle, oracle * float("nan")):
        verdict, count = judge_all(oracle * float("nan"), oracle, plain, torch.bfloat16)
        assert not verdict.ok
        assert count == testing.FIRST_DRAWS


@pytest.mark.parametrize(("elements", "expected"), [(0, 1), (4, 8), (300, 4), (1024, 1)])
def test_what_is_right_is_drawn_until_there_are_enough_numbers(elements, expected):
    oracle = torch.ones(elements, dtype=torch.float64)
    verdict, count = judge_all(oracle, oracle, oracle)
    assert verdict.ok
    assert count == expected


@pytest.mark.parametrize(("elements", "expected"), [(4, 256), (2**17, 8)])
def test_what_is_wrong_is_drawn_until_luck_is_ruled_out(elements, expected):
    oracle = torch.ones(elements, dtype=torch.float64)
    verdict, count = judge_all(oracle + 3e-3, oracle, oracle + 1e-3)
    assert not verdict.ok
    assert count == expected


@pytest.mark.parametrize("tail", [0.0, 1.0], ids=["even", "heavy tails"])
@pytest.mark.parametrize("elements", [1, 4, 96])
def test_luck_decides_nothing(elements, tail):
    """Kernels with 1.3 times the error of plain torch are right, those with a hundred are wrong, whatever the draws."""

    def verdict(ratio):
        judge = Judge(torch.float32)
        for _ in draws([judge]):
            oracle = torch.randn(elements, dtype=torch.float64)
            errors = torch.randn(2, elements, dtype=torch.float64)
            errors = 1e-4 * errors * torch.randn_like(errors).abs() ** tail
            judge.add(oracle + ratio * errors[0], oracle, oracle + errors[1])
        return judge.verdicts[0].ok

    assert all(verdict(1.3) for _ in range(100))
    assert not any(verdict(100.0) for _ in range(20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_entry_among_a_million_is_seen(dtype):
    oracle = torch.randn(2**20, dtype=torch.float64)
    plain, actual = oracle.to(dtype), oracle.to(dtype)
    assert testing.judge(actual, oracle, plain, dtype).ok
    actual[12345] += 1
    verdict = testing.judge(actual, oracle, plain, dtype)
    assert not verdict.ok
    assert "an entry is off by" in str(verdict)


def test_what_was_rounded_on_the_way_is_not_rounded_once():
    parts = torch.randn(2, 1024)
    oracle, once = parts.double().sum(0), parts.sum(0).bfloat16()
    twice = parts.bfloat16().float().sum(0).bfloat16()
    for actual, promised, right in ((once, True, True), (twice, True, False), (twice, False, True)):
        judge = Judge(torch.bfloat16)
        judge.add(actual, oracle, twice, rounded_once=promised)
        assert judge.verdicts[0].ok == right


def test_one_draw_of_a_few_numbers_is_refused():
    oracle = torch.ones(1023, dtype=torch.float64)
    with pytest.raises(ValueError, match="output: 1023 elements of one draw are judged by luck; need 1024"):
        testing.judge(oracle, oracle, oracle, torch.float32, "output")


def test_a_loop_over_draws_fails_where_something_is_wrong_or_nothing_was_judged():
    oracle = torch.ones(1024, dtype=torch.float64)

    def loop(**results):
        for judge in within_rule(torch.float32):
            for name, actual in results.items():
                judge.add(actual, oracle, oracle, name)

    loop(output=oracle)
    with pytest.raises(AssertionError, match="grad bias1: error"):
        loop(output=oracle, **{"grad bias1": oracle + 1})
    with pytest.raises(AssertionError, match="nothing was judged"):
        loop()


def test_a_result_that_does_not_match_the_oracle():
    with pytest.raises(ValueError, match="shape"):
        relative_error(torch.ones(3), torch.ones(2))


def test_a_row_has_a_verdict_on_the_output_and_every_gradient_of_its_case():
    for case in cases.SMALL_CASES:
        names = set(case.run(case.draw(seeded(), torch.float32, "cpu"), "reference"))
        assert "output" in names
        assert (cases.MIX_WEIGHTS_GRAD in names) == bool(case.plan.num_columns)
        assert ("grad norm weight" in names) == (case.norm_eps is not None)
        assert any(name.startswith("grad layer") for name in names) == case.trainable_tower


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_a_case_without_a_gradient_from_a_kink(activation):
    case = next(case for case in cases.SMALL_CASES if case.activation == activation and case.op == "layer_mix_linear")
    inputs = case.draw(seeded(), torch.float16, "cpu")
    plain = replace(case, activation=None).forward(inputs.double(), "reference")
    near = plain.abs() < cases.KINK
    assert inputs.grad_out[near].eq(0).all()
    assert inputs.grad_out[~near].ne(0).float().mean() > 0.99


def test_real_shapes_and_the_interpreter_do_not_meet(monkeypatch):
    seen = []
    statuses = [registry.BackendStatus(name, True, ("cpu",), "") for name in ("triton", "cpu")]
    monkeypatch.setattr(verify, "backends", lambda: [*statuses, registry.BackendStatus("cuda", False, (), "none")])
    monkeypatch.setattr(
        verify, "judge", lambda case, dtype, names, device, seed: seen.append((case, list(names))) or []
    )
    monkeypatch.setattr(registry.Operator, "why_not", lambda *_: None)
    assert list(verify.verify(dtypes=["fp32"])) == []
    assert {tuple(names) for case, names in seen if case in cases.SMALL_CASES} == {("triton", "cpu")}
    assert {tuple(names) for case, names in seen if case in cases.REAL_CASES} == {("cpu",)}


def test_a_dtype_that_takes_minutes_at_real_shapes_is_judged_there_only_if_named(monkeypatch):
    seen = set()
    monkeypatch.setattr(verify, "is_emulated", lambda dtype: dtype == torch.float16)
    monkeypatch.setattr(
        verify,
        "backends",
        lambda: [registry.BackendStatus(n, n == "cpu", ("cpu",), "") for n in registry.all_backends()],
    )

    def judge(case, dtype, names, device, seed):
        seen.update([(case in cases.REAL_CASES, dtype)] if names else [])
        return []

    monkeypatch.setattr(verify, "judge", judge)
    list(verify.verify())
    assert {dtype for real, dtype in seen if not real} == {"fp32", "bf16", "fp16"}
    assert {dtype for real, dtype in seen if real} == {"fp32", "bf16"}
    list(verify.verify(dtypes=["fp16"]))
    assert (True, "fp16") in seen


def test_draws_are_the_same_numbers_every_time():
    first, second = (CASE.draw(0, torch.float32, "cpu") for _ in range(2))
    assert torch.equal(first.grad_out, second.grad_out)
    assert not torch.equal(first.grad_out, CASE.draw(1, torch.float32, "cpu").grad_out)


def test_memory_of_a_call():
    x = torch.ones(2**20)
    result, memory = measure_memory(lambda: (x + 1).exp().sum())
    assert result.ndim == 0
    assert memory.peak == pytest.approx(2 * x.nbytes, rel=0.01)
    assert memory.kept < 1024
    _, memory = measure_memory(lambda: ik.layer_mix([x.view(1, -1, 16)], _tap(), impl="reference"))
    assert memory.kept == pytest.approx(x.nbytes, rel=0.01)


def _tap():
    return ik.MixPlan.concat([0])


def test_plain_torch_can_be_judged_too():
    rows = list(verify.verify(["reference"], ["fp32"], quick=True))
    assert rows and all(row.ok and row.backend == "reference" for row in rows)


def test_a_backend_is_not_judged_in_a_case_whose_activation_it_lacks(monkeypatch):
    monkeypatch.setattr(verify, "judge", lambda case, dtype, names, *_: [(case, name) for name in names])
    lacking = registry.operators()["weighted_mix"].implementation("cpu")
    monkeypatch.setattr(type(lacking), "activations", lambda self: ("gelu",))
    judged = {case for case, _ in verify.verify(["cpu"], ["fp32"], quick=True) if isinstance(case, cases.Case)}
    assert {case.activation for case in judged} == {None, "gelu"}
