"""Internal direct fusion (I_D): the config line, what is added where, and every way in which a prompt is read."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from hosts import close, gradients
from reference_models import (
    assert_a_checkpoint_gives_the_same_bits,
    assert_a_compiled_step_is_the_step,
    assert_a_copy_answers_by_itself,
    assert_an_upgraded_llava_answers_as_before,
    assert_many_questions_read_one_encoded_image,
    assert_samples_answer_alone_as_in_a_batch,
    assert_step_is,
    assert_zero_gradients_without_images,
)
from threads import in_threads
from tiny import FUSED, IMAGE, PATCHES, batch, igva_config, igva_model, text_config, vision_config
from torch import nn

from igva_kernels.models import LlavaIgvaConfig
from igva_kernels.testing import measure_memory

TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
TIMES = ["encode", "inject"]
IMPLS = ["reference", *FUSED]


def model_of(when="encode", taps=(1, -2), layers=(0, 1), **overrides):
    fields = {"mix_plan": {"concat": {"layers": [-2]}}, "aggregation": "uniform"}
    injection = {"taps": list(taps), "layers": list(layers), "when": when}
    return igva_model(**{**fields, "injection": injection, **overrides})


def loop(model, inputs):
    """The logits as the repository computes them: a slice of a sample's hidden states at a time, in plain modules."""
    core, ids = model.model, inputs["input_ids"]
    injection = model.config.injection_plan
    skip = model.config.skip_tokens

    def project(projector, state):
        return projector.linear_2(nn.functional.gelu(projector.linear_1(state[:, skip:])))

    states = core.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    features = [project(core.injection_projectors[j], states[tap]) for j, tap in enumerate(injection.taps)]
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == IMAGE)[..., None], project(core.multi_modal_projector, states[-2]))

    def before(j):
        def hook(layer, args):
            hidden, image = args[0].clone(), 0
            for b in range(len(ids)):
                places = torch.where(ids[b] == IMAGE)[0]
                for start in range(0, len(places), PATCHES):
                    span = places[start : start + PATCHES]
                    hidden[b, span[0] : span[0] + PATCHES] += features[j][image]
                    image += 1
            return hidden, *args[1:]

        return hook

    layers = core.language_model.layers
    hooks = [layers[i].register_forward_pre_hook(before(j)) for j, i in enumerate(injection.layers)]
    try:
        out = core.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    finally:
        for hook in hooks:
            hook.remove()
    return model.lm_head(out.last_hidden_state)


# ---- the config ----


def config_of(injection, tower="clip", tower_layers=24, text_layers=32):
    vision = vision_config(tower, num_hidden_layers=tower_layers)
    text = text_config()
    text.num_hidden_layers = text_layers
    return LlavaIgvaConfig(
        vision_config=vision, text_config=text, mix_plan={"concat": {"layers": [-2]}}, injection=injection
    )


@pytest.mark.parametrize(
    ("strategy", "taps", "layers"),
    [
        ("18", [18], [23]),
        ("3-18", [3, 18], [3, 23]),
        ("3-18-23", [3, 18, 23], [3, 23, 29]),
        ("former", [*range(1, 13)], [*range(12)]),
        ("latter", [*range(13, 25)], [*range(20, 32)]),
        ("all", [*range(1, 25)], [*range(12), *range(20, 32)]),
    ],
)
def test_a_strategy_is_the_layers_of_the_repository(strategy, taps, layers):
    config = config_of({"strategy": strategy})
    assert config.injection == {"taps": taps, "layers": layers, "when": "encode"}
    assert config_of(config.injection).injection_plan == config.injection_plan
    assert config_of({"strategy": strategy, "when": "inject"}).injection_plan.when == "inject"


def test_the_layers_follow_the_depth_of_the_language_model_and_the_states_the_tower():
    assert config_of({"strategy": "3-18-23"}, text_layers=40).injection["layers"] == [4, 29, 37]
    assert config_of({"strategy": "3-18-23"}, "siglip", 26).injection["taps"] == [3, 20, 25]
    assert config_of({"strategy": "latter"}, "siglip", 26).injection["taps"] == [*range(15, 27)]
    assert config_of({"taps": [-1, 3], "layers": [5, 2]}).injection["taps"] == [24, 3]


@pytest.mark.parametrize(
    ("injection", "error", "said"),
    [
        ("3-18-23", TypeError, "need a dict"),
        ({}, ValueError, "need {'strategy'"),
        ({"strategy": "18", "taps": [18]}, ValueError, "need {'strategy'"),
        ({"taps": [18]}, ValueError, "need {'strategy'"),
        ({"strategy": "19"}, ValueError, "strategy '19'"),
        ({"strategy": "18", "when": "late"}, ValueError, "'when' 'late'"),
        ({"taps": [], "layers": []}, ValueError, "a layer for each tap"),
        ({"taps": [1, 2], "layers": [1]}, ValueError, "2 taps and 1 layers"),
        ({"taps": [25], "layers": [1]}, ValueError, "taps from -25 to 24"),
        ({"taps": [1], "layers": [32]}, ValueError, "layers from 0 to 31"),
        ({"taps": [1], "layers": [-1]}, ValueError, "layers from 0 to 31"),
        ({"taps": [1, 2], "layers": [3, 3]}, ValueError, "each layer of the language model once"),
        ({"taps": [True], "layers": [1]}, TypeError, "integers as taps"),
        ({"taps": 1, "layers": [1]}, TypeError, "integers as taps"),
        ({"taps": [1], "layers": ["1"]}, TypeError, "integers as layers"),
    ],
)
def test_an_injection_that_cannot_be_meant_is_refused(injection, error, said):
    with pytest.raises(error, match=said):
        config_of(injection)


def test_a_strategy_is_refused_for_models_that_the_repository_does_not_know():
    with pytest.raises(ValueError, match="clip tower of 12 layers; give taps and layers"):
        config_of({"strategy": "18"}, tower_layers=12)
    with pytest.raises(ValueError, match="'18' is not defined for a siglip tower"):
        config_of({"strategy": "18"}, "siglip", 26)
    with pytest.raises(ValueError, match="at least 24 layers, got 22"):
        config_of({"strategy": "all"}, text_layers=22)


# ---- what is computed ----


@pytest.mark.parametrize("when", TIMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_logits_and_gradients_are_those_of_the_plain_loop(when, impl):
    model = model_of(when, impl=impl).train()
    ours = assert_step_is(model, batch((1, 2, 1), labels=True), loop)
    assert any("injection_projectors.1.linear_2" in name for name in ours)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_samples_answer_in_a_batch_as_they_do_alone(tower, padding):
    assert_samples_answer_alone_as_in_a_batch(model_of(tower=tower), padding)


def test_every_injection_changes_the_answer():
    model, inputs = model_of(), batch((1,))
    whole = model(**inputs).logits
    for projector in model.model.injection_projectors:
        changed = copy.deepcopy(projector.state_dict())
        nn.init.zeros_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)
        assert (model(**inputs).logits - whole).abs().max() > 1e-3
        projector.load_state_dict(changed)


def test_injection_goes_with_weights_from_the_instruction():
    model, inputs = igva_model(injection={"taps": [2], "layers": [1]}, impl="auto"), batch((1, 1))
    out = model(**inputs)
    assert out.layer_weights.shape == (2, 2)
    assert (model(**{**inputs, "sentence_embeds": -inputs["sentence_embeds"]}).logits - out.logits).abs().max() > 1e-3


# ---- training ----


def test_a_late_projection_keeps_only_the_states():
    kept = {}
    for when in TIMES:
        model, inputs = model_of(when, impl="auto").train(), batch((4, 4), labels=True)
        kept[when] = measure_memory(lambda: model(**inputs).loss)[1].kept  # noqa: B023
    projected = 8 * PATCHES * 32 * 4  # Z of one projector: 8 images, H 32, fp32
    assert kept["encode"] - kept["inject"] >= 2 * projected


@pytest.mark.parametrize("when", TIMES)
def test_without_images_the_projectors_get_zero_gradients(when):
    model = model_of(when).train()
    assert_zero_gradients_without_images(model, model.model.injection_projectors)


@pytest.mark.parametrize("when", TIMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(when, reentrant):
    model, inputs = model_of(when).train(), batch((1, 2), labels=True)
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and TRANSFORMERS < (5, 23):  # which runs hooks inside its checkpoints
        with pytest.raises(NotImplementedError, match="use_reentrant=False"):
            model(**inputs)
        return
    model(**inputs).loss.backward()
    ours = gradients(model)
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        close(ours[name], grad)


@pytest.mark.slow
@pytest.mark.parametrize("when", TIMES)
def test_a_compiled_step_is_the_step(when):
    assert_a_compiled_step_is_the_step(model_of(when, impl="auto").train())


# ---- generation ----


@pytest.mark.parametrize("when", TIMES)
@pytest.mark.parametrize(
    "how",
    [{"use_cache": False}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": PATCHES + 1}],
    ids=["no cache", "chunks inside an image", "chunks of two images"],
)
def test_generation_does_not_depend_on_how_the_prompt_is_read(when, how):
    model, inputs = model_of(when), batch((1, 2, 0), "left")
    fields = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**inputs, **fields)
    assert torch.equal(model.generate(**inputs, **fields, **how), plain)


def test_the_first_token_is_that_of_the_forward_and_decode_steps_inject_nothing():
    model, inputs = model_of(), batch((1, 1), "left")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    new = out.sequences[:, -3:]
    mask = inputs["attention_mask"]
    for step in range(3):
        ids = torch.cat([inputs["input_ids"], new[:, :step]], dim=1)
        grown = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(mask, (0, step), value=1)}
        logits = model(**grown, pixel_values=inputs["pixel_values"]).logits[:, -1]
        assert torch.equal(logits.argmax(-1), new[:, step])


def test_beams_answer_as_each_sample_does_alone():
    model, fields = model_of("inject"), {"num_beams": 3, "max_new_tokens": 5, "eos_token_id": None}
    inputs = batch((1, 1), "left")
    together = model.generate(**inputs, **fields)[:, -5:]
    for sample in range(2):
        keep = inputs["attention_mask"][sample] == 1
        alone = {"input_ids": inputs["input_ids"][sample : sample + 1, keep]}
        alone["pixel_values"] = inputs["pixel_values"][sample : sample + 1]
        assert torch.equal(model.generate(**alone, **fields)[0, -5:], together[sample])


@pytest.mark.parametrize("assistant", ["lookup", "copy", "other injection-free"])
def test_assisted_generation_gives_the_greedy_tokens(assistant):
    model, inputs = model_of(), batch((1,), "left")
    fields = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**inputs, **fields)
    if assistant == "lookup":
        fields["prompt_lookup_num_tokens"] = 2
    else:
        fields["assistant_model"] = copy.deepcopy(model) if assistant == "copy" else model_of(injection=None)
    assert torch.equal(model.generate(**inputs, **fields), plain)


def test_a_prompt_given_as_embeddings_is_injected_too():
    model, inputs = model_of(), batch((1, 1), "left")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    fields = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**batch((1, 1), "left"), **fields)[:, -4:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **fields), expected)


def test_embeddings_that_hold_their_images_already_come_with_what_is_injected():
    model, inputs = model_of(), batch((1, 2))
    embeds, injected, _ = model.model.embed(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    mask = inputs["attention_mask"]
    close(model(inputs_embeds=embeds, attention_mask=mask, injected_images=injected).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="injected_images"):
        model_of(injection=None)(inputs_embeds=embeds, injected_images=injected)


# ---- images that are encoded once ----


@pytest.mark.parametrize("when", TIMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_many_questions_read_one_encoded_image(when, impl, tmp_path):
    assert_many_questions_read_one_encoded_image(model_of(when, impl=impl), model_of(injection=None), tmp_path)


def test_encoded_images_hold_a_state_that_connector_and_injection_share_once():
    features = model_of(taps=(1, -2)).encode_images(batch((1,))["pixel_values"])
    assert len(features.sources) == 2


@pytest.mark.parametrize("when", TIMES)
def test_image_outputs_stand_in_for_the_images(when):
    model, inputs = model_of(when), batch((1, 2))
    expected = model(**inputs).logits
    out = model.get_image_features(pixels := inputs.pop("pixel_values"))
    close(model(**inputs, mm_encoder_outputs={"image": out}).logits, expected)
    of_another = model_of(injection=None).get_image_features(pixels)
    with pytest.raises(ValueError, match="injected_features"):
        model(**inputs, mm_encoder_outputs={"image": of_another})


def test_threads_that_share_a_model_inject_their_own_images():
    model = model_of("inject")
    inputs = [batch((1,), seed=seed) for seed in range(4)]
    expected = [model(**one).logits for one in inputs]

    def ask(client):
        for turn in range(6):
            i = (client + turn) % 4
            close(model(**inputs[i]).logits, expected[i])

    in_threads(ask)


# ---- models ----


def test_a_checkpoint_keeps_injection_and_weights(tmp_path):
    model = model_of("inject")
    assert assert_a_checkpoint_gives_the_same_bits(model, tmp_path).config.injection == model.config.injection
    names = {name for name in model.state_dict() if "injection" in name}
    linears = (f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias"))
    expected = {f"model.injection_projectors.{j}.{name}" for name in linears for j in range(2)}
    assert names == expected


def test_an_upgraded_llava_answers_as_before_and_learns_what_to_inject():
    plan, injection = {"concat": {"layers": [-2]}}, {"taps": [1, 3], "layers": [0, 1]}
    model = assert_an_upgraded_llava_answers_as_before(mix_plan=plan, aggregation="uniform", injection=injection)
    assert all(projector.linear_2.weight.grad.any() for projector in model.model.injection_projectors)


def test_a_copy_of_a_model_injects_its_own_features():
    assert_a_copy_answers_by_itself(model_of())


def test_a_language_model_that_keeps_its_arguments_to_itself_is_refused():
    model, inputs = model_of(), batch((1,))
    core = model.model.language_model
    run = type(core).forward
    core.forward = lambda injected_tokens=None, **kwargs: run(core, **kwargs)
    with pytest.raises(NotImplementedError, match=r"without injecting at its layers \[0, 1\]"):
        model(**inputs)


def test_without_an_injection_nothing_is_hooked():
    model = model_of(injection=None)
    assert model.config.injection is None
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)
    assert igva_config().injection_plan is None
