"""The rule, and that ``verify`` catches a backend that breaks it."""

import pytest
import torch

from igva_kernels import dispatch, ops, verify
from igva_kernels.testing import assert_within_rule, judge, measure_memory, relative_error

CASE = verify.SMALL_CASES[0]


def test_the_rule():
    oracle = torch.tensor([3.0, 4.0], dtype=torch.float64)
    plain = oracle + torch.tensor([0.0, 5e-3])
    assert relative_error(plain, oracle) == pytest.approx(1e-3)
    assert judge(oracle + torch.tensor([0.0, 9.9e-3]), oracle, plain, torch.float32).ok
    assert not judge(oracle + torch.tensor([0.0, 10.1e-3]), oracle, plain, torch.float32).ok
    # Half a unit of rounding is granted where plain torch is exact.
    assert judge(oracle * (1 + 0.4 * torch.finfo(torch.bfloat16).eps), oracle, oracle, torch.bfloat16).ok
    with pytest.raises(AssertionError, match="grad bias1: error"):
        assert_within_rule(oracle + 1, oracle, plain, torch.float32, "grad bias1")


def test_nan_is_never_right():
    oracle = torch.ones(2, dtype=torch.float64)
    assert not judge(oracle * float("nan"), oracle, oracle, torch.bfloat16).ok
    assert not judge(oracle * float("nan"), oracle, oracle * float("nan"), torch.bfloat16).ok


def test_draws_are_judged_by_their_root_mean_square():
    oracle = [torch.ones(1, dtype=torch.float64)] * 2
    assert relative_error([o + e for o, e in zip(oracle, (0.3, 0.4), strict=True)], oracle) == pytest.approx(0.125**0.5)


@pytest.mark.parametrize(("actual", "message"), [(torch.ones(3), "shape"), ([torch.ones(2)] * 2, "draws")])
def test_results_that_do_not_match_the_oracle(actual, message):
    with pytest.raises(ValueError, match=message):
        relative_error(actual, torch.ones(2))


@pytest.mark.parametrize("case", [*verify.SMALL_CASES], ids=lambda case: case.name)
def test_plain_torch_keeps_its_own_rule(case):
    (row,) = verify.judge(case, "bf16", ["reference"], "cpu")
    assert row.ok
    names = {verdict.name for verdict in row.verdicts}
    assert "output" in names
    assert (verify.MIX_WEIGHTS_GRAD in names) == bool(case.plan.num_columns)
    assert ("grad norm weight" in names) == (case.norm_eps is not None)
    assert any(name.startswith("grad layer") for name in names) == case.trainable_tower


@pytest.mark.parametrize("wrong", ["output", "grad mix_weights", "grad weight1", "grad layer 3"])
def test_a_wrong_result_is_caught(monkeypatch, wrong):
    run = verify.Case.run

    def with_an_error(self, inputs, impl, only_mix_weights=False):
        results = run(self, inputs, "reference", only_mix_weights)
        if impl == "cpu" and wrong in results:
            results[wrong] = results[wrong] * 1.001
        return results

    monkeypatch.setattr(verify.Case, "run", with_an_error)
    (row,) = verify.judge(CASE, "fp32", ["cpu"], "cpu")
    assert not row.ok
    assert row.worst.name == wrong


def test_real_shapes_and_the_interpreter_do_not_meet(monkeypatch):
    seen = []
    statuses = [dispatch.BackendStatus(name, True, ("cpu",), "") for name in ("triton", "cpu")]
    monkeypatch.setattr(verify, "backends", lambda: [*statuses, dispatch.BackendStatus("cuda", False, (), "none")])
    monkeypatch.setattr(verify, "judge", lambda case, dtype, names, device: seen.append((case, list(names))) or [])
    assert list(verify.verify(dtypes=["fp32"])) == []
    assert {tuple(names) for case, names in seen if case in verify.SMALL_CASES} == {(), ("triton", "cpu")}
    assert {tuple(names) for case, names in seen if case in verify.REAL_CASES} == {(), ("cpu",)}


def test_a_dtype_that_takes_minutes_at_real_shapes_is_judged_there_only_if_named(monkeypatch):
    seen = set()
    monkeypatch.setattr(verify.gemm, "is_emulated", lambda dtype: dtype == torch.float16)
    monkeypatch.setattr(
        verify,
        "backends",
        lambda: [dispatch.BackendStatus(n, n == "cpu", ("cpu",), "") for n in dispatch.KERNEL_BACKENDS],
    )

    def judge(case, dtype, names, device):
        seen.update([(case in verify.REAL_CASES, dtype)] if names else [])
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
    _, memory = measure_memory(lambda: ops.layer_mix([x.view(1, -1, 16)], _tap(), impl="reference"))
    assert memory.kept == pytest.approx(x.nbytes, rel=0.01)


def _tap():
    return verify.MixPlan.concat([0])
