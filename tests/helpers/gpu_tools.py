"""What the tests on a GPU share."""

import torch

import igva_kernels as ik
from igva_kernels import MixPlan

PLAN = MixPlan.igva()


def same(a, b):
    """Whether two lists of tensors have the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Block:
    """The IGVA block at small widths, with everything that needs a gradient; enough rows for every fused GEMM."""

    def __init__(self, impl, batch=4, tokens=69, width=128, hidden=264, dtype=torch.bfloat16, device="cuda", grad=True):
        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        self.impl = impl
        self.states = [normal(batch, tokens, width) for _ in range(25)]
        self.weights = torch.randn(batch, 4, device=device).softmax(-1).requires_grad_(grad)
        shapes = ((hidden, 2 * width), (hidden,), (hidden, hidden), (hidden,))
        self.params = [normal(*shape, scale=0.05).requires_grad_(grad) for shape in shapes]

    def __call__(self, index=None):
        return ik.layer_mix_mlp(
            self.states, PLAN, self.weights, *self.params, skip_tokens=1, image_index=index, impl=self.impl
        )

    def step(self):
        out = self()
        return [out.detach(), *torch.autograd.grad(out.float().square().mean(), [self.weights, *self.params])]
