"""Converts checkpoints of the IGVA repository and of LLaVA, which it grew from, to transformers' layout and back.

Both repositories save a ``LlavaLlamaForCausalLM``, whose config has the ``model_type`` "llava_llama". If that config
has ``vit_aggregate_groups``, the checkpoint is IGVA's and becomes a ``LlavaIgvaForConditionalGeneration``; otherwise it
is LLaVA's and becomes transformers' own Llava. Neither repository is imported.

They differ from transformers in three ways:

* The vision tower is a checkpoint of its own, named by the config's ``mm_vision_tower``. They load the tower from there
  even if their checkpoint contains it too.
* No token stands for an image (the input ids hold -200 in its place). One is added. Its rows in the embeddings and in
  the head are the means of the other rows: the embedding is never read, and the logit is never the largest.
* The sentence encoder is a module of the model. As it is frozen, only its name is kept.
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from igva_kernels.models.llava_igva.configuration_llava_igva import LlavaIgvaConfig
from igva_kernels.models.llava_igva.modeling_llava_igva import LlavaIgvaForConditionalGeneration
from igva_kernels.models.llava_igva.processing_llava_igva import LlavaIgvaProcessor
from igva_kernels.models.llava_igva.upgrade import load_state_dict
from igva_kernels.ops.weighted_mix import MixPlan

REPO_TYPE = "llava_llama"
IMAGE_TOKEN = "<image>"

_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_tower.", "model.vision_tower."),  # as transformers 5.10 and newer name it
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.vision_aggregator.transformers.", "model.weight_allocator.blocks."),
    ("model.vision_aggregator.linear.", "model.weight_allocator.head."),
    ("model.vision_aggregator.", "model.weight_allocator."),
    ("model.mm_projector.weight_allocator.", "model.weight_allocator."),  # a LLaVA that was patched with a plan
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
)
"""Prefixes of the weights' names in the repositories and in transformers; the first that matches counts."""

_NOT_WEIGHTS = ("model.sentence_embedder.", ".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Entries of a checkpoint whose names contain one of these are dropped."""
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    vision_tower: str | os.PathLike[str] | None = None,
    config_fields: dict[str, Any] | None = None,
) -> LlavaIgvaForConditionalGeneration | LlavaForConditionalGeneration:
    """Write the checkpoint in the directory ``source`` to ``target`` in the other layout, and return the model.

    If there is a tokenizer, it is written too; in transformers' layout it becomes part of a processor.

    Args:
        source: a checkpoint of the IGVA or LLaVA repository, or of transformers' LLaVA-IGVA or Llava.
        target: a new or an empty directory.
        vision_tower: the tower's own checkpoint; None for the ``mm_vision_tower`` of the repository's config.
        config_fields: for a LLaVA that was patched with a plan, the fields of ``LlavaIgvaConfig`` that the repository's
            config lacks.

    Raises:
        FileNotFoundError: ``source`` holds no checkpoint.
        ValueError: ``target`` is not empty, or the other layout cannot hold the model.
    """
    source, target = Path(source), Path(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"target: got {target}, which is not empty, need a new or an empty directory")
    kind = _read_config(source)["model_type"]
    tokenizer = None
    if (source / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(source, config=LlamaConfig())  # source's model_type is unknown
    if kind == REPO_TYPE:
        model = from_repo(source, vision_tower, _add_image_token(tokenizer), config_fields)
        model.save_pretrained(target)
        if tokenizer is not None:
            _processor(model.config, _image_processor(source, vision_tower), tokenizer).save_pretrained(target)
        return model
    classes = {LlavaIgvaConfig.model_type: LlavaIgvaForConditionalGeneration, "llava": LlavaForConditionalGeneration}
    if kind not in classes:
        raise ValueError(f"source: got a {kind!r} checkpoint, need one of {', '.join((REPO_TYPE, *classes))}")
    model = classes[kind].from_pretrained(source)
    to_repo(model, target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
        CLIPImageProcessor.from_pretrained(source).save_pretrained(target / "vision_tower")
    return model


def from_repo(
    source: str | os.PathLike[str],
    vision_tower: str | os.PathLike[str] | None = None,
    image_token: int | None = None,
    config_fields: dict[str, Any] | None = None,
) -> LlavaIgvaForConditionalGeneration | LlavaForConditionalGeneration:
    """The model in a checkpoint of the IGVA or LLaVA repository.

    Args:
        source: the directory of the checkpoint, in safetensors or pickled, in one file or in shards.
        vision_tower: as in ``convert``.
        image_token: the id of the token that stands for an image; None to append one to the vocabulary.
        config_fields: as in ``convert``.

    Raises:
        FileNotFoundError: ``source`` holds no checkpoint.
        ValueError: transformers' Llava cannot represent the model.
    """
    fields = _read_config(Path(source))
    weights = {
        _renamed(name, _PREFIXES): value
        for name, value in _read_weights(Path(source)).items()
        if not any(part in name for part in _NOT_WEIGHTS)
    }
    tower = vision_tower or fields["mm_vision_tower"]
    vision_config = AutoConfig.from_pretrained(tower)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    if not any(name.startswith("model.vision_tower.") for name in weights):
        states = AutoModel.from_pretrained(tower, config=vision_config).state_dict()
        weights |= {f"model.vision_tower.{name}": value for name, value in states.items()}
    embeddings = "model.language_model.embed_tokens.weight"
    vocabulary = weights[embeddings].shape[0]
    image_token = vocabulary if image_token is None else image_token
    for name in {embeddings, "lm_head.weight"} & weights.keys():
        row = weights[name].float().mean(dim=0, keepdim=True).to(weights[name].dtype)
        weights[name] = torch.cat([weights[name], row.expand(max(0, image_token + 1 - vocabulary), -1)])
    config = _transformers_config(fields, vision_config, image_token, weights[embeddings].shape[0], config_fields)
    is_igva = isinstance(config, LlavaIgvaConfig)
    model_class = LlavaIgvaForConditionalGeneration if is_igva else LlavaForConditionalGeneration
    model = load_state_dict(model_class, config, weights, weights[embeddings].dtype)
    if (Path(source) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def to_repo(
    model: LlavaIgvaForConditionalGeneration | LlavaForConditionalGeneration, target: str | os.PathLike[str]
) -> None:
    """Save a model as a checkpoint of the IGVA repository or, if it is a plain Llava, of the LLaVA repository.

    The vision tower goes to ``target/vision_tower``, whose absolute path is ``mm_vision_tower`` in the config: edit it
    after moving the checkpoint. If the last token of the vocabulary is the image token, it is left out.

    Raises:
        ValueError: the repository cannot represent the model.
    """
    target = Path(target)
    tower = target / "vision_tower"
    fields = _repo_config(model.config, str(tower.resolve()))
    back = [(theirs, ours) for ours, theirs in _PREFIXES[2:]]
    weights, of_tower = {}, {}
    for name, value in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            of_tower["vision_model." + name.removeprefix("model.vision_tower.")] = value
        else:
            weights[_renamed(name, back)] = value
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if len(weights[name]) > fields["vocab_size"]:
            weights[name] = weights[name][:-1].clone()
    tower.mkdir(parents=True)
    save_torch_state_dict(weights, target, metadata={"format": "pt"})
    save_torch_state_dict(of_tower, tower, metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True))
    model.generation_config.save_pretrained(target)
    model.config.vision_config.save_pretrained(tower)
    size = model.config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(tower)


def _read_config(source: Path) -> dict[str, Any]:
    file = source / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"source: {source} holds no config.json")
    return json.loads(file.read_text())


def _read_weights(source: Path) -> dict[str, Tensor]:
    for name in _WEIGHT_FILES:
        index = source / f"{name}.index.json"
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [name]
        if (source / files[0]).exists():
            return {k: v for file in files for k, v in _load(source / file).items()}
    raise FileNotFoundError(f"source: {source} holds neither {' nor '.join(_WEIGHT_FILES)}, whole or in shards")


def _load(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _renamed(name: str, prefixes: Any) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"source: the weight {name!r} has no counterpart in the other layout")


def _transformers_config(
    fields: dict[str, Any], vision_config: Any, image_token: int, vocabulary: int, config_fields: dict[str, Any] | None
) -> LlavaConfig:
    for name, needed in (("mm_projector_type", "mlp2x_gelu"), ("mm_patch_merge_type", "flat")):
        if fields.get(name, needed) != needed:
            raise ValueError(f"{name}: got {fields[name]!r}, transformers' Llava supports only {needed!r}")
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures"}
    text = {name: value for name, value in fields.items() if name in known}
    shared: dict[str, Any] = {
        "vision_config": vision_config,
        "text_config": LlamaConfig(**{**text, "vocab_size": vocabulary}),
        "image_token_index": image_token,
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
    }
    if "vit_aggregate_groups" not in fields:
        strategy = {"patch": "default", "cls_patch": "full"}[fields.get("mm_vision_select_feature", "patch")]
        shared |= {
            "vision_feature_layer": fields["mm_vision_select_layer"],
            "vision_feature_select_strategy": strategy,
        }
        return LlavaConfig(**shared) if config_fields is None else LlavaIgvaConfig(**{**shared, **config_fields})
    if not fields["aggregate_by_average"]:
        shared |= {ours: fields[theirs] for theirs, ours in _ALLOCATOR_FIELDS.items()}
    return LlavaIgvaConfig(
        **shared,
        aggregation="uniform" if fields["aggregate_by_average"] else "instruction",
        mix_groups=ast.literal_eval(fields["vit_aggregate_groups"]),
        vision_feature_layer=fields["vit_base_layer"],
    )


_ALLOCATOR_FIELDS = {
    "sentence_embedder": "sentence_encoder",
    "sentence_embed_dim": "sentence_embed_dim",
    "aggregator_hidden_dim": "allocator_hidden_dim",
    "aggregator_num_transformers": "allocator_num_blocks",
    "aggregator_num_heads": "allocator_num_heads",
}


def _repo_config(config: LlavaConfig, tower: str) -> dict[str, Any]:
    is_igva = isinstance(config, LlavaIgvaConfig)
    for name, given, needed in (
        ("text_config", config.text_config.model_type, "llama"),
        ("vision_config", config.vision_config.model_type, "clip_vision_model"),
        ("projector_hidden_act", config.projector_hidden_act, "gelu"),
        ("multimodal_projector_bias", config.multimodal_projector_bias, True),
        *((("mix_plan", config.mix_plan, None), ("projector_layernorm_eps", config.projector_layernorm_eps, None),
           ("vision_feature_select_strategy", config.vision_feature_select_strategy, "default")) if is_igva else ()),
    ):  # fmt: skip
        if given != needed:
            raise ValueError(f"{name}: got {given!r}, the repository supports only {needed!r}")
    text = config.text_config.to_dict()
    vocabulary = text["vocab_size"] - (config.image_token_id == text["vocab_size"] - 1)
    fields = {
        **{name: value for name, value in text.items() if name not in ("_name_or_path", "transformers_version")},
        # transformers 4 reads the value under this name
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "model_type": REPO_TYPE,
        "architectures": ["LlavaLlamaForCausalLM"],
        "vocab_size": vocabulary,
        "mm_vision_tower": tower,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
    }
    if not is_igva:
        feature = {"default": "patch", "full": "cls_patch"}[config.vision_feature_select_strategy]
        return {**fields, "mm_vision_select_layer": config.vision_feature_layer, "mm_vision_select_feature": feature}
    plan = MixPlan.igva(config.vision_config.num_hidden_layers, config.mix_groups, config.vision_feature_layer)
    groups = [[e.layer for e in plan.blocks[1] if e.column == k] for k in range(plan.num_columns)]
    return {
        **fields,
        **{theirs: getattr(config, ours) for theirs, ours in _ALLOCATOR_FIELDS.items()},
        "vit_aggregate_groups": repr(groups),
        "vit_base_layer": config.vision_feature_layer,
        "aggregate_by_average": config.aggregation == "uniform",
    }


def _add_image_token(tokenizer: Any) -> int | None:
    if tokenizer is None:
        return None
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def _image_processor(source: Path, vision_tower: str | os.PathLike[str] | None) -> Any:
    fields = _read_config(source)
    processor = CLIPImageProcessor.from_pretrained(vision_tower or fields["mm_vision_tower"])
    if fields.get("image_aspect_ratio") != "pad":
        return processor
    return LlavaImageProcessor(**{**processor.to_dict(), "do_pad": True})  # CLIP's, on an image padded to a square


def _processor(config: LlavaConfig, image_processor: Any, tokenizer: Any) -> LlavaProcessor:
    if isinstance(config, LlavaIgvaConfig):
        return LlavaIgvaProcessor.from_config(config, image_processor, tokenizer)
    return LlavaProcessor(
        image_processor, tokenizer, config.vision_config.patch_size, config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )  # fmt: skip
