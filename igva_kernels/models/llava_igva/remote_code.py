"""Checkpoints that load by path where this package is installed and nobody imports it.

The Auto classes know a model by its registration, which is made when ``igva_kernels.models`` is imported. For a process
that does not import it, a checkpoint carries a module of a few lines that does, named in the ``auto_map`` of its
config and of its processor, as the hub's conventions have it; ``trust_remote_code=True`` lets it run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODULE = "llava_igva_from_igva_kernels"
"""The module's name in a checkpoint, as no installed package is called."""

_TEXT = '''\
"""The code of this model is in igva_kernels: pip install "igva-kernels[models]"."""

from igva_kernels.models import (  # noqa: F401
    LlavaIgvaConfig,
    LlavaIgvaForConditionalGeneration,
    LlavaIgvaModel,
    LlavaIgvaProcessor,
)
'''


def auto_map(auto_classes: Mapping[str, str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Which class of the module each Auto class finds.

    Args:
        auto_classes: names of our classes by the names of Auto classes.
        given: an ``auto_map`` that was read. It wins, because a subclass may have put code of its own there; but a
            reference to our module in another repository becomes one to the module beside the checkpoint.
    """
    ours = {auto: f"{MODULE}.{name}" for auto, name in auto_classes.items()}
    return ours | {auto: ref for auto, ref in (given or {}).items() if not ref.endswith(ours.get(auto, "?"))}


def write_module(directory: str | os.PathLike[str]) -> None:
    """Write the module into a checkpoint."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{MODULE}.py").write_text(_TEXT)


class CarriesRemoteCode:
    """Of a config or a processor: what is saved carries the module."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: transformers calls this after loading by ``auto_map``, to copy our source files at the next save."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in transformers, with the module in the directory."""
        write_module(save_directory)
        saved = super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if push_to_hub:  # pushing from here would leave out the module, which transformers has not written
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **kwargs)  # type: ignore[attr-defined]
        return saved
