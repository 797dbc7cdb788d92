"""Deformable attention on a GPU, by every implementation: no waiting, CUDA graphs, corners, real shapes."""

import deform_corners as corners
import harness
import pytest
import torch

import igva_kernels as ik
from igva_kernels import registry
from igva_kernels.testing import capture

VIT = ((24, 24),) * 4
DETECTOR = ((100, 134), (50, 67), (25, 34), (13, 17))


@pytest.fixture(params=harness.subjects("deform_attn", "cuda"))
def impl(request):
    return request.param.impl


def leaves(shapes, queries=576, heads=16, width=64):
    value = [torch.randn(2, rows * columns, heads, width, device="cuda").bfloat16() for rows, columns in shapes]
    sampling = torch.rand(2, queries, heads, len(shapes), 4, 2, device="cuda")
    logits = torch.randn(sampling.shape[:-1], device="cuda")
    return [tensor.requires_grad_() for tensor in (sampling, logits, *value)]


def step(impl, shapes, inputs):
    sampling, logits, *value = inputs
    out = ik.deform_attn(value, shapes, sampling, logits, reference=None, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@pytest.mark.parametrize("corner", corners.CORNERS, ids=lambda corner: corner.__name__)
def test_corners(impl, corner):
    corner(impl, registry.operators()["deform_attn"].implementation(impl), "cuda")


@pytest.mark.plain_memory
@pytest.mark.parametrize("shapes", [VIT, DETECTOR], ids=["vit", "detector"])
def test_neither_forward_nor_backward_waits_for_the_gpu_and_reruns_have_the_same_bits(impl, shapes):
    inputs = leaves(shapes)
    expected = step(impl, shapes, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step(impl, shapes, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.plain_memory
@pytest.mark.parametrize("shapes", [((8, 8),) * 2, ((70, 90), (9, 7))], ids=["small maps", "a large map"])
def test_a_captured_step_follows_its_inputs(impl, shapes):
    inputs = leaves(shapes, queries=40, heads=2)
    graph, results = capture(lambda: step(impl, shapes, inputs))
    for _ in range(3):
        with torch.no_grad():
            for tensor in inputs:
                tensor.copy_(torch.rand_like(tensor))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(impl, shapes, inputs), strict=True))


@pytest.mark.large
def test_offsets_beyond_32_bits(impl):
    stride = 2**31 + 16
    if torch.cuda.mem_get_info()[0] < 3 * 2 * stride:
        pytest.skip("needs 13 GB of free memory")
    far = torch.empty(2 * stride, dtype=torch.bfloat16, device="cuda").as_strided((2, 6, 1, 64), (stride, 64, 64, 1))
    near = torch.randn(2, 6, 1, 64, device="cuda").bfloat16()
    far.copy_(near)
    sampling = torch.rand(2, 9, 1, 1, 2, 2, device="cuda")
    logits = torch.randn(2, 9, 1, 1, 2, device="cuda")
    found, expected = (
        ik.deform_attn(value, [(2, 3)], sampling, logits, reference=None, impl=impl) for value in (far, near)
    )
    assert torch.equal(found, expected)
