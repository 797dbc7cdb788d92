"""Where the first Linear's result lies, beside what torch's product wrote."""

import torch

import igva_kernels as ik
from igva_kernels import MixPlan


def activated_in_place(impl, trained, monkeypatch):
    """Whether ``layer_mix_linear`` with GELU returns the memory of the one product that torch computed."""
    products, linear = [], torch.nn.functional.linear
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", lambda *args: products.append(linear(*args)) or products[-1])
        states = [torch.randn(2, 5, 16).bfloat16() for _ in range(5)]
        weight, bias = torch.randn(24, 32).bfloat16().requires_grad_(trained), torch.randn(24).bfloat16()
        out = ik.layer_mix_linear(
            states, MixPlan.igva(4, 2), torch.rand(2, 2), weight, bias, activation="gelu", skip_tokens=1, impl=impl
        )
    (product,) = products
    return out.data_ptr() == product.data_ptr()
