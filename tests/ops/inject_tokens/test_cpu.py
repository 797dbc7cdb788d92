"""The C++ kernels of the injection on every instruction set of this machine."""

import pytest
import strides
import torch
from cpu_kernels import DTYPES, needs_module
from seeds import seeded

import igva_kernels as ik
from igva_kernels.runtime.cpu import dense

pytestmark = needs_module


def results(dtype, width, gate=None, **options):
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, width).to(dtype).requires_grad_()
    features = torch.randn(12, width).to(dtype).requires_grad_()
    rows = torch.randperm(18).view(2, 9)
    rows = torch.where(rows < 12, rows, -1).int()
    gates = () if gate is None else (torch.randn(gate).to(hidden.new_empty(0, dtype=torch.float32)).requires_grad_(),)
    out = ik.inject_tokens(hidden, features, rows, gate=gates[0] if gates else None, impl="cpu", **options)
    leaves = (hidden, features, *gates)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(dtype))


@pytest.mark.parametrize("gate", [None, 1, 12])
@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_around_the_cache_and_threads_change_nothing(isa, dtype, mode, gate, monkeypatch, restored_threads):
    expected = results(dtype, 64, gate, mode=mode)
    monkeypatch.setattr(dense, "STREAM_BYTES", 0)
    for width in (64, 67):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            around = results(dtype, width, gate, mode=mode)
            if width == 64:
                assert all(torch.equal(a, b) for a, b in zip(around, expected, strict=True))


@pytest.mark.parametrize("width", [1, 7, 16, 67, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_vectors_are_added_like_whole_ones(isa, dtype, width):
    hidden, features = torch.randn(1, 5, width).to(dtype), torch.randn(5, width).to(dtype)
    rows = torch.tensor([[3, -1, 0, 4, -1]])
    expected = torch.where((rows >= 0)[..., None], hidden + features[rows.clamp(0)], hidden)
    assert torch.equal(ik.inject_tokens(hidden, features, rows, impl="cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_calls_have_the_bits_of_plain_torch(isa, dtype):
    """Any shape, layout and order of rows, forward and every gradient; `make sanitize` looks at the memory."""
    generator = torch.Generator().manual_seed(seeded())

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    def normal(*shape):
        layout = [*strides.LAYOUTS][draw(0, 5)]
        values = torch.randn(shape, generator=generator).to(dtype)
        return (strides.LAYOUTS[layout](values) if values.numel() else values).requires_grad_()

    for _ in range(40):
        batch, tokens, count, width = draw(0, 4), draw(0, 9), draw(0, 20), draw(0, 70)
        places = torch.randperm(batch * tokens, generator=generator)[:count]
        rows = torch.full((batch * tokens,), -1, dtype=(torch.int32, torch.int64)[draw(0, 2)])
        rows[places] = torch.randperm(count, generator=generator)[: len(places)].to(rows.dtype)
        rows = rows.view(batch, tokens)
        leaves, mode = (normal(batch, tokens, width), normal(count, width)), ("add", "replace")[draw(0, 2)]
        grad = torch.randn(batch, tokens, width, generator=generator).to(dtype)
        found = []
        for impl in ("cpu", "reference"):
            out = ik.inject_tokens(*leaves, rows, mode=mode, impl=impl)
            found.append([out, *torch.autograd.grad(out, leaves, grad)])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs), (batch, tokens, count, width, mode)
