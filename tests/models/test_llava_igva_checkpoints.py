"""Checkpoints: round trips, Llava's old and new layouts, and the upgrade of a Llava."""

import json
import re

import pytest
import torch
from seeds import seeded

pytest.importorskip("transformers")

from hosts import liven
from safetensors.torch import load_file, save_file
from tiny import IMAGE, SMALL, batch, igva_config, igva_model, llava_config
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.utils import logging

from igva_kernels import MixPlan
from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaForConditionalGeneration, LlavaIgvaModel
from igva_kernels.models.llava_igva.upgrade import load_state_dict


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def llava(**overrides):
    torch.manual_seed(seeded(3))
    return liven(LlavaForConditionalGeneration(llava_config(**overrides)).eval())


def save_in_the_old_layout(model, path):
    """As llava-hf/llava-1.5-7b-hf lies on the hub."""
    model.config.save_pretrained(path)
    renamed = {}
    for name, value in model.state_dict().items():
        for pattern, old in (
            (r"^lm_head", "language_model.lm_head"),
            (r"^model\.language_model", "language_model.model"),
            (r"^model\.vision_tower", "vision_tower.vision_model"),
            (r"^model\.multi_modal_projector", "multi_modal_projector"),
        ):
            name = re.sub(pattern, old, name)
        renamed[name] = value.clone()
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("aggregation", ["instruction", "uniform"])
def test_a_saved_model_loads_as_it_was(tmp_path, tower, aggregation):
    model = igva_model(tower, aggregation=aggregation, projector_layernorm_eps=1e-5)
    model.save_pretrained(tmp_path)
    for auto in (LlavaIgvaForConditionalGeneration, AutoModelForImageTextToText):
        loaded, info = auto.from_pretrained(tmp_path, impl="reference", output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded) is LlavaIgvaForConditionalGeneration
        assert same_weights(model, loaded)
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    assert same_weights(model.model, AutoModel.from_pretrained(tmp_path))


def test_a_tower_that_the_config_freezes_is_frozen_after_loading(tmp_path):
    igva_model().save_pretrained(tmp_path)
    for model_class in (LlavaIgvaForConditionalGeneration, LlavaIgvaModel):
        for frozen in (True, False):
            model = model_class.from_pretrained(tmp_path, freeze_vision_tower=frozen)
            assert {p.requires_grad for p in model.base_model.vision_tower.parameters()} == {not frozen}
            assert all(p.requires_grad for n, p in model.named_parameters() if "vision_tower" not in n)


def test_a_checkpoint_is_written_in_the_layout_of_llava(tmp_path):
    igva_model().save_pretrained(tmp_path / "igva")
    llava().save_pretrained(tmp_path / "llava")
    keys = set(load_file(tmp_path / "igva" / "model.safetensors"))
    assert set(load_file(tmp_path / "llava" / "model.safetensors")) <= keys
    assert not any("sentence_encoder" in key for key in keys)


@pytest.mark.parametrize("plan", [None, MixPlan.concat([-2, 1]), MixPlan.weighted_sum([1, 2], residual=-1)])
def test_the_config_survives_json_plan_included(tmp_path, plan):
    config = igva_config(mix_plan=plan, mix_groups=[[1, 2], [3, 4]])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LlavaIgvaConfig
    assert loaded.plan == config.plan
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_code_of_a_subclass_stays_in_the_auto_map(tmp_path):
    ours = "llava_igva_from_igva_kernels"
    given = {"AutoModel": "mine.MyModel", "AutoConfig": f"some/repository--{ours}.LlavaIgvaConfig"}
    igva_config(auto_map=given).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert (saved["AutoModel"], saved["AutoConfig"]) == ("mine.MyModel", f"{ours}.LlavaIgvaConfig")
    assert saved["AutoProcessor"] == f"{ours}.LlavaIgvaProcessor"
    assert (tmp_path / f"{ours}.py").exists()


def test_the_implementation_is_not_saved_and_can_be_asked_for_when_loading(tmp_path):
    igva_model(impl="reference").save_pretrained(tmp_path)
    assert "impl" not in json.loads((tmp_path / "config.json").read_text())
    for kwargs, impl in (({}, "auto"), ({"impl": "reference"}, "reference")):
        model = LlavaIgvaForConditionalGeneration.from_pretrained(tmp_path, **kwargs)
        assert model.model.multi_modal_projector.impl == impl


def test_stage_two_starts_from_a_stage_one_checkpoint(tmp_path):
    one = igva_model(aggregation="uniform")
    one.save_pretrained(tmp_path)
    two, info = LlavaIgvaForConditionalGeneration.from_pretrained(
        tmp_path, aggregation="instruction", output_loading_info=True
    )
    assert info["missing_keys"]
    assert all("weight_allocator" in key for key in info["missing_keys"])
    assert same_weights(one.model.multi_modal_projector, two.model.multi_modal_projector)
    assert all(p.isfinite().all() for p in two.parameters())


@pytest.mark.parametrize("layout", ["new", "old"])
def test_the_llava_part_of_a_llava_checkpoint_loads_with_nothing_missing(tmp_path, layout):
    source = llava()
    source.save_pretrained(tmp_path) if layout == "new" else save_in_the_old_layout(source, tmp_path)
    plan = MixPlan.concat([-2])  # a projector of Llava's own shape
    model, info = LlavaIgvaForConditionalGeneration.from_pretrained(
        tmp_path, config=igva_config(mix_plan=plan), output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_weights(source, model)


@pytest.mark.parametrize("given", ["model", "new", "old"])
def test_an_upgraded_llava_answers_at_first_as_the_original(tmp_path, given):
    source = llava()
    if given == "new":
        source.save_pretrained(tmp_path)
    elif given == "old":
        save_in_the_old_layout(source, tmp_path)
    model = LlavaIgvaForConditionalGeneration.from_llava(source if given == "model" else tmp_path, **SMALL)
    inputs = batch((1, 2), "left")
    plain = {name: x for name, x in inputs.items() if name != "sentence_embeds"}
    torch.testing.assert_close(model(**inputs).logits, source(**plain).logits, rtol=1e-4, atol=3e-5)
    inputs, options = batch((1, 1), "left"), {"max_new_tokens": 8, "do_sample": False}
    plain = {name: x for name, x in inputs.items() if name != "sentence_embeds"}
    assert torch.equal(model.generate(**inputs, **options), source.generate(**plain, **options))
    assert not model.model.multi_modal_projector.linear_1.weight[:, 16:].any()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.config.image_token_id == IMAGE


def test_an_upgrade_prints_nothing_and_leaves_transformers_as_talkative_as_it_was(capfd):
    source, settings = llava(), (logging.get_verbosity(), logging.is_progress_bar_enabled())
    LlavaIgvaForConditionalGeneration.from_llava(source, **SMALL)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == settings


def test_weights_that_do_not_make_the_model_are_named():
    config, weights = igva_config(), dict(igva_model().state_dict())
    weights["model.stranger"] = weights.pop("lm_head.weight")
    with pytest.raises(ValueError, match=r"missing are lm_head.weight; left over are model.stranger"):
        load_state_dict(LlavaIgvaForConditionalGeneration, config, weights, torch.float32, new="weight_allocator")


def test_an_upgraded_llava_learns_from_the_mixed_half_at_once():
    model = LlavaIgvaForConditionalGeneration.from_llava(llava(), **SMALL).train()
    model(**batch(labels=True)).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad[:, 16:].any()
    assert all(p.grad is None for p in model.model.vision_tower.parameters())


def test_a_llava_of_several_layers_is_upgraded_layer_by_layer():
    source = llava(vision_feature_layer=[-2, 1])
    plan = MixPlan((*MixPlan.concat([1, 0, -2]).blocks, *MixPlan.weighted_sum([2, 3]).blocks))
    model = LlavaIgvaForConditionalGeneration.from_llava(source, **SMALL, mix_plan=plan)
    inputs = batch()
    out = model(**inputs).logits
    inputs.pop("sentence_embeds")
    torch.testing.assert_close(out, source(**inputs).logits, rtol=1e-4, atol=3e-5)


def test_an_upgrade_that_would_change_the_answers_is_refused():
    with pytest.raises(ValueError, match="layer -2"):
        LlavaIgvaForConditionalGeneration.from_llava(llava(), **SMALL, mix_plan=MixPlan.concat([1, 2]))
    with pytest.raises(TypeError, match="model_or_path"):
        LlavaIgvaForConditionalGeneration.from_llava(igva_model(), **SMALL)
