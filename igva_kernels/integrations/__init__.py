"""Swaps the fused operator into an existing model: ``patch`` finds the integration that knows the model.

An integration is one module of this package, for one family of host models. It has three names:

    DESCRIPTION                          the models it knows, for error messages
    matches(model) -> bool               whether it knows this one; imports no host library
    apply(model, edits, **options)       change instances, through ``edits.set`` alone

To add a family, add its module here and its name to ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from igva_kernels.integrations.handle import PatchHandle

FAMILIES = (
    "llava_igva",
    "transformers_llava",
    "transformers_deepstack",
    "igva_repo",
    "dense_connector",
    "layer_select_fuse",
    "tgif",
    "mmfuser",
    "llava_repo",
    "transformers_deformable",
)
"""The families' modules, in the order in which they are asked."""


def patch(model: nn.Module, **options: Any) -> PatchHandle:
    """Swap the fused operator into this model instance, until ``revert``.

    No class is changed and no parameter moved: keys and values of the ``state_dict`` stay as they are. The exception is
    a plain LLaVA that is given a ``plan``: its projector is widened, and its config records the plan.

    Args:
        model: a model of a known family, bare or wrapped (peft, DDP, ...).
        options: as the family takes them. All take ``impl``, as in ``layer_mix`` ("auto" by default); the LLaVA
            repository takes ``plan``, ``allocator``, ``balance_coefficient`` and ``weights``, see ``llava_repo.apply``;
            models with DeepStack take ``mergers`` and ``check``, see ``transformers_deepstack.apply``.

    Returns:
        A handle with ``revert()``; as a context manager it reverts at the end of the block. Printed, it says what was
        replaced and which implementation serves it.

    Raises:
        TypeError: ``model`` is no module, or the family does not take one of the options.
        ValueError: the model belongs to no known family, is patched already, or has a method that something else has
            replaced.
        NotImplementedError: a setting of the model that its family cannot serve, or an explicit ``impl`` that nothing
            here can serve; one that cannot serve the model where it is raises it when the model runs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, need a torch.nn.Module")
    families = [import_module(f"{__name__}.{name}") for name in FAMILIES]
    for family in families:
        if family.matches(model):
            handle = PatchHandle()
            try:
                family.apply(model, handle, **options)
            except BaseException:
                handle.revert()
                raise
            return handle
    known = "; ".join(family.DESCRIPTION for family in families)
    raise ValueError(f"model: no integration knows {type(model).__name__}; known are {known}")


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[nn.Module]:
    """The model with the fused operator inside the ``with`` block; arguments and errors are those of ``patch``."""
    with patch(model, **options):
        yield model


__all__ = ["FAMILIES", "PatchHandle", "patch", "patched"]
