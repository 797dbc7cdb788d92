"""The Triton kernels on a GPU, beyond what every implementation must do there: tiles, TF32, the allocator."""

import dataclasses

import harness
import pytest
import torch
from gpu_tools import PLAN, Block
from seeds import seeded

from igva_kernels import registry
from igva_kernels.nn import WeightAllocator, column_summaries
from igva_kernels.ops.weighted_mix import cases
from igva_kernels.runtime import config
from igva_kernels.testing import capture, relative_error, within_rule

pytestmark = harness.on_a_gpu(registry.all_backends()["triton"])


@pytest.mark.parametrize("case", [*cases.SMALL_CASES[:4], cases.REAL_CASES[1]], ids=lambda case: case.name)
@pytest.mark.parametrize("i", range(3))
def test_every_tile_where_the_cost_model_would_rather_not(i, case, monkeypatch):
    chosen = config.of_device(torch.cuda.current_device())
    tiles = {name: (tiles[min(i, len(tiles) - 1)],) for name, tiles in chosen.gemms.items()}
    # As in the interpreter: always Triton, always the first tile.
    forced = dataclasses.replace(chosen, status="interpreted", gemms=tiles)
    # Every module that asks has a name of its own for it.
    for module in ("runtime.triton.dense", "ops.weighted_mix.triton"):
        monkeypatch.setattr(f"igva_kernels.{module}.config_of", lambda tensor: forced)
    harness.assert_right(case, "bf16", "triton", "cuda", seeded())


@pytest.mark.plain_memory
def test_the_whole_connector_in_one_graph():
    """Group CLS, allocator, weights and block: what runs between the tower and the language model."""
    block = Block("triton", grad=False)
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
def test_a_captured_graph_of_the_allocator_follows_its_inputs(batch):
    allocator, inputs = igva_allocator(torch.bfloat16), questions(batch, torch.bfloat16)
    graph, weights = capture(lambda: allocator(*inputs))
    for _ in range(2):
        for tensor, fresh in zip(inputs, questions(batch, torch.bfloat16), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        assert torch.equal(weights, allocator(*inputs))


@pytest.mark.plain_memory
def test_the_allocator_launches_far_fewer_kernels_than_plain_torch():
    allocator, inputs = igva_allocator(torch.bfloat16), questions(2, torch.bfloat16)
    counts = []
    for impl in ("triton", "reference"):
        allocator(*inputs, impl=impl)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            allocator(*inputs, impl=impl)
            torch.cuda.synchronize()
        counts.append(sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events()))
    ours, plain = counts
    if not plain:
        pytest.skip("the profiler sees no kernels on this machine")
    assert ours <= plain / 2


@pytest.mark.plain_memory
def test_the_allocator_compiles_in_one_graph():
    allocator, inputs = igva_allocator(torch.bfloat16), questions(2, torch.bfloat16)
    assert relative_error(torch.compile(allocator, fullgraph=True)(*inputs), allocator(*inputs)) <= 0.01


@pytest.mark.plain_memory
def test_no_call_of_the_allocator_waits_for_the_gpu():
    allocator, inputs = igva_allocator(torch.bfloat16), questions(2, torch.bfloat16)
    allocator(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        allocator(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_obeys_torch_about_tf32(tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    block = Block("triton", dtype=torch.float32, grad=False)
    oracle = Block("reference", dtype=torch.float64, grad=False)
    oracle.states = [state.double() for state in block.states]
    oracle.weights = block.weights.double()
    oracle.params = [param.double() for param in block.params]
    error = relative_error(block(), oracle())
    assert (error > 1e-5) == tf32
