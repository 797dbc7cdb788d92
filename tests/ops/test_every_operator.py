"""What holds for every implementation of every operator: the error rule, the same bits again, any strides, and torch's
own checks of what is registered."""

import harness
import pytest
import strides
import torch
from recording import NAMESPACE, registered_calls
from seeds import seeded
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from igva_kernels import registry
from igva_kernels.registry import REFERENCE
from igva_kernels.verify import DTYPES


def test_a_kernel_backend_runs_here():
    assert [*harness.subjects(device="cpu")], [tuple(status) for status in registry.backends()]


@pytest.mark.parametrize(("subject", "case", "dtype"), harness.calls())
def test_values_and_every_gradient_obey_the_error_rule(subject, case, dtype):
    harness.assert_right(case, dtype, subject.impl, subject.device, seeded())


@pytest.mark.parametrize(("subject", "case", "dtype"), harness.calls(large=True, device="cuda", dtypes=("bf16",)))
def test_real_shapes_obey_the_error_rule(subject, case, dtype):
    harness.assert_right(case, dtype, subject.impl, subject.device, seeded())


@pytest.mark.parametrize("case", harness.cases())
def test_plain_torch_keeps_its_own_rule(case):
    harness.assert_right(case, "bf16", REFERENCE, "cpu", seeded())


@pytest.mark.parametrize("case", harness.cases())
@torch.no_grad()
def test_without_gradients_a_case_gives_its_output_alone_as_the_benchmarks_ask(case):
    assert len(case.run(case.draw(seeded(), torch.float32, "cpu"), REFERENCE)) == 1


@pytest.mark.parametrize(("subject", "case", "dtype"), harness.calls(dtypes=("bf16",), few=1))
def test_reruns_are_bit_identical(subject, case, dtype):
    inputs = case.draw(seeded(), DTYPES[dtype], subject.device)
    first, again = (case.run(inputs, subject.impl) for _ in range(2))
    assert first.keys() == again.keys()
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("layout", strides.LAYOUTS)
@pytest.mark.parametrize(("subject", "case", "dtype"), harness.calls(dtypes=("fp32", "bf16"), few=1))
def test_any_strides_give_what_a_dense_copy_gives(subject, case, dtype, layout):
    inputs = tree_map_only(torch.Tensor, strides.LAYOUTS[layout], case.draw(seeded(), DTYPES[dtype], subject.device))
    results = strides.outcome(case.run, inputs, subject.impl)
    dense = tree_map_only(torch.Tensor, torch.Tensor.contiguous, inputs)
    expected = strides.outcome(case.run, dense, subject.impl)
    strides.assert_same(results, expected, 1e-4 if dtype == "fp32" else 0.1, layout)


@pytest.mark.parametrize("layout", strides.LAYOUTS)
@pytest.mark.parametrize(("subject", "case", "dtype"), harness.calls(device="cpu", dtypes=("fp32",), few=1))
def test_any_argument_of_a_registered_operator_may_have_any_strides(subject, case, dtype, layout):
    for operator, args in registered_calls(case, subject.impl, seeded(), detached=True).items():
        strides.check(operator, args, layout, at_once=harness.INTERPRETED)


@pytest.mark.plain_memory
@pytest.mark.parametrize(("subject", "case", "dtype"), harness.calls(device="cpu", dtypes=("fp32",), few=1))
def test_opcheck_passes_for_every_operator_that_a_call_runs(subject, case, dtype):
    for operator, args in registered_calls(case, subject.impl, seeded()).items():
        torch.library.opcheck(operator, args)


@pytest.mark.interpreted  # only Triton has kernels of every operator
def test_the_cases_call_every_operator_that_is_registered_so_that_opcheck_sees_it():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")}
    for subject in (param.values[0] for param in harness.subjects(device="cpu")):
        for case in subject.operator.cases():
            if not case.is_large and registered:
                registered -= {operator.name() for operator in registered_calls(case, subject.impl, seeded())}
    assert not registered


@pytest.mark.parametrize(("subject", "case", "dtype"), harness.calls(device="cpu", dtypes=("fp32",), few=1))
def test_torch_counts_the_products_that_plain_torch_would_run(subject, case, dtype):
    inputs, counted = case.draw(seeded(), DTYPES[dtype], subject.device), []
    for impl in (subject.impl, REFERENCE):
        with FlopCounterMode(display=False) as counter:
            case.run(inputs, impl)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


@pytest.mark.plain_memory
@pytest.mark.parametrize("subject", harness.subjects(device="cpu"))
def test_torch_compile_takes_every_operator_that_a_call_runs_into_one_graph(subject):
    torch.compiler.reset()  # torch counts what it compiled of all operators together, and stops at eight
    calls = registered_calls(harness.smallest(subject.operator), subject.impl, seeded(), detached=True)
    for operator, args in calls.items():
        compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
        for actual, expected in zip(tree_leaves(compiled(*args)), tree_leaves(operator(*args)), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("subject", harness.subjects(device="cuda"))
def test_a_call_runs_on_the_stream_of_its_caller(subject):
    case, results = harness.smallest(subject.operator), []
    drawn = [case.draw(seeded(i), torch.bfloat16, "cuda") for i in range(2)]
    expected = [case.run(inputs, subject.impl) for inputs in drawn]
    torch.cuda.synchronize()
    for inputs in drawn:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)  # on another stream, a kernel would read the copies before they are made
            results.append(case.run(tree_map_only(torch.Tensor, torch.clone, inputs), subject.impl))
    torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert all(torch.equal(result[name], value) for name, value in right.items())
