"""Layer_Select_Fuse (arXiv 2503.06063).

External direct fusion (E_D) concatenates layers, or means of layers, in front of one MLP, the base last. External
modular fusion (E_M) has MMFuser's block there: the base reads the others by deformable attention. Internal direct
fusion (I_D) has an MLP for each layer, and adds what it returns to the image tokens in front of a layer of the language
model. Which layers these are is read from the model, whose code knows them.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from igva_kernels.integrations.handle import PatchHandle
from igva_kernels.integrations.lazy import set_forward, set_method
from igva_kernels.integrations.mmfuser import encoder, patch_projector
from igva_kernels.integrations.research import check_host, encode, find_host, has_host, num_states, patch_mlp
from igva_kernels.nn import MixInput
from igva_kernels.ops.inject_tokens import inject_tokens, token_rows
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.runtime.context import PerThread
from igva_kernels.runtime.errors import UserError
from igva_kernels.runtime.files import read_tensors, some

DESCRIPTION = "the Layer_Select_Fuse repository (E_D, E_M, I_D)"

_BASE = "mm_projector_f"


def matches(model: nn.Module) -> bool:
    """Whether ``model`` contains a model of the repository."""
    return has_host(model, "layer_fusing_strategy")


def apply(model: nn.Module, edits: PatchHandle, impl: str = "auto") -> None:
    """Serve E_D, E_M and I_D.

    E_D: the projector mixes what ``encode_images`` stacks, averages and concatenates. E_M: see ``mmfuser``. I_D: the
    tower keeps no state but those that are projected, and the features are added to the image tokens by one operator a
    layer, where the repository's code has a loop over the samples. That loop needs one image a sample; with the patch,
    several images, also apart, find their own places.

    Args:
        model: contains a model of the repository.
        edits: the handle of the patch.
        impl: as in ``layer_mix_mlp``, ``deform_attn`` and ``inject_tokens``.

    Raises:
        NotImplementedError: another strategy, or a model that its code could not run with this one.
    """
    host = find_host(model)
    tower = check_host(host, "images")
    fusing = host.config.layer_fusing_strategy
    if fusing == "E_D":
        _patch_external(host, tower, edits, impl)
    elif fusing == "E_M":
        _patch_modular(host, tower, edits, impl)
    elif fusing == "I_D":
        _patch_internal(host, tower, edits, impl)
    else:
        raise NotImplementedError(
            f"layer_fusing_strategy: got {fusing!r}, need 'E_D', 'E_M' or 'I_D' (in I_M layers attend to features)"
        )


def _skip_tokens(tower: Any) -> int:
    # 'patch' drops token 0 of SigLIP too, although that is no CLS token.
    return 1 if tower.select_feature == "patch" else 0


# ---- external direct fusion ----


def _patch_external(host: Any, tower: Any, edits: PatchHandle, impl: str) -> None:
    using = host.config.layer_using_strategy
    siglip = "clip" not in tower.vision_tower_name  # the repository's own test
    if siglip and using not in ("3-18-23", "latter"):
        raise NotImplementedError(f"layer_using_strategy: got {using!r}, its SigLIP tower has '3-18-23' and 'latter'")
    plan = MixPlan.layer_select(using, "siglip" if siglip else "clip").resolve(num_states(tower))
    patch_mlp(edits, host.get_model().mm_projector_f, f"model.{_BASE}", impl)
    set_method(edits, host, "encode_images", encoder(_BASE, plan, skip_tokens=_skip_tokens(tower), no_grad=False))


# ---- external modular fusion ----


def _patch_modular(host: Any, tower: Any, edits: PatchHandle, impl: str) -> None:
    siglip, feature = "clip" not in tower.vision_tower_name, tower.select_feature
    if feature != ("cls_patch" if siglip else "patch"):
        raise NotImplementedError(
            f"mm_vision_select_feature: got {feature!r}, which leaves no square of patches for E_M; need "
            f"{'cls_patch' if siglip else 'patch'!r} with {'SigLIP' if siglip else 'CLIP'}"
        )
    layers = _selected_layers(tower, host.config.layer_using_strategy)
    patch_projector(edits, host.get_model().mm_projector_f, f"model.{_BASE}", len(layers), impl)
    plan = MixPlan.concat(layers, num_states(tower))
    set_method(edits, host, "encode_images", encoder(_BASE, plan, skip_tokens=_skip_tokens(tower), no_grad=False))


# ---- internal direct fusion ----

_ONE_LAYER = MixPlan.concat([0], 1)


class _Injected(NamedTuple):
    """What one run of the language model injects."""

    features: Sequence[Tensor]
    """``[I, P, H]`` for each layer that injects."""
    token_rows: Tensor
    """int32 ``[B, T]``: the row of a feature ``[I * P, H]`` that each token takes, -1 for none."""


class _Injection(PerThread):
    """On the way from the language model, which is given the features, to its layers, which are not."""

    def __init__(self) -> None:
        self.is_running = False
        self.injected: _Injected | None = None


def _patch_internal(host: Any, tower: Any, edits: PatchHandle, impl: str) -> None:
    core, config = host.get_model(), host.config
    merge = getattr(config, "mm_patch_merge_type", "flat")
    if merge != "flat":
        raise NotImplementedError(f"mm_patch_merge_type: got {merge!r}, need 'flat', as I_D has no other features")
    patch_mlp(edits, core.mm_projector_f, f"model.{_BASE}", impl)  # first, as it knows whether there is a patch already
    # The order of the layers is that of the features. Where two features meet in one layer, the repository drops one.
    layers = [layer for layer in core.layers if layer.has_cross]
    count = len(getattr(core, "mm_projectors", ()))
    if len(layers) != count:
        raise NotImplementedError(
            f"layer_using_strategy: got {config.layer_using_strategy!r}, which has {count} features for {len(layers)} "
            f"of the {len(core.layers)} layers of this language model, need a layer for each"
        )
    plan = MixPlan.concat(_selected_layers(tower, config.layer_using_strategy), num_states(tower))
    if plan.num_blocks != count + 1:
        raise NotImplementedError(
            f"layer_using_strategy: the vision tower selects {plan.num_blocks} layers, need {count + 1}, one for each "
            f"projector"
        )
    for index, projector in enumerate(core.mm_projectors):
        patch_mlp(edits, projector, f"model.mm_projectors[{index}]", impl)
    set_method(edits, host, "encode_images", _internal_encoder(plan, _skip_tokens(tower)))
    injection = _Injection()
    edits.set(core, "injection", injection)
    set_forward(edits, core, _injecting_model(type(core)))
    for index, layer in enumerate(layers):
        edits.set(layer, "has_cross", False)  # so that the model calls it as it calls the others
        edits.set(layer, "injection", injection)
        set_forward(edits, layer, _injecting_layer(index, impl))


def _selected_layers(tower: Any, using: str) -> list[int]:
    """The layers whose features the tower returns, the base last, as its own code selects them among numbered ones."""
    numbered = tuple(torch.full((1, 2, 1), number) for number in range(num_states(tower)))
    try:
        selected = tower.feature_select(SimpleNamespace(hidden_states=numbered))
    except (UnboundLocalError, IndexError) as error:
        raise NotImplementedError(
            f"layer_using_strategy: got {using!r}, for which a {type(tower).__name__} of {len(numbered)} states has no "
            f"features"
        ) from error
    return [int(feature.flatten()[0]) for feature in selected]


def _internal_encoder(plan: MixPlan, skip_tokens: int) -> Callable[[Any, Tensor], list[Tensor]]:
    def encode_images(self: Any, images: Tensor) -> list[Tensor]:
        core = self.get_model()
        mixed = encode(self.get_vision_tower(), images, plan, skip_tokens, no_grad=False)
        projectors = (*core.mm_projectors, core.mm_projector_f)
        return [project(layer) for project, layer in zip(projectors, _one_by_one(mixed), strict=True)]

    return encode_images


def _one_by_one(mixed: MixInput) -> list[MixInput]:
    """Each tap of the plan as the input of a projector of its own."""
    taps = [mixed.hidden_states[block[0].layer] for block in mixed.plan.blocks]
    return [mixed._replace(hidden_states=(tap,), plan=_ONE_LAYER) for tap in taps]


def _injecting_model(model_class: Any) -> Callable[..., Any]:
    method = model_class.forward
    signature = inspect.signature(method)

    @wraps(method)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        injection = self.injection
        try:
            injection.injected, injection.is_running = _to_inject(given), True
            return method(self, *args, **kwargs)
        finally:
            injection.injected, injection.is_running = None, False

    return forward


def _to_inject(arguments: dict[str, Any]) -> _Injected | None:
    """What the arguments of the language model ask for; nothing in a decode step, whose arguments are the prompt's."""
    features, mask = arguments.get("images_features"), arguments.get("image_token_mask")
    if arguments.get("past_key_values") is not None or features is None:
        return None
    return _Injected(features, _token_rows(mask == 1, *features[0].shape[:2]))


def _token_rows(mask: Tensor, images: int, patches: int) -> Tensor:
    """The row of a feature for each token: images follow each other, and a sample without one has one all the same.

    Raises:
        ValueError: the tokens are not those of the images.
    """
    counts = mask.sum(1)
    expected = (counts // patches).clamp_min(1).sum()
    # This waits for the device, as the repository does many times to find the places of the images.
    if expected != images or (counts % patches).any():
        raise ValueError(
            f"images: got {images} of {patches} tokens, and the samples have {counts.tolist()} image tokens: need "
            f"whole images, and one that is not used for a sample without"
        )
    unused = (counts == 0).cumsum(0, dtype=torch.int32) * patches
    return torch.where(mask, token_rows(mask) + unused[:, None], -1)


def _injecting_layer(index: int, impl: str) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        injection = self.injection
        if not injection.is_running:
            raise NotImplementedError(
                f"model: a {type(self).__name__} of I_D ran outside of its language model, where no features are at "
                f"hand; checkpointing of whole layers, which the repository does not have, is not supported"
            )
        if injection.injected is not None:
            features, rows = injection.injected
            device = hidden_states.device  # a device map may have spread the layers
            feature = features[index].to(device)
            hidden_states = inject_tokens(hidden_states, feature, rows.to(device), impl=impl)
        return type(self).forward(self, hidden_states, *args, **kwargs)

    return forward


# ---- the files of stage 1 ----

_PROJECTOR = re.compile(r"(mm_projectors\.\d+|mm_projector_f)\.([^.]+\.[^.]+)$")
_FILES = re.compile(r"mm_projector_(\d+|f)\.bin")


def load_projectors(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load the projectors that stage 1 of the repository has saved: ``mm_projector_f.bin``, and for I_D
    ``mm_projector_0.bin`` and so on.

    The repository's own loader takes file 1 for that of all projectors whose numbers start with 1, and fails where
    there are more than ten ("former", "latter", "all").

    Args:
        model: contains a model of the repository, with the projectors of the strategy.
        folder: where stage 1 has written.

    Raises:
        ValueError: the model is not of the repository, the folder has no such files, one cannot be read, or they are
            not those of the model's projectors.
    """
    host = find_host(model)
    if host is None or not matches(model):
        raise ValueError(f"model: got {type(model).__name__}, need one of {DESCRIPTION}")
    core = host.get_model()
    names = [f"mm_projectors.{index}" for index in range(len(getattr(core, "mm_projectors", ())))]
    loaded = read_projectors(folder)
    if loaded.keys() != {*names, _BASE}:
        raise ValueError(
            f"folder: {str(folder)!r} has the projectors {some(sorted(loaded))}, need {some([*names, _BASE])}"
        )
    for name, state in loaded.items():
        try:
            core.get_submodule(name).load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"folder: {str(folder)!r} does not fit the model's {name}: {error}") from error


def read_projectors(folder: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """The parameters of each projector in a folder of stage 1, by the projector's name in the model and their own.

    Raises:
        ValueError: there is no such folder or file, or one cannot be read.
    """
    files = sorted(path for path in Path(folder).glob("mm_projector_*.bin") if _FILES.fullmatch(path.name))
    found: dict[str, dict[str, Tensor]] = {}
    for file in files:
        try:
            tensors = read_tensors(file)
        except UserError as error:
            raise ValueError(f"folder: {str(file)!r} cannot be read: {error}") from error
        for name, value in tensors.items():
            # File 1 also has the projectors from 10 to 19, as their names start alike: the same as in their own files.
            if match := _PROJECTOR.search(name):
                found.setdefault(match[1], {})[match[2]] = value
    if _BASE not in found:
        raise ValueError(f"folder: {str(folder)!r} has no {_BASE}.bin; need what stage 1 of the repository has saved")
    return found
