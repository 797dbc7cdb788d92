"""What the tests of both GPU backends ask of the same block."""

import torch


def same(a, b):
    """Whether two lists of tensors have the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_memory(block):
    """Beyond its inputs: 10 MB an image at inference, output included; 10.7 MB an image saved for backward."""
    batch = len(block.weights)
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
