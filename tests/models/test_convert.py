"""Checkpoints of the IGVA and LLaVA repositories: read, written, and the same after a round trip."""

import json
import shutil

import pytest
import torch
from seeds import seeded

pytest.importorskip("transformers")

from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from tiny import IMAGE, SMALL, batch, igva_model, liven, llava_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from igva_kernels import MixPlan, cli
from igva_kernels.models import LlavaIgvaForConditionalGeneration
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


UNFIT = {
    "a plan of its own": ({"mix_plan": MixPlan.concat([1, 2])}, "mix_plan"),
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
        ({"vit_aggregate_groups": "[[1], [2], [3], [4]]"}, "weight_allocator.head.weight"),
    ],
)
def test_the_command_says_what_it_cannot_convert(tmp_path, capsys, fields, said):
    assert cli.main(spoilt(tmp_path, **fields)) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_the_command_says_what_is_missing(tmp_path, capsys):
    command = spoilt(tmp_path)
    (tmp_path / "theirs" / "model.safetensors").unlink()
    assert cli.main(command) == 1
    assert "model.safetensors" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "theirs")
    assert cli.main(command) == 1
    assert "config.json" in capsys.readouterr().err
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "file").touch()
    assert cli.main(command) == 1
    assert "which is not empty, need a new or an empty directory" in capsys.readouterr().err


def test_a_llava_that_was_patched_with_a_plan_becomes_the_reference_model(tmp_path):
    """Its config knows nothing of the plan, and the allocator is part of ``mm_projector``."""
    model = igva_model()
    to_repo(plain_llava(), tmp_path)
    prefixes = {
        "model.weight_allocator.": "model.mm_projector.weight_allocator.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.vision_tower.": "model.vision_tower.vision_tower.",
        "model.language_model.": "model.",
    }
    weights = {}
    for name, value in model.state_dict().items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "lm_head.")
        weights[prefixes.get(old, old) + name.removeprefix(old)] = value
    save_torch_state_dict(weights, tmp_path)
    assert same(from_repo(tmp_path, image_token=IMAGE, config_fields=SMALL), model)
    with pytest.raises(ValueError, match="weight_allocator"):
        from_repo(tmp_path, image_token=IMAGE)
    fields = json.dumps({name: value for name, value in SMALL.items() if name != "impl"})
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "ours"), "--config", fields]) == 0
