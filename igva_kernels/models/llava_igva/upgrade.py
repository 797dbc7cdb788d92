"""From a Llava checkpoint to LLaVA-IGVA: the config, and the weights with ``linear_1`` widened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging

from igva_kernels.models.llava_igva.configuration_llava_igva import LlavaIgvaConfig
from igva_kernels.nn import widen


def upgraded_config(llava: LlavaConfig, overrides: dict[str, Any]) -> LlavaIgvaConfig:
    """The Llava's config, with the other fields of ``LlavaIgvaConfig`` at their defaults or as overridden."""
    fields = llava.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        fields.pop(name, None)
    return LlavaIgvaConfig(**{**fields, **overrides})


def upgraded_state_dict(llava: LlavaForConditionalGeneration, config: LlavaIgvaConfig) -> dict[str, Tensor]:
    """The Llava's weights, ``linear_1`` widened: its columns for a layer go to that layer's block, the rest are zeros.
    What an injection adds is zero too, by the last Linear of its projectors.

    Raises:
        ValueError: a layer that the Llava reads has no block of its own in the plan.
    """
    state_dict = llava.state_dict()
    name = "model.multi_modal_projector.linear_1.weight"
    layers = llava.config.vision_feature_layer
    wide = widen(state_dict[name], [layers] if isinstance(layers, int) else layers, config.plan)
    zeros: dict[str, Tensor] = {}
    if config.injection_plan is not None:
        last = {key: x for key, x in state_dict.items() if key.startswith("model.multi_modal_projector.linear_2.")}
        for member in range(len(config.injection_plan.taps)):
            ours = f"model.injection_projectors.{member}"
            zeros |= {key.replace("model.multi_modal_projector", ours): torch.zeros_like(x) for key, x in last.items()}
    return {**state_dict, **zeros, name: wide}


def load_state_dict(
    model_class: Any, config: LlavaConfig, state_dict: dict[str, Tensor], dtype: torch.dtype, new: tuple[str, ...] = ()
) -> Any:
    """A model of this class that shares these weights instead of copying them. Nothing is printed.

    Args:
        model_class: a class of transformers' models.
        config: its config.
        state_dict: its weights.
        dtype: of the model.
        new: names of modules whose missing weights are initialised.

    Raises:
        ValueError: any other weight is missing, left over or of another shape.
    """
    with quiet():
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    wrong = {
        "missing": [name for name in info["missing_keys"] if not any(f".{part}." in name for part in new)],
        "left over": list(info["unexpected_keys"]),
        "of another shape": [name for name, *_ in info["mismatched_keys"]],
    }
    if any(wrong.values()):
        details = "; ".join(f"{what} are {', '.join(sorted(names))}" for what, names in wrong.items() if names)
        raise ValueError(f"the weights do not make a {model_class.__name__}: {details}")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' report on the weights and its progress bar; what matters in the report is raised here."""
    verbosity, draws = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if draws:
            logging.enable_progress_bar()
