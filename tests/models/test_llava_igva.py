"""The model: its forward, its loss, its gradients, and generate, in transformers' own conventions."""

import copy
import math

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from hosts import gradients
from threads import in_threads
from tiny import (
    EMBED,
    FUSED,
    IMAGE,
    PATCHES,
    batch,
    igva_config,
    igva_model,
    liven,
    prompts,
    text_config,
    vision_config,
)
from transformers import AttentionInterface, AutoModel, AutoModelForImageTextToText, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from igva_kernels import MixPlan, patched
from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaForConditionalGeneration, LlavaIgvaModel
from igva_kernels.nn import negative_entropy

TOWERS = ["clip", "siglip"]
TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


def without_padding(inputs, sample):
    """One sample of a batch, alone."""
    keep = inputs["attention_mask"][sample] == 1
    alone = {name: inputs[name][sample : sample + 1] for name in ("input_ids", "attention_mask", "sentence_embeds")}
    alone = {name: x[:, keep] if name != "sentence_embeds" else x for name, x in alone.items()}
    counts = ((inputs["input_ids"] == IMAGE).sum(1) // PATCHES).tolist()
    start = sum(counts[:sample])
    if counts[sample]:
        alone["pixel_values"] = inputs["pixel_values"][start : start + counts[sample]]
    return alone, keep


# ---- what is computed ----


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_threads_that_share_a_model_get_the_answers_to_their_own_images(impl):
    model = igva_model(impl=impl)
    prompts = [batch((1,), seed=seed) for seed in range(4)]
    features = [model.model.encode_images(prompt["pixel_values"]) for prompt in prompts]
    outputs = [model(**prompt) for prompt in prompts]
    assert torch.cat([output.layer_weights for output in outputs]).std(0).max() > 1e-3

    def ask(client):
        for i in [(client + turn) % 4 for turn in range(6)]:
            close(model.model.encode_images(prompts[i]["pixel_values"]).sources, features[i].sources)
            output = model(**prompts[i])
            close(output.logits, outputs[i].logits)
            close(output.layer_weights, outputs[i].layer_weights)

    in_threads(ask)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_the_model_on_the_meta_device_knows_its_shapes(impl):
    model = igva_model(impl=impl).to("meta")
    inputs = {name: x.to("meta") for name, x in batch((1, 1)).items() if name != "attention_mask"}
    output = model(**inputs)
    assert (output.logits.shape, output.logits.device.type) == ((*inputs["input_ids"].shape, 64), "meta")
    assert output.layer_weights.shape == (2, 2)
    assert model.model.encode_images(inputs["pixel_values"]).sources[0].device.type == "meta"


@pytest.mark.parametrize("inference", [False, True])
def test_the_connector_trains_on_encoded_images_as_on_pixels(inference):
    model, inputs = igva_model(impl="auto").train(), batch((1, 1), labels=True)
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.inference_mode(inference):
        features = model.model.encode_images(inputs.pop("pixel_values"))
    model(**inputs, image_features=features).loss.backward()
    close(gradients(model), expected)


@pytest.mark.parametrize("tower", TOWERS)
def test_the_visual_tokens_are_the_published_formula(tower):
    model = igva_model(tower)
    core, inputs = model.model, batch((1, 1))
    hidden = core.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    groups = torch.stack([torch.stack(hidden[1:3]).mean(0), torch.stack(hidden[3:5]).mean(0)], dim=1)
    cls = groups[:, :, 0] if tower == "clip" else groups.mean(2)
    weights = core.weight_allocator(inputs["sentence_embeds"], cls)
    fused = (weights[:, :, None, None] * groups).sum(1)
    rows = torch.cat([hidden[-2], fused], dim=-1)[:, 1 if tower == "clip" else 0 :]
    projector = core.multi_modal_projector
    tokens = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(rows)))
    out = model.get_image_features(inputs["pixel_values"], inputs["sentence_embeds"])
    close(torch.stack(out.pooler_output), tokens)
    close(out.layer_weights, weights)
    full = model(**inputs)
    close(full.image_hidden_states, tokens)
    close(full.layer_weights, weights)


@pytest.mark.parametrize("impl", FUSED)
def test_the_published_steps_are_those_of_the_allocator_too(impl):
    model, inputs = igva_model(impl=impl), batch((1,))
    model.model.weight_allocator.impl = impl  # a backend without kernels for the allocator
    with pytest.raises(NotImplementedError, match="the operator allocator"):
        model(**inputs)
    with patched(model, impl="reference"):
        model(**inputs)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_samples_with_no_one_and_several_images_answer_as_they_do_alone(tower, padding):
    model, inputs = igva_model(tower), batch((2, 0, 1, 3), padding)
    together = model(**inputs)
    for sample in range(4):
        alone, keep = without_padding(inputs, sample)
        close(together.logits[sample, keep], model(**alone).logits[0])
    assert together.layer_weights.shape == (6, 2)


def test_the_instruction_changes_the_answer_and_stage_one_does_not_know_it():
    inputs = batch((1, 1, 1, 1))
    other = inputs | {"sentence_embeds": -inputs["sentence_embeds"]}
    model = igva_model()
    assert (model(**inputs).logits - model(**other).logits).abs().max() > 1e-3  # roundings are a thousandth of that
    model = igva_model(aggregation="uniform")
    assert model.model.weight_allocator is None
    torch.testing.assert_close(model(**inputs).logits, model(**other).logits, rtol=0, atol=0)
    out = model(**{k: v for k, v in inputs.items() if k != "sentence_embeds"})
    assert out.layer_weights is None


def test_stage_one_is_stage_two_with_equal_weights():
    inputs, two, one = batch((1,)), igva_model(), igva_model(aggregation="uniform")
    one.load_state_dict(two.state_dict(), strict=False)
    for parameter in two.model.weight_allocator.head.parameters():
        torch.nn.init.zeros_(parameter)
    close(one(**inputs).logits, two(**inputs).logits)
    assert igva_config(aggregation="uniform").plan == MixPlan.igva_uniform(4, 2)


@pytest.mark.skipif(not FUSED, reason="no kernel serves CPU tensors here")
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("frozen", [True, False])
def test_fused_and_plain_connector_agree_in_loss_gradients_and_greedy_tokens(tower, frozen):
    results = []
    for impl in ("reference", FUSED[0]):
        model = igva_model(tower, freeze_vision_tower=frozen, impl=impl).train()
        out = model(**batch((2, 0, 1), labels=True))
        out.loss.backward()
        tokens = model.eval().generate(**batch((2, 0, 1), "left"), max_new_tokens=8, do_sample=False)
        results.append((out, gradients(model), tokens))
    (plain, plain_grads, plain_tokens), (fused, fused_grads, fused_tokens) = results
    for name in ("loss", "logits", "layer_weights", "image_hidden_states"):
        close(getattr(fused, name), getattr(plain, name))
    assert plain_grads.keys() == fused_grads.keys()
    for name, grad in plain_grads.items():
        close(fused_grads[name], grad)
    assert torch.equal(plain_tokens, fused_tokens)


# ---- image features ----


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_image_features_come_with_what_the_tower_returned_as_those_of_llava_do(impl):
    model, inputs = igva_model(impl=impl, attn_implementation="eager"), batch((1, 1))
    given = {name: inputs[name] for name in ("pixel_values", "sentence_embeds")}
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    out = model.get_image_features(**given)
    assert (out.hidden_states, out.attentions) == (None, None)  # a state that nobody asked for is not kept
    close(out.last_hidden_state, tower.last_hidden_state)
    asked = model.get_image_features(**given, output_hidden_states=True, output_attentions=True)
    close(asked.pooler_output, out.pooler_output)
    close(asked.hidden_states, tower.hidden_states)
    close(asked.attentions, tower.attentions)
    attentive = model.get_image_features(**given, output_attentions=True)
    assert attentive.hidden_states is None
    close(attentive.attentions, tower.attentions)
    assert isinstance(model.get_image_features(**given, return_dict=False), tuple)
    encoded = model.get_image_features(
        image_features=model.encode_images(given["pixel_values"]), sentence_embeds=given["sentence_embeds"]
    )
    close(encoded.pooler_output, out.pooler_output)
    assert encoded.last_hidden_state is None


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("vision_feature_layer", -2, -3),
        ("vision_feature_select_strategy", "default", "full"),
        ("image_sizes", None, torch.tensor([[28, 28]])),
    ],
)
def test_arguments_of_llava_that_the_config_settles_are_taken_if_they_agree_with_it(name, same, other):
    model, inputs = igva_model(), batch((1,))
    given = {name: inputs[name] for name in ("pixel_values", "sentence_embeds")}
    model(**inputs, **{name: same})
    model.get_image_features(**given, **{name: same})
    for call in (lambda: model(**inputs, **{name: other}), lambda: model.get_image_features(**given, **{name: other})):
        with pytest.raises(ValueError, match=f"{name}: .*need None"):
            call()


def test_arguments_for_a_tower_that_does_not_run_are_refused():
    model, inputs = igva_model(), batch((1,))
    features = model.encode_images(inputs["pixel_values"])
    with pytest.raises(ValueError, match="output_attentions: for the vision tower"):
        model.get_image_features(
            image_features=features, sentence_embeds=inputs["sentence_embeds"], output_attentions=True
        )


# ---- training ----


def test_the_loss_is_language_loss_minus_lambda_times_entropy_of_once_softmaxed_weights():
    inputs = batch((1, 1), labels=True)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, 3:] = -100  # as many supervised tokens in each sample: the plain mean over the batch
    model = igva_model(balance_coefficient=0.5)
    out = model(**inputs)
    language = igva_model(balance_coefficient=0.0)(**inputs).loss
    close(out.loss, language + 0.5 * negative_entropy(out.layer_weights).mean())
    assert -math.log(2) < negative_entropy(out.layer_weights).mean() < 0


def test_each_supervised_token_is_charged_with_the_entropy_of_its_sample():
    inputs = batch((2, 0, 1), labels=True)
    out = igva_model(balance_coefficient=1.0)(**inputs)
    tokens = (inputs["labels"][:, 1:] != -100).sum(1)
    entropy = negative_entropy(out.layer_weights)
    mean = (tokens[0] * (entropy[0] + entropy[1]) / 2 + tokens[2] * entropy[2]) / tokens.sum()
    close(out.loss, igva_model(balance_coefficient=0.0)(**inputs).loss + mean)


def test_loss_and_gradient_do_not_depend_on_how_accumulation_splits_a_batch():
    whole = batch((2, 0, 1, 1), labels=True)
    supervised = (whole["labels"][:, 1:] != -100).sum()
    model = igva_model(balance_coefficient=0.7).train()
    loss = model(**whole).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    parts = 0.0
    for sample in range(4):
        alone, keep = without_padding(whole, sample)
        part = model(**alone, labels=whole["labels"][sample : sample + 1, keep], num_items_in_batch=supervised).loss
        part.backward()
        parts += part.detach()
    close(parts, loss.detach())
    for name, grad in gradients(model).items():
        close(grad, expected[name])


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_changes_no_gradient(frozen):
    found = []
    for checkpointing in (False, True):
        model = igva_model(freeze_vision_tower=frozen).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch((2, 1), labels=True)).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        close(found[1][name], grad)


def test_a_frozen_tower_takes_no_gradient_stays_in_eval_mode_and_can_be_thawed():
    model = igva_model().train()
    tower = model.model.vision_tower
    assert not tower.training
    assert not any(p.requires_grad for p in tower.parameters())
    model(**batch(labels=True)).loss.backward()
    assert all(p.grad is None for p in tower.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if "vision_tower" not in n)
    tower.requires_grad_()
    model.train()(**batch(labels=True)).loss.backward()
    assert tower.training
    assert tower.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("aggregation", ["instruction", "uniform"])
@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_a_batch_without_images_gives_every_connector_parameter_a_zero_gradient(aggregation, impl):
    model = igva_model(aggregation=aggregation, impl=impl).train()
    out = model(**batch((0, 0), labels=True))
    out.loss.backward()
    assert out.layer_weights is None if aggregation == "uniform" else out.layer_weights.shape[0] == 0
    for name, parameter in model.named_parameters():
        if "allocator" in name or "projector" in name:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    text = model.eval()(**batch((0, 0), labels=True))
    assert torch.equal(text.logits, out.logits)


def test_the_tower_runs_without_images_where_ranks_of_a_sharded_model_must_agree():
    model, runs = igva_model(), []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    for training, labels, expected in ((False, False, 0), (False, True, 1), (True, False, 1), (True, True, 1)):
        runs.clear()
        model.train(training)(**batch((0, 0), labels=labels))
        assert len(runs) == expected


def test_a_batch_without_images_needs_no_sentence_embeddings():
    inputs = prompts((0, 0))
    for model in (igva_model(), igva_model().train()):
        assert model(**inputs).logits.isfinite().all()


def test_autocast_trains_fp32_weights_in_bf16():
    for impl in ("reference", *FUSED):
        model = igva_model(impl=impl).train()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**batch(labels=True))
        out.loss.backward()
        assert out.layer_weights.dtype == torch.float32
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_model_runs_in_other_dtypes(dtype):
    model = igva_model().to(dtype)
    out = model(**batch(labels=True))
    assert out.logits.dtype == dtype
    assert out.layer_weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.plain_memory
@pytest.mark.parametrize("impl", FUSED)
def test_the_whole_model_is_one_graph_for_the_compiler(impl):
    model, inputs = igva_model(impl=impl, stream_hidden_states=False).train(), batch((2, 1), labels=True)
    loss = model(**inputs).loss  # the first run of a tower installs transformers' hooks, which cannot be traced
    close(torch.compile(model, backend="eager", fullgraph=True)(**inputs).loss, loss)


# ---- generate ----


def greedy_by_hand(model, inputs, steps):
    """No cache, no generate: append the best token that is no image's and run everything again."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **rest).logits[:, -1]
        best = logits.index_fill(-1, torch.tensor([IMAGE]), -torch.inf).argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("images", [(1, 1), (2, 0, 1, 3), (0, 0)])
def test_greedy_generation_with_the_cache_says_what_the_model_says_without(tower, images):
    model, inputs = without_eos(igva_model(tower)), batch(images, "left")
    with torch.no_grad():
        expected = greedy_by_hand(model, inputs, 6)
    assert torch.equal(tokens_of(model, inputs), expected)


def tokens_of(model, inputs, new_tokens=6, **options):
    return model.generate(
        **inputs, max_new_tokens=new_tokens, suppress_tokens=[IMAGE], **{"do_sample": False} | options
    )


def other_model(inputs):
    return {"assistant_model": igva_model(seed=1)}


def text_model(inputs):
    return {"assistant_model": liven(LlamaForCausalLM(text_config()).eval())}


HOW = {
    "in chunks that cut images": lambda inputs: {"prefill_chunk_size": 3},
    "without a cache": lambda inputs: {"use_cache": False},
    "with a cache of fixed size": lambda inputs: {"cache_implementation": "static", "disable_compile": True},
    "assisted by itself": None,
    "assisted by another model": other_model,
    "assisted by a model of text": text_model,
    "assisted by the prompt": lambda inputs: {"prompt_lookup_num_tokens": 3},
}


def without_eos(model):
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("how", HOW)
def test_however_tokens_are_generated_they_are_the_greedy_ones(how):
    images = (2,) if "assisted" in how else (2, 0, 1)  # transformers assists one sample at a time
    if how == "assisted by a model of text" and TRANSFORMERS < (5, 20):
        pytest.skip("transformers hands the arguments of the images on to a model without images")
    model, inputs = without_eos(igva_model()), batch(images, "left")
    options = {"assistant_model": model} if HOW[how] is None else HOW[how](inputs)
    with torch.no_grad():
        expected = greedy_by_hand(model, inputs, 6)
    assert torch.equal(tokens_of(model, inputs, **options), expected)


def test_an_assistant_that_is_the_model_itself_sees_the_images():
    model, inputs = without_eos(igva_model()), batch((2,), "left")
    model.generation_config.update(num_assistant_tokens=5, assistant_confidence_threshold=0.0)
    steps = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: steps.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    prompt = inputs["input_ids"].shape[1]
    tokens_of(model, inputs, 6, assistant_model=model)
    assert [length for length in steps if length > 1] == [prompt, prompt + 5]  # its five drafts are right at once


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 3, "use_cache": False}, {"num_beams": 2, "prefill_chunk_size": 4}],
    ids=str,
)
def test_beams_of_samples_with_several_images_are_those_of_each_sample_alone(options):
    model, inputs = without_eos(igva_model()), batch((2, 0, 1), "left")
    together = tokens_of(model, inputs, 5, **options)
    for sample in range(3):
        alone, _ = without_padding(inputs, sample)
        assert torch.equal(
            tokens_of(model, alone, 5, num_beams=3 if options["num_beams"] == 3 else 2)[0, -5:], together[sample, -5:]
        )


def test_a_penalty_on_the_tokens_of_the_prompt_sees_them():
    model, inputs = without_eos(igva_model()), batch((1,), "left")
    with torch.no_grad():
        scores = model(**inputs).logits[:, -1]
    out = model.generate(
        **inputs, max_new_tokens=1, encoder_repetition_penalty=3.0, output_scores=True, return_dict_in_generate=True
    )
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, inputs["input_ids"], True)
    louder = torch.where(scores < 0, scores / 3, scores * 3)  # transformers divides by the penalty's inverse
    close(out.scores[0], torch.where(seen, louder, scores))


def test_a_prompt_with_images_is_not_written_anew():
    model = igva_model()
    with pytest.raises(NotImplementedError, match=r"token_healing: .* image tokens"):
        model.generate(**batch((1,), "left"), max_new_tokens=1, token_healing=True)


def test_an_answer_goes_on_from_the_cache_of_the_one_before():
    model, inputs = without_eos(igva_model()), batch((1,), "left")
    first = tokens_of(model, inputs, 3, return_dict_in_generate=True)
    rest = {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}
    more = torch.cat([first.sequences, torch.full((1, PATCHES), IMAGE), torch.tensor([[7, 8]])], dim=1)
    rest["pixel_values"] = torch.cat([rest["pixel_values"], torch.randn(1, 3, 28, 28)])
    expected = tokens_of(model, rest | {"input_ids": more}, 4)
    chunks = {"prefill_chunk_size": 3} if TRANSFORMERS >= (5, 23) else {}  # older ones read the cached tokens again
    for options in ({}, chunks):
        cache = copy.deepcopy(first.past_key_values)
        assert torch.equal(tokens_of(model, rest | {"input_ids": more}, 4, past_key_values=cache, **options), expected)


def test_a_loop_of_ones_own_hands_the_images_on_in_its_first_step_alone():
    model, inputs = igva_model(), batch((2, 1), "left")
    encoded = {name: x for name, x in inputs.items() if name != "pixel_values"}
    encoded["image_features"] = model.encode_images(inputs["pixel_values"])
    ids = encoded.pop("input_ids")
    first = model.prepare_inputs_for_generation(ids, is_first_iteration=True, use_cache=True, **encoded)
    assert {"image_features", "sentence_embeds"} <= first.keys()
    then = model.prepare_inputs_for_generation(ids, next_sequence_length=1, use_cache=True, **encoded)
    assert not {"image_features", "sentence_embeds"} & then.keys()


def test_generation_returns_several_sequences_and_the_prompt():
    model, inputs = igva_model(), batch((1, 2), "left")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert torch.equal(out[:, :-3][::2], inputs["input_ids"])
    assert out.shape[0] == 4


def test_features_of_the_inner_model_can_be_injected_as_transformers_does():
    model, inputs = igva_model(), batch((2, 1))
    expected = model(**inputs)
    pixels, sentences = inputs.pop("pixel_values"), inputs.pop("sentence_embeds")
    encoded = model.model.get_image_features(pixel_values=pixels, sentence_embeds=sentences[[0, 0, 1]])
    out = model(**inputs, mm_encoder_outputs={"image": encoded})
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(out.layer_weights, expected.layer_weights, rtol=0, atol=0)


@pytest.mark.skipif(TRANSFORMERS < (5, 20), reason="transformers encodes images in forward")
def test_transformers_own_route_of_encoding_images_before_generation_works():
    from transformers import GenerationMixin

    model, inputs = igva_model(), batch((1, 1), "left")
    options = {"max_new_tokens": 5, "do_sample": False}
    for beams in (1, 2):
        ours = model.generate(**inputs, **options, num_beams=beams)
        assert torch.equal(GenerationMixin.generate(model, **inputs, **options, num_beams=beams), ours)


# ---- attention, Auto classes, errors ----


def test_every_attention_implementation_can_be_chosen_and_switched():
    AttentionInterface.register("look_alike", sdpa_attention_forward)
    model, inputs = igva_model(), batch((1,))  # nothing padded: the look-alike gets no mask
    logits = model(**inputs).logits
    for implementation in ("eager", "sdpa", "look_alike"):
        model.set_attn_implementation(implementation)
        parts = (model.config, model.model.vision_tower.config, model.model.language_model.config)
        assert {config._attn_implementation for config in parts} == {implementation}
        close(model(**inputs).logits, logits)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert (model._supports_sdpa, model._supports_flash_attn, model._supports_attention_backend) == (True, True, True)


def test_the_auto_classes_know_the_model():
    config = igva_config()
    assert isinstance(AutoModel.from_config(config), LlavaIgvaModel)
    assert isinstance(AutoModelForImageTextToText.from_config(config), LlavaIgvaForConditionalGeneration)


BAD_CONFIGS = {
    "groups do not divide": ({"mix_groups": 3}, "groups"),
    "strategy of a tower without CLS": (
        {"vision_config": vision_config("siglip"), "vision_feature_select_strategy": "default"},
        "vision_feature_select_strategy",
    ),
    "layer list without a plan": ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer"),
    "layer that is not there": ({"mix_plan": MixPlan.concat([9])}, "layer 9"),
    "activation": ({"projector_hidden_act": "tanh"}, "projector_hidden_act"),
    "plan of another tower": ({"mix_plan": MixPlan.igva(24, 4)}, "hidden states"),
}


@pytest.mark.parametrize(("fields", "name"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_cannot_be_is_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=name):
        igva_config(**fields)


def test_an_unknown_tower_must_say_whether_it_has_a_cls_token():
    with pytest.raises(ValueError, match="vision_has_cls"):
        LlavaIgvaConfig(vision_config={"model_type": "vit", "num_hidden_layers": 4}, mix_groups=2)
    config = LlavaIgvaConfig(
        vision_config={"model_type": "vit", "num_hidden_layers": 4}, mix_groups=2, vision_has_cls=True
    )
    assert config.skip_tokens == 1


def change(**changes):
    inputs = batch((1, 1))
    return {k: v for k, v in (inputs | changes).items() if v is not None}


BAD_INPUTS = {
    "no sentences": (change(sentence_embeds=None), "sentence_embeds"),
    "sentences of another batch": (change(sentence_embeds=torch.zeros(3, EMBED)), "sentence_embeds"),
    "sentences of another width": (change(sentence_embeds=torch.zeros(2, EMBED + 1)), "sentence_embeds"),
    "an image too many": (change(pixel_values=torch.zeros(3, 3, 28, 28)), "3 images"),
    "an image too few": (change(pixel_values=torch.zeros(1, 3, 28, 28)), "1 images"),
    "pixels in five dimensions": (change(pixel_values=torch.zeros(2, 1, 3, 28, 28)), "pixel_values"),
    "ids and embeddings": (change(inputs_embeds=torch.zeros(2, 11, 32)), "input_ids, inputs_embeds: got both, need"),
    "neither": (change(input_ids=None), "input_ids, inputs_embeds: got neither, need"),
}


@pytest.mark.parametrize(("inputs", "name"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused_by_name(inputs, name):
    with pytest.raises(ValueError, match=name):
        igva_model()(**inputs)


def test_image_tokens_given_as_embeddings_are_found():
    model, inputs = igva_model(), batch((1, 2))
    expected = model(**inputs).logits
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    close(model(**inputs).logits, expected)


def test_every_patch_token_counts_where_the_strategy_is_full():
    model = igva_model(vision_feature_select_strategy="full")
    features = model.get_image_features(torch.randn(1, 3, 28, 28), torch.randn(1, EMBED))
    assert features.pooler_output[0].shape[0] == PATCHES + 1


def test_a_training_forward_whose_loss_will_lack_the_balance_loss_says_so(recwarn):
    model = igva_model().train()
    model(**batch(labels=True))
    model(**batch((0,)))  # no images, so no weights to balance
    model.eval()(**batch())
    core = model.train().model
    core.trainer_adds_balance = True
    model(**batch())
    core.trainer_adds_balance = False
    assert not [warning for warning in recwarn if "balance" in str(warning.message)]
    with pytest.warns(UserWarning, match="BalanceLossMixin adds it"):
        model(**batch())
