"""The Triton backend on a GPU: every dtype, compile, CUDA graphs, streams, devices, the same bits, no waiting."""

import dataclasses

import pytest
import torch
from gpu_tools import check_memory, same
from igva_kernels.backends.triton import BACKEND, backend, config
from seeds import seeded

import igva_kernels as ik
from igva_kernels import MixPlan, verify
from igva_kernels.nn import WeightAllocator, column_summaries
from igva_kernels.ops.weighted_mix import cases
from igva_kernels.testing import capture, relative_error, within_rule

REASON = BACKEND.why_not(torch.device("cuda"), torch.bfloat16)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

PLAN = MixPlan.igva()


class Block:
    """The IGVA block at small widths, with everything that needs a gradient."""

    def __init__(self, batch=4, tokens=33, width=128, hidden=256, dtype=torch.bfloat16, device="cuda", grad=True):
        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        self.states = [normal(batch, tokens, width) for _ in range(25)]
        self.weights = torch.randn(batch, 4, device=device).softmax(-1).requires_grad_(grad)
        self.params = [
            p.requires_grad_(grad)
            for p in (normal(hidden, 2 * width, scale=0.05), normal(hidden), normal(hidden, hidden, scale=0.05),
                      normal(hidden))
        ]  # fmt: skip

    def __call__(self, impl="triton", index=None):
        return ik.layer_mix_mlp(
            self.states, PLAN, self.weights, *self.params, skip_tokens=1, image_index=index, impl=impl
        )

    def step(self, impl="triton"):
        out = self(impl)
        return [out.detach(), *torch.autograd.grad(out.float().square().mean(), [self.weights, *self.params])]


@pytest.mark.parametrize("dtype", verify.DTYPES)
@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=lambda case: case.name)
def test_values_and_every_gradient_obey_the_error_rule(case, dtype):
    for row in verify.judge(case, dtype, ["triton"], "cuda", seeded()):
        assert row.ok, str(row.worst)


@pytest.mark.parametrize("case", cases.REAL_CASES, ids=lambda case: case.name)
def test_real_shapes_obey_the_error_rule(case):
    for row in verify.judge(case, "bf16", ["triton"], "cuda", seeded()):
        assert row.ok, str(row.worst)


@pytest.mark.parametrize("case", [*cases.SMALL_CASES[:4], cases.REAL_CASES[1]], ids=lambda case: case.name)
@pytest.mark.parametrize("i", range(3))
def test_every_tile_where_the_cost_model_would_rather_not(i, case, monkeypatch):
    chosen = config.of_device(torch.cuda.current_device())
    tiles = {name: (tiles[min(i, len(tiles) - 1)],) for name, tiles in chosen.gemms.items()}
    # As in the interpreter: always Triton, always the first tile.
    forced = dataclasses.replace(chosen, status="interpreted", gemms=tiles)
    monkeypatch.setattr(backend, "_config", lambda tensor: forced)
    for row in verify.judge(case, "bf16", ["triton"], "cuda", seeded()):
        assert row.ok, str(row.worst)


def test_same_bits_again():
    block = Block()
    first = block.step()
    assert all(same(first, block.step()) for _ in range(5))


@pytest.mark.plain_memory
def test_compiled_in_one_graph():
    block = Block()
    compiled = torch.compile(lambda: block(), fullgraph=True)
    out = compiled()
    grads = torch.autograd.grad(out.float().square().mean(), [block.weights, *block.params])
    assert same([out.detach(), *grads], block.step())


@pytest.mark.plain_memory
def test_a_captured_graph_follows_its_inputs():
    block = Block(grad=False)
    index = torch.tensor([3, 1, 1, 0], device="cuda")
    graph, out = capture(lambda: block(index=index))
    for _ in range(2):
        for tensor in (*block.states, block.weights, *block.params):
            tensor.copy_(torch.randn_like(tensor) * 0.1)
        index.copy_(torch.randint(4, (4,)))
        graph.replay()
        assert torch.equal(out, block(index=index))


@pytest.mark.plain_memory
def test_the_whole_connector_in_one_graph():
    """Group CLS, allocator, weights and block: what runs between the tower and the language model."""
    block = Block(grad=False)
    allocator = WeightAllocator(16, 128, 4, hidden_dim=64, impl="triton").cuda().bfloat16()
    sentence = torch.randn(4, 16, device="cuda")

    def connector():
        block.weights = allocator(sentence, column_summaries(block.states, PLAN, impl="triton"))
        return block()

    with torch.no_grad():
        graph, out = capture(connector)
        for state in block.states:
            state.copy_(torch.randn_like(state))
        sentence.copy_(torch.randn_like(sentence))
        graph.replay()
        torch.testing.assert_close(out, connector(), rtol=2e-2, atol=2e-2)


def igva_allocator(dtype, columns=4):
    """IGVA's allocator, frozen, with biases and norms that do something."""
    allocator = WeightAllocator(768, 1024, columns).requires_grad_(False)
    for name, p in allocator.named_parameters():
        if p.dim() == 1:
            p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    return allocator.cuda().to(dtype)


def questions(batch, dtype, columns=4):
    """Sentences, and summaries that resemble each other as those of one image do."""
    image = torch.randn(batch, 1, 1024, device="cuda")
    summaries = image + 0.5 * torch.randn(batch, columns, 1024, device="cuda")
    return torch.randn(batch, 768, device="cuda").to(dtype), summaries.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "columns"), [(0, 4), (1, 4), (3, 5), (17, 16), (128, 4)])
def test_the_allocator_obeys_the_error_rule(batch, columns, dtype):
    for judge in within_rule(dtype):
        allocator, inputs = igva_allocator(dtype, columns), questions(batch, dtype, columns)
        actual, plain = (allocator(*inputs, impl=impl) for impl in ("triton", "reference"))
        judge.add(actual, allocator.double()(*inputs, impl="reference"), plain)


@pytest.mark.plain_memory
@pytest.mark.parametrize("batch", [1, 64])
def test_the_allocator_is_16_kernels_and_a_captured_graph_follows_its_inputs(batch):
    allocator, inputs = igva_allocator(torch.bfloat16), questions(batch, torch.bfloat16)
    graph, weights = capture(lambda: allocator(*inputs))
    for _ in range(2):
        for tensor, fresh in zip(inputs, questions(batch, torch.bfloat16), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        assert torch.equal(weights, allocator(*inputs))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        allocator(*inputs)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 16, kernels


@pytest.mark.plain_memory
def test_the_allocator_compiles_in_one_graph():
    allocator, inputs = igva_allocator(torch.bfloat16), questions(2, torch.bfloat16)
    assert torch.equal(torch.compile(allocator, fullgraph=True)(*inputs), allocator(*inputs))


@pytest.mark.plain_memory
def test_no_call_waits_for_the_gpu():
    block = Block()
    index = torch.tensor([0, 9, -1, 2], device="cuda")
    allocator, inputs = igva_allocator(torch.bfloat16), questions(2, torch.bfloat16)
    block.step()
    block(index=index)
    allocator(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        allocator(*inputs)
        block.step()
        out = block(index=index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out[[1, 2]].isnan().all()
    assert out[[0, 3]].isfinite().all()


def test_streams_of_their_own():
    blocks = [Block(), Block()]
    expected = [block.step() for block in blocks]
    streams = [torch.cuda.Stream() for _ in blocks]
    results = [[], []]
    torch.cuda.synchronize()
    for _ in range(4):
        for stream, block, result in zip(streams, blocks, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(block.step())
    torch.cuda.synchronize()
    for wanted, result in zip(expected, results, strict=True):
        assert all(same(wanted, got) for got in result)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_a_device_that_is_not_current():
    block = Block(device="cuda:1")
    with torch.cuda.device(0):
        away = block.step()
    with torch.cuda.device(1):
        assert same(away, block.step())
    assert away[0].device.index == 1


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_obeys_torch_about_tf32(tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    block = Block(dtype=torch.float32, grad=False)
    oracle = Block(dtype=torch.float64, grad=False)
    oracle.states = [state.double() for state in block.states]
    oracle.weights = block.weights.double()
    oracle.params = [param.double() for param in block.params]
    error = relative_error(block(), oracle("reference"))
    assert (error > 1e-5) == tf32


def test_offsets_beyond_32_bits():
    stride = 2**31 + 16
    if torch.cuda.mem_get_info()[0] < 3 * 2 * stride:
        pytest.skip("needs 13 GB of free memory")
    buffer = torch.empty(2 * stride, dtype=torch.bfloat16, device="cuda")
    far = buffer.as_strided((2, 5, 64), (stride, 64, 1))
    far.copy_(torch.randn(2, 5, 64))
    plan = MixPlan.concat([0, 0], 1)
    assert torch.equal(ik.layer_mix([far], plan, impl="triton"), torch.cat([far, far], -1))


@pytest.mark.plain_memory
def test_memory_of_the_real_block():
    check_memory(Block(16, 577, 1024, 4096, grad=False))
