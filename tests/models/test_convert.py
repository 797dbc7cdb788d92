"""Checkpoints of the IGVA and LLaVA repositories: read, written, and the same after a round trip."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from seeds import seeded

pytest.importorskip("transformers")

from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from tiny import IMAGE, SMALL, batch, igva_model, liven, llava_config, text_config, vision_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from igva_kernels import MixPlan, cli
from igva_kernels.models import LlavaIgvaForConditionalGeneration
from igva_kernels.models.llava_igva.checkpoint_files import read_weights
from igva_kernels.models.llava_igva.convert import convert, from_repo, to_repo

ALLOCATOR = [
    *(f"{name}.{kind}" for name in ("sentence_proj", "cls_proj", "linear") for kind in ("weight", "bias")),
    "transformers.1.cross_attention.in_proj_weight", "transformers.1.cross_attention.out_proj.bias",
    "transformers.0.ffn.0.weight", "transformers.0.ffn.2.bias", "transformers.1.norm1.weight",
]  # fmt: skip


def plain_llava():
    torch.manual_seed(seeded(3))
    return liven(LlavaForConditionalGeneration(llava_config()).eval())


MODELS = {
    "igva": lambda: igva_model(),
    "igva stage 1": lambda: igva_model(aggregation="uniform"),
    "igva with groups of unequal size": lambda: igva_model(mix_groups=[[1], [2, 3, 4]]),
    "llava": plain_llava,
    "a plan of its own": lambda: igva_model(
        mix_plan=MixPlan((((3, None, 1.0),), ((1, 1, 0.5), (2, 0, 1.0)))), balance_coefficient=0.5
    ),
    "a plan that the text weighs": lambda: igva_model(mix_plan=MixPlan.weighted_sum([1, 3]), aggregation="text"),
    "a plan with learned weights": lambda: igva_model(mix_plan=MixPlan.weighted_sum([1, 3], -2), aggregation="learned"),
    "a plan without weights": lambda: igva_model(mix_plan=MixPlan.concat([-2, -3, 1]), aggregation="uniform"),
}


def answers(model):
    """Logits and greedy tokens."""
    inputs = batch((1, 1), "left")
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = model.config.image_token_id
    if not isinstance(model, LlavaIgvaForConditionalGeneration):
        inputs.pop("sentence_embeds")
    with torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=6, do_sample=False)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(answers(a), answers(b), strict=True))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_answers_the_same_after_a_round_trip(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path / "ours")
    converted = convert(tmp_path / "ours", tmp_path / "theirs")
    assert type(converted) is type(model)
    loaded = from_repo(tmp_path / "theirs", image_token=IMAGE)
    assert type(loaded) is type(model)
    if isinstance(model, LlavaIgvaForConditionalGeneration):
        assert loaded.config.plan == model.config.plan
        assert loaded.config.balance_coefficient == model.config.balance_coefficient
        loaded.model.multi_modal_projector.impl = "reference"
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert same(loaded, model)


def test_the_names_are_those_of_the_repository(tmp_path):
    to_repo(igva_model(), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {f"model.vision_aggregator.{name}" for name in ALLOCATOR} <= names
    assert {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")} <= names
    assert {
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    } <= names
    assert not any("weight_allocator" in name or "multi_modal" in name or "language_model" in name for name in names)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert json.loads(config["vit_aggregate_groups"]) == [[1, 2], [3, 4]]
    assert (config["vit_base_layer"], config["aggregate_by_average"], config["rope_theta"]) == (-2, False, 10000.0)
    assert config["mm_vision_tower"] == str(tmp_path / "vision_tower")


def test_the_vision_tower_is_written_as_the_checkpoint_that_the_repository_loads(tmp_path):
    model = igva_model()
    to_repo(model, tmp_path)
    tower, info = CLIPVisionModel.from_pretrained(tmp_path / "vision_tower", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(tower.state_dict()[name], value)


def internal_fusion(strategy="3-18-23", **overrides):
    """A model that Layer_Select_Fuse has too."""
    language = text_config()
    language.num_hidden_layers = 24
    fields = {"mix_plan": MixPlan.concat([-2]), "aggregation": "uniform", "injection": {"strategy": strategy}}
    tower = vision_config(num_hidden_layers=24)
    return igva_model(vision_config=tower, text_config=language, **{**fields, **overrides})


@pytest.mark.parametrize("strategy", ["3-18", "all"])
def test_internal_fusion_becomes_a_checkpoint_of_layer_select_fuse_and_comes_back(tmp_path, strategy):
    model = internal_fusion(strategy)
    to_repo(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    count = len(model.model.injection_projectors)
    kinds = [f"{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    assert {n for n in names if "mm_" in n} == {
        *(f"model.mm_projectors.{j}.{kind}" for j in range(count) for kind in kinds),
        *(f"model.mm_projector_f.{kind}" for kind in kinds),
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["layer_fusing_strategy"], config["layer_using_strategy"]) == ("I_D", strategy)
    assert (config["mm_vision_select_feature"], config["mm_hidden_size"]) == ("patch", 16)
    loaded = from_repo(tmp_path, image_token=IMAGE)
    loaded.model.token_injection.impl = "reference"
    for projector in (loaded.model.multi_modal_projector, *loaded.model.injection_projectors):
        projector.impl = "reference"
    assert loaded.config.injection == model.config.injection
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    inputs = batch((1, 1))
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_an_injection_that_layer_select_fuse_does_not_have_is_refused(tmp_path):
    for fields, said in (
        ({"injection": {"taps": [3, 18], "layers": [3, 22]}}, "injection"),
        ({"mix_plan": MixPlan.concat([-1])}, "mix_plan"),
    ):
        with pytest.raises(ValueError, match=f"{said}: got .*, the Layer_Select_Fuse repository supports only"):
            to_repo(internal_fusion(**fields), tmp_path)


def test_a_checkpoint_of_layer_select_fuse_with_other_fusions_or_without_a_projector_is_refused(tmp_path):
    to_repo(internal_fusion(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_fusing_strategy": "I_M"}))
    with pytest.raises(ValueError, match="layer_fusing_strategy is 'I_M', need 'I_D' or 'E_M'"):
        from_repo(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_using_strategy": "former"}))
    with pytest.raises(ValueError, match=r"missing: model\.mm_projectors\.3\.0\.weight"):
        from_repo(tmp_path)


@pytest.mark.parametrize("form", ["sharded safetensors", "pickled", "pickled shards"])
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_checkpoints_with_the_tower_inside_are_read_in_every_form(tmp_path, form, prefix):
    """As training leaves them: with the tower, buffers of old versions, and the sentence encoder."""
    model = igva_model()
    to_repo(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    tower = load_file(tmp_path / "vision_tower" / "model.safetensors")
    weights |= {
        f"model.vision_tower.vision_tower.{prefix}{k.removeprefix('vision_model.')}": v for k, v in tower.items()
    }
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    weights["model.sentence_embedder.0.auto_model.pooler.weight"] = torch.zeros(4)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "vision_tower" / "model.safetensors").unlink()
    size = "5GB" if form == "pickled" else "20KB"
    save_torch_state_dict(weights, tmp_path, max_shard_size=size, safe_serialization="safetensors" in form)
    assert len(list(tmp_path.glob("*.index.json"))) == (form != "pickled")
    loaded = from_repo(tmp_path, image_token=IMAGE)
    loaded.model.multi_modal_projector.impl = "reference"
    assert same(loaded, model)


def test_the_image_token_is_added_behind_the_vocabulary_and_goes_on_the_way_back(tmp_path):
    to_repo(igva_model(), tmp_path / "theirs")
    loaded = from_repo(tmp_path / "theirs")
    rows = loaded.get_input_embeddings().weight
    assert (loaded.config.image_token_id, len(rows)) == (64, 65)
    torch.testing.assert_close(rows[64], rows[:64].mean(0))
    assert (answers(loaded)[0][..., 64] < answers(loaded)[0].max(-1).values).all()
    to_repo(loaded, tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>")


@pytest.mark.parametrize("name", ["igva", "llava"])
@pytest.mark.parametrize("ratio", ["pad", "square"])
def test_a_tokenizer_becomes_a_processor_and_the_model_reads_what_it_makes(tmp_path, name, ratio):
    to_repo(MODELS[name](), tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": ratio}))
    assert cli.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert processor.image_token_id == model.config.image_token_id == 64
    assert bool(getattr(processor.image_processor, "do_pad", None)) == (ratio == "pad")
    inputs = processor(
        images=[torch.zeros(3, 40, 30, dtype=torch.uint8).numpy()], text="w1 <image> w2", return_tensors="pt"
    )
    if name == "igva":
        inputs["sentence_embeds"] = torch.zeros(1, model.config.sentence_embed_dim)
    assert model(**inputs).logits.isfinite().all()
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    images = json.loads((tmp_path / "back" / "vision_tower" / "preprocessor_config.json").read_text())
    assert (images["crop_size"], images["size"]) == ({"height": 28, "width": 28}, {"shortest_edge": 28})
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["image_aspect_ratio"] == ("pad" if ratio == "pad" else None)


UNFIT = {
    "a norm": ({"projector_layernorm_eps": 1e-5}, "projector_layernorm_eps"),
    "another activation": ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
    "CLS among the tokens": ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
}


@pytest.mark.parametrize(("fields", "name"), UNFIT.values(), ids=UNFIT)
def test_what_the_repository_cannot_hold_is_refused_before_anything_is_written(tmp_path, fields, name):
    with pytest.raises(ValueError, match=name):
        to_repo(igva_model(**fields), tmp_path / "theirs")
    with pytest.raises(ValueError, match="vision_config"):
        to_repo(igva_model("siglip"), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def spoilt(tmp_path, **fields):
    to_repo(igva_model(), tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    return ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"vit_aggregate_groups": "[[1], [2], [3], [4]]"}, "model.vision_aggregator.linear.weight is [2, 16] in place"),
    ],
)
def test_the_command_says_what_it_cannot_convert(tmp_path, capsys, fields, said):
    assert cli.main(spoilt(tmp_path, **fields)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_the_command_says_what_is_missing(tmp_path, capsys):
    command = spoilt(tmp_path)
    (tmp_path / "theirs" / "model.safetensors").unlink()
    assert cli.main(command) == 2
    assert "model.safetensors" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "theirs")
    assert cli.main(command) == 2
    assert "theirs is not a directory" in capsys.readouterr().err
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "file").touch()
    assert cli.main(command) == 2
    assert "which is not empty, need a new or an empty directory" in capsys.readouterr().err


BACK = {
    "model.weight_allocator.": "model.mm_projector.weight_allocator.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "model.vision_tower.vision_tower.",
    "model.language_model.": "model.",
}


def patched_llava(folder, model):
    """What the LLaVA repository saves of a model that was patched with a plan, before its config recorded plans."""
    to_repo(plain_llava(), folder)
    weights = {}
    for name, value in model.state_dict().items():
        old = next((prefix for prefix in BACK if name.startswith(prefix)), "lm_head.")
        weights[BACK.get(old, old) + name.removeprefix(old)] = value
    save_torch_state_dict(weights, folder)


def test_a_llava_that_was_patched_with_a_plan_becomes_the_reference_model(tmp_path):
    """Its config knows nothing of the plan, and the allocator is part of ``mm_projector``."""
    model = igva_model()
    patched_llava(tmp_path, model)
    assert same(from_repo(tmp_path, image_token=IMAGE, config_fields=SMALL), model)
    with pytest.raises(ValueError, match=r"records no plan.*--config"):
        from_repo(tmp_path, image_token=IMAGE)
    fields = json.dumps({name: value for name, value in SMALL.items() if name != "impl"})
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "ours"), "--config", fields]) == 0


def test_the_sizes_of_an_allocator_are_read_from_its_weights_and_what_they_do_not_tell_is_said(tmp_path, capsys):
    model = igva_model(allocator_num_heads=4)
    patched_llava(tmp_path, model)
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "ours"), "--config", '{"mix_groups": 2}']) == 0
    said = "assumed sentence_encoder 'sentence-transformers/all-mpnet-base-v2' and allocator_num_heads 4; --config"
    assert said in capsys.readouterr().err
    with pytest.warns(UserWarning, match="assumed"):
        loaded = from_repo(tmp_path, image_token=IMAGE, config_fields={"mix_groups": 2, "impl": "reference"})
    assert same(loaded, model)
    for name in ("sentence_embed_dim", "allocator_hidden_dim", "allocator_num_blocks"):
        assert getattr(loaded.config, name) == SMALL[name]


def test_a_patched_llava_whose_config_records_the_plan_needs_nothing_else(tmp_path):
    model = igva_model(balance_coefficient=0.5, allocator_num_heads=2)
    patched_llava(tmp_path, model)
    file = tmp_path / "config.json"
    allocator = {"kind": "WeightAllocator", "sentence_dim": 12, "vision_dim": 16, "num_weights": 2, "hidden_dim": 16,
                 "num_blocks": 2, "num_heads": 2}  # fmt: skip
    record = {"plan": model.config.plan.to_dict(), "allocator": allocator, "balance_coefficient": 0.5}
    file.write_text(json.dumps({**json.loads(file.read_text()), "mm_hidden_size": 32, "igva_kernels": record}))
    loaded = from_repo(tmp_path, image_token=IMAGE, config_fields={"impl": "reference"})
    assert same(loaded, model)
    assert (loaded.config.plan, loaded.config.balance_coefficient) == (model.config.plan, 0.5)


def test_config_fields_are_heard_for_the_checkpoints_of_the_igva_repository_too(tmp_path, capsys):
    command = spoilt(tmp_path)
    assert cli.main([*command, "--config", '{"sentence_encoder": null, "balance_coefficient": 0.5}']) == 0
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["sentence_encoder"], config["balance_coefficient"]) == (None, 0.5)
    for fields, said in (
        ({"mix_group": 2}, "config_fields: got mix_group, need some of aggregation"),
        ({"text_config": {}}, "config_fields: got text_config"),
        ({"mix_groups": "four"}, "an entry is (layer: int"),
        ({"allocator_num_heads": 3}, "num_heads: got 3, need a divisor of hidden_dim=16"),
        ({"aggregation": "uniform"}, "left over: model.vision_aggregator."),
    ):
        assert cli.main(["convert", command[1], str(tmp_path / "new"), "--config", json.dumps(fields)]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "new"), "--config", "{}"]) == 2


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    to_repo(igva_model(), folder / "good")
    return folder / "good"


class Malicious:
    def __reduce__(self):
        return os.system, ("true",)


def set_config(folder, without=(), **fields):
    data = {**json.loads((folder / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if k not in without}))


def pickle(folder, weights, **options):
    torch.save(weights, folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


def shorten(file):
    file.write_bytes(file.read_bytes()[:5000])


def pickle_and_shorten(folder, **options):
    pickle(folder, load_file(folder / "model.safetensors"), **options)
    shorten(folder / "pytorch_model.bin")


def point(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def index(folder, data):
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))


def another_tower(folder, **fields):
    to_repo(igva_model(vision_config=vision_config(**fields)), folder / "other")
    set_config(folder, mm_vision_tower=str(folder / "other" / "vision_tower"))


def tower_without_weights(folder):
    shutil.copytree(folder / "vision_tower", folder / "other")
    file = folder / "other" / "model.safetensors"
    weights = load_file(file)
    weights["another.weight"] = weights.pop("vision_model.pre_layrnorm.weight")
    save_torch_state_dict(weights, folder / "other")
    set_config(folder, mm_vision_tower=str(folder / "other"))


def only(folder, *names):
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).touch()


BROKEN = {
    "truncated safetensors": (lambda d: shorten(d / "model.safetensors"), "model.safetensors: .*; .* get it again"),
    "truncated pickle": (pickle_and_shorten, "pytorch_model.bin: .*get it again"),
    "truncated old pickle": (
        lambda d: pickle_and_shorten(d, _use_new_zipfile_serialization=False), "pytorch_model.bin: .*get it again",
    ),
    "Git LFS pointer": (lambda d: point(d / "model.safetensors"), "model.safetensors: .*`git lfs pull`"),
    "Git LFS pointer for an index": (lambda d: point(d / "model.safetensors.index.json"), "json: .*`git lfs pull`"),
    "pickle that runs code": (lambda d: pickle(d, {"a": Malicious()}), "never loaded; get it again"),
    "pickle of a list": (lambda d: pickle(d, [torch.zeros(1)]), "pytorch_model.bin: got a pickled list"),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: got a JSON list"),
    "config that is no JSON": (lambda d: (d / "config.json").write_bytes(b"\xff{"), "config.json: .*need a JSON"),
    **{
        f"config without {name}": (lambda d, name=name: set_config(d, [name]), f"config.json.*{name}")
        for name in ("model_type", "mm_vision_tower", "aggregate_by_average", "vit_base_layer")
    },
    "config with groups of words": (lambda d: set_config(d, vit_aggregate_groups="[[a]]"), "aggregate_groups: .*need"),
    "config with a base of text": (lambda d: set_config(d, vit_base_layer="-2"), "vit_base_layer' is '-2', need int"),
    "config of another width": (lambda d: set_config(d, hidden_size=64), r"mm_projector.0.weight is \[32, 32\] in pla"),
    "config of fewer layers": (lambda d: set_config(d, num_hidden_layers=1), "left over: model.layers.1."),
    "config of a billion layers": (lambda d: set_config(d, num_hidden_layers=10**9), "1000000000 layers and"),
    "config that is no model's": (lambda d: set_config(d, num_attention_heads=5), "config.json: .*attention heads"),
    "quantised": (lambda d: set_config(d, quantization_config={"load_in_4bit": True}), "quantised; need the weights"),
    "index without weight_map": (lambda d: index(d, {}), "index.json: .*'weight_map'"),
    "index of shards that are missing": (
        lambda d: index(d, {"weight_map": {"a": "model.safetensors", "b": "2.safetensors"}}), "it names 2.safetensors",
    ),
    "foreign weights": (lambda d: pickle(d, {"transformer.h.0.weight": torch.zeros(2)}), "'transformer.h.0.w.* has no"),
    "part of the weights": (lambda d: pickle(d, {"model.norm.weight": torch.zeros(2)}), "need a whole checkpoint"),
    "no such tower": (lambda d: set_config(d, mm_vision_tower=str(d / "none")), "tower .*none: .*--vision-tower"),
    "a tower that is none": (lambda d: set_config(d, mm_vision_tower=str(d)), "vision tower .*--vision-tower"),
    "a narrower tower": (lambda d: another_tower(d, hidden_size=8), "model.mm_projector.0.weight is .* in place of"),
    "a lower tower": (lambda d: another_tower(d, num_hidden_layers=2), r"config.json: .*layer"),
    "a tower that lacks a weight": (tower_without_weights, "tower .*other: its weights lack 1 .*--vision-tower"),
    "a LoRA adapter": (lambda d: only(d, "adapter_config.json"), "LoRA adapter; merge it"),
    "a projector": (lambda d: only(d, "mm_projector.bin"), "the projector alone"),
}  # fmt: skip
"""What happens to a checkpoint of the IGVA repository, and what is said of it."""


@pytest.mark.parametrize(("happen", "said"), BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_that_cannot_be_converted_is_told_in_one_line_and_nothing_is_written(
    good, tmp_path, capsys, happen, said
):
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    happen(folder)
    capsys.readouterr()
    assert cli.main(["convert", str(folder), str(tmp_path / "ours")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("igva-kernels convert: ")
    assert re.search(said, line), line
    assert not (tmp_path / "ours").exists()


def test_weights_pickled_as_before_torch_1_6_are_read(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    pickle(tmp_path, weights, _use_new_zipfile_serialization=False)
    assert all(torch.equal(value, weights[name]) for name, value in read_weights(tmp_path).items())
    assert same(from_repo(tmp_path, image_token=IMAGE, config_fields={"impl": "reference"}), igva_model())


OURS = {
    "truncated": (lambda d: shorten(d / "model.safetensors"), "model.safetensors: .*get it again"),
    "Git LFS pointer": (lambda d: point(d / "model.safetensors"), "`git lfs pull`"),
    "config of 7 B parameters": (
        lambda d: set_config(d, text_config=LlamaConfig().to_dict()), "0.0.* M values, .* has 6.* M: .*get the whole",
    ),
    "a weight by another name": (
        lambda d: rename(d, "multi_modal_projector.linear_2.bias"), "its weights lack model.*projector.linear_2.bias;",
    ),
    "config that is no model's": (lambda d: set_config(d, mix_groups=3), "groups: 3 does not divide"),
}  # fmt: skip


def rename(folder, ending):
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith(ending))
    weights[name + ".another"] = weights.pop(name)
    save_torch_state_dict(weights, folder)


@pytest.mark.parametrize(("happen", "said"), OURS.values(), ids=OURS)
def test_a_checkpoint_of_ours_with_anything_missing_is_refused_before_a_model_of_its_size_is_made(
    tmp_path, capsys, happen, said
):
    igva_model().save_pretrained(tmp_path / "ours")
    happen(tmp_path / "ours")
    capsys.readouterr()
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
    assert not (tmp_path / "theirs").exists()


def sentencepiece_model(folder):
    """``tokenizer.model`` as Llama's tokenizers are, and what is beside it in a checkpoint of Vicuna."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="protobuf", exc_type=Exception)
    lines = ["the cup is on the saucer", "a spoon lies to the right of the cup", "what colour is the saucer"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 9), model_prefix=str(folder / "tokenizer"), vocab_size=60, model_type="bpe",
        byte_fallback=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    fields = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "unk_token": "<unk>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "eos_token": "</s>"}))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_the_tokenizer_of_vicuna_which_is_sentencepiece_alone_gives_the_same_tokens(good, tmp_path):
    shutil.copytree(good, tmp_path / "theirs")
    vicuna = sentencepiece_model(tmp_path / "theirs")
    assert cli.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    for text in ("the cup lies on a spoon", "what is the colour"):
        assert processor.tokenizer(text).input_ids == [1, *vicuna.encode(text)]


def test_a_tokenizer_that_needs_packages_names_them(good, tmp_path, capsys, monkeypatch):
    shutil.copytree(good, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.model").write_bytes(b"sentencepiece")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    assert cli.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tokenizer.model needs sentencepiece and a protobuf that fits it" in line
    assert line.endswith("; pip install 'igva-kernels[models]'")
