"""Hooks that edit what flows through the connector, in place or by what they return, act as they do on plain code."""

import pytest
import torch
from clients import KERNEL, assert_same_step, build, inputs_of, plain_code
from hosts import step

import igva_kernels as ik


def edit_in_place(tensor):
    tensor[:, 1:3] *= 0.5
    tensor.add_(0.1)


def edited(tensor):
    return tensor * 0.5 + 0.1


PRE = {
    "in place": lambda module, args: edit_in_place(args[0]),
    "returned": lambda module, args: (edited(args[0]), *args[1:]),
}
POST = {
    "in place": lambda module, args, out: edit_in_place(out),
    "returned": lambda module, args, out: edited(out),
}
PLACES = ("projector", "linear_1", "linear_2")


def place(model, where):
    projector = model.model.multi_modal_projector
    return projector if where == "projector" else projector.get_submodule(where)


def assert_acts_as_on_plain_code(kind, hook, first="hook"):
    """``hook(model)`` registers it; the patch comes before or after."""
    inputs, before = inputs_of(kind, labels=True), step(build(kind), inputs_of(kind, labels=True))
    model = plain_code(build(kind))
    hook(model)
    expected = step(model, inputs)
    assert not torch.allclose(expected[1], before[1])
    model = build(kind)
    if first == "hook":
        hook(model)
    handle = ik.patch(model, impl=KERNEL) if kind == "patched" else None
    if first != "hook":
        hook(model)
    assert_same_step(step(model, inputs), expected)
    if handle is not None:
        handle.revert()
        assert_same_step(step(model, inputs), expected)


RUNS = [("plain", "hook"), ("patched", "hook"), ("patched", "patch"), ("reference", "hook")]
"""The column, and which comes first: the hook, or the patch if there is one."""
runs = pytest.mark.parametrize(("kind", "first"), RUNS)


@pytest.mark.parametrize("way", PRE)
@pytest.mark.parametrize("where", PLACES)
@runs
def test_hooks_before_the_projector_and_its_linears(kind, first, where, way, client_row):
    client_row("hooks before the projector", kind)
    if (kind, where) != ("reference", "projector"):  # this one is given the states of the tower, and no features
        assert_acts_as_on_plain_code(kind, lambda model: place(model, where).register_forward_pre_hook(PRE[way]), first)


@pytest.mark.parametrize("way", POST)
@pytest.mark.parametrize("where", PLACES)
@runs
def test_hooks_behind_the_projector_and_its_linears(kind, first, where, way, client_row):
    client_row("hooks behind the projector", kind)
    assert_acts_as_on_plain_code(kind, lambda model: place(model, where).register_forward_hook(POST[way]), first)


@pytest.mark.parametrize("way", POST)
@runs
def test_hooks_of_a_layer_of_the_tower(kind, first, way, client_row):
    """A layer returns its states, alone or in a tuple."""
    client_row("hooks in the tower", kind)

    def hook(module, args, out):
        states = out[0] if isinstance(out, tuple) else out
        if way == "in place":
            return edit_in_place(states)
        return (edited(states), *out[1:]) if isinstance(out, tuple) else edited(states)

    assert_acts_as_on_plain_code(kind, lambda model: layers_of(model)[1].register_forward_hook(hook), first)


def layers_of(model):
    return next(m for name, m in model.model.vision_tower.named_modules() if name.endswith("encoder.layers"))


@pytest.mark.parametrize(("kind", "first"), RUNS[:3])
def test_hooks_of_the_tower_that_edit_the_states_it_returns(kind, first, client_row):
    client_row("hooks in the tower", kind)

    def hook(module, args, out):
        for state in out.hidden_states:
            if state is not None:  # transformers 5.23 returns the layers that are read
                state.mul_(0.5)

    inputs = inputs_of(kind)
    answers = []
    for patch in (False, kind == "patched"):
        model = build(kind)
        handle = ik.patch(model, impl=KERNEL) if patch and first == "patch" else None
        model.model.vision_tower.register_forward_hook(hook)
        handle = handle or (ik.patch(model, impl=KERNEL) if patch else None)
        with torch.no_grad():
            answers.append(model(**inputs).logits)
    torch.testing.assert_close(*answers, rtol=1e-4, atol=3e-5)
