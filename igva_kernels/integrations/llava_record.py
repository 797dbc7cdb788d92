"""What a plain LLaVA that was given a plan keeps of it: a record in its config, and the weights in its checkpoints.

LLaVA's own loader builds the projector from the config and drops the weights that this projector does not name. So the
config records the plan and the allocator, and ``read_projector`` finds in any file that LLaVA's scripts write what
belongs to the projector, the allocator in it included.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from igva_kernels.nn import LearnedWeights, TextAllocator, WeightAllocator
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.runtime.errors import UserError
from igva_kernels.runtime.files import read_tensors

KEY = "igva_kernels"
"""The record's name in the config."""

FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "non_lora_trainables.bin",
    "mm_projector.bin",
)
"""Where a projector may be in a folder. A whole model comes first: published ones hold stage 1's projector as well."""

_PROJECTOR = "mm_projector."


class Record(NamedTuple):
    """A plan with what it needs to be attached again."""

    plan: MixPlan
    allocator: dict[str, Any] | None
    """``kind`` and the arguments of its constructor; None for a plan without weight columns."""
    balance_coefficient: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON config."""
        return {**self._asdict(), "plan": self.plan.to_dict()}

    @classmethod
    def of(cls, config: Any) -> Record | None:
        """What a config records; None where it records nothing.

        Raises:
            ValueError: it records something else.
        """
        data = getattr(config, KEY, None)
        if data is None:
            return None
        try:
            return cls(MixPlan.from_dict(data["plan"]), data["allocator"], float(data["balance_coefficient"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"config.{KEY}: got {data!r}, need what ik.patch writes: plan, allocator, balance_coefficient"
            ) from error


def describe(allocator: nn.Module) -> dict[str, Any]:
    """The allocator's kind and the arguments of its constructor. Of a class from elsewhere, its name alone."""
    sizes: dict[str, Any] = {}
    if isinstance(allocator, WeightAllocator):
        sizes = {
            "sentence_dim": allocator.sentence_proj.in_features, "vision_dim": allocator.cls_proj.in_features,
            "num_weights": allocator.head.out_features, "hidden_dim": allocator.head.in_features,
            "num_blocks": len(allocator.blocks),
            "num_heads": allocator.blocks[0].cross_attention.num_heads if len(allocator.blocks) else 1,
        }  # fmt: skip
    elif isinstance(allocator, TextAllocator):
        first, second = allocator.linear_1, allocator.linear_2
        sizes = {
            "sentence_dim": first.in_features,
            "num_weights": second.out_features,
            "hidden_dim": first.out_features,
        }
    elif isinstance(allocator, LearnedWeights):
        sizes = {"num_weights": allocator.scores.numel()}
    return {"kind": type(allocator).__name__, **sizes}


def rebuild(description: dict[str, Any]) -> nn.Module:
    """The allocator that ``describe`` described, on the meta device: it has no weights, and no random number is drawn.

    Raises:
        ValueError: its class is not one of this package.
    """
    kinds = {kind.__name__: kind for kind in (WeightAllocator, TextAllocator, LearnedWeights)}
    sizes = {name: value for name, value in description.items() if name != "kind"}
    if description.get("kind") not in kinds or not sizes:
        raise ValueError(
            f"allocator: got None, the config records a {description.get('kind')}, which is none of "
            f"{', '.join(kinds)}; need the module itself"
        )
    with torch.device("meta"):
        return kinds[description["kind"]](**sizes)


def read_projector(weights: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The parameters of ``mm_projector`` by their names in it, from a file or folder that a LLaVA script has written.

    Raises:
        ValueError: there is no such file or folder, it cannot be read, or no projector is in it.
    """
    path = Path(weights)
    if not path.exists():
        raise ValueError(f"weights: there is no file or folder {str(path)!r}; need a checkpoint of LLaVA's scripts")
    files = [path / name for name in FILES if (path / name).is_file()] if path.is_dir() else [path]
    for file in files:
        found = _of_projector(file)
        if found:
            return found
    looked = ", ".join(file.name for file in files) or f"no file of LLaVA's ({', '.join(FILES)})"
    raise ValueError(f"weights: no mm_projector in {str(path)!r}, which has {looked}; need a checkpoint that has one")


def _of_projector(file: Path) -> dict[str, Tensor]:
    try:
        found = read_tensors(file, lambda name: _PROJECTOR in name)
    except UserError as error:
        raise ValueError(f"weights: {str(file)!r} cannot be read: {error}") from error
    return {name.partition(_PROJECTOR)[2]: value for name, value in found.items()}
