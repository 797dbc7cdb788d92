"""What the repositories that grew out of LLaVA have in common; a family adds the plan that its code computes.

The model has ``encode_images``, a vision tower that wraps transformers' (or a copy of it), and a projector that is
``nn.Sequential(Linear, GELU, Linear)``. ``encode_images`` is replaced on the instance: the tower's states are folded
into the sources of the plan while it runs, and the projector takes them. No repository is imported.
"""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass, make_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.integrations.lazy import activation_of, patch_projector
from igva_kernels.nn import Connector, MixInput
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.runtime.context import PerThread
from igva_kernels.streaming import encoder_layers, stream_hidden_states

IMAGE_TOKEN_INDEX = -200
"""The id that stands for an image in ``input_ids`` in all of these repositories."""


def find_host(model: nn.Module) -> Any:
    """The module whose class has ``encode_images`` and the methods around it; None if there is none."""
    methods = ("encode_images", "get_model", "get_vision_tower", "prepare_inputs_labels_for_multimodal")
    for module in model.modules():
        if all(callable(getattr(type(module), name, None)) for name in methods):
            return module
    return None


def has_host(model: nn.Module, setting: str) -> bool:
    """Whether ``model`` contains a host whose config has ``setting``."""
    host = find_host(model)
    return host is not None and hasattr(host.config, setting)


def check_host(host: Any, *arguments: str) -> Any:
    """The host's vision tower.

    Raises:
        NotImplementedError: ``encode_images`` takes other arguments, or the tower encodes at several scales.
        ValueError: the tower is not loaded.
    """
    found = tuple(inspect.signature(type(host).encode_images).parameters)[1:]
    if found != arguments:
        raise NotImplementedError(
            f"model: {type(host).__name__}.encode_images takes {', '.join(found)}, need {', '.join(arguments)}: "
            f"this version of the repository is not known"
        )
    tower = host.get_vision_tower()
    if tower is None or not tower.is_loaded:
        raise ValueError("model: its vision tower is not loaded; call vision_tower.load_model() before the patch")
    if hasattr(tower, "s2_scales"):
        raise NotImplementedError(f"model: its {type(tower).__name__} encodes at several scales, need one")
    return tower


def num_states(tower: Any) -> int:
    """How many hidden states the tower returns."""
    return len(encoder_layers(tower.vision_tower)) + 1


def patch_mlp(edits: PatchHandle, projector: nn.Module, name: str, impl: str) -> None:
    """Let an ``nn.Sequential(Linear, activation, Linear)`` take layers.

    Raises:
        NotImplementedError: the projector has another form.
    """
    check_mlp(projector, name)
    patch_projector(edits, projector, _mlp_children, activation_of(projector[1], f"{name}[1]"), impl, name)


def check_mlp(projector: Any, name: str) -> None:
    """Raises NotImplementedError unless the projector has two Linears (``mlp2x_gelu``)."""
    parts = [key for key in projector._modules if key.isdigit()]
    if not isinstance(projector, nn.Sequential) or len(parts) != 3:
        raise NotImplementedError(
            f"{name}: got a {type(projector).__name__} of {len(parts)} modules, need Linear, activation, Linear"
        )


def _mlp_children(projector: Any) -> Connector:
    return Connector(None, projector[0], projector[1], projector[2])


def encode(tower: Any, images: Tensor, plan: MixPlan, skip_tokens: int, no_grad: bool = True) -> MixInput:
    """The layers of ``images`` ``[I, 3, height, width]`` on their way to the projector.

    Args:
        tower: the repository's wrapper of the tower.
        images: of any floating dtype.
        plan: over all hidden states.
        skip_tokens: as in ``layer_mix``.
        no_grad: whether the repository runs its tower under ``torch.no_grad``.
    """
    inner = tower.vision_tower
    with torch.set_grad_enabled(torch.is_grad_enabled() and not no_grad), stream_hidden_states(inner, plan) as stream:
        inner(images.to(device=tower.device, dtype=tower.dtype), output_hidden_states=False)
    return MixInput(tuple(stream.sources), None, None, None, stream.plan, skip_tokens, "gelu", "auto")


class Instructions(PerThread):
    """What a forward passes around the host's own methods: sentence embeddings inwards, layer weights outwards."""

    def __init__(self) -> None:
        self.sentence_embeds: Tensor | None = None
        self.layer_weights: Tensor | None = None


def rows_of_images(sentence_embeds: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The embedding of each image or tile ``[I, E]``, from one per sample ``[B, E]``.

    Args:
        sentence_embeds: one row per sample.
        arguments: those of ``prepare_inputs_labels_for_multimodal``. ``images`` is ``[B, 3, height, width]``, or for
            each image, in order, one ``[3, height, width]`` or its tiles ``[n, 3, height, width]``. A sample without
            an image token has one image all the same, which is not used.

    Raises:
        ValueError: the images are more or fewer than the places for them.
    """
    input_ids, images, mask = (arguments[name] for name in ("input_ids", "images", "attention_mask"))
    places = input_ids == IMAGE_TOKEN_INDEX
    if mask is not None:
        places = places & mask.bool()
    per_sample = places.sum(dim=1).clamp_min(1)
    if len(images) != per_sample.sum():
        raise ValueError(
            f"images: got {len(images)}, need {per_sample.sum()}: the samples have {per_sample.tolist()} places"
        )
    several = isinstance(images, list) or images.ndim == 5
    tiles = [image.shape[0] if image.ndim == 4 else 1 for image in images] if several else [1] * len(images)
    rows = sentence_embeds.repeat_interleave(per_sample.to(sentence_embeds.device), dim=0)
    return rows.repeat_interleave(torch.tensor(tiles, device=rows.device), dim=0)


def add_to_loss(outputs: Any, term: Tensor) -> Any:
    """The outputs of a forward with ``labels``, a dict or a tuple, with ``term`` added to the loss."""
    if isinstance(outputs, tuple):
        return (outputs[0] + term, *outputs[1:])
    outputs["loss"] = outputs["loss"] + term
    return outputs


def add_to_outputs(outputs: Any, name: str, value: Tensor) -> Any:
    """The outputs of a forward, a dict or a tuple, with one more value at their end.

    An output class of transformers is exchanged for one that declares the value: whoever takes outputs apart and puts
    them together again (DDP with ``find_unused_parameters``, pickle) calls their class with it.
    """
    if isinstance(outputs, tuple):
        return (*outputs, value)
    if is_dataclass(type(outputs)):
        return _make_outputs(type(outputs), name, {**outputs, name: value})
    outputs[name] = value
    return outputs


def _make_outputs(base: type, name: str, values: dict[str, Any]) -> Any:
    return _outputs_class(base, name)(**values)


@cache
def _outputs_class(base: Any, name: str) -> Any:
    """``base``, an output class of transformers, with one more field. Pickle has it made anew."""

    def reduce(self: Any) -> Any:
        return _make_outputs, (base, name, dict(self))

    namespace = {"__module__": __name__, "__doc__": base.__doc__, "__reduce__": reduce}
    return make_dataclass(base.__name__, [(name, Any, None)], bases=(base,), namespace=namespace)
