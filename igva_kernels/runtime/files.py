"""Reads JSON and files of weights: what cannot be read is a ``UserError`` that names the file and says what to do."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igva_kernels.runtime.errors import UserError, reading

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds something else.
    """
    _refuse_pointer(file)
    with reading(file, "need a JSON object"):
        data = json.loads(file.read_bytes())
    if not isinstance(data, dict):
        raise UserError(f"{file}: got a JSON {type(data).__name__}, need an object")
    return data


def need(fields: Mapping[str, Any], name: str, kind: Any, where: object, default: Any = None) -> Any:
    """``fields[name]``, or the default if it is absent or null.

    Raises:
        UserError: it is of another type, or absent without a default.
    """
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise UserError(f"{where}: it has no {name!r}, which is needed")
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{where}: {name!r} is {value!r}, need {kinds}")
    return value


def read_tensors(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a file by their names: safetensors, a pickle, or the index of shards of these.

    Nothing but tensors is unpickled. Of safetensors only what is wanted is read; a pickle is mapped into memory where
    its format allows it.

    Args:
        file: the file.
        wanted: whether a tensor of this name is.

    Raises:
        UserError: a file is damaged, missing, or holds something else.
    """
    files = _shards(file, wanted) if file.name.endswith(".index.json") else [file]
    return {name: value for each in files for name, value in _read(each, wanted).items()}


def _shards(index: Path, wanted: Callable[[str], bool]) -> list[Path]:
    shards = need(read_json(index), "weight_map", dict, index)
    files = sorted({str(shard) for name, shard in shards.items() if wanted(name)})
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing or not shards:
        names = some(missing) if missing else "no files"
        raise UserError(f"{index}: it names {names}, not in this directory; get the whole checkpoint")
    return [index.parent / file for file in files]


def _read(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    _refuse_pointer(file)
    with reading(file):
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
        try:
            # The format of before torch 1.6 is no zip archive, and cannot be mapped into memory.
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError as error:  # torch's message proposes to load the file all the same
            raise UserError(
                f"{file}: it is no pickle of tensors alone: either damaged, or with objects that could run code, which "
                f"are never loaded; get it again, or in safetensors"
            ) from error
    found = {name: value for name, value in data.items() if wanted(name)} if isinstance(data, dict) else None
    if found is None or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file}: got a pickled {type(data).__name__}, need tensors by their names")
    return found


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{file}: it is a Git LFS pointer in place of the file; run `git lfs pull` in {file.parent}"
            )


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
