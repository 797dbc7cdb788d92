"""Reads the files of a checkpoint and compares them with its config, before anything of that size is allocated.

A download that broke off, a Git LFS pointer, another model's weights: each is a ``UserError`` that names the file
and says what to do. transformers would initialise what is missing at random and go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igva_kernels.models.llava_igva.upgrade import quiet
from igva_kernels.runtime.errors import UserError, reading
from igva_kernels.runtime.files import need, read_json, read_tensors, some

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

_PARTS_OF_CHECKPOINTS = {
    "adapter_config.json": "it is a LoRA adapter; merge it into its base with scripts/merge_lora_weights.py of the "
    "LLaVA repository, and convert the result",
    "non_lora_trainables.bin": "it is what training with LoRA saved beside the adapter; merge both into their base "
    "with scripts/merge_lora_weights.py of the LLaVA repository, and convert the result",
    "mm_projector_f.bin": "it has the projectors alone, as stage 1 of Layer_Select_Fuse saves them; load them into the "
    "model with igva_kernels.integrations.layer_select_fuse.load_projectors, save that with save_pretrained, and "
    "convert the result",
    "mm_projector.bin": "it has the projector alone, as stage 1 saves it; load it into its base with the repository's "
    "load_pretrained_model(DIRECTORY, BASE, name), save that with save_pretrained, and convert the result",
}
"""By a file that gives it away: what a directory without weights is, and what to do with it."""


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        FileNotFoundError: there is none; the message says what the directory is, where that can be told.
        UserError: it is not a JSON object, or names no ``model_type``.
    """
    file = directory / "config.json"
    if not file.is_file():
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a directory; need the directory of a checkpoint")
        raise FileNotFoundError(f"{directory} holds no config.json{_what_it_is(directory)}")
    fields = read_json(file)
    need(fields, "model_type", str, file)
    return fields


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, in safetensors or pickled, in one file or in shards.

    Nothing but tensors is unpickled. Files in a format that allows it are mapped into memory, not read.

    Raises:
        FileNotFoundError: there are none; the message says what the directory is, where that can be told.
        UserError: a file is damaged, missing, or holds something else.
    """
    for name in WEIGHT_FILES:
        for file in (directory / f"{name}.index.json", directory / name):
            if file.is_file():
                return read_tensors(file)
    raise FileNotFoundError(
        f"{directory} holds neither {' nor '.join(WEIGHT_FILES)}, whole or in shards{_what_it_is(directory)}"
    )


def check_weights(
    weights: Mapping[str, Tensor], make: Callable[[], torch.nn.Module], where: object, rename: Callable[[str], str]
) -> None:
    """Compares names and shapes with those of the model that ``make`` makes, which is made on the meta device.

    Args:
        weights: by their names in the model.
        make: returns the model.
        where: what the message names.
        rename: from a name in the model to the one in the checkpoint.

    Raises:
        UserError: a weight is missing, left over or of another shape.
    """
    with torch.device("meta"), reading(where, "need the config that was saved with these weights"):
        model = make()
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    missing = [rename(name) for name in wanted if name not in weights and name not in tied]
    left = [rename(name) for name in weights if name not in wanted]
    wrong = [
        f"{rename(name)} is {list(weights[name].shape)} in place of {shape}"
        for name, shape in wanted.items()
        if name in weights and list(weights[name].shape) != shape
    ]
    told = {"missing: ": missing, "left over: ": left, "": wrong}
    if any(told.values()):
        details = "; ".join(f"{what}{some(names)}" for what, names in told.items() if names)
        raise UserError(f"{where}: the weights are not those of the model in its config.json: {details}")


def check_size(directory: Path, config: Any, make: Callable[[], torch.nn.Module]) -> None:
    """Refuses a checkpoint in transformers' layout whose weights are fewer than those of its config's model.

    The names in such files differ between versions of transformers, the number of values does not.

    Raises:
        FileNotFoundError: there are no weights.
        UserError: they cannot be read, or are fewer.
    """
    weights = read_weights(directory)
    check_depth(len(weights), config, directory)
    with torch.device("meta"), reading(directory, "need the config that was saved with these weights"):
        needed = sum(parameter.numel() for parameter in make().parameters())
    found = sum(value.numel() for value in weights.values())
    if found < needed:
        raise UserError(
            f"{directory}: its weights have {found / 1e6:.3g} M values, and the model in its config.json has "
            f"{needed / 1e6:.3g} M: they do not belong together; get the whole checkpoint"
        )


def load_pretrained(model_class: Any, directory: Path) -> Any:
    """``from_pretrained`` of a directory, where nothing may be missing.

    Raises:
        FileNotFoundError: there is no checkpoint.
        UserError: it is another model's, incomplete or damaged.
    """
    read_config(directory)
    with reading(directory, "need a checkpoint of this model in transformers' layout"):
        config = model_class.config_class.from_pretrained(directory)
    check_size(directory, config, partial(model_class, config))
    with quiet(), reading(directory):
        model, info = model_class.from_pretrained(directory, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(
            f"{directory}: its weights lack {some(sorted(info['missing_keys']))}; need a checkpoint of a "
            f"{model_class.__name__}"
        )
    return model


def check_depth(tensors: int, config: Any, where: object) -> None:
    """Refuses a config of more layers than the checkpoint has tensors: even on meta such a model takes for ever."""
    for name in ("text_config", "vision_config"):
        layers = getattr(getattr(config, name, None), "num_hidden_layers", None)
        if isinstance(layers, int) and layers > tensors:
            raise UserError(
                f"{where}: the {name} has {layers} layers and the weights are {tensors} tensors: they do not belong "
                f"together; get the whole checkpoint"
            )


def _what_it_is(directory: Path) -> str:
    return next((f": {what}" for name, what in _PARTS_OF_CHECKPOINTS.items() if (directory / name).exists()), "")
