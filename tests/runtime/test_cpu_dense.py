"""Dense steps on the CPU: conversions, activations and products on every instruction set, against fp64."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import CPU, DTYPES, LOW, needs_module, within_rule

from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.runtime.cpu import dense

pytestmark = needs_module


# ---- activations ---------------------------------------------------------------------------------------------------


def every_sixteen_bits(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_conversions_agree_with_torch(isa, dtype):
    low = every_sixteen_bits(dtype)[None]
    wide = torch.empty(low.shape)
    dense.epilogue(low.float(), None, narrow := torch.empty_like(low), None)
    assert torch.equal(narrow.isnan(), low.isnan())
    assert torch.equal(narrow[~low.isnan()], low[~low.isnan()])
    # Halfway cases and their neighbours, overflow and subnormals.
    bits = low.float().view(torch.int32)
    for shift in (-1, 1, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001):
        wide = (bits + shift).view(torch.float32)
        dense.epilogue(wide, None, narrow, None)
        assert torch.equal(narrow.nan_to_num(nan=7.0), wide.to(dtype).nan_to_num(nan=7.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_fp32_are_right_to_a_few_ulps(isa, activation):
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-30, 30, 601), -torch.logspace(-30, 0, 301)])[None]
    z = torch.empty_like(x)
    dense.epilogue(x, activation, y := torch.empty_like(x), z)
    assert torch.equal(x, z)
    exact_x = x.double().requires_grad_()
    exact = ACTIVATIONS[activation](exact_x)
    torch.testing.assert_close(y.double(), exact.detach(), rtol=5e-7, atol=5e-7)

    grad = torch.randn(x.shape)
    exact.backward(grad.double())
    again = torch.empty_like(x)
    dense.activation_grad(grad, x, activation, grad_z := torch.empty_like(x), again)
    assert torch.equal(again, y)
    torch.testing.assert_close(grad_z.double(), exact_x.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_what_is_not_finite_or_extreme(isa, activation, dtype):
    inf = float("inf")
    big = torch.finfo(dtype).max
    x = torch.tensor([[float("nan"), inf, -inf, big, -big, 0.0, -0.0, torch.finfo(dtype).tiny, 88.0, -88.0]]).to(dtype)
    dense.epilogue(x, activation, y := torch.empty_like(x), None)
    # fp64, because torch's own GELU of large fp32 values is infinite or NaN.
    torch.testing.assert_close(y, ACTIVATIONS[activation](x.double()).to(dtype), equal_nan=True)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_and_its_gradient_obey_the_error_rule(isa, activation, dtype, products):
    m, k, n, h = 37, 23, 50, 41
    for judge in within_rule(dtype):
        x, weight, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype) / k**0.5, torch.randn(n).to(dtype)
        weight2, grad = torch.randn(h, n).to(dtype) / h**0.5, torch.randn(m, h).to(dtype)

        def run(dtype):
            z = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).requires_grad_()  # noqa: B023
            y = z if activation is None else ACTIVATIONS[activation](z)
            (y @ weight2.to(dtype).t()).backward(grad.to(dtype))  # noqa: B023
            return z.detach(), y.detach(), z.grad

        (z64, y64, grad64), (z_plain, y_plain, grad_plain) = run(torch.float64), run(dtype)
        for keep_z in (False, True):
            y, z = CPU.linear(x, weight, bias, activation, keep_z)
            assert (z is not None) == (keep_z and activation is not None)
            judge.add(y, y64, y_plain, f"y, keep_z={keep_z}")
            if z is not None:
                judge.add(z, z64, z_plain, "z")
        z = z_plain
        grad_z, y, grad_bias = CPU.linear_grad_input(grad, weight2, z, activation, True, True)
        judge.add(grad_z, grad64, grad_plain, "grad_z")
        judge.add(grad_bias, grad64.sum(0), grad_plain.sum(0), "grad_bias")
        judge.add(y, y64, y_plain, "y again")
        judge.add(
            CPU.linear_grad_input(grad, None, torch.ones_like(grad), activation, False, False)[0],
            plain_grad(grad.double(), activation), plain_grad(grad, activation), "the identity",
        )  # fmt: skip


def plain_grad(grad, activation):
    return grad if activation is None else ACTIVATIONS[activation].backward(grad, torch.ones_like(grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_takes_transposed_views_and_slices(dtype, products):
    for judge in within_rule(dtype):
        a, b = torch.randn(35, 45).to(dtype), torch.randn(45, 60).to(dtype)
        parts = (b, b.t().contiguous().t(), b[:, 20:50], b.t().contiguous()[20:50].t(), b[:, ::2])
        for left, (i, right) in product((a, a.t().contiguous().t()), enumerate(parts)):
            judge.add(CPU.matmul(left, right), left.double() @ right.double(), left @ right, f"b {i}, {left.stride()}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_of_operands_and_bias(dtype, products):
    for judge in within_rule(dtype):
        a, b, c = torch.randn(35, 2, 45).to(dtype), torch.randn(29, 3, 45).to(dtype), torch.randn(29, 2).to(dtype)
        xs = (a[:, 1], a[0, :1].expand(35, 45), a[::2, 0], a[:, 0].t().contiguous().t(), a[:, 1].flip(0))
        weights = (b[:, 1], b[:, 2].t().contiguous().t(), b[0, :1].expand(29, 45), b.view(29, -1)[:, ::3])
        biases = (None, c[:, 1], c[0, :1].expand(29), c[:, 0].contiguous())
        for (i, x), (j, weight), (k, bias) in product(enumerate(xs), enumerate(weights), enumerate(biases)):
            wide = [t if t is None else t.double() for t in (x, weight, bias)]
            actual, z = CPU.linear(x, weight, bias, "relu", True)
            judge.add(z, F.linear(*wide), F.linear(x, weight, bias), f"x {i}, weight {j}, bias {k}")
            assert torch.equal(actual, z.relu())


def test_rows_whose_elements_lie_apart_are_refused():
    """A kernel would read them as if they lay side by side."""
    apart = torch.zeros(3, 2).t()
    with pytest.raises(ValueError, match="side by side"):
        dense.epilogue(apart, "gelu", torch.empty(2, 3), None)
    empty = torch.zeros(0, 1).expand(0, 3)
    dense.epilogue(empty, "gelu", torch.empty(0, 3), None)
