"""Every system of multi-layer fusion is one config line of the reference model, and computes its authors' formula."""

import json

import pytest
import torch
from seeds import seeded

pytest.importorskip("transformers")

from compare_connectors import SYSTEMS, make_config, measure
from hosts import gradients
from huggingface_hub.errors import StrictDataclassError
from tiny import EMBED, FUSED, IMAGE, PATCHES, batch, igva_config, liven, text_config
from torch.nn.functional import gelu, layer_norm
from transformers import LlavaConfig, LlavaForConditionalGeneration

from igva_kernels import MixPlan
from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaForConditionalGeneration
from igva_kernels.nn import LearnedWeights, TextAllocator

SMALL = {"sentence_embed_dim": EMBED, "allocator_hidden_dim": 16, "allocator_num_blocks": 1, "allocator_num_heads": 2}


def system(name, impl="reference", **overrides):
    torch.manual_seed(seeded())
    return liven(LlavaIgvaForConditionalGeneration(make_config(name, impl=impl, **SMALL, **overrides)).eval())


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


def cat(*parts):
    return torch.cat(parts, dim=-1)


def mean(h, layers):
    return sum(h[layer] for layer in layers) / len(layers)


def weighted(h, w, layers):
    return sum(w[:, i, None, None] * h[layer] for i, layer in enumerate(layers))


FIRST, SECOND = list(range(1, 13)), list(range(13, 25))
ROWS = {
    "LLaVA-1.5": lambda h, w: h[23],
    "IGVA": lambda h, w: cat(h[23], sum(w[:, k, None, None] * mean(h, range(6 * k + 1, 6 * k + 7)) for k in range(4))),
    "IGVA, stage 1": lambda h, w: cat(h[23], mean(h, range(1, 25))),
    "DenseConnector SCI": lambda h, w: cat(h[23], h[7], h[15]),
    "DenseConnector DCI": lambda h, w: cat(h[23], mean(h, range(12)), mean(h, range(12, 24))),
    "DenseConnector SCI, SigLIP": lambda h, w: cat(h[26], h[7], h[15]),
    "DenseConnector DCI, SigLIP": lambda h, w: cat(h[26], mean(h, range(13)), mean(h, range(13, 26))),
    "Layer_Select_Fuse 18": lambda h, w: cat(h[18], h[23]),
    "Layer_Select_Fuse 3-18-23": lambda h, w: cat(h[3], h[18], h[23]),
    "Layer_Select_Fuse former": lambda h, w: cat(mean(h, FIRST), h[23]),
    "Layer_Select_Fuse latter": lambda h, w: cat(mean(h, SECOND), h[23]),
    "Layer_Select_Fuse all": lambda h, w: cat(mean(h, FIRST), mean(h, SECOND), h[23]),
    "VipLlava": lambda h, w: cat(h[23], h[20], h[17], h[14], h[6]),
    "Granite Vision, SigLIP": lambda h, w: cat(h[4], h[8], h[16], h[27]),
    "TGIF": lambda h, w: weighted(h, w, range(1, 25)) + h[23],
    "COMM Mean": lambda h, w: mean(h, range(1, 25)),
    "COMM Layerscale": lambda h, w: weighted(h, w, range(1, 25)),
}
"""The mixed rows in plain torch, from hidden states and layer weights."""


KINDS = ["IGVA", "IGVA, stage 1", "DenseConnector DCI, SigLIP", "VipLlava", "TGIF", "COMM Layerscale"]
"""One of each: allocator, uniform, constant means without CLS, taps and a norm, text allocator, learned weights."""


def test_every_system_has_its_formula():
    assert ROWS.keys() == SYSTEMS.keys()


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_visual_tokens_are_the_formula_of_the_system(name):
    model, inputs = system(name), batch((1, 1))
    core = model.model
    h = core.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    skip = 0 if "SigLIP" in name else 1
    out = model.get_image_features(inputs["pixel_values"], inputs["sentence_embeds"])
    projector = core.multi_modal_projector
    rows = ROWS[name]([state[:, skip:] for state in h], out.layer_weights)
    if name in ("VipLlava", "TGIF"):
        norm = projector.projector_layernorm
        rows = layer_norm(rows, rows.shape[-1:], norm.weight, norm.bias, 1e-5)
    tokens = projector.linear_2(gelu(projector.linear_1(rows)))
    close(torch.stack(out.pooler_output), tokens)
    assert tokens.shape[1] == PATCHES


@pytest.mark.parametrize("name", ["IGVA", "MMFuser"])
def test_the_comparison_has_a_number_for_every_column(name):
    """It also compares the fused connector with the plain one."""
    parameters, kept, *pairs = measure(name, "tiny", batch=1, rounds=1)
    assert float(parameters) > 0 and float(kept) > 0
    assert len(pairs) == 4 and all(float(number) > 0 for pair in pairs for number in pair.split(" / "))


def test_the_instruction_can_weigh_the_layers_of_any_plan():
    model, inputs = system("COMM Layerscale", aggregation="instruction"), batch((1, 1))
    core = model.model
    h = core.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    weights = core.weight_allocator(inputs["sentence_embeds"], torch.stack([state[:, 0] for state in h[1:]], dim=1))
    out = model.get_image_features(inputs["pixel_values"], inputs["sentence_embeds"])
    close(out.layer_weights, weights)
    projector, rows = core.multi_modal_projector, weighted(h, weights, range(1, 25))
    close(torch.stack(out.pooler_output), projector.linear_2(gelu(projector.linear_1(rows[:, 1:]))))


def test_the_weights_of_tgif_come_from_the_text_alone():
    model = system("TGIF")
    first, second = (batch((1, 1), seed=seed) for seed in (0, 1))
    router = model.model.weight_allocator
    hidden = torch.relu(first["sentence_embeds"] @ router.linear_1.weight.T + router.linear_1.bias)
    expected = torch.softmax(hidden @ router.linear_2.weight.T + router.linear_2.bias, dim=-1)
    for pixels in (first["pixel_values"], second["pixel_values"]):
        weights = model.get_image_features(pixels, first["sentence_embeds"]).layer_weights
        close(weights, expected)
    assert (weights[0] - weights[1]).abs().max() > 1e-4


def test_learned_weights_start_equal_need_no_sentence_and_learn():
    model, inputs = system("COMM Layerscale").train(), batch((2, 1), labels=True)
    del inputs["sentence_embeds"]
    out = model(**inputs)
    close(out.layer_weights, torch.full((3, 24), 1 / 24))
    out.loss.backward()
    assert model.model.weight_allocator.scores.grad.abs().max() > 0
    tokens = model.generate(**batch((2, 1), "left"), max_new_tokens=2)
    assert tokens.shape[0] == 2


@pytest.mark.skipif(not FUSED, reason="no kernel serves CPU tensors here")
@pytest.mark.parametrize("name", KINDS)
def test_fused_and_plain_agree_in_loss_gradients_and_greedy_tokens(name):
    results = []
    for impl in ("reference", FUSED[0]):
        model = system(name, impl).train()
        out = model(**batch((2, 0, 1), labels=True))
        out.loss.backward()
        tokens = model.eval().generate(**batch((2, 0, 1), "left"), max_new_tokens=6, do_sample=False)
        results.append((out.loss, gradients(model), tokens))
    (loss, grads, tokens), (fused_loss, fused_grads, fused_tokens) = results
    close(fused_loss, loss)
    assert grads.keys() == fused_grads.keys()
    for parameter, grad in grads.items():
        close(fused_grads[parameter], grad)
    assert torch.equal(tokens, fused_tokens)


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_system_loads_as_it_was(tmp_path, name):
    model, inputs = system(name), batch((1, 1))
    model.save_pretrained(tmp_path)
    loaded, info = LlavaIgvaForConditionalGeneration.from_pretrained(
        tmp_path, impl="reference", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.plan == model.config.plan
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["IGVA", "IGVA, stage 1", "DenseConnector DCI", "Layer_Select_Fuse all"])
def test_a_llava_becomes_any_system_that_reads_its_layer_and_answers_as_before(name):
    torch.manual_seed(seeded())
    vision = make_config("LLaVA-1.5").vision_config
    config = LlavaConfig(vision_config=vision, text_config=text_config(), image_token_index=IMAGE)
    llava = liven(LlavaForConditionalGeneration(config).eval())
    model = LlavaIgvaForConditionalGeneration.from_llava(llava, **SMALL, **SYSTEMS[name])
    inputs = batch((1, 2))
    plain = {key: value for key, value in inputs.items() if key != "sentence_embeds"}
    torch.testing.assert_close(model(**inputs).logits, llava(**plain).logits, rtol=1e-4, atol=3e-5)
    assert model.config.plan == make_config(name).plan


def test_a_line_of_json_is_the_plan_that_its_constructor_makes():
    for data, plan in (
        ('{"dense_connector": {"kind": "dci"}}', MixPlan.dense_connector("dci")),
        ('{"concat": {"layers": [-2, 6]}}', MixPlan.concat([23, 6], 25)),
        ('{"weighted_sum": {"layers": [1, 2], "residual": 3}}', MixPlan.weighted_sum([1, 2], 3, 25)),
    ):
        tower = {"model_type": "clip_vision_model", "num_hidden_layers": 24}
        assert LlavaIgvaConfig(vision_config=tower, mix_plan=json.loads(data)).plan == plan


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ({"densest_connector": {}}, ValueError, "dense_connector"),
        ({"from_code": {"code": "()"}}, ValueError, "weighted_sum"),
        ({}, ValueError, "mix_plan"),
        ({"layer_select": {"strategy": "19"}}, ValueError, "strategy"),
        ({"layer_select": {"layer": 18}}, TypeError, "layer"),
    ],
)
def test_a_plan_that_no_constructor_makes_is_refused(data, error, said):
    with pytest.raises(error, match=said):
        make_config("IGVA", mix_plan=data)


def test_allocators_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="sentence_embeds"):
        TextAllocator(4, 2)(torch.zeros(3, 5))
    assert LearnedWeights(3).to(torch.bfloat16)(2).dtype == torch.float32


@pytest.mark.parametrize(
    ("field", "wrong"), [("aggregation", "bogus"), ("allocator_hidden_dim", "wide"), ("balance_coefficient", "x")]
)
def test_a_field_of_the_config_that_cannot_be_meant_is_refused_by_its_name(field, wrong):
    with pytest.raises(StrictDataclassError, match=field):
        igva_config(**{field: wrong})
