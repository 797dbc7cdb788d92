"""Converts checkpoints of LLaVA, and of repositories that grew from it, to transformers' layout and back.

The repositories save a ``LlavaLlamaForCausalLM``, whose config has the ``model_type`` "llava_llama". If that config
has ``vit_aggregate_groups``, the checkpoint is IGVA's; if it has ``layer_fusing_strategy``, it is Layer_Select_Fuse's
(I_D and E_M); if it has ``igva_kernels``, it is of a LLaVA that was patched with a plan, which the config records; if
its projector begins with a fuser, it is MMFuser's. These become a ``LlavaIgvaForConditionalGeneration``. Otherwise it
is a plain LLaVA's and becomes transformers' own Llava. No repository is imported.

They differ from transformers in three ways:

* The vision tower is a checkpoint of its own, named by the config's ``mm_vision_tower``. They load the tower from there
  even if their checkpoint contains it too.
* No token stands for an image (the input ids hold -200 in its place). One is added. Its rows in the embeddings and in
  the head are the means of the other rows: the embedding is never read, and the logit is never the largest.
* The sentence encoder is a module of the model. As it is frozen, only its name is kept.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields as fields_of
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor, cat
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

from igva_kernels.integrations.llava_record import KEY, Record, describe
from igva_kernels.models.llava_igva.checkpoint_files import (
    check_depth,
    check_size,
    check_weights,
    load_pretrained,
    read_config,
    read_weights,
)
from igva_kernels.models.llava_igva.configuration_llava_igva import LlavaIgvaConfig
from igva_kernels.models.llava_igva.fuser import EXTERNAL_STRATEGIES, HEADS, POINTS, FuserPlan
from igva_kernels.models.llava_igva.injection import STRATEGIES, InjectionPlan
from igva_kernels.models.llava_igva.modeling_llava_igva import LlavaIgvaForConditionalGeneration
from igva_kernels.models.llava_igva.processing_llava_igva import LlavaIgvaProcessor
from igva_kernels.models.llava_igva.upgrade import load_state_dict, quiet
from igva_kernels.ops.weighted_mix import MixPlan, is_tap
from igva_kernels.runtime.errors import UserError, reading
from igva_kernels.runtime.files import need

REPO_TYPE = "llava_llama"
IMAGE_TOKEN = "<image>"

_TOWER = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_tower.", "model.vision_tower."),  # as transformers 5.10 and newer name it
)
_AGGREGATOR = (
    ("model.vision_aggregator.transformers.", "model.weight_allocator.blocks."),
    ("model.vision_aggregator.linear.", "model.weight_allocator.head."),
    ("model.vision_aggregator.", "model.weight_allocator."),
)
_LAYER_SELECT = (
    *(
        (f"model.mm_projectors.{index}.{theirs}.", f"model.injection_projectors.{index}.{ours}.")
        for index in range(24)
        for theirs, ours in ((0, "linear_1"), (2, "linear_2"))
    ),
    ("model.mm_projector_f.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector_f.2.", "model.multi_modal_projector.linear_2."),
)
_MMFUSER = (
    ("model.mm_projector.0.", "model.fuser."),
    ("model.mm_projector.1.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.3.", "model.multi_modal_projector.linear_2."),
)
_EXTERNAL_MODULAR = tuple((theirs.replace("projector", "projector_f"), ours) for theirs, ours in _MMFUSER)
_OLD_GAMMAS = tuple(
    (f"model.{projector}.0.weight{n}", f"model.fuser.gamma{n}")
    for projector in ("mm_projector", "mm_projector_f")
    for n in (1, 2)
)
"""The names that old versions of transformers give to parameters called gamma; they are only read."""
_OTHERS = (
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.mm_projector.weight_allocator.", "model.weight_allocator."),  # a LLaVA that was patched with a plan
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
)
"""Prefixes of the weights' names in the repositories and in transformers; the first that matches counts."""

_NOT_WEIGHTS = ("model.sentence_embedder.", ".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Entries of a checkpoint whose names contain one of these are dropped."""
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
_OFFSETS = "model.fuser.cross_attn.sampling_offsets.weight"
_EMBEDDINGS, _LINEAR_1 = "model.language_model.embed_tokens.weight", "model.multi_modal_projector.linear_1.weight"
_AGGREGATIONS = {
    None: "uniform",
    "WeightAllocator": "instruction",
    "TextAllocator": "text",
    "LearnedWeights": "learned",
}
"""By the allocator of a patched LLaVA: the reference model's ``aggregation``."""
_FEATURES = {"patch": "default", "cls_patch": "full"}
"""By ``mm_vision_select_feature``: transformers' ``vision_feature_select_strategy``."""
_OPTIONS = {field.name for field in fields_of(LlavaIgvaConfig)} - {field.name for field in fields_of(LlavaConfig)}
_OPTIONS |= {"vision_feature_layer", "vision_feature_select_strategy"}
"""The fields that ``config_fields`` may have: all but those that the checkpoint alone can know."""
_BASE = MixPlan.concat([-2])
"""What the connector reads in Layer_Select_Fuse's internal fusion, and its fuser's query in E_M."""
_HOW_TO_NAME_A_TOWER = "--vision-tower (vision_tower=) takes the directory of the tower that the model was trained with"


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    vision_tower: str | os.PathLike[str] | None = None,
    config_fields: Mapping[str, Any] | None = None,
) -> LlavaIgvaForConditionalGeneration | LlavaForConditionalGeneration:
    """Write the checkpoint in the directory ``source`` to ``target`` in the other layout, and return the model.

    If there is a tokenizer, it is written too; in transformers' layout it becomes part of a processor. Nothing is
    written before everything has been read.

    Args:
        source: a checkpoint of the IGVA, Layer_Select_Fuse, MMFuser or LLaVA repository, or of transformers'
            LLaVA-IGVA or Llava.
        target: a new or an empty directory.
        vision_tower: the tower's own checkpoint; None for the ``mm_vision_tower`` of the repository's config.
        config_fields: fields of ``LlavaIgvaConfig`` in place of what the repository's checkpoint says, or in addition.
            A LLaVA that was patched with a plan needs its plan here, unless its config records it.

    Raises:
        FileNotFoundError: ``source`` holds no checkpoint.
        UserError: a ValueError; a file cannot be read, or the files do not belong together.
        ValueError: ``target`` is not empty, ``config_fields`` has an unknown field, or the other layout cannot hold the
            model.
    """
    source, target = Path(source), Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"target: got {target}, which is not empty, need a new or an empty directory")
    kind = read_config(source)["model_type"]
    tokenizer = _read_tokenizer(source)
    if kind == REPO_TYPE:
        image_processor = None if tokenizer is None else _image_processor(source, vision_tower)
        model = from_repo(source, vision_tower, _add_image_token(tokenizer), config_fields)
        model.save_pretrained(target)
        if tokenizer is not None:
            _processor(model.config, image_processor, tokenizer).save_pretrained(target)
        return model
    classes = {LlavaIgvaConfig.model_type: LlavaIgvaForConditionalGeneration, "llava": LlavaForConditionalGeneration}
    if kind not in classes:
        raise UserError(f"source: got a {kind!r} checkpoint, need one of {', '.join((REPO_TYPE, *classes))}")
    for name, given in (("vision_tower", vision_tower), ("config_fields", config_fields)):
        if given is not None:
            raise UserError(f"{name}: got {given!r} for a {kind!r} checkpoint, which says all of itself; need None")
    saved: dict[Path, Any] = {}
    aspect = None
    if tokenizer is not None:
        with reading(f"{source}: the image processor", "need preprocessor_config.json beside the tokenizer"):
            images = CLIPImageProcessor.from_pretrained(source)
        saved = {target: tokenizer, target / "vision_tower": images}
        aspect = "pad" if images.to_dict().get("do_pad") else None
    model = load_pretrained(classes[kind], source)
    to_repo(model, target, aspect)
    for directory, part in saved.items():
        part.save_pretrained(directory)
    return model


def from_repo(
    source: str | os.PathLike[str],
    vision_tower: str | os.PathLike[str] | None = None,
    image_token: int | None = None,
    config_fields: Mapping[str, Any] | None = None,
) -> LlavaIgvaForConditionalGeneration | LlavaForConditionalGeneration:
    """The model in a checkpoint of the IGVA or LLaVA repository.

    The sizes of an allocator are read from its weights, which do not tell its heads: where no config does either, they
    are the default of ``LlavaIgvaConfig``, and a warning says so.

    Args:
        source: the directory of the checkpoint, in safetensors or pickled, in one file or in shards.
        vision_tower: as in ``convert``.
        image_token: the id of the token that stands for an image; None to append one to the vocabulary.
        config_fields: as in ``convert``.

    Raises:
        FileNotFoundError: ``source`` holds no checkpoint.
        UserError: a ValueError; a file cannot be read, or the files do not belong together.
        ValueError: ``config_fields`` has an unknown field, or transformers' Llava cannot represent the model.
    """
    source = Path(source)
    file = source / "config.json"
    stated = read_config(source)
    unknown = sorted(set(config_fields or ()) - _OPTIONS)
    if unknown:
        raise UserError(f"config_fields: got {', '.join(unknown)}, need some of {', '.join(sorted(_OPTIONS))}")
    if stated.get("quantization_config"):
        raise UserError(f"{file}: the checkpoint is quantised; need the weights before they were quantised")
    loaded = read_weights(source)
    own = _own_names(stated, any(name.startswith("model.mm_projector.0.cross_attn.") for name in loaded))
    prefixes = (*_TOWER, *_OLD_GAMMAS, *own, *_OTHERS)
    names = {_renamed(name, prefixes): name for name in loaded if not _is_dropped(name)}
    weights = {ours: loaded[theirs] for ours, theirs in names.items()}
    if _EMBEDDINGS not in weights or not weights[_EMBEDDINGS].is_floating_point() or _LINEAR_1 not in weights:
        raise UserError(
            f"{source}: the weights have no language model and projector in a floating dtype; need a whole checkpoint "
            f"of the IGVA or LLaVA repository, neither an adapter nor a quantised one"
        )
    tower = vision_tower or need(stated, "mm_vision_tower", str, f"{file} ({_HOW_TO_NAME_A_TOWER})")
    vision_config = _tower_config(tower)
    if not any(name.startswith("model.vision_tower.") for name in weights):
        weights |= {f"model.vision_tower.{name}": value for name, value in _tower_weights(tower, vision_config).items()}
    vocabulary = weights[_EMBEDDINGS].shape[0]
    image_token = vocabulary if image_token is None else image_token
    for name in {_EMBEDDINGS, "lm_head.weight"} & weights.keys():
        row = weights[name].float().mean(dim=0, keepdim=True).to(weights[name].dtype)
        weights[name] = cat([weights[name], row.expand(max(0, image_token + 1 - vocabulary), -1)])
    config = _transformers_config(file, stated, vision_config, image_token, weights, config_fields)
    is_igva = isinstance(config, LlavaIgvaConfig)
    model_class = LlavaIgvaForConditionalGeneration if is_igva else LlavaForConditionalGeneration
    check_depth(len(weights), config, source)
    check_weights(weights, partial(model_class, config), source, lambda name: names.get(name) or _in_repo(name, own))
    model = load_state_dict(model_class, config, weights, weights[_EMBEDDINGS].dtype)
    if (source / "generation_config.json").exists():
        with reading(source / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def to_repo(
    model: LlavaIgvaForConditionalGeneration | LlavaForConditionalGeneration,
    target: str | os.PathLike[str],
    image_aspect_ratio: str | None = None,
) -> None:
    """Save a model as a checkpoint of the IGVA repository or, if it is a plain Llava, of the LLaVA repository.

    A model with an ``injection`` becomes a checkpoint of Layer_Select_Fuse (I_D). One with a ``fuser`` becomes one of
    MMFuser if it reads four levels, otherwise of Layer_Select_Fuse (E_M). Any other with a plan of its own
    (``mix_plan``) becomes one of a LLaVA that was patched with this plan; its config records the plan, the allocator
    and the balance coefficient.

    The vision tower goes to ``target/vision_tower``, whose absolute path is ``mm_vision_tower`` in the config: edit it
    after moving the checkpoint. If the last token of the vocabulary is the image token, it is left out.

    Args:
        model: of the transformers layout.
        target: a directory.
        image_aspect_ratio: the repository's setting of this name, "pad" if images are padded to squares.

    Raises:
        ValueError: the repository cannot represent the model.
    """
    target = Path(target)
    tower = target / "vision_tower"
    fields = {**_repo_config(model, str(tower.resolve())), "image_aspect_ratio": image_aspect_ratio}
    own = _own_names(fields, isinstance(model.config, LlavaIgvaConfig) and model.config.fuser is not None)
    weights, of_tower = {}, {}
    for name, value in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            of_tower["vision_model." + name.removeprefix("model.vision_tower.")] = value
        else:
            weights[_in_repo(name, own)] = value
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


def _is_dropped(name: str) -> bool:
    return any(part in name for part in _NOT_WEIGHTS)


def _own_names(fields: Mapping[str, Any], has_fuser: bool) -> tuple[tuple[str, str], ...]:
    """The prefixes that only this repository has, by what its config says."""
    if "layer_fusing_strategy" in fields:
        return _EXTERNAL_MODULAR if fields["layer_fusing_strategy"] == "E_M" else _LAYER_SELECT
    if has_fuser:
        return _MMFUSER
    return () if KEY in fields else _AGGREGATOR


def _renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise UserError(
        f"source: the weight {name!r} has no counterpart in the other layout; need a checkpoint of the IGVA or LLaVA "
        f"repository, or of transformers' LLaVA-IGVA or Llava"
    )


def _in_repo(name: str, own: Iterable[tuple[str, str]]) -> str:
    """The name of a weight in a repository, with the prefixes that only this one has."""
    return _renamed(name, [(theirs, ours) for ours, theirs in (*_TOWER[1:], *own, *_OTHERS)])


def _tower_config(tower: str | os.PathLike[str]) -> Any:
    with reading(f"the vision tower {tower}", _HOW_TO_NAME_A_TOWER):
        config = AutoConfig.from_pretrained(tower)
    config = getattr(config, "vision_config", config)
    if config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise UserError(f"the vision tower {tower}: got a {config.model_type!r} model; {_HOW_TO_NAME_A_TOWER}")
    return config


def _tower_weights(tower: str | os.PathLike[str], config: Any) -> dict[str, Tensor]:
    if Path(tower).is_dir():
        check_size(Path(tower), config, partial(AutoModel.from_config, config))
    with quiet(), reading(f"the vision tower {tower}", _HOW_TO_NAME_A_TOWER):
        model, info = AutoModel.from_pretrained(tower, config=config, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(
            f"the vision tower {tower}: its weights lack {len(info['missing_keys'])} of the model's, such as "
            f"{min(info['missing_keys'])}; {_HOW_TO_NAME_A_TOWER}"
        )
    return model.state_dict()


def _transformers_config(
    file: Path,
    stated: dict[str, Any],
    vision_config: Any,
    image_token: int,
    weights: Mapping[str, Tensor],
    config_fields: Mapping[str, Any] | None,
) -> LlavaConfig:
    needs = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat"}
    if "layer_fusing_strategy" in stated:  # there every projector is that one, whatever its config says
        del needs["mm_projector_type"]
    for name, needed in needs.items():
        if stated.get(name, needed) != needed:
            raise UserError(f"{file}: {name} is {stated[name]!r}, transformers' Llava supports only {needed!r}")
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures"}
    text = {name: value for name, value in stated.items() if name in known}
    with reading(file, "need the config that was saved with these weights"):
        text_config = LlamaConfig(**{**text, "vocab_size": weights[_EMBEDDINGS].shape[0]})
    shared: dict[str, Any] = {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_index": image_token,
        "tie_word_embeddings": stated.get("tie_word_embeddings", False),
    }
    if "vit_aggregate_groups" in stated:
        shared |= _igva_fields(file, stated)
    else:
        feature = need(stated, "mm_vision_select_feature", str, file, default="patch")
        if feature not in _FEATURES:
            raise UserError(f"{file}: mm_vision_select_feature is {feature!r}, need {' or '.join(_FEATURES)}")
        shared["vision_feature_select_strategy"] = _FEATURES[feature]
        is_mmfuser = _OFFSETS in weights and "layer_fusing_strategy" not in stated
        if not is_mmfuser:
            shared["vision_feature_layer"] = need(stated, "mm_vision_select_layer", int, file)
        if "layer_fusing_strategy" in stated:
            shared |= _layer_select_fields(file, stated)
        elif is_mmfuser:
            shared |= _mmfuser_fields(file, stated, weights)
        elif KEY in stated:
            shared |= _patch_fields(file, need(stated, KEY, dict, file))
        elif config_fields is None:
            _check_is_plain(file, weights, vision_config.hidden_size)
            return LlavaConfig(**shared)
    shared = {**_allocator_fields(weights), **shared, **(config_fields or {})}
    with reading(file, "--config (config_fields=) takes fields of LlavaIgvaConfig in place of what it says"):
        config = LlavaIgvaConfig(**shared)
    _tell_assumptions(file, config, shared)
    return config


def _igva_fields(file: Path, stated: dict[str, Any]) -> dict[str, Any]:
    groups = need(stated, "vit_aggregate_groups", (str, list), file)
    with reading(f"{file}: vit_aggregate_groups", "need lists of layers, such as '[[1, 2], [3, 4]]'"):
        groups = ast.literal_eval(groups) if isinstance(groups, str) else groups
    fields = {"mix_groups": groups, "vision_feature_layer": need(stated, "vit_base_layer", int, file)}
    if need(stated, "aggregate_by_average", bool, file):
        return {**fields, "aggregation": "uniform"}
    return {**fields, "aggregation": "instruction", **_present(stated, _ALLOCATOR_FIELDS)}


def _layer_select_fields(file: Path, stated: dict[str, Any]) -> dict[str, Any]:
    """What the config of Layer_Select_Fuse says. Its base is the layer before the last."""
    fusing = need(stated, "layer_fusing_strategy", str, file)
    if fusing not in ("I_D", "E_M"):
        raise UserError(f"{file}: layer_fusing_strategy is {fusing!r}, need 'I_D' or 'E_M', which the reference has")
    chosen = {"strategy": need(stated, "layer_using_strategy", str, file)}
    own = {"injection": chosen} if fusing == "I_D" else {"fuser": {"layer_select": chosen}}
    return {"mix_plan": _BASE, "aggregation": "uniform", "vision_feature_layer": -2, **own}


def _mmfuser_fields(file: Path, stated: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the config of MMFuser says: a list of the fuser's levels, with the query behind them."""
    given = need(stated, "mm_vision_select_layer", (list, str, int), file)
    layers = given
    if isinstance(given, str) and given.startswith("list"):  # as its scripts have it: list-22/-17/-12/-7/-2
        with reading(f"{file}: mm_vision_select_layer is {given!r}", "need layers, such as list-22/-17/-12/-7/-2"):
            layers = [int(layer) for layer in given.removeprefix("list").split("/")]
    levels = weights[_OFFSETS].shape[0] // (2 * HEADS * POINTS)
    if not isinstance(layers, list) or len(layers) != levels + 1:
        raise UserError(
            f"{file}: mm_vision_select_layer is {given!r}, need a list of the {levels} levels that the weights of the "
            f"fuser read, and the query"
        )
    return {"fuser": {"levels": layers[:-1]}, "vision_feature_layer": layers[-1]}


def _patch_fields(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What the patch of a LLaVA has recorded in its config."""
    where = f"{file}: {KEY!r}"
    with reading(f"{where}: plan", "need what MixPlan.to_dict writes"):
        plan = MixPlan.from_dict(need(record, "plan", dict, where))
    allocator = need(record, "allocator", dict, where, default={})
    kind = allocator.get("kind")
    if kind not in _AGGREGATIONS:
        raise UserError(f"{where}: the allocator is a {kind!r}, need one of {', '.join(filter(None, _AGGREGATIONS))}")
    heads = _present(allocator, {"num_heads": "allocator_num_heads"})
    balance = need(record, "balance_coefficient", (int, float), where, default=0.0)
    return {"mix_plan": plan, "aggregation": _AGGREGATIONS[kind], "balance_coefficient": float(balance), **heads}


def _present(stated: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: stated[theirs] for theirs, ours in names.items() if stated.get(theirs) is not None}


def _allocator_fields(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the weights tell of the allocator: its kind and its sizes."""
    prefix = "model.weight_allocator."
    shapes = {name.removeprefix(prefix): value.shape for name, value in weights.items() if name.startswith(prefix)}
    for name, aggregation in (("sentence_proj.weight", "instruction"), ("linear_1.weight", "text")):
        if name in shapes:
            blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
            sizes = {"sentence_embed_dim": shapes[name][-1], "allocator_hidden_dim": shapes[name][0]}
            return {"aggregation": aggregation, **sizes, **({"allocator_num_blocks": len(blocks)} if blocks else {})}
    return {"aggregation": "learned" if "scores" in shapes else "uniform"}


def _check_is_plain(file: Path, weights: Mapping[str, Tensor], width: int) -> None:
    reads = weights[_LINEAR_1].shape[-1]
    if _allocator_fields(weights)["aggregation"] != "uniform" or (reads > width and reads % width == 0):
        raise UserError(
            f"{file}: it records no plan, but the model was patched with one: model.mm_projector.0 reads {reads} "
            f"channels, the vision tower has {width}, and an allocator is model.mm_projector.weight_allocator; "
            f"--config (config_fields=) takes the plan, such as '{{\"mix_groups\": 4}}'"
        )


def _tell_assumptions(file: Path, config: LlavaIgvaConfig, known: Mapping[str, Any]) -> None:
    """Warns of what neither the checkpoint nor the caller has said, and what was taken for it."""
    reads = {"instruction": ("sentence_encoder", "allocator_num_heads"), "text": ("sentence_encoder",)}
    assumed = [name for name in reads.get(config.aggregation, ()) if config.plan.num_columns and name not in known]
    if assumed:
        values = " and ".join(f"{name} {getattr(config, name)!r}" for name in assumed)
        warnings.warn(
            f"{file} does not say {' and '.join(assumed)}: assumed {values}; --config (config_fields=) takes others",
            stacklevel=4,
        )


_ALLOCATOR_FIELDS = {"sentence_embedder": "sentence_encoder", "aggregator_num_heads": "allocator_num_heads"}
"""What the weights of an allocator do not tell, by the names of the IGVA repository."""
_ALLOCATOR_SIZES = {
    "sentence_embed_dim": "sentence_embed_dim",
    "aggregator_hidden_dim": "allocator_hidden_dim",
    "aggregator_num_transformers": "allocator_num_blocks",
}


def _repo_config(model: Any, tower: str) -> dict[str, Any]:
    config = model.config
    is_igva = isinstance(config, LlavaIgvaConfig)
    for name, given, needed in (
        ("text_config", config.text_config.model_type, "llama"),
        ("vision_config", config.vision_config.model_type, "clip_vision_model"),
        ("projector_hidden_act", config.projector_hidden_act, "gelu"),
        ("multimodal_projector_bias", config.multimodal_projector_bias, True),
        *((("projector_layernorm_eps", config.projector_layernorm_eps, None),) if is_igva else ()),
        *((("vision_feature_select_strategy", config.vision_feature_select_strategy, "default"),)
          if is_igva and config.mix_plan is None else ()),
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
    features = {ours: theirs for theirs, ours in _FEATURES.items()}
    feature = features[str(config.vision_feature_select_strategy)]
    if is_igva and config.fuser_plan is not None:
        return {**fields, **_fuser_config(config, config.fuser_plan), "mm_vision_select_feature": feature}
    if is_igva and config.injection_plan is not None:
        selected = _layer_select_config(config, config.injection_plan)
        return {**fields, **selected, "mm_vision_select_layer": -2, "mm_vision_select_feature": feature}
    if not is_igva or config.mix_plan is not None:
        fields |= {"mm_vision_select_layer": config.vision_feature_layer, "mm_vision_select_feature": feature}
        return {**fields, **_patch_record(model)} if is_igva else fields
    plan = MixPlan.igva(config.vision_config.num_hidden_layers, config.mix_groups, config.vision_feature_layer)
    groups = [[e.layer for e in plan.blocks[1] if e.column == k] for k in range(plan.num_columns)]
    allocator = {**_ALLOCATOR_FIELDS, **_ALLOCATOR_SIZES}
    return {
        **fields,
        **{theirs: getattr(config, ours) for theirs, ours in allocator.items()},
        "vit_aggregate_groups": repr(groups),
        "vit_base_layer": config.vision_feature_layer,
        "aggregate_by_average": config.aggregation == "uniform",
    }


def _layer_select_config(config: LlavaIgvaConfig, injection: InjectionPlan) -> dict[str, str]:
    """What the config of Layer_Select_Fuse says of a model with an injection."""
    layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    if config.plan != _BASE.resolve(layers[0] + 1):
        raise ValueError(f"mix_plan: got {config.plan}, the Layer_Select_Fuse repository supports only {_BASE}")
    for strategy in STRATEGIES:
        try:
            plan = InjectionPlan.from_dict({"strategy": strategy}, *layers)
        except ValueError:  # a tower or a language model of this size has no such strategy
            continue
        if (plan.taps, plan.layers) == (injection.taps, injection.layers):
            return {"layer_fusing_strategy": "I_D", "layer_using_strategy": strategy}
    raise ValueError(
        f"injection: got {config.injection}, the Layer_Select_Fuse repository supports only {', '.join(STRATEGIES)}"
    )


def _fuser_config(config: LlavaIgvaConfig, fuser: FuserPlan) -> dict[str, Any]:
    """What the config of MMFuser, or of Layer_Select_Fuse for other numbers of levels, says of a fuser."""
    if config.injection is not None:
        raise ValueError(f"injection: got {config.injection}, the repositories of fusers support only None")
    layers, width = config.vision_config.num_hidden_layers, config.vision_config.hidden_size
    base = config.plan.layers[0] - layers - 1
    if len(fuser.levels) == 4 and (fuser.heads, fuser.points) == (HEADS, POINTS):
        return {"mm_vision_select_layer": [*(level - layers - 1 for level in fuser.levels), base]}
    for strategy in EXTERNAL_STRATEGIES if base == -2 else ():
        try:
            plan = FuserPlan.from_dict({"layer_select": {"strategy": strategy}}, layers, width)
        except ValueError:  # a tower of this size has no such strategy
            continue
        if plan == fuser:
            return {
                "layer_fusing_strategy": "E_M",
                "layer_using_strategy": strategy,
                "mm_vision_select_layer": base,
            }
    raise ValueError(
        f"fuser: got {config.fuser}, need four levels, which MMFuser supports, or those of Layer_Select_Fuse's "
        f"strategies {', '.join(EXTERNAL_STRATEGIES)} and the base -2, with {HEADS} heads and {POINTS} points"
    )


def _patch_record(model: LlavaIgvaForConditionalGeneration) -> dict[str, Any]:
    """What the config of a LLaVA that was patched with the model's plan says of it."""
    config, allocator = model.config, model.model.weight_allocator
    plan = config.plan
    record = Record(plan, None if allocator is None else describe(allocator), config.balance_coefficient)
    taps = [block[0].layer for block in plan.blocks if is_tap(block)]
    layers = config.vision_config.num_hidden_layers + 1
    read = config.vision_feature_layer
    # A plain LLaVA reads one layer, and a plan takes the place of that layer's block.
    if taps and not (isinstance(read, int) and read % layers in taps):
        read = taps[0] - layers
    return {
        "mm_hidden_size": plan.num_blocks * config.vision_config.hidden_size,
        "mm_vision_select_layer": read if isinstance(read, int) else -2,
        "sentence_embedder": config.sentence_encoder,
        KEY: record.to_dict(),
    }


def _read_tokenizer(source: Path) -> Any:
    """The tokenizer of a checkpoint; None if there is none."""
    if not any((source / name).is_file() for name in _TOKENIZER_FILES):
        return None
    if not (source / "tokenizer.json").is_file() and (file := source / "tokenizer.model").is_file():
        # Without them transformers takes the file for one of tiktoken's, and says so.
        with reading(f"{file} needs sentencepiece and a protobuf that fits it", "pip install 'igva-kernels[models]'"):
            importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    with reading(f"{source}: the tokenizer"):
        return AutoTokenizer.from_pretrained(source, config=LlamaConfig())  # source's model_type is unknown


def _add_image_token(tokenizer: Any) -> int | None:
    if tokenizer is None:
        return None
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def _image_processor(source: Path, vision_tower: str | os.PathLike[str] | None) -> Any:
    stated = read_config(source)
    tower = vision_tower or need(stated, "mm_vision_tower", str, f"{source / 'config.json'} ({_HOW_TO_NAME_A_TOWER})")
    with reading(f"the vision tower {tower}", _HOW_TO_NAME_A_TOWER):
        processor = CLIPImageProcessor.from_pretrained(tower)
    if stated.get("image_aspect_ratio") != "pad":
        return processor
    return LlavaImageProcessor(**{**processor.to_dict(), "do_pad": True})  # CLIP's, on an image padded to a square


def _processor(config: LlavaConfig, image_processor: Any, tokenizer: Any) -> LlavaProcessor:
    if isinstance(config, LlavaIgvaConfig):
        return LlavaIgvaProcessor.from_config(config, image_processor, tokenizer)
    return LlavaProcessor(
        image_processor, tokenizer, config.vision_config.patch_size, config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )  # fmt: skip
