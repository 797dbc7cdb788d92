"""Every method that the installed peft has, on the projector's modules: peft's answer over plain code, or a refusal."""

import inspect

import pytest
import torch
from clients import KERNEL, MODELS, assert_same_step, build, inputs_of, plain_code
from hosts import close, step
from seeds import seeded

import igva_kernels as ik

pytest.importorskip("peft")

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

# Some methods use operations that have no deterministic form.
pytestmark = [pytest.mark.slow, pytest.mark.plain_memory]

METHODS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
PROMPTS = [name for name, config in METHODS.items() if issubclass(config, peft.PromptLearningConfig)]

SMALL = {
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "C3A": {"block_size": 16},
    "MISS": {"r": 2},
    "SHIRA": {"r": 2},
    "ROAD": {"group_size": 8},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 16},
    "POLY": {"n_tasks": 2, "n_skills": 2, "r": 2},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
}
"""What a method needs on modules this small; one that is not here runs with its own defaults."""

TASKS = ("POLY", "MULTITASK_PROMPT_TUNING")
"""They are told which task each sample belongs to."""

TARGETS = ("linear_1", "linear_2", "projector_layernorm")


def config_of(method, target):
    options = dict(SMALL.get(method, {}))
    known = inspect.signature(METHODS[method]).parameters
    if method in PROMPTS:
        return METHODS[method](task_type="CAUSAL_LM", **{"num_virtual_tokens": 2, **options})
    if "target_modules" in known:
        options["target_modules"] = ["embed_tokens"] if method == "TRAINABLE_TOKENS" else [target]
    if method == "TRAINABLE_TOKENS":
        options["token_indices"] = [3, 4]
    if "feedforward_modules" in known:
        options["feedforward_modules"] = [target] if target == "linear_2" else []
    return METHODS[method](**options)


def with_norm(kind, target):
    """Which model has such a module: of transformers', VipLlava's projector has the norm."""
    if target != "projector_layernorm":
        return {}
    return {"projector_layernorm_eps": 1e-5} if kind == "reference" else {"host": "VipLlava"}


def adapted(kind, method, target, order="plain code"):
    """A model with an adapter that has learned something; it is patched before or after peft, if at all."""
    model = build(kind, **with_norm(kind, target))
    handle = ik.patch(model, impl=KERNEL) if order == "patch, peft" else None
    if order == "plain code":
        plain_code(model)
    torch.manual_seed(seeded(1))
    model = move(peft.get_peft_model(model, config_of(method, target)))
    return model, ik.patch(model, impl=KERNEL) if order == "peft, patch" else handle


def merged(model, inputs):
    """Logits when the adapter is in the weights; None for a method that cannot be merged."""
    if not hasattr(model.base_model, "merge_and_unload"):
        return None
    try:
        return model.eval().merge_and_unload()(**inputs).logits.detach()
    except NotImplementedError:
        return None


ORDERS = {"plain": ["plain code"], "patched": ["patch, peft", "peft, patch"], "reference": ["fused"]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_method_gives_loss_gradients_and_merged_weights_of_plain_code(kind, method, client_row):
    row = f"peft: {method}"
    client_row(row, kind)
    inputs = inputs_of(kind, labels=True)
    if method in TASKS:
        inputs["task_ids"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    ran, why = [], {}
    for target in TARGETS:
        try:
            model, _ = adapted(kind, method, target)
            expected = step(model, inputs)
            assert expected[0].isfinite(), "the loss on this model is not a number"
        except Exception as error:  # peft has no adapter for such a module or model
            why[target] = f"peft: {error}"
            continue
        ran.append(target)
        after = merged(model, inputs)
        for order in ORDERS[kind]:
            try:
                model, handle = adapted(kind, method, target, order)
            except NotImplementedError:
                assert order == "peft, patch"
                client_row(row, kind, "refused after peft")
                continue
            assert_same_step(step(model, inputs), expected)
            if after is not None:
                close(merged(model, inputs), after)
            if handle is not None:
                handle.revert()
    if not ran:
        pytest.skip(why[TARGETS[0]])
    if without := [target for target in TARGETS[:2] if target in why]:
        client_row(row, kind, f"yes, not on {without[0]}")


SAVED = ("multi_modal_projector", "linear_1", "linear_2", "projector_layernorm")


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("kind", MODELS)
def test_modules_to_save_train_as_on_plain_code_and_nothing_of_a_patch_stays(kind, saved, client_row):
    client_row("peft: modules_to_save", kind)
    inputs = inputs_of(kind, labels=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])
    wrapped = peft.get_peft_model(plain_code(build(kind, **with_norm(kind, saved))), config)
    expected = step(move(wrapped), inputs)
    assert any(f"{saved}.modules_to_save" in name for name in expected[2])
    after = merged(wrapped, inputs)
    for order in ORDERS[kind]:
        model = build(kind, **with_norm(kind, saved))
        handle = ik.patch(model, impl=KERNEL) if order == "patch, peft" else None
        model = peft.get_peft_model(model, config)
        if order == "peft, patch":
            try:
                handle = ik.patch(model, impl=KERNEL)
            except NotImplementedError as refusal:
                told = str(refusal)
                assert "peft" in told and "quantis" not in told  # the reason is the right one
                client_row("peft: modules_to_save", kind, "refused after peft")
                continue
        assert_same_step(step(move(model), inputs), expected)
        if handle is not None:
            handle.revert()
            assert_same_step(step(model, inputs), expected)
            ik.patch(model, impl=KERNEL).revert()
        model = model.merge_and_unload()
        close(model.eval()(**inputs).logits, after)
        if handle is not None:
            with ik.patched(model, impl=KERNEL):
                close(model(**inputs).logits, after)


def move(model):
    """The model after some steps: what is trained differs from what it started as."""
    torch.manual_seed(seeded(1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model
