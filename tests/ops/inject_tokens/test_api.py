"""``token_rows`` and ``inject_tokens``: what they compute, bit by bit, and errors that name the argument."""

import harness
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import igva_kernels as ik
from igva_kernels.testing import measure_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IMPLS = ["reference", *harness.quick_impls("inject_tokens")]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def make(dtype=torch.float32, width=40, **options):
    torch.manual_seed(0)
    hidden = torch.randn(3, 17, width).to(dtype).requires_grad_(**options)
    mask = torch.rand(3, 17) < 0.5
    return hidden, torch.randn(int(mask.sum()), width).to(dtype).requires_grad_(**options), mask


def written_out(hidden, features, mask):
    """As transformers' ``_deepstack_process`` has it."""
    hidden = hidden.clone()
    hidden[mask, :] = hidden[mask, :] + features
    return hidden


def test_rows_are_numbered_through_the_whole_batch():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    rows = ik.token_rows(mask)
    assert rows.tolist() == [[-1, 0, 1], [2, -1, -1]] and rows.dtype == torch.int32
    assert ik.token_rows(torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_values_and_gradients_is_that_of_the_masked_addition(impl, dtype):
    hidden, features, mask = make(dtype)
    expected = written_out(hidden, features, mask)
    actual = ik.inject_tokens(hidden, features, ik.token_rows(mask), impl=impl)
    grad = torch.randn_like(expected)
    assert torch.equal(actual, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(out, (hidden, features), grad) for out in (actual, expected)), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_replacing_is_what_masked_scatter_does(impl, dtype):
    hidden, features, mask = make(dtype)
    expected = hidden.masked_scatter(mask.unsqueeze(-1), features)
    actual = ik.inject_tokens(hidden, features, ik.token_rows(mask), mode="replace", impl=impl)
    grad = torch.randn_like(expected)
    assert torch.equal(actual, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(out, (hidden, features), grad) for out in (actual, expected)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_nan_and_infinity_stay_in_their_tokens(impl):
    hidden, features, mask = make()
    rows = ik.token_rows(mask)
    with torch.no_grad():
        hidden[0, 0], features[1] = float("nan"), float("inf")
    out = ik.inject_tokens(hidden, features, rows, impl=impl).detach()
    assert torch.equal(out.isfinite().all(-1), (rows != 1) & (torch.arange(51).view(3, 17) != 0))


def test_the_result_is_new_memory_even_where_nothing_is_injected(impl):
    hidden, features, mask = make(requires_grad=False)
    before = hidden.clone()
    ik.inject_tokens(hidden, features[:0], ik.token_rows(torch.zeros_like(mask)), impl=impl).add_(1)
    assert torch.equal(hidden, before)


def test_no_feature_still_gets_a_gradient_so_that_sharded_training_does_not_wait(impl):
    hidden, features, mask = make()
    weight = torch.randn(4, 40, requires_grad=True)
    features = torch.zeros(0, 4) @ weight
    ik.inject_tokens(hidden, features, ik.token_rows(torch.zeros_like(mask)), impl=impl).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_features_of_images_are_taken_in_order(impl):
    hidden = torch.zeros(2, 4, 3)
    features = torch.arange(12.0).view(2, 2, 3)
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]])
    out = ik.inject_tokens(hidden, features, ik.token_rows(mask), impl=impl)
    assert torch.equal(out[mask], features.view(4, 3))


def test_features_of_another_dtype_are_rounded_first_as_plain_code_does(impl):
    hidden, _, mask = make(torch.bfloat16)
    features = torch.randn(int(mask.sum()), 40, requires_grad=True)
    out = ik.inject_tokens(hidden, features, ik.token_rows(mask), impl=impl)
    assert torch.equal(out, written_out(hidden, features.bfloat16(), mask))
    out.sum().backward()
    assert features.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [[0, 7], [0, -2], [0, 2**31 - 1], [2**40, 0]])
def test_a_row_out_of_range_is_refused(impl, rows):
    rows = torch.tensor([rows], dtype=torch.int64 if max(rows) > 2**31 else torch.int32)
    with pytest.raises(ValueError, match="token_rows: need values from -1 to 6, the rows of the features, got"):
        ik.inject_tokens(torch.ones(1, 2, 4), torch.ones(7, 4), rows, impl=impl)


def test_a_row_that_two_tokens_take_is_refused(impl):
    with pytest.raises(ValueError, match="token_rows: no two tokens may take the same row"):
        ik.inject_tokens(torch.ones(1, 3, 4), torch.ones(7, 4), torch.tensor([[2, -1, 2]]), impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "sum"}, ValueError, "mode: got 'sum', need 'add' or 'replace'"),
        ({"hidden_states": torch.ones(2, 4)}, ValueError, r"hidden_states: need shape \[B, T, H\], got \[2, 4\]"),
        ({"hidden_states": torch.ones(1, 2, 4).int()}, TypeError, "hidden_states: need a floating tensor"),
        ({"features": torch.ones(3, 5)}, ValueError, r"features: need shape \[V, 4\] or \[B, P, 4\], got \[3, 5\]"),
        ({"features": None}, TypeError, "features: need a floating tensor"),
        ({"token_rows": torch.ones(1, 2).bool()}, TypeError, r"got a tensor of torch.bool; token_rows\(mask\) makes"),
        ({"token_rows": torch.ones(1, 3).int()}, ValueError, r"token_rows: need shape \[1, 2\] as the hidden states"),
        ({"gate": torch.ones(2)}, ValueError, r"gate: need shape \[1\] or \[3\], one number per row of features, got"),
        ({"gate": 1.0}, TypeError, "gate: need a floating tensor"),
        ({"gate": torch.ones(1, device="meta")}, ValueError, "gate: need device cpu as the hidden states, got meta"),
        ({"impl": "fast"}, ValueError, "impl: got 'fast'"),
    ],
)
def test_a_wrong_argument_is_named(change, error, message):
    given = {"hidden_states": torch.ones(1, 2, 4), "features": torch.ones(3, 4), "token_rows": torch.tensor([[0, 1]])}
    with pytest.raises(error, match=message):
        ik.inject_tokens(**given | change)


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3).bool(), torch.ones(1, 2, 3).bool(), None])
def test_a_mask_of_another_kind_is_named(mask):
    with pytest.raises((TypeError, ValueError), match="mask: need"):
        ik.token_rows(mask)


def test_nothing_but_the_rows_is_kept_for_the_backward(impl):
    if impl == "reference":
        pytest.skip("plain torch keeps what it likes")
    hidden, features, mask = make()
    rows, kept = ik.token_rows(mask), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ik.inject_tokens(hidden, features, rows, impl=impl)
        assert [t.data_ptr() for t in kept] == [rows.data_ptr()]
        kept.clear()
        gate = torch.ones(1, requires_grad=True)
        ik.inject_tokens(hidden, features, rows, gate=gate, impl=impl)
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (rows, gate, features)}


@pytest.mark.plain_memory
def test_nothing_beyond_the_results_is_allocated(impl):
    if impl == "reference":
        pytest.skip("plain torch allocates what it likes")
    hidden, features, mask = (
        torch.randn(1, 512, 256, requires_grad=True),
        torch.randn(300, 256, requires_grad=True),
        None,
    )
    mask = torch.arange(512).view(1, 512) < 300
    rows = ik.token_rows(mask)
    out, memory = measure_memory(lambda: ik.inject_tokens(hidden, features, rows, impl=impl))
    assert memory.peak < out.nbytes + 8192
    grad = torch.ones_like(out)
    grads, memory = measure_memory(lambda: torch.autograd.grad(out, (hidden, features), grad))
    assert grads[0].data_ptr() == grad.data_ptr()  # the gradient of an addition is passed on, not copied
    assert memory.peak < features.nbytes + 8192


@pytest.mark.plain_memory
def test_one_graph_serves_every_number_of_visual_tokens(impl):
    torch.compiler.reset()
    counter = CompileCounter()

    def step(hidden, features, mask, gate):
        return ik.inject_tokens(hidden, features, ik.token_rows(mask), gate=gate, impl=impl).square().sum()

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for count in (5, 9, 2, 12):
        hidden = torch.randn(2, 8, 4, requires_grad=True)
        features, gate = torch.randn(count, 4, requires_grad=True), torch.ones(1, requires_grad=True)
        torch._dynamo.mark_dynamic(features, 0)
        mask = (torch.arange(16) < count).view(2, 8)
        losses = [function(hidden, features, mask, gate) for function in (compiled, step)]
        assert torch.equal(*losses)
        for ours, theirs in zip(*(torch.autograd.grad(loss, (hidden, features, gate)) for loss in losses), strict=True):
            assert torch.equal(ours, theirs)
    assert counter.frame_count == 1


def test_a_compiled_call_refuses_a_row_out_of_range_too():
    torch.compiler.reset()
    compiled = torch.compile(ik.inject_tokens, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="token_rows: need values from -1 to 2"):
        compiled(torch.ones(1, 2, 4), torch.ones(3, 4), torch.tensor([[0, 3]], dtype=torch.int32))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_can_be_recomputed_in_the_backward(impl, use_reentrant):
    hidden, features, mask = make()
    rows, grads = ik.token_rows(mask), []
    for wrap in (lambda f, *args: f(*args), lambda f, *args: checkpoint(f, *args, use_reentrant=use_reentrant)):
        out = wrap(lambda h, f: ik.inject_tokens(h, f, rows, impl=impl).square(), hidden, features)
        grads.append(
            torch.autograd.grad(out.sum(), (hidden, features))
            if not use_reentrant
            else _backward(out, hidden, features)
        )
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


def _backward(out, *leaves):
    for leaf in leaves:
        leaf.grad = None
    out.sum().backward()
    return [leaf.grad for leaf in leaves]


def test_the_reference_has_second_derivatives():
    hidden, features, mask = (t.double() if t.is_floating_point() else t for t in make(width=3))
    gate = torch.randn(1, dtype=torch.float64, requires_grad=True)
    rows, leaves = ik.token_rows(mask), (hidden.detach().requires_grad_(), features.detach().requires_grad_(), gate)
    for mode in ("add", "replace"):
        torch.autograd.gradgradcheck(
            lambda h, f, g, m=mode: ik.inject_tokens(h, f, rows, gate=g, mode=m, impl="reference"), leaves
        )


def test_meta_tensors_have_the_shape(impl):
    hidden, features = torch.empty(2, 5, 8, device="meta"), torch.empty(3, 8, device="meta")
    rows = torch.empty(2, 5, device="meta", dtype=torch.int32)
    assert ik.inject_tokens(hidden, features, rows).shape == (2, 5, 8)


@pytest.mark.parametrize("features", [torch.ones(3, 4).half(), torch.ones(3, 5), torch.ones(1, 3, 4)])
def test_a_direct_call_reads_no_memory_that_is_not_the_features(impl, features):
    if impl == "reference":
        pytest.skip("plain torch is no registered operator")
    rows = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"features: need \[\d, 4\] of torch.float32"):
        torch.ops.igva_kernels.inject_tokens(torch.ones(1, 1, 4), features, rows, None, "add", impl)
