"""Swapping the operator into a model that exists, and out again."""

import copy
import io
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import igva_kernels as ik
from igva_kernels import registry
from igva_kernels.integrations import PatchHandle
from igva_kernels.integrations.lazy import set_forward
from igva_kernels.nn import LayerMixProjector
from igva_kernels.runtime.backend import Backend

pytest.importorskip("transformers")

from hosts import gradients
from recording import Dispatched
from tiny import FUSED, batch, igva_model


def operators(model, **inputs):
    with Dispatched() as ran, torch.no_grad():
        model(**(inputs or batch()))
    return ran.ours


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


needs_kernel = pytest.mark.skipif(not FUSED, reason="no kernel serves CPU tensors here")


@needs_kernel
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("aggregation", ["instruction", "uniform"])
def test_a_patched_model_has_the_same_loss_gradients_and_greedy_tokens(tower, aggregation):
    model, inputs = igva_model(tower, aggregation=aggregation).train(), batch((2, 0, 1), labels=True)
    model(**inputs).loss.backward()
    expected = gradients(model)
    prompt, options = batch((2, 0, 1), "left"), {"max_new_tokens": 8, "do_sample": False}
    tokens, logits = model.eval().generate(**prompt, **options), model(**inputs).logits
    model.zero_grad()
    with ik.patch(model, impl=FUSED[0]):
        close(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**prompt, **options), tokens)
        model.train()(**inputs).loss.backward()
    assert gradients(model).keys() == expected.keys()
    for name, grad in gradients(model).items():
        close(grad, expected[name])


@needs_kernel
def test_the_operator_runs_while_patched_and_not_before_or_after():
    model = igva_model()
    assert operators(model) == []
    handle = ik.patch(model)
    assert "projector" in operators(model)
    handle.revert()
    assert operators(model) == []


def test_revert_restores_the_very_objects():
    model = igva_model()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    forwards = {name: module.forward.__func__ for name, module in model.named_modules()}
    keys, tensors = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    handle = ik.patch(model)
    assert list(model.state_dict()) == keys
    assert [p.data_ptr() for p in model.parameters()] == tensors
    assert handle.is_active
    handle.revert()
    handle.revert()  # once more does nothing
    assert not handle.is_active
    for name, module in model.named_modules():
        assert module.forward.__func__ is forwards[name]
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())


def test_no_class_is_changed_and_other_models_stay_as_they_are():
    model, other = igva_model(), igva_model()
    attributes = {cls: dict(vars(cls)) for cls in {type(m) for m in model.modules()} if cls is not nn.Module}
    with ik.patch(model):
        assert other.model.multi_modal_projector.impl == "reference"
        for cls, before in attributes.items():
            assert {k: v for k, v in vars(cls).items() if not k.startswith("__")} == {
                k: v for k, v in before.items() if not k.startswith("__")
            }


def test_two_models_are_patched_and_reverted_each_on_its_own():
    one, two = igva_model(), igva_model()
    first, second = ik.patch(one), ik.patch(two, impl="reference")
    first.revert()
    assert one.model.multi_modal_projector.impl == "reference"
    assert second.is_active
    second.revert()


def test_patching_twice_is_an_error_and_changes_nothing():
    model = igva_model()
    with ik.patch(model):
        for again in (model, model.model):
            with pytest.raises(ValueError, match="patched already"):
                ik.patch(again)
        assert model.model.multi_modal_projector.impl == "auto"
    assert model.model.multi_modal_projector.impl == "reference"
    ik.patch(model).revert()


def test_the_block_reverts_when_it_raises():
    model = igva_model()

    def block():
        with ik.patched(model) as same:
            assert same is model
            assert model.model.multi_modal_projector.impl == "auto"
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert model.model.multi_modal_projector.impl == "reference"


@needs_kernel
def test_a_wrapped_model_is_found_and_no_grad_does_not_matter():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            return self.inner(**inputs)

    wrapper = Wrapper(igva_model())
    with torch.no_grad(), ik.patch(wrapper):
        assert "projector" in operators(wrapper)


def test_a_model_that_nobody_knows_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"Linear.*LLaVA-IGVA"):
        ik.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model"):
        ik.patch("llava")  # type: ignore[arg-type]


def test_options_that_cannot_be_served_are_refused_and_change_nothing():
    model = igva_model()
    with pytest.raises(ValueError, match="impl"):
        ik.patch(model, impl="fastest")
    with pytest.raises(NotImplementedError, match="cuda"):
        ik.patch(model, impl="cuda")
    with pytest.raises(TypeError, match="speed"):
        ik.patch(model, speed=2)
    assert model.model.multi_modal_projector.impl == "reference"
    ik.patch(model).revert()


def test_reverted_models_can_be_copied_and_pickled_and_patched_ones_too():
    model, inputs = igva_model(), batch()
    handle = ik.patch(model)
    copies = [copy.deepcopy(model)]
    handle.revert()
    copies += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    for duplicate in copies:
        close(duplicate(**inputs).logits, model(**inputs).logits)
        ik.patch(duplicate).revert()


def test_revert_refuses_to_undo_the_work_of_others():
    model = igva_model()
    handle = ik.patch(model)
    model.model.multi_modal_projector.impl = "cpu"
    with pytest.raises(ValueError, match="rebound"):
        handle.revert()
    model.model.multi_modal_projector.impl = "auto"
    handle.revert()


def test_a_handle_restores_attributes_that_only_the_class_had():
    linear, handle = nn.Linear(2, 2), PatchHandle()
    forward = linear.forward.__func__
    handle.set(linear, "forward", lambda x: x)
    assert linear(1) == 1
    assert "forward" in repr(handle)
    handle.revert()
    assert "forward" not in vars(linear)
    assert linear.forward.__func__ is forward


def test_a_handle_edits_configs_too():
    config, handle = SimpleNamespace(width=1), PatchHandle()
    handle.set(config, "width", 2)
    handle.set(config, "plan", {})
    assert vars(config) == {"width": 2, "plan": {}}
    handle.revert()
    assert vars(config) == {"width": 1}


@pytest.mark.parametrize("hooks", ["removed", "added", "added and removed"])
def test_a_method_that_hooks_moved_since_the_patch_is_found_and_restored(hooks):
    accelerate = pytest.importorskip("accelerate")
    linear, handle, x = nn.Linear(2, 2), PatchHandle(), torch.randn(1, 2)
    add = partial(accelerate.hooks.add_hook_to_module, linear, accelerate.hooks.ModelHook())
    if hooks == "removed":
        add()
    set_forward(handle, linear, lambda self, x: x)
    if "added" in hooks:
        add()
    if "removed" in hooks:
        accelerate.hooks.remove_hook_from_module(linear)
    assert torch.equal(linear(x), x)
    handle.revert()
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    accelerate.hooks.remove_hook_from_module(linear)
    assert linear.forward.__func__ is nn.Linear.forward
    set_forward(handle, linear, lambda self, x: x)  # and it can be patched again
    handle.revert()


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a process has one at a time
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_what_wraps_a_patched_method_is_named_and_a_revert_works_once_it_is_gone(accelerator):
    linear, handle = nn.Linear(2, 2), PatchHandle()
    set_forward(handle, linear, lambda self, x: x)
    wrapped = accelerator.prepare(linear)
    with pytest.raises(ValueError, match=r"rebound since, by accelerate.*keep_fp32_wrapper=False"):
        handle.revert()
    assert handle.is_active
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    handle.revert()
    assert linear.forward.__func__ is nn.Linear.forward


def test_a_copy_is_reverted_with_the_children_that_were_replaced_in_the_original():
    """peft's ``modules_to_save`` copies a projector whose first Linear a plan has widened."""
    projector, handle = nn.Sequential(nn.Linear(2, 3), nn.GELU()), PatchHandle()
    handle.set(projector, "_modules", {**projector._modules, "0": nn.Linear(4, 3)})
    duplicate = copy.deepcopy(projector)
    handle.revert()
    assert duplicate[0].in_features == projector[0].in_features == 2
    assert duplicate[0] is not projector[0] and torch.equal(duplicate[0].weight, projector[0].weight)
    assert duplicate[1] is not projector[1]


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_a_handle_prints_what_serves_the_model_where_it_is(impl):
    model = igva_model()
    with ik.patch(model, impl=impl) as handle:
        assert f"by {'plain PyTorch' if impl == 'reference' else impl} (float32 on cpu)" in str(handle)
        model.model.multi_modal_projector.linear_1.register_forward_hook(lambda *_: None)
        assert impl == "reference" or "linear_1, which has hooks" in str(handle)
        assert "LayerMixProjector.impl" in str(handle)
    assert str(handle) == "PatchHandle(reverted)"


def test_an_impl_that_the_machine_has_for_another_device_is_checked_when_the_model_runs(monkeypatch):
    """Training scripts patch on the CPU and move the model to its GPU later."""
    name = "elsewhere"
    elsewhere = Backend(name, 9, ("cuda",), lambda device, dtype: None if device.type == "cuda" else "it serves cuda")
    monkeypatch.setattr(registry, "all_backends", lambda: {name: elsewhere})
    registry.choose.cache_clear()
    model = igva_model()
    with ik.patch(model, impl=name), pytest.raises(NotImplementedError, match="it serves cuda"):
        model(**batch())
    registry.choose.cache_clear()


def test_every_projector_of_a_model_is_patched():
    plan = ik.MixPlan.concat([0, 1])
    pair = nn.ModuleList(LayerMixProjector(plan, 4, 4, impl="reference") for _ in range(2))
    with ik.patch(pair):
        assert [p.impl for p in pair] == ["auto", "auto"]
    assert [p.impl for p in pair] == ["reference", "reference"]
