"""Quantised models answer as plain code does over the weights that the quantisation left."""

import pytest
import torch
from clients import KERNEL, MODELS, assert_same_step, build, inputs_of, plain_code
from hosts import step
from seeds import seeded
from torch import nn

import igva_kernels as ik

pytest.importorskip("transformers")

AGGREGATIONS = ("instruction", "text", "learned")
"""The allocators of the reference model."""

PROJECTOR = ["model.multi_modal_projector", "lm_head"]
SETTINGS = {
    "4 bit": {"load_in_4bit": True},
    "4 bit, without the projector": {"load_in_4bit": True, "llm_int8_skip_modules": PROJECTOR},
    "4 bit, without the allocator": {
        "load_in_4bit": True,
        "llm_int8_skip_modules": ["model.weight_allocator", "lm_head"],
    },
    "8 bit": {"load_in_8bit": True},
    "8 bit, without the projector": {"load_in_8bit": True, "llm_int8_skip_modules": PROJECTOR},
}
CASES = [("plain", {}), ("patched", {}), *(("reference", {"aggregation": name}) for name in AGGREGATIONS)]
cases = pytest.mark.parametrize(
    ("kind", "fields"), CASES, ids=[" ".join((kind, *fields.values())) for kind, fields in CASES]
)


def over_dequantised_weights(model, kind, fields):
    """Plain code in fp32, with every quantised weight as the number that it stands for."""
    weights = {name: values_of(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plain = plain_code(build(kind, **fields))
    with torch.no_grad():
        for name, values in weights.items():
            plain.get_submodule(name).weight.copy_(values)
    return plain


def values_of(linear):
    weight = linear.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):
        return weight.data * weight.SCB[:, None] / 127
    return weight.data if type(weight.data) is torch.Tensor else weight.dequantize()


@torch.no_grad()
def answer(model, inputs):
    out = model(**inputs)
    return out.logits.float(), getattr(out, "layer_weights", None)


def assert_close_to(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            distance = (a - b).norm() / b.norm()
            assert distance <= tolerance, f"{distance:.1e} off"


@cases
@pytest.mark.parametrize("setting", SETTINGS)
def test_bitsandbytes(kind, fields, setting, client_row, tmp_path):
    row = f"bitsandbytes {setting[:5]}"
    client_row(row, kind)
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    original = build(kind, **fields)
    original.save_pretrained(tmp_path)
    model = type(original).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**SETTINGS[setting])).eval()
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    exact = over_dequantised_weights(model, kind, fields)  # first, as bitsandbytes moves its numbers when it runs
    inputs = inputs_of(kind)
    plain = answer(model, inputs)
    # In 8 bit the activations are rounded, too.
    assert_close_to(plain, answer(exact, inputs), 1e-4 if "4 bit" in setting else 0.05)
    if kind == "patched":
        assert_patched_or_refused(model, inputs, plain, client_row, row)


def assert_patched_or_refused(model, inputs, plain, client_row, row):
    try:
        handle = ik.patch(model, impl=KERNEL)
    except NotImplementedError as refusal:
        told = str(refusal)
    else:
        with handle:
            assert_close_to(answer(model, inputs), plain, 1e-5)
        return
    assert "multi_modal_projector" in told and "llm_int8_skip_modules" in told
    assert not is_plain_linear(model.model.multi_modal_projector.linear_1), told
    client_row(row, "patched", "yes, without the projector")


def is_plain_linear(module):
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


@pytest.mark.parametrize("first", ["torchao", "patch"])
@cases
def test_torchao(kind, fields, first, client_row):
    client_row("torchao int8", kind)
    quantization = pytest.importorskip("torchao.quantization")
    if kind != "patched" and first == "patch":
        return
    model, inputs = build(kind, **fields), inputs_of(kind)
    handle = ik.patch(model, impl=KERNEL) if first == "patch" else None
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    exact = over_dequantised_weights(model, kind, fields)
    assert not is_plain_linear(model.model.multi_modal_projector.linear_1)
    found = answer(model, inputs)
    assert_close_to(found, answer(exact, inputs), 1e-4)
    if handle is not None:
        handle.revert()
        assert_close_to(answer(model, inputs), found, 1e-5)
    elif kind == "patched":
        assert_patched_or_refused(model, inputs, found, client_row, "torchao int8")


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_of_a_4_bit_model_learn_as_over_plain_code(kind, client_row, tmp_path):
    client_row("bitsandbytes 4 bit with peft", kind)
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from transformers import BitsAndBytesConfig

    original = build(kind)
    original.save_pretrained(tmp_path)

    def learn(first, then):
        settings = BitsAndBytesConfig(load_in_4bit=True)
        model = type(original).from_pretrained(tmp_path, quantization_config=settings)
        first(model)
        model = peft.prepare_model_for_kbit_training(model)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "linear_1", "linear_2"], init_lora_weights=False)
        torch.manual_seed(seeded(1))
        model = peft.get_peft_model(model, config).train()
        then(model)
        return step(model, inputs_of(kind, labels=True))

    def nothing(model):
        pass

    def patch(model):
        ik.patch(model, impl=KERNEL)

    expected = learn(plain_code, nothing)
    assert any("multi_modal_projector" in name for name in expected[2])
    if kind != "patched":
        assert_same_step(learn(nothing, nothing), expected)
    else:
        assert_same_step(learn(patch, nothing), expected)
        assert_same_step(learn(nothing, patch), expected)
