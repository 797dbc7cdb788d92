"""``allocate`` in plain torch: what ``nn.WeightAllocator`` computes, and errors that name the argument."""

import pytest
import torch

from igva_kernels.nn import WeightAllocator
from igva_kernels.ops.allocator import AllocatorWeights, allocate

EPS = [1e-5] * 4


def make():
    return WeightAllocator(20, 24, 4, 32, 2, 2).double(), torch.randn(3, 20).double(), torch.randn(3, 4, 24).double()


def test_the_specification_is_what_the_modules_compute():
    module, sentences, summaries = make()
    actual = allocate(sentences, summaries, [*module.parameters()], 2, EPS, "reference")
    torch.testing.assert_close(actual, module(sentences, summaries, impl="reference"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_parameters_of_a_module_are_counted_and_named_in_their_order(blocks):
    parameters = [*WeightAllocator(20, 24, 4, 32, blocks, 2).parameters()]
    assert len(parameters) == AllocatorWeights.num_parameters(blocks)
    assert len(AllocatorWeights.of(parameters).blocks) == blocks


def test_inputs_made_under_inference_mode_train_the_parameters():
    module, *_ = make()
    with torch.inference_mode():
        _, *inputs = make()
    allocate(*inputs, [*module.parameters()], 2, EPS).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentences": torch.ones(3, 5)}, r"sentences: got shape \(3, 5\), need \(3, 20\)"),
        ({"summaries": torch.ones(3, 3, 24)}, r"summaries: got shape \(3, 3, 24\), need \(3, 4, 24\)"),
        ({"eps": [1e-5]}, "eps: got 1 numbers, need 4, two per block"),
        ({"num_heads": 3}, "num_heads: got 3, need a divisor of the hidden width 32"),
        ({"parameters": []}, "parameters: got 0 tensors, need 6 and 12 per block, of at least one block"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    module, sentences, summaries = make()
    arguments = {
        "sentences": sentences, "summaries": summaries, "parameters": [*module.parameters()], "num_heads": 2,
        "eps": EPS,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        allocate(**arguments | change)


@pytest.mark.parametrize("name", ["sentences", "summaries", "parameters"])
def test_a_dtype_that_cannot_be_computed_in_is_refused_by_the_name_of_the_argument(name):
    module, sentences, summaries = make()
    arguments = {"sentences": sentences, "summaries": summaries, "parameters": [*module.parameters()]}
    for dtype in (torch.float8_e4m3fn, torch.complex64, torch.int64):
        value = arguments[name]
        changed = [p.to(dtype) for p in value] if name == "parameters" else value.to(dtype)
        with pytest.raises(TypeError, match=rf"^{name}.*: need a floating tensor .* got {dtype}"):
            allocate(**arguments | {name: changed}, num_heads=2, eps=EPS)
