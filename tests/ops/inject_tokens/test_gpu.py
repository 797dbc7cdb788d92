"""The injection on a GPU, by every implementation: no waiting, CUDA graphs, corners, many elements."""

import harness
import injection_corners as corners
import pytest
import torch

import igva_kernels as ik
from igva_kernels import registry
from igva_kernels.testing import capture


@pytest.fixture(params=harness.subjects("inject_tokens", "cuda"))
def impl(request):
    return request.param.impl


def leaves(rows=3000, tokens=4096, width=4096):
    hidden = torch.randn(1, tokens, width, device="cuda").bfloat16().requires_grad_()
    features = torch.randn(rows, width, device="cuda").bfloat16().requires_grad_()
    mask = torch.zeros(1, tokens, dtype=torch.bool, device="cuda")
    mask[:, 5 : 5 + rows] = True
    return hidden, features, mask, torch.ones(1, device="cuda").requires_grad_()


def step(impl, hidden, features, mask, gate, mode):
    out = ik.inject_tokens(hidden, features, ik.token_rows(mask), gate=gate, mode=mode, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (hidden, features, gate), hidden.detach())]


@pytest.mark.parametrize("corner", corners.CORNERS, ids=lambda corner: corner.__name__)
def test_corners(impl, corner):
    corner(impl, registry.operators()["inject_tokens"].implementation(impl), "cuda")


@pytest.mark.plain_memory
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_neither_forward_nor_backward_waits_for_the_gpu(impl, mode):
    inputs = leaves()
    expected = step(impl, *inputs, mode)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step(impl, *inputs, mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.plain_memory
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_captured_step_follows_its_inputs(impl, mode):
    inputs = leaves(rows=20, tokens=64, width=256)
    graph, results = capture(lambda: step(impl, *inputs, mode))
    for shift in range(3):
        with torch.no_grad():
            for tensor in (*inputs[:2], inputs[3]):
                tensor.copy_(torch.randn_like(tensor))
            inputs[2].copy_(inputs[2].roll(shift, 1))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(impl, *inputs, mode), strict=True))


@pytest.mark.large
def test_offsets_beyond_32_bits(impl):
    stride = 2**31 + 16
    if torch.cuda.mem_get_info()[0] < 3 * 2 * stride:
        pytest.skip("needs 13 GB of free memory")
    far = torch.empty(2 * stride, dtype=torch.bfloat16, device="cuda").as_strided((2, 5, 64), (stride, 64, 1))
    near = torch.randn(2, 5, 64, device="cuda").bfloat16()
    far.copy_(near)
    rows = torch.tensor([[-1, 1, -1, -1, -1], [-1, -1, 0, -1, -1]], device="cuda")
    for hidden, features in ((far, near[0, :2]), (near, far[:, 0])):
        expected = ik.inject_tokens(hidden.contiguous(), features.contiguous(), rows, impl="reference")
        assert torch.equal(ik.inject_tokens(hidden, features, rows, impl=impl), expected)
