"""What every backend of a GPU must do with rows that no token, no row or several tokens take; each is a test."""

import torch
from seeds import seeded

import igva_kernels as ik
from igva_kernels.ops.inject_tokens.cases import InjectionCase

NAN = float("nan")


def draw(device, dtype=torch.float32, batch=2, tokens=5, width=16, count=6):
    """Hidden states, and features with NaN on both sides."""
    hidden = torch.randn(batch, tokens, width, device=device).to(dtype)
    around = torch.full((count + 2, width), NAN, dtype=dtype, device=device)
    around[1:-1] = torch.randn(count, width, device=device).to(dtype)
    return hidden, around[1:-1]


def without_a_gate_every_bit_is_that_of_plain_torch(impl, implementation, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (16, 13):
            hidden, features = draw(device, dtype, width=width)
            rows = torch.tensor([[-1, 3, 0, -1, 5], [4, -1, -1, 2, -1]], device=device)
            hidden[0, 0, :2], hidden[0, 3, 0] = NAN, -0.0
            for mode in ("add", "replace"):
                plain = hidden.clone()
                plain[rows >= 0] = features[rows[rows >= 0]] + (hidden[rows >= 0] if mode == "add" else 0)
                out = ik.inject_tokens(hidden, features, rows, mode=mode, impl=impl)
                assert torch.equal(out.view(torch.uint8), plain.view(torch.uint8))


def a_row_out_of_range_gives_a_nan_token_and_takes_no_part_in_gradients(impl, implementation, device):
    hidden, features = draw(device)
    rows = torch.tensor([[-1, 3, 6, -2, 0], [2**31 - 1, -1, -(2**31), 1, -1]], dtype=torch.int32, device=device)
    wrong = (rows < -1) | (rows >= 6)
    gate = torch.randn(6, device=device).requires_grad_()
    features = features.requires_grad_()
    for mode in ("add", "replace"):
        out = ik.inject_tokens(hidden, features, rows, gate=gate, mode=mode, impl=impl)
        assert out[wrong].isnan().all() and out[~wrong].isfinite().all()
        for grad in torch.autograd.grad(out, (features, gate), torch.ones_like(out)):
            assert grad.isfinite().all()
            assert grad[[0, 1, 3]].any() and not grad[[2, 4, 5]].any()


def a_row_taken_twice_has_a_gradient_of_nan_and_no_other_has(impl, implementation, device):
    hidden, features = draw(device)
    rows = torch.tensor([[-1, 3, 1, -1, 3], [0, -1, -1, 3, -1]], dtype=torch.int32, device=device)
    gate = torch.randn(6, device=device).requires_grad_()
    features = features.requires_grad_()
    out = ik.inject_tokens(hidden, features, rows, gate=gate, impl=impl)
    for grad in torch.autograd.grad(out, (features, gate), torch.ones_like(out)):
        assert grad[3].isnan().all()
        assert grad[[0, 1]].isfinite().all() and not grad[[2, 4, 5]].any()


def rows_that_nobody_took_have_zeros_whatever_their_gate_and_features(impl, implementation, device):
    hidden, features = draw(device)
    rows = torch.tensor([[-1, 3, 1, -1, -1], [0, -1, -1, -1, -1]], dtype=torch.int32, device=device)
    gate = torch.ones(6, device=device)
    features, gate[2] = features.clone(), float("inf")
    features[4] = NAN
    found = implementation.features_grad(hidden, features, rows, gate, 6, (True, True))
    for grad in found:
        assert grad.isfinite().all() and not grad[[2, 4, 5]].any()


def only_what_is_needed_is_computed(impl, implementation, device):
    hidden, features = draw(device)
    rows = torch.tensor([[-1, 3, 1, -1, -1], [0, -1, -1, -1, -1]], dtype=torch.int32, device=device)
    gate = torch.randn(1, device=device)
    both = implementation.features_grad(hidden, features, rows, gate, 6, (True, True))
    of_features, none = implementation.features_grad(hidden, None, rows, gate, 6, (True, False))
    also_none, of_gate = implementation.features_grad(hidden, features, rows, gate, 6, (False, True))
    assert none is None and also_none is None
    assert torch.equal(of_features, both[0]) and torch.equal(of_gate, both[1])


def without_features_every_row_is_out_of_range(impl, implementation, device):
    hidden, _ = draw(device)
    rows = torch.tensor([[-1, 0, -1, -1, -1], [-1, -1, -1, -1, -1]], device=device)
    out = ik.inject_tokens(hidden, hidden.new_empty(0, 16), rows, impl=impl)
    assert out[0, 1].isnan().all() and torch.equal(out[rows < 0], hidden[rows < 0])


def the_gradient_of_what_is_replaced_is_zero(impl, implementation, device):
    hidden, _ = draw(device)
    rows = torch.tensor([[-1, 3, 1, -1, -1], [0, -1, -1, -1, -1]], dtype=torch.int32, device=device)
    grad = implementation.inject(hidden, None, rows, None, True)
    assert torch.equal(grad, hidden.masked_fill((rows >= 0).unsqueeze(-1), 0))


def empty_tensors_give_what_plain_torch_gives(impl, implementation, device):
    for batch, tokens, width, count in ((0, 3, 16, 0), (2, 0, 16, 3), (2, 3, 0, 4)):
        case = InjectionCase("", batch, tokens, width, count, gate="one")
        inputs = case.draw(seeded(), torch.float32, device)
        expected = case.run(inputs, "reference")
        for name, actual in case.run(inputs, impl).items():
            assert torch.equal(actual, expected[name]), name


CORNERS = (
    empty_tensors_give_what_plain_torch_gives,
    without_a_gate_every_bit_is_that_of_plain_torch,
    a_row_out_of_range_gives_a_nan_token_and_takes_no_part_in_gradients,
    a_row_taken_twice_has_a_gradient_of_nan_and_no_other_has,
    rows_that_nobody_took_have_zeros_whatever_their_gate_and_features,
    only_what_is_needed_is_computed,
    without_features_every_row_is_out_of_range,
    the_gradient_of_what_is_replaced_is_zero,
)
