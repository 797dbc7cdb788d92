"""Every implementation on a GPU: compile, CUDA graphs, streams, devices, the same bits, no waiting, memory."""

import harness
import pytest
import torch
from gpu_tools import Block, same

import igva_kernels as ik
from igva_kernels import MixPlan, registry
from igva_kernels.ops.weighted_mix.cuda import gemm
from igva_kernels.testing import capture, relative_error

BY_DEFAULT, FUSED = "0", "1"
VARIANTS = [
    pytest.param((param.values[0].impl, switch), id=name, marks=param.marks)
    for param in harness.subjects("weighted_mix", "cuda")
    for switch, name in ((BY_DEFAULT, param.values[0].impl), (FUSED, f"{param.values[0].impl}, fused GEMM"))
]


@pytest.fixture(params=VARIANTS)
def impl(request, monkeypatch):
    """Each implementation, and once more with its fused GEMM switched on if it has any."""
    impl, switch = request.param
    monkeypatch.setenv(gemm.SWITCH, switch)
    if switch == FUSED:
        notes = registry.operators()["weighted_mix"].implementation(impl).notes()
        if not any("fused GEMM: yes" in note for note in notes):
            pytest.skip("; ".join(notes) or "it has no such switch")
    return impl


def test_same_bits_again(impl):
    block = Block(impl)
    first = block.step()
    assert all(same(first, block.step()) for _ in range(5))


@pytest.mark.plain_memory
def test_compiled_in_one_graph(impl):
    block = Block(impl)
    compiled = torch.compile(lambda: block(), fullgraph=True)
    out = compiled()
    grads = torch.autograd.grad(out.float().square().mean(), [block.weights, *block.params])
    # What the compiler puts around our operator may round otherwise.
    for compiled_result, result in zip([out, *grads], block.step(), strict=True):
        assert relative_error(compiled_result, result) <= 0.01


@pytest.mark.plain_memory
@pytest.mark.parametrize("indexed", [False, True])
def test_a_captured_graph_follows_its_inputs(impl, indexed):
    block = Block(impl, grad=False)
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
def test_no_call_waits_for_the_gpu(impl):
    block = Block(impl)
    index = torch.tensor([0, 9, -1, 2], device="cuda")
    block.step()
    block(index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        block.step()
        out = block(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out[[1, 2]].isnan().all()
    assert out[[0, 3]].isfinite().all()


def test_streams_of_their_own(impl):
    blocks = [Block(impl), Block(impl)]
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
def test_tensors_on_a_device_that_is_not_current(impl):
    block = Block(impl, device="cuda:1")
    with torch.cuda.device(0):
        away = block.step()
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert same(away, block.step())
    assert away[0].device.index == 1


@pytest.mark.large
def test_offsets_beyond_32_bits(impl):
    stride = 2**31 + 16
    if torch.cuda.mem_get_info()[0] < 3 * 2 * stride:
        pytest.skip("needs 13 GB of free memory")
    buffer = torch.empty(2 * stride, dtype=torch.bfloat16, device="cuda")
    far = buffer.as_strided((2, 5, 64), (stride, 64, 1))
    far.copy_(torch.randn(2, 5, 64))
    plan = MixPlan.concat([0, 0], 1)
    assert torch.equal(ik.layer_mix([far], plan, impl=impl), torch.cat([far, far], -1))


@pytest.mark.plain_memory
def test_memory_of_the_real_block(impl):
    """Beyond its inputs: 10 MB per image at inference, output included; 10.7 MB per image saved for the backward."""
    batch = 16
    block = Block(impl, batch, 577, 1024, 4096, grad=False)
    block()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block()
    assert torch.cuda.max_memory_allocated() - before <= batch * 10e6
    for tensor in (block.weights, *block.params):
        tensor.requires_grad_()
    before = torch.cuda.memory_allocated()
    out = block()
    assert torch.cuda.memory_allocated() - before - out.nbytes <= batch * 10.7e6
