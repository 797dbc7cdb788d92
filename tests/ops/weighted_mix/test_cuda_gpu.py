"""The CUDA backend on a GPU: values, compile, graphs, streams, devices, the same bits, no waiting; on Hopper the fused
GEMMs too, whose flags and ticket are hammered.

`python tests/ops/weighted_mix/test_cuda_gpu.py` is a small run of every kernel for compute-sanitizer (memcheck,
racecheck, synccheck).
"""

import os

import pytest
import torch
import torch.nn.functional as F
from gpu_tools import check_memory, same
from igva_kernels.backends.cuda import BACKEND, gemm, grad_gemm
from seeds import seeded

import igva_kernels as ik
from igva_kernels import MixPlan, verify
from igva_kernels.ops.weighted_mix import cases
from igva_kernels.ops.weighted_mix.steps import Keep, MixArgs
from igva_kernels.testing import capture, within_rule

REASON = BACKEND.why_not(torch.device("cuda"), torch.bfloat16)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

PLAN = MixPlan.igva()


def switch(on):
    os.environ[gemm.SWITCH] = "1" if on else "0"
    return gemm.why_not_device(torch.cuda.current_device())


@pytest.fixture(params=["two kernels", "fused"])
def path(request):
    """The mix kernel and cuBLAS, or both in one kernel where the device has it."""
    reason = switch(request.param == "fused")
    if request.param == "fused" and reason is not None:
        pytest.skip(reason)
    yield request.param
    switch(False)


@pytest.fixture
def fused():
    reason = switch(True)
    if reason is not None:
        pytest.skip(reason)
    yield
    switch(False)


class Block:
    """The IGVA block at small widths, with everything that needs a gradient; rows enough for every fused GEMM."""

    def __init__(self, batch=4, tokens=69, width=128, hidden=264, dtype=torch.bfloat16, device="cuda", grad=True):
        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        self.states = [normal(batch, tokens, width) for _ in range(25)]
        self.weights = torch.randn(batch, 4, device=device).softmax(-1).requires_grad_(grad)
        shapes = ((hidden, 2 * width), (hidden,), (hidden, hidden), (hidden,))
        self.params = [normal(*shape, scale=0.05).requires_grad_(grad) for shape in shapes]

    def __call__(self, index=None):
        return ik.layer_mix_mlp(
            self.states, PLAN, self.weights, *self.params, skip_tokens=1, image_index=index, impl="cuda"
        )

    def step(self):
        out = self()
        return [out.detach(), *torch.autograd.grad(out.float().square().mean(), [self.weights, *self.params])]


@pytest.mark.parametrize("dtype", verify.DTYPES)
@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=lambda case: case.name)
def test_values_and_every_gradient_obey_the_error_rule(case, dtype, path):
    for row in verify.judge(case, dtype, ["cuda"], "cuda", seeded()):
        assert row.ok, str(row.worst)


@pytest.mark.parametrize("case", cases.REAL_CASES, ids=lambda case: case.name)
def test_real_shapes_obey_the_error_rule(case, path):
    for row in verify.judge(case, "bf16", ["cuda"], "cuda", seeded()):
        assert row.ok, str(row.worst)


def test_same_bits_again(path):
    block = Block()
    first = block.step()
    assert all(same(first, block.step()) for _ in range(5))


@pytest.mark.plain_memory
def test_compiled_in_one_graph(path):
    block = Block()
    compiled = torch.compile(lambda: block(), fullgraph=True)
    out = compiled()
    grads = torch.autograd.grad(out.float().square().mean(), [block.weights, *block.params])
    assert same([out.detach(), *grads], block.step())


@pytest.mark.plain_memory
@pytest.mark.parametrize("indexed", [False, True])
def test_a_captured_graph_follows_its_inputs(path, indexed):
    block = Block(grad=False)
    index = torch.tensor([3, 1, 1, 0], device="cuda") if indexed else None
    graph, out = capture(lambda: block(index))
    for _ in range(3):
        for tensor in (*block.states, block.weights, *block.params):
            tensor.copy_(torch.randn_like(tensor) * 0.1)
        if index is not None:
            index.copy_(torch.randint(4, (4,)))
        graph.replay()
        assert torch.equal(out, block(index))


@pytest.mark.plain_memory
def test_no_call_waits_for_the_gpu(path):
    block = Block()
    index = torch.tensor([0, 9, -1, 2], device="cuda")
    block.step()
    block(index=index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        block.step()
        out = block(index=index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out[[1, 2]].isnan().all()
    assert out[[0, 3]].isfinite().all()


def test_streams_of_their_own(path):
    blocks = [Block(), Block()]
    expected = [block.step() for block in blocks]
    streams = [torch.cuda.Stream() for _ in blocks]
    results = [[], []]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, block, result in zip(streams, blocks, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(block.step())
    torch.cuda.synchronize()
    for wanted, result in zip(expected, results, strict=True):
        assert all(same(wanted, got) for got in result)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_a_device_that_is_not_current(path):
    block = Block(device="cuda:1")
    with torch.cuda.device(0):
        away = block.step()
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert same(away, block.step())


def test_offsets_beyond_32_bits():
    stride = 2**31 + 16
    if torch.cuda.mem_get_info()[0] < 3 * 2 * stride:
        pytest.skip("needs 13 GB of free memory")
    buffer = torch.empty(2 * stride, dtype=torch.bfloat16, device="cuda")
    far = buffer.as_strided((2, 5, 64), (stride, 64, 1))
    far.copy_(torch.randn(2, 5, 64))
    plan = MixPlan.concat([0, 0], 1)
    assert torch.equal(ik.layer_mix([far], plan, impl="cuda"), torch.cat([far, far], -1))


def test_more_elements_than_32_bits_count():
    """The last rows as if they stood alone."""
    rows, columns = 2**19 + 8, 4104
    if torch.cuda.mem_get_info()[0] < 16 * rows * columns:
        pytest.skip("needs 35 GB of free memory")
    x, weight = torch.randn(rows, 64, device="cuda").bfloat16(), torch.randn(columns, 64, device="cuda").bfloat16()
    y, z = BACKEND.linear(x, weight, None, "gelu", True)
    torch.testing.assert_close(y[-8:], F.gelu(z[-8:]), rtol=1e-2, atol=1e-5)
    grad_z, again, _ = BACKEND.linear_grad_input(y, None, z, "gelu", True, True)
    assert torch.equal(again, y)
    assert torch.equal(grad_z[-8:], BACKEND.linear_grad_input(y[-8:], None, z[-8:], "gelu", False, False)[0])


@pytest.mark.parametrize("layers", [1, 11, 12, 24])
def test_a_row_with_norm_of_every_size_that_fits_a_multiprocessor(layers):
    """12 layers are 48 KB, for which a kernel must ask, and 24 the 96 KB beyond which memory holds the row."""
    states = [torch.randn(1, 3, 1024, device="cuda") for _ in range(layers)]
    weight = torch.randn(64, layers * 1024, device="cuda") / 100
    args = (states, MixPlan.concat(range(layers), layers), None, weight)
    norm = (None, None, 1e-5)
    expected = ik.layer_mix_linear(*args, norm=norm, impl="reference")
    torch.testing.assert_close(ik.layer_mix_linear(*args, norm=norm, impl="cuda"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.plain_memory
def test_memory_of_the_real_block(path):
    check_memory(Block(16, 577, 1024, 4096, grad=False))


# ---- the fused GEMM ----


def both_paths(call, states):
    """F and the base by the fused GEMM (an identity for a weight), and by the mix kernel."""
    row = call.plan.num_blocks * call.width
    identity = torch.eye(row, dtype=states[0].dtype, device="cuda")
    return gemm.run(call, identity, None, None, False, [])[0], BACKEND.mix(call, states[0].dtype).rows.flatten(0, 1)


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(("tokens", "width"), [(257, 768), (577, 1024), (729, 1152)])
def test_the_mixed_row_keeps_the_bits_of_the_mix_kernel(fused, batch, tokens, width):
    states = [torch.randn(batch, tokens, width, device="cuda").bfloat16() for _ in range(24)]
    weights = torch.rand(batch, 4, device="cuda")
    call = MixArgs(states, PLAN.compact()[1], weights, None, 1)
    assert torch.equal(*both_paths(call, states))


def test_the_fused_gemm_writes_more_elements_than_32_bits_count(fused):
    images, columns = 909, 4104
    if torch.cuda.mem_get_info()[0] < 4 * images * 577 * columns:
        pytest.skip("needs 9 GB of free memory")
    states = [torch.randn(images, 577, 64, device="cuda").bfloat16() for _ in range(2)]
    weight = torch.randn(columns, 128, device="cuda").bfloat16()
    out, _ = gemm.run(MixArgs(states, MixPlan.concat([0, 1], 2), None, None, 1), weight, None, None, False, [])
    last = F.linear(torch.cat([state[-1, 1:] for state in states], -1), weight)
    torch.testing.assert_close(out[-576:], last, rtol=1e-2, atol=1e-2)


@pytest.mark.plain_memory
def test_ten_thousand_launches_back_to_back(fused):
    """A flag that is seen too early, or left set, shows in some of them; a ticket that is lost never ends."""
    states = [torch.randn(3, 65, 128, device="cuda").bfloat16() for _ in range(24)]
    sets = [torch.rand(3, 4, device="cuda") for _ in range(8)]
    calls = [MixArgs(states, PLAN.compact()[1], weights, None, 1) for weights in sets]
    identity = torch.eye(256, dtype=torch.bfloat16, device="cuda")
    wanted = [BACKEND.mix(call, torch.bfloat16).rows.flatten(0, 1) for call in calls]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(10_000):
        out, _ = gemm.run(calls[i % 8], identity, None, None, False, [])
        wrong += (out != wanted[i % 8]).any()
    assert int(wrong) == 0


@pytest.mark.plain_memory
def test_replays_with_random_inputs_keep_the_bits_of_the_mix_kernel(fused):
    states = [torch.randn(2, 577, 256, device="cuda").bfloat16() for _ in range(24)]
    weights = torch.rand(2, 4, device="cuda")
    call = MixArgs(states, PLAN.compact()[1], weights, None, 1)
    graph, (one, two) = capture(lambda: both_paths(call, states))
    for _ in range(200):
        for tensor in (*states, weights):
            tensor.uniform_(-1, 1)
        one.fill_(float("nan"))
        graph.replay()
        assert torch.equal(one, two)


def test_flags_and_ticket_end_where_they_must(fused, monkeypatch):
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **kw: made.append(zeros(*args, **kw)) or made[-1])
    block = Block(batch=5, tokens=101, grad=False)
    for _ in range(3):
        block()
    warps = 3 * torch.cuda.get_device_properties(0).multi_processor_count
    rows = gemm.num_flags(5 * 101) - 1
    launches = [tensor.tolist() for tensor in made if tensor.dtype == torch.int32]
    assert launches == [[16 * rows + warps] + [16] * rows] * 3


def test_a_layout_that_is_not_flat_takes_two_kernels(fused, monkeypatch):
    calls = []
    run = gemm.run
    monkeypatch.setattr(gemm, "run", lambda *args: calls.append(args) or run(*args))
    block = Block(grad=False)
    flat = block()
    padded = torch.empty(4, 70, 128, dtype=torch.bfloat16, device="cuda")[:, 1:]
    padded.copy_(block.states[-2])
    block.states[-2] = padded
    torch.testing.assert_close(block(), flat, rtol=2e-2, atol=2e-2)
    assert len(calls) == 1


def test_training_keeps_sums_and_z_of_the_fused_gemm(fused):
    block = Block()
    kept = block.step()
    switch(False)
    plain = block.step()
    for actual, expected in zip(kept, plain, strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=3e-2, atol=1e-2)


@pytest.mark.parametrize("width", [768, 1024, 1152])
def test_the_weight_gradient_in_the_product(fused, width, monkeypatch):
    calls = []
    run = grad_gemm.run
    monkeypatch.setattr(grad_gemm, "run", lambda *args: calls.append(args) or run(*args))
    plan = PLAN.reduced()[1]
    for judge in within_rule(torch.bfloat16):
        args = MixArgs(
            [torch.randn(8, 576, width, device="cuda").bfloat16() for _ in range(plan.num_states)], plan,
            torch.rand(8, 4, device="cuda"), None, 0,
        )  # fmt: skip
        grad_z = torch.randn(8 * 576, 4096, device="cuda").bfloat16()
        weight1 = (torch.randn(4096, 2 * width, device="cuda") / 64).bfloat16()
        call = (grad_z, weight1, plan.weighted_blocks, args)
        switch(True)
        calls.clear()
        one, again = BACKEND.mix_weights_grad_of_linear(*call), BACKEND.mix_weights_grad_of_linear(*call)
        assert len(calls) == 2 and torch.equal(one, again)
        switch(False)
        grad_rows = (grad_z.double() @ weight1[:, width:].double()).view(8, 576, width)
        exact = torch.stack([(grad_rows * layer.double()).sum((1, 2)) for layer in args.layers[1:]], 1)
        judge.add(one, exact, BACKEND.mix_weights_grad_of_linear(*call))


def sanitize():
    """Every kernel once, at odd and even sizes; small, because a sanitizer is slow."""
    for fused_gemm in (False, True):
        if switch(fused_gemm) is not None and fused_gemm:
            continue
        for width, hidden in ((128, 264), (59, 97)):
            for dtype in (torch.bfloat16, torch.float32):
                Block(width=width, hidden=hidden, dtype=dtype).step()
                states = [torch.randn(2, 5, width, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
                weight = torch.randn(hidden, 2 * width, device="cuda").to(dtype)
                norm = (torch.ones(2 * width, device="cuda").requires_grad_(), None, 1e-5)
                plan = MixPlan((((0, 0, 1.0), (1, None, 0.5)), ((2, None, 1.0),)), 3)
                index = torch.tensor([1, 0, 1], device="cuda")
                out = ik.layer_mix_linear(
                    states, plan, torch.rand(3, 1, device="cuda", requires_grad=True), weight,
                    activation="silu", norm=norm, skip_tokens=1, image_index=index, impl="cuda",
                )  # fmt: skip
                out.sum().backward()
        states = [torch.randn(2, 21, 64, device="cuda").bfloat16() for _ in range(3)]
        weight = torch.randn(72, 192, device="cuda").bfloat16()
        ik.layer_mix_linear(states, MixPlan.concat([0, 2, 1]), None, weight, activation="gelu", impl="cuda")
    call = MixArgs(states, MixPlan.concat([0, 1, 2]), None, None, 0)
    BACKEND.mix(call, torch.bfloat16, None, Keep.NOTHING)
    torch.cuda.synchronize()


if __name__ == "__main__":
    sanitize()
