"""The stand-in for the extension of Deformable DETR, called as research repositories call the extension."""

import gc
import importlib.util
import sys
from types import ModuleType

import harness
import pytest
import torch
from seeds import seeded

import igva_kernels as ik
from igva_kernels.integrations import msda

IMPLS = ["reference", *harness.quick_impls("deform_attn")]
SHAPES = [(5, 7), (3, 4)]


def attention(value, shapes, starts, locations, weights):
    """An autograd function as the repositories have one."""
    import MultiScaleDeformableAttention as extension

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            ctx.save_for_backward(*arguments)
            return extension.ms_deform_attn_forward(*arguments, 64)

        @staticmethod
        def backward(ctx, grad):
            found = extension.ms_deform_attn_backward(*ctx.saved_tensors, grad, 64)
            assert isinstance(found, list)
            return found[0], None, None, *found[1:]

    return Attention.apply(value, shapes, starts, locations, weights)


def arguments(dtype=torch.float32, batch=3):
    generator = torch.Generator().manual_seed(seeded())
    value = torch.randn(batch, 47, 2, 8, generator=generator)
    locations = 1.4 * torch.rand(batch, 6, 2, 2, 3, 2, generator=generator) - 0.2
    weights = torch.randn(batch, 6, 2, 6, generator=generator).softmax(-1).unflatten(-1, (2, 3))
    value, locations, weights = (x.to(dtype).requires_grad_() for x in (value, locations, weights))
    return value, torch.tensor(SHAPES), torch.tensor([0, 35]), locations, weights


def gradients(out, leaves):
    grad = torch.linspace(-1, 1, out.numel()).view_as(out).to(out)
    return torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_it_has_the_bits_of_the_operator(impl, dtype):
    if impl != "reference":
        harness.require(impl, dtype)
    value, _, _, locations, weights = given = arguments(dtype)
    leaves = (value, locations, weights)
    with msda.register(impl=impl):
        out = attention(*given)
        grads = gradients(out, leaves)
    expected = ik.deform_attn(value, SHAPES, locations, weights, reference=None, softmax=False, impl=impl)
    assert torch.equal(out, expected)
    for found, grad, leaf in zip(grads, gradients(expected, leaves), leaves, strict=True):
        assert torch.equal(found, grad) and found.dtype == leaf.dtype and found.shape == leaf.shape


class OnDevice(torch.Tensor):
    """Says that it is not on the CPU."""

    device = torch.device("cuda")


def test_sizes_are_read_once_for_forward_and_backward_and_again_after_a_change(monkeypatch):
    reads, read = [], msda._read
    monkeypatch.setattr(msda, "_read", lambda shapes: reads.append(1) or read(shapes))
    value, shapes, *rest = arguments()
    shapes = shapes.as_subclass(OnDevice)
    with msda.register():
        for _ in range(2):
            gradients(attention(value, shapes, *rest), (value,))
        assert len(reads) == 1
        shapes.copy_(torch.tensor([(7, 5), (4, 3)]))
        gradients(attention(value, shapes, *rest), (value,))
    assert len(reads) == 2
    del shapes, rest
    gc.collect()
    assert not len(msda._SIZES._known)


def test_it_is_registered_on_request_until_it_is_undone():
    assert msda.NAME not in sys.modules
    registration = msda.register()
    assert importlib.util.find_spec(msda.NAME) is not None
    with pytest.raises(ValueError, match="loaded already"):
        msda.register()
    registration.undo()
    registration.undo()
    assert msda.NAME not in sys.modules


def test_an_extension_is_replaced_only_by_force(monkeypatch, tmp_path):
    real = ModuleType(msda.NAME)
    monkeypatch.setitem(sys.modules, msda.NAME, real)
    with pytest.raises(ValueError, match=r"loaded already.*need force=True"):
        msda.register()
    with msda.register(force=True) as registration:
        assert sys.modules[msda.NAME] is registration.module
    assert sys.modules[msda.NAME] is real
    monkeypatch.delitem(sys.modules, msda.NAME)
    (tmp_path / f"{msda.NAME}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"it is installed, at .*need force=True"):
        msda.register()


def test_what_has_taken_its_place_is_left(monkeypatch):
    registration = msda.register()
    monkeypatch.setitem(sys.modules, msda.NAME, ModuleType(msda.NAME))
    with pytest.raises(ValueError, match="another module of that name"):
        registration.undo()
    sys.modules[msda.NAME] = registration.module
    registration.undo()
    assert msda.NAME not in sys.modules


def test_unknown_impls_are_refused():
    with pytest.raises(ValueError, match="impl"):
        msda.register(impl="cudnn")
