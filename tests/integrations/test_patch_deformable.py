"""transformers' models with deformable attention, and the core swapped in."""

import copy
import types

import harness
import pytest
import torch

import igva_kernels as ik

pytest.importorskip("transformers")

import deformable_hosts as hosts
from hosts import close, gradients
from recording import Dispatched

IMPLS = ["reference", *(["auto"] if harness.quick_impls("deform_attn") else [])]
CASES = [*((name, False) for name in hosts.CLASSES if name not in hosts.BY_LEVEL), *((n, True) for n in hosts.CLASSES)]


@pytest.fixture(autouse=True)
def row(request, record_property):
    """Of docs/compatibility.md: the model that a test is about."""
    if "name" in request.fixturenames:
        record_property("deformable", request.getfixturevalue("name"))


def step(module, given):
    """The outputs and every gradient, of the arguments too."""
    module.zero_grad()
    out, weights = module(**given.leaves, **given.others)
    sign = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    of_leaves = torch.autograd.grad((out * sign).sum(), [*given.leaves.values(), *module.parameters()])
    names = [*given.leaves, *dict(module.named_parameters())]
    return out.detach(), weights.detach(), dict(zip(names, of_leaves, strict=True))


def assert_same_step(found, expected):
    assert found[0].dtype == expected[0].dtype
    close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for name, grad in expected[2].items():
        assert (found[2][name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name


def ran(module, given):
    with Dispatched() as seen, torch.no_grad():
        module(**given.leaves, **given.others)
    return seen


# ---- the same answers -----------------------------------------------------------------------------------------------


def test_every_module_of_transformers_is_tested():
    assert hosts.folders() <= hosts.CLASSES.keys()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "boxes"), CASES)
def test_outputs_and_gradients(name, boxes, impl):
    module = hosts.attention(name)
    given = hosts.inputs(module, boxes)
    expected = step(module, given)
    keys = list(module.state_dict())
    with ik.patch(module, impl=impl):
        assert_same_step(step(module, given), expected)
        assert list(module.state_dict()) == keys
    assert torch.equal(module(**given.leaves, **given.others)[0], expected[0])


@pytest.mark.parametrize("name", hosts.CLASSES)
def test_the_core_is_one_operator(name):
    if IMPLS[-1] == "reference":
        pytest.skip("no kernel serves CPU tensors here")
    module = hosts.attention(name)
    given = hosts.inputs(module, boxes=True)
    assert "aten::grid_sampler_2d" in ran(module, given).names
    with ik.patch(module):
        seen = ran(module, given)
    assert seen.ours == ["deform_attn"]
    assert "aten::grid_sampler_2d" not in seen.names


@pytest.mark.parametrize("name", ["deformable_detr", "d_fine", "mask2former"])
def test_autocast(name):
    """The dtype is that of transformers. The output projection, where there is one, rounds the sum to bf16 anyway;
    where there is none it is rounded once more than in transformers."""
    module = hosts.attention(name)
    given = hosts.inputs(module, boxes=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = module(**given.leaves, **given.others)
        with ik.patch(module):
            found, _ = module(**given.leaves, **given.others)
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= 2 * torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.mark.parametrize("name", hosts.WHOLE)
def test_whole_models(name):
    build, output = hosts.WHOLE[name]
    model = build().double()  # decisions such as which mask a pixel is in do not turn on rounding then
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def run():
        model.zero_grad()
        found = model(pixel_values=pixels)[output]
        found.square().mean().backward()
        return found.detach(), gradients(model)

    expected, grads = run()
    keys = list(model.state_dict())
    with ik.patch(model) as handle:
        found, found_grads = run()
        assert list(model.state_dict()) == keys
        assert "deformable attention, " in repr(handle)
    close(found, expected)
    assert found_grads.keys() == grads.keys()
    for key, grad in grads.items():
        assert (found_grads[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, key


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2", "d_fine", "mask2former"])
def test_compile(name):
    """In one graph, with no guard on a global of transformers that the patch has replaced."""
    module = hosts.attention(name)
    given = hosts.inputs(module, boxes=True)
    with ik.patch(module):
        expected = module(**given.leaves, **given.others)[0]
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        for _ in range(2):
            close(compiled(**given.leaves, **given.others)[0], expected)
    torch.compiler.reset()


# ---- what a patch changes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2", "d_fine"])
def test_revert_restores_the_very_same_objects_in_copies_too(name):
    module = hosts.attention(name)
    before = {path: dict(vars(each)) for path, each in module.named_modules()}
    handle = ik.patch(module)
    duplicate = copy.deepcopy(module)
    given = hosts.inputs(module, boxes=True)
    patched = module(**given.leaves, **given.others)[0]
    with torch.no_grad():
        duplicate.sampling_offsets.bias.add_(0.25)
    assert not torch.equal(duplicate(**given.leaves, **given.others)[0], patched)
    handle.revert()
    for path, each in module.named_modules():
        assert vars(each).keys() == before[path].keys() and all(vars(each)[k] is v for k, v in before[path].items())
    for path, each in duplicate.named_modules():
        assert vars(each).keys() == before[path].keys(), path


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2", "d_fine"])
def test_a_second_patch_is_refused(name):
    module = hosts.attention(name)
    with ik.patch(module), pytest.raises(ValueError, match="patched already"):
        ik.patch(module)


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine", "deimv2"])
def test_discrete_sampling_is_refused(name):
    with pytest.raises(NotImplementedError, match=r"decoder_method: got 'discrete'.*need 'default'"):
        ik.patch(hosts.attention(name, method="discrete"))


@pytest.mark.parametrize(("name", "attribute"), [("deformable_detr", "attn"), ("mask2former", None)])
def test_a_forward_that_something_else_has_replaced_is_refused(name, attribute):
    """As transformers itself does with ``use_kernels=True``."""
    module = hosts.attention(name)
    core = getattr(module, attribute) if attribute else module
    core.forward = types.MethodType(lambda self, *args: args[0], core)
    with pytest.raises(ValueError, match=r"forward of its .* has been replaced by"):
        ik.patch(module)


def test_a_function_that_something_else_has_replaced_is_refused(monkeypatch):
    module = hosts.attention("d_fine")
    module.ms_deformable_attn_core = lambda *args: args[0]
    with pytest.raises(ValueError, match=r"ms_deformable_attn_core of its .* has been replaced by"):
        ik.patch(module)
    module = hosts.attention("mask2former")
    scope = type(module).forward.__globals__
    monkeypatch.setitem(scope, "multi_scale_deformable_attention", lambda *args: args[0])
    with pytest.raises(ValueError, match=r"multi_scale_deformable_attention of its .* has been replaced by"):
        ik.patch(module)


def test_another_signature_is_refused(monkeypatch):
    module = hosts.attention("deformable_detr")
    monkeypatch.setattr(type(module.attn), "forward", lambda self, value, shapes: value)
    type(module.attn).forward.__module__ = "transformers.models.deformable_detr"
    with pytest.raises(NotImplementedError, match="it takes self, value, shapes, need"):
        ik.patch(module)
