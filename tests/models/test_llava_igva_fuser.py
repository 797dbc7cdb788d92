"""Deformable fusion (MMFuser, E_M): the config line, the visual tokens, training, streaming, and checkpoints."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from hosts import close, gradients
from huggingface_hub import save_torch_state_dict
from published_fuser import PARAMETERS, published_fuser, random_weights
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
from tiny import FUSED, IMAGE, PATCHES, batch, igva_model, text_config, vision_config
from torch import nn

import igva_kernels as ik
from igva_kernels import MixPlan
from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaForConditionalGeneration
from igva_kernels.models.llava_igva.convert import from_repo, to_repo
from igva_kernels.runtime.files import read_tensors
from igva_kernels.testing import measure_memory

LEVELS, HEADS, POINTS = (1, 2), 4, 2


def model_of(tower="clip", **overrides):
    fuser = {"levels": list(LEVELS), "heads": HEADS, "points": POINTS}
    model = igva_model(tower, **{"fuser": fuser, **overrides})
    random_weights(model.model.fuser)
    return model


def published(model, inputs):
    """The logits as the repository computes them: all states, the block in plain torch, and the projector's modules."""
    core, ids = model.model, inputs["input_ids"]
    states = core.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    taps = [states[layer] for layer in (*LEVELS, -2)]
    fused = published_fuser(dict(core.fuser.named_parameters()), taps, HEADS, POINTS, skip=model.config.skip_tokens)
    projector = core.multi_modal_projector
    tokens = projector.linear_2(nn.functional.gelu(projector.linear_1(fused)))
    embeds = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], tokens)
    return model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits


# ---- the config ----


def config_of(fuser, tower="clip", tower_layers=24, width=32, **fields):
    vision = vision_config(tower, num_hidden_layers=tower_layers, hidden_size=width)
    return LlavaIgvaConfig(vision_config=vision, text_config=text_config(), fuser=fuser, **fields)


@pytest.mark.parametrize(
    ("fuser", "levels"),
    [
        ({"mmfuser": {}}, [3, 8, 13, 18]),
        ({"mmfuser": {"levels": [5, -3]}}, [5, 22]),
        ({"layer_select": {"strategy": "18"}}, [18]),
        ({"layer_select": {"strategy": "3-18-23"}}, [3, 18]),
        ({"layer_select": {"strategy": "former"}}, [*range(1, 13)]),
        ({"layer_select": {"strategy": "latter"}}, [*range(13, 25)]),
        ({"layer_select": {"strategy": "all"}}, [*range(1, 25)]),
        ({"levels": [7]}, [7]),
    ],
)
def test_a_line_is_the_levels_of_its_system(fuser, levels):
    config = config_of(fuser)
    assert config.fuser == {"levels": levels, "heads": 16, "points": 4}
    assert config.plan == MixPlan.concat([-2], 25) and not config.reads_instructions
    again = LlavaIgvaConfig.from_dict(json.loads(config.to_json_string()))
    assert again.fuser_plan == config.fuser_plan


def test_siglip_has_levels_of_its_own_and_the_base_may_be_another():
    assert config_of({"layer_select": {"strategy": "3-18-23"}}, "siglip", 26).fuser["levels"] == [3, 20]
    config = config_of({"levels": [1], "heads": 2, "points": 1}, mix_plan=MixPlan.concat([-1]))
    assert (config.fuser_plan.heads, config.fuser_plan.points, config.plan.layers) == (2, 1, (24,))


@pytest.mark.parametrize(
    ("fuser", "fields", "error", "said"),
    [
        ("mmfuser", {}, TypeError, "need a dict"),
        ({}, {}, ValueError, "need 'levels'"),
        ({"dense_connector": {}}, {}, ValueError, "need {'mmfuser'"),
        ({"mmfuser": {"layers": [1]}}, {}, ValueError, "need {'mmfuser'"),
        ({"mmfuser": {}}, {"tower_layers": 12}, ValueError, "levels from -13 to 12, .* give levels"),
        ({"layer_select": {}}, {}, ValueError, "need 'strategy'"),
        ({"layer_select": {"strategy": "3-18"}}, {}, ValueError, "'3-18', which .* need '3-18-23'"),
        ({"layer_select": {"strategy": "19"}}, {}, ValueError, "strategy '19', need one of 18"),
        (
            {"layer_select": {"strategy": "18"}},
            {"tower_layers": 12},
            ValueError,
            "clip tower of 12 layers; give levels",
        ),
        ({"levels": []}, {}, ValueError, "one or more levels"),
        ({"levels": [25]}, {}, ValueError, "levels from -25 to 24"),
        ({"levels": [1.5]}, {}, TypeError, "fuser: need a list of integers as levels"),
        ({"levels": [1], "heads": 0}, {}, ValueError, "1 or more heads"),
        ({"levels": [1], "points": "4"}, {}, TypeError, "an integer as points"),
        ({"levels": [1], "heads": 5}, {}, ValueError, "5 heads, need a divisor of the tower's width 32"),
        ({"levels": [1]}, {"mix_plan": MixPlan.concat([1, 2])}, ValueError, "mix_plan: .* a single state"),
        ({"levels": [1]}, {"vision_feature_layer": [-2, -5]}, ValueError, "vision_feature_layer: a fuser has one base"),
        ({"levels": [1]}, {"vision_feature_select_strategy": "full"}, ValueError, "no place in the grid"),
    ],
)
def test_a_fuser_that_cannot_be_meant_is_refused(fuser, fields, error, said):
    with pytest.raises(error, match=said):
        config_of(fuser, **fields)


# ---- what is computed ----


@pytest.mark.parametrize(("impl", "tower"), [("reference", "clip"), *((impl, "siglip") for impl in FUSED)])
def test_logits_and_gradients_are_those_of_the_published_block(impl, tower):
    model = model_of(tower, impl=impl).train()
    ours = assert_step_is(model, batch((1, 2), labels=True), published)
    assert {f"model.fuser.{name}" for name in PARAMETERS} <= ours.keys()


def test_a_new_fuser_starts_as_its_class_does_and_reads_the_base_alone():
    model, inputs = igva_model(fuser={"levels": [1], "heads": 4}), batch((1,))
    fuser = model.model.fuser
    assert not fuser.gamma1.any() and not fuser.cross_attn.attention_weights.bias.any()
    assert fuser.cross_attn.sampling_offsets.bias.view(4, 1, 4, 2)[0, 0, :, 0].tolist() == [1, 2, 3, 4]
    plain = igva_model(mix_plan=MixPlan.concat([-2]), aggregation="uniform")
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if "fuser" not in name})
    close(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_samples_answer_in_a_batch_as_they_do_alone(padding):
    assert_samples_answer_alone_as_in_a_batch(model_of(impl="auto"), padding)


def test_generation_gives_the_tokens_of_repeated_forwards():
    model, inputs = model_of(impl="auto"), batch((1, 1), "left")
    fields = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
    new = model.generate(**inputs, **fields)[:, -3:]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(3):
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -1]
        logits[:, IMAGE] = -torch.inf
        assert torch.equal(logits.argmax(-1), new[:, step])
        ids, mask = torch.cat([ids, new[:, step : step + 1]], 1), nn.functional.pad(mask, (0, 1), value=1)


def test_an_injection_goes_with_a_fuser():
    injection = {"taps": [2, 3], "layers": [0, 1]}
    model, inputs = model_of(injection=injection), batch((1, 1))
    expected = model(**inputs).logits
    features = model.encode_images(inputs.pop("pixel_values"))
    assert len(features.sources) == 3  # the base is a tap of the injection, and so is a level
    close(model(**inputs, image_features=features).logits, expected)


# ---- training ----


def test_without_images_the_fuser_gets_zero_gradients():
    model = model_of().train()
    assert_zero_gradients_without_images(model, model.model.fuser)


@pytest.mark.slow
def test_a_compiled_step_is_the_step():
    assert_a_compiled_step_is_the_step(model_of(impl="auto").train())


def test_a_tower_that_learns_gets_the_gradients_of_its_states():
    model, inputs = model_of(freeze_vision_tower=False, impl="auto").train(), batch((1,), labels=True)
    model(**inputs).loss.backward()
    ours = gradients(model)
    model.zero_grad()
    model.loss_function(logits=published(model, inputs), labels=inputs["labels"], vocab_size=64).backward()
    for name, grad in gradients(model).items():
        close(ours[name], grad)
    assert any("vision_tower.encoder.layers.0" in name or "vision_tower.layers.0" in name for name in ours)


# ---- images that are encoded once ----


def test_the_tower_is_streamed_and_leaves_the_states_that_are_read():
    many = vision_config(num_hidden_layers=12)
    model, pixels = model_of(vision_config=many, impl="auto"), batch((4,))["pixel_values"]
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features, memory = measure_memory(lambda: model.encode_images(pixels))
    assert len(features.sources) == 3
    for source, layer in zip(features.sources, (*LEVELS, -2), strict=True):
        close(source, states[layer])
    assert memory.kept <= 4 * states[0].nbytes


def test_many_questions_read_one_encoded_image(tmp_path):
    other = model_of(fuser={"levels": [1, 0], "heads": 4})
    assert_many_questions_read_one_encoded_image(model_of(impl="auto"), other, tmp_path)


# ---- models and checkpoints ----


def test_a_checkpoint_keeps_the_fuser_and_weights_that_it_lacks_start_anew(tmp_path):
    model = model_of()
    assert assert_a_checkpoint_gives_the_same_bits(model, tmp_path).config.fuser == model.config.fuser
    weights = {name: x for name, x in model.state_dict().items() if not name.endswith("gamma1")}
    partial = LlavaIgvaForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=weights)
    assert not partial.model.fuser.gamma1.any()
    assert all(torch.equal(partial.state_dict()[name], x) for name, x in weights.items())


def test_an_upgraded_llava_answers_as_before_and_learns_to_fuse():
    model = assert_an_upgraded_llava_answers_as_before(fuser={"levels": [1, 2], "heads": 4})
    assert model.model.fuser.cross_attn.sampling_offsets.bias.any()
    assert model.model.fuser.gamma1.grad.any()


def repository_model(fuser):
    """A model that the repositories have too: 16 heads, 4 points, a CLIP tower of 24 layers."""
    model = igva_model(vision_config=vision_config(num_hidden_layers=24), fuser=fuser)
    random_weights(model.model.fuser)
    return model


def same(loaded, model):
    """Whether a loaded model has the weights and the logits of another."""
    loaded.model.fuser.impl = loaded.model.multi_modal_projector.impl = "reference"
    state, inputs = loaded.state_dict(), batch((1, 1))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    return torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("fuser", "module", "stated"),
    [
        ({"mmfuser": {}}, "mm_projector", {"mm_vision_select_layer": [-22, -17, -12, -7, -2]}),
        (
            {"layer_select": {"strategy": "3-18-23"}},
            "mm_projector_f",
            {"layer_fusing_strategy": "E_M", "layer_using_strategy": "3-18-23", "mm_vision_select_layer": -2},
        ),
    ],
    ids=["MMFuser", "E_M"],
)
def test_a_model_becomes_a_checkpoint_of_its_repository_and_comes_back(tmp_path, fuser, module, stated):
    model = repository_model(fuser)
    to_repo(model, tmp_path)
    names = set(read_tensors(tmp_path / "model.safetensors"))
    linears = {f"{i}.{kind}" for i in (1, 3) for kind in ("weight", "bias")}
    expected = {f"model.{module}.{name}" for name in (*(f"0.{name}" for name in PARAMETERS), *linears)}
    assert {name for name in names if "mm_" in name} == expected
    assert stated.items() <= json.loads((tmp_path / "config.json").read_text()).items()
    loaded = from_repo(tmp_path, image_token=IMAGE)
    assert loaded.config.fuser == model.config.fuser
    assert same(loaded, model)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A checkpoint of MMFuser, its weights and its config."""
    folder = tmp_path_factory.mktemp("mmfuser")
    model = repository_model({"mmfuser": {}})
    to_repo(model, folder)
    return folder, model


def changed(theirs, tmp_path, rename=lambda name: name, **fields):
    """A copy of the checkpoint with weights of other names, or other fields in its config."""
    shutil.copytree(theirs[0], tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    weights = read_tensors(tmp_path / "copy" / "model.safetensors")
    named = {rename(name): x.clone() for name, x in weights.items() if rename(name)}
    save_torch_state_dict(named, tmp_path / "copy", metadata={"format": "pt"})
    return tmp_path / "copy"


def test_gammas_are_found_by_the_names_that_old_transformers_gave_them(theirs, tmp_path):
    renamed = changed(theirs, tmp_path, lambda name: name.replace("gamma", "weight"))
    assert same(from_repo(renamed, image_token=IMAGE), theirs[1])


def test_the_layers_may_be_written_as_the_scripts_write_them(theirs, tmp_path):
    other = changed(theirs, tmp_path, mm_vision_select_layer="list-21/-17/-12/-7/-2")
    assert from_repo(other, image_token=IMAGE).config.fuser["levels"] == [4, 8, 13, 18]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mm_vision_select_layer": -2}, "mm_vision_select_layer is -2, need a list of the 4 levels .* and the query"),
        ({"mm_vision_select_layer": [-7, -2]}, r"mm_vision_select_layer is \[-7, -2\], need a list of the 4 levels"),
        ({"mm_vision_select_layer": "list3/x"}, "mm_vision_select_layer is 'list3/x'"),
        ({"mm_vision_select_feature": "cls_patch"}, "no place in the grid"),
        ({"layer_fusing_strategy": "E_M", "layer_using_strategy": "18"}, "no language model and projector"),
    ],
)
def test_a_checkpoint_whose_config_does_not_say_which_layers_are_read_is_refused(theirs, tmp_path, fields, said):
    with pytest.raises(ValueError, match=said):
        from_repo(changed(theirs, tmp_path, **fields))


def test_missing_gammas_are_told(theirs, tmp_path):
    with pytest.raises(ValueError, match=r"missing: model\.mm_projector\.0\.gamma1, model\.mm_projector\.0\.gamma2"):
        from_repo(changed(theirs, tmp_path, lambda name: "" if "gamma" in name else name))


@pytest.mark.parametrize(
    "fuser",
    [{"levels": [3, 18], "heads": 8}, {"levels": [3, 18], "points": 2}, {"levels": [3, 17]}],
    ids=["heads", "points", "levels"],
)
def test_a_fuser_that_no_repository_has_is_refused_before_anything_is_written(tmp_path, fuser):
    with pytest.raises(ValueError, match=r"fuser: got .*, need .*16 heads and 4 points"):
        to_repo(repository_model(fuser), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_patch_chooses_who_serves_the_fuser():
    model = model_of()
    with ik.patch(model, impl="auto") as handle:
        assert model.model.fuser.impl == "auto"
        assert "model.fuser: deformable attention by" in repr(handle)
    assert model.model.fuser.impl == "reference"


def test_a_copy_of_a_model_has_a_fuser_of_its_own():
    assert_a_copy_answers_by_itself(model_of())
    assert PATCHES == 4  # two by two: the only grid of the tiny tower
