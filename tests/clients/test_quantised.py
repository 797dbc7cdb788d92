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
SCORES = ["model.weight_allocator.head", "model.weight_allocator.linear_2"]
"""The allocators' last Linear. It has an output a group, and bitsandbytes multiplies 4-bit weights on CPUs with
AVX512-BF16 in blocks of 32 outputs only."""

SETTINGS = {
    "4 bit": {"load_in_4bit": True, "llm_int8_skip_modules": [*SCORES, "lm_head"]},
    "4 bit, without the projector": {"load_in_4bit": True, "llm_int8_skip_modules": [*SCORES, *PROJECTOR]},
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


def wide(kind, **fields):
    """The model in widths that are whole blocks of such a product, of 32 outputs and 64 inputs; and its inputs."""
    config, inputs = build(kind).config, inputs_of(kind)
    config.vision_config.update({"hidden_size": 64, "intermediate_size": 64})
    config.text_config.update({"hidden_size": 64, "head_dim": 16, "intermediate_size": 128})
    if kind == "reference":
        fields = {"sentence_embed_dim": 64, "allocator_hidden_dim": 64, **fields}
        inputs["sentence_embeds"] = torch.randn(2, 64, generator=torch.Generator().manual_seed(seeded(2)))
    return build(kind, vision_config=config.vision_config, text_config=config.text_config, **fields), inputs


def over_dequantised_weights(original, model):
    """Plain code of the original in fp32, with every quantised weight of the model as the number that it stands for."""
    weights = {name: values_of(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plain = plain_code(original)
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

    original, inputs = wide(kind, **fields)
    original.save_pretrained(tmp_path)
    model = type(original).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**SETTINGS[setting])).eval()
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    exact = over_dequantised_weights(original, model)  # first, as bitsandbytes moves its numbers when it runs
    plain = answer(model, inputs)
    # In 8 bit the activations are rounded, too, and so they are in the bf16 products of 4 bit on some CPUs.
    rounded = bnb.functional.has_avx512bf16() if "4 bit" in setting else True
    assert_close_to(plain, answer(exact, inputs), 0.05 if rounded else 1e-4)
    if kind == "patched":
        # The last bit of our rows can be another, which the next activation's rounding to bf16 makes larger.
        tolerance = 0.01 if rounded and "4 bit" in setting else 1e-5
        assert_patched_or_refused(model, inputs, plain, client_row, row, tolerance)


def assert_patched_or_refused(model, inputs, plain, client_row, row, tolerance=1e-5):
    try:
        handle = ik.patch(model, impl=KERNEL)
    except NotImplementedError as refusal:
        told = str(refusal)
    else:
        with handle:
            assert_close_to(answer(model, inputs), plain, tolerance)
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
    original, model, inputs = build(kind, **fields), build(kind, **fields), inputs_of(kind)
    handle = ik.patch(model, impl=KERNEL) if first == "patch" else None
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    exact = over_dequantised_weights(original, model)
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
