"""LLaVA-IGVA: a Llava whose projector reads a mix of the vision tower's layers, weighted by the instruction.

The path of an image: vision tower -> its hidden states -> summaries of the layer groups -> ``WeightAllocator`` (with
the sentence embedding) -> ``LayerMixProjector`` (the hidden states and the weights) -> visual tokens, which take the
places of the image tokens in the prompt. Everything else is transformers' Llava. Where the config has a ``fuser``, the
projector reads one state, to which deformable attention has added what it finds in others. Where it has an
``injection``, further states are projected on their own and added to the image tokens before layers of the language
model.

Symbols: B samples of the batch, S tokens of a prompt, I images, R image places in the prompts of the batch (I without
an ``image_index``), P visual tokens per image, E width of the sentence embedding, K weight columns, H width of the
language model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import AutoModel
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from igva_kernels.models.llava_igva.configuration_llava_igva import LlavaIgvaConfig
from igva_kernels.models.llava_igva.image_features import ImageFeatures
from igva_kernels.models.llava_igva.injection import InjectedImages, rows_of_copies
from igva_kernels.models.llava_igva.sentence_encoder import encode_sentences
from igva_kernels.models.llava_igva.upgrade import load_state_dict, upgraded_config, upgraded_state_dict
from igva_kernels.nn import (
    DeformableFuser,
    LayerMixProjector,
    LayerProjectors,
    LearnedWeights,
    TextAllocator,
    TokenInjection,
    WeightAllocator,
    balance_loss,
    column_summaries,
)
from igva_kernels.ops.inject_tokens import token_rows
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.runtime.context import has_values
from igva_kernels.streaming import encoder_layers, stream_hidden_states


@dataclass
class LlavaIgvaImageOutput(BaseModelOutputWithPooling):
    """What ``LlavaModel.get_image_features`` returns, and the layer weights.

    ``pooler_output`` holds the visual tokens, one ``[P, H]`` per image place; ``last_hidden_state [I, T, D]`` is the
    tower's, and ``hidden_states`` and ``attentions`` are too, where they are asked for.
    """

    layer_weights: Tensor | None = None
    """``[R, K]`` in fp32; None if the plan has no weights."""
    injected_features: tuple[Tensor, ...] | None = None
    """What the language model adds to the visual tokens, ``[R, P, H]`` for each injection; None if there is none."""


@dataclass
class LlavaIgvaModelOutputWithPast(LlavaModelOutputWithPast):
    """What ``LlavaModel`` returns, and the layer weights; ``image_hidden_states`` is ``[R, P, H]``."""

    layer_weights: Tensor | None = None
    """``[R, K]`` in fp32, in the order of the image places; None if the plan has no weights. For a batch without
    images, None, or R = 0 if the connector ran on a blank image."""
    images_per_sample: Tensor | None = None
    """int64 ``[B]``: how many rows of ``layer_weights`` belong to each sample."""


@dataclass
class LlavaIgvaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """What ``LlavaForConditionalGeneration`` returns, and the layer weights."""

    layer_weights: Tensor | None = None
    """``[R, K]`` in fp32, in the order of the image places; None if the plan has no weights. For a batch without
    images, None, or R = 0 if the connector ran on a blank image."""


class _FrozenTowerMixin:
    """Freezes the tower again after loading, if the config says so: loading makes every parameter trainable."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """``PreTrainedModel.from_pretrained``."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.freeze_vision_tower:
            model.base_model.vision_tower.requires_grad_(False)
        return loaded


class LlavaIgvaModel(_FrozenTowerMixin, LlavaModel):
    """Vision tower, weight allocator, projector over the mixed layers, and language model without its head."""

    config_class = LlavaIgvaConfig
    trainer_adds_balance = False
    """Whether the loss that is being computed has the balance loss, although the model was given no labels."""

    def __init__(self, config: LlavaIgvaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)  # LlavaModel's would build a projector for one layer
        plan = config.plan
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.vision_tower.requires_grad_(not config.freeze_vision_tower)
        self.weight_allocator = _allocator(config)
        self.multi_modal_projector = _projector(config, plan, config.projector_layernorm_eps)
        self.fuser = None
        if (fuser := config.fuser_plan) is not None:
            self.fuser = DeformableFuser(
                config.vision_config.hidden_size, len(fuser.levels), fuser.heads, fuser.points,
                skip_tokens=config.skip_tokens, impl=config.impl,
            )  # fmt: skip
            self.multi_modal_projector.skip_tokens = 0  # which the fuser has left out
        self.language_model = AutoModel.from_config(config.text_config)
        self.injection_projectors = None
        if (injection := config.injection_plan) is not None:
            states = config.vision_config.num_hidden_layers + 1
            taps = (MixPlan.concat([tap], states) for tap in injection.taps)
            self.injection_projectors = LayerProjectors(_projector(config, tap) for tap in taps)
            by_layer = {layer: member for member, layer in enumerate(injection.layers)}
            self.token_injection = TokenInjection(by_layer, impl=config.impl)
            self.token_injection.attach(self.language_model, encoder_layers(self.language_model))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' initial values, but a fuser's are those of its class; it comes after its Linears."""
        super()._init_weights(module)
        if isinstance(module, DeformableFuser):
            parameters = list(module.parameters())
            loaded = [p for p in parameters if getattr(p, "_is_hf_initialized", False)]
            if len(loaded) < len(parameters):
                values = [p.clone() for p in loaded]
                module.reset_parameters()
                for parameter, value in zip(loaded, values, strict=True):
                    parameter.copy_(value)

    def train(self, mode: bool = True) -> LlavaIgvaModel:
        """A frozen tower stays in eval mode: without dropout, and not recomputed under gradient checkpointing."""
        super().train(mode)
        if not self._tower_learns:
            self.vision_tower.eval()
        return self

    @property
    def _tower_learns(self) -> bool:
        return any(p.requires_grad for p in self.vision_tower.parameters())

    def encode_sentences(self, instructions: Sequence[str]) -> Tensor:
        """Embeddings ``[B, E]`` of instructions given as text, by the config's encoder and without gradients.

        Raises:
            ValueError, TypeError, ImportError: as in ``sentence_encoder.encode_sentences``.
        """
        return encode_sentences(self.config.sentence_encoder, instructions, self.device)

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> ImageFeatures:
        """Run the vision tower once; ``forward`` and ``generate`` take the result in place of pixels.

        Args:
            pixel_values: ``[I, 3, height, width]``.

        Returns:
            The reduced sources of the plan (IGVA: 5 states per image, not 25), in the tower's dtype, without gradients.

        Raises:
            ValueError: ``pixel_values`` has another shape.
        """
        _check_pixels(pixel_values)
        return self._streamed_states(pixel_values)[0]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        sentence_embeds: Tensor | None = None,
        image_features: ImageFeatures | None = None,
        image_index: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaIgvaImageOutput:
        """Visual tokens of images and their instructions.

        Args:
            pixel_values: ``[I, 3, height, width]``.
            sentence_embeds: ``[R, E]``, one per row of the result; needed if an allocator reads the instructions.
            image_features: what ``encode_images`` returned, in place of pixels; the tower does not run then.
            image_index: int64 ``[R]``, the image that each row reads; None where row r reads image r.
            vision_feature_layer, vision_feature_select_strategy: None, or what the config says.
            image_sizes: None; images are of one size.
            kwargs: for the vision tower. ``output_hidden_states`` keeps all of its states, which else are streamed.

        Raises:
            ValueError: both pixels and features or neither; features of another plan, or with arguments for the tower;
                sentence embeddings missing or of the wrong shape; arguments of Llava that the config settles.
        """
        self._check_settled(vision_feature_layer, vision_feature_select_strategy, image_sizes)
        features, tower = self._image_states(pixel_values, image_features, **kwargs)
        tokens, weights = self._connect(features, sentence_embeds, image_index)
        injected = None if self.injection_projectors is None else self._injected_features(features, image_index)
        return LlavaIgvaImageOutput(
            **{**tower, "pooler_output": list(tokens)}, layer_weights=weights, injected_features=injected
        )

    def embed(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_features: ImageFeatures | None = None,
        image_index: Tensor | None = None,
        sentence_embeds: Tensor | None = None,
        instructions: Sequence[str] | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        always_connect: bool = False,
    ) -> tuple[Tensor, InjectedImages | None, LlavaIgvaModelOutputWithPast]:
        """The prompt's embeddings ``[B, S, H]`` with visual tokens in their places, what the language model injects
        besides, and the outputs for the images.

        Arguments as in ``forward``. In training mode, or with ``always_connect``, a batch without images runs the
        connector on a blank image and discards the result: the connector's parameters get zero gradients, and every
        rank of a sharded run makes the same calls.

        Raises:
            ValueError: arguments that contradict each other, or image places that do not fit the images.
        """
        _check_one_is_given(input_ids=input_ids, inputs_embeds=inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        places = self._image_places(input_ids, inputs_embeds)
        encoded = (mm_encoder_outputs or {}).get("image")
        given = pixel_values is not None or image_features is not None or encoded is not None
        if not given and not (self.training or always_connect):
            return inputs_embeds, None, LlavaIgvaModelOutputWithPast()

        batch = inputs_embeds.shape[0]
        if instructions is not None and sentence_embeds is None:
            sentence_embeds = self.encode_sentences(instructions)
        if encoded is not None:
            if pixel_values is not None or image_features is not None:
                raise ValueError("mm_encoder_outputs: got pixel_values or image_features too, need one of the three")
            tokens, weights = torch.stack(list(encoded.pooler_output)), encoded.get("layer_weights")
            if weights is not None and len(weights) != len(tokens):
                weights = None  # transformers repeats the tokens for every beam, but not their weights
            per_sample = self._images_per_sample(places, len(tokens), tokens.shape[1], whole=weights is not None)
            injected = self._injected_of_output(encoded, len(tokens), places)
        elif given:
            features, _ = self._image_states(pixel_values, image_features)
            rows = len(features) if image_index is None else image_index.shape[0]
            per_sample = self._images_per_sample(places, rows, features.num_tokens - self.config.skip_tokens)
            if sentence_embeds is not None:
                if sentence_embeds.shape[0] != batch:
                    raise ValueError(f"sentence_embeds: got {sentence_embeds.shape[0]} rows for {batch} samples")
                sentence_embeds = sentence_embeds.repeat_interleave(per_sample, dim=0, output_size=rows)
            tokens, weights = self._connect(features, sentence_embeds, image_index)
            injected = self._injected_images(features, image_index, places)
        else:
            size = self.config.vision_config.image_size
            blank, _ = self._image_states(
                inputs_embeds.new_zeros(1, self.config.vision_config.num_channels, size, size)
            )
            tokens, weights = self._connect(blank, inputs_embeds.new_zeros(1, self.config.sentence_embed_dim), None)
            # No rows, but still in the graph: ZeRO-3 counts the outputs that every rank differentiates.
            weights = None if weights is None else weights[:0]
            places, per_sample = torch.zeros_like(places), places.new_zeros(batch, dtype=torch.int64)
            injected = self._injected_images(blank, None, places)
        tokens = tokens.to(inputs_embeds.device, inputs_embeds.dtype)
        inputs_embeds = inputs_embeds.masked_scatter(places.unsqueeze(-1), tokens)
        return (
            inputs_embeds,
            injected,
            LlavaIgvaModelOutputWithPast(
                image_hidden_states=tokens if given else None, layer_weights=weights, images_per_sample=per_sample
            ),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        sentence_embeds: Tensor | None = None,
        instructions: Sequence[str] | None = None,
        image_features: ImageFeatures | None = None,
        image_index: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        injected_images: InjectedImages | None = None,
        always_connect: bool = False,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaIgvaModelOutputWithPast:
        """Hidden states of the language model ``[B, S, H]`` and the layer weights.

        Args:
            input_ids: ``[B, S]``, with P image tokens per image; a sample has none, one or several images.
            pixel_values: ``[I, 3, height, width]``, the images of all samples in the order of their places.
            attention_mask: ``[B, S]``.
            position_ids: ``[B, S]``.
            past_key_values: the cache of the language model.
            inputs_embeds: ``[B, S, H]`` in place of ``input_ids``.
            sentence_embeds: ``[B, E]``, one instruction per sample, however many images it has; needed with images if
                an allocator reads the instructions.
            instructions: B strings in place of ``sentence_embeds``.
            image_features: what ``encode_images`` returned, in place of ``pixel_values``.
            image_index: int64 ``[R]``, the image that each place reads, so that several places can share one.
            mm_encoder_outputs: ``{"image": get_image_features(...)}`` in place of the images (transformers >= 5.20).
            injected_images: what ``embed`` returned beside the ``inputs_embeds``, if these hold visual tokens already
                and the config has an ``injection``.
            always_connect: whether a batch without images runs tower and connector outside training mode too.
            vision_feature_layer, vision_feature_select_strategy, image_sizes: as in ``get_image_features``.
            kwargs: for the language model.

        Raises:
            ValueError: arguments that contradict each other, image places that do not fit the images, or arguments of
                Llava that the config settles.
        """
        self._check_settled(vision_feature_layer, vision_feature_select_strategy, image_sizes)
        inputs_embeds, injected, images = self.embed(
            input_ids, inputs_embeds, pixel_values=pixel_values, image_features=image_features, image_index=image_index,
            sentence_embeds=sentence_embeds, instructions=instructions, mm_encoder_outputs=mm_encoder_outputs,
            always_connect=always_connect,
        )  # fmt: skip
        self._check_balance(images.layer_weights, always_connect)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values,
            **self._injection(injected if injected_images is None else injected_images, len(inputs_embeds)), **kwargs,
        )  # fmt: skip
        return LlavaIgvaModelOutputWithPast(**{**images, **outputs})

    def _check_balance(self, layer_weights: Tensor | None, is_in_loss: bool) -> None:
        """Warns where a trainer computes a loss of its own, in which the balance loss is missing without a trace."""
        if is_in_loss or self.trainer_adds_balance or not self.training or torch.compiler.is_compiling():
            return
        learns = layer_weights is not None and len(layer_weights) > 0 and layer_weights.requires_grad
        if learns and self.config.balance_coefficient:
            warnings.warn(
                "LLaVA-IGVA learns without its balance loss, because the model was given no labels; "
                "igva_kernels.models.BalanceLossMixin adds it to the loss of a trainer, and balance_coefficient=0 in "
                "the config says that none is wanted",
                stacklevel=2,
            )

    def _check_settled(self, layer: Any, strategy: str | None, image_sizes: Any) -> None:
        """Llava takes these arguments per call; here the weights of the connector fit one answer."""
        config = self.config
        given = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
        for name, value in given.items():
            if value is not None and value != getattr(config, name):
                raise ValueError(
                    f"{name}: got {value!r}, need None or the config's {getattr(config, name)!r}; the plan of the "
                    f"config, {config.plan}, says which layers are read"
                )
        if image_sizes is not None:
            raise ValueError("image_sizes: need None, because all images have one size and the same number of tokens")

    def _run_tower(
        self, pixel_values: Any, output_hidden_states: Any = None, **kwargs: Any
    ) -> tuple[ImageFeatures, dict[str, Any]]:
        """What the connector reads from the tower, the sources of its plan or every state; and the tower's output."""
        _check_pixels(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.vision_tower.config.output_hidden_states
        differentiates = torch.is_grad_enabled() and self._tower_learns
        streams = self.config.stream_hidden_states and self.multi_modal_projector.impl != "reference"
        with torch.set_grad_enabled(differentiates):
            if streams and not (output_hidden_states or differentiates or torch.compiler.is_compiling()):
                return self._streamed_states(pixel_values, **kwargs)
            # Every state, because transformers before 5.23 numbers the layers of a selection differently.
            output = dict(
                self.vision_tower(pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True})
            )
        states = output["hidden_states"] if output_hidden_states else output.pop("hidden_states")
        plan = self._read_plan.resolve(len(states))
        return ImageFeatures(states, MixPlan.concat(range(len(states)), len(states)), plan), output

    def _streamed_states(self, pixel_values: Tensor, **kwargs: Any) -> tuple[ImageFeatures, dict[str, Any]]:
        plan, impl = self._read_plan, self.multi_modal_projector.impl
        with stream_hidden_states(self.vision_tower, plan, impl=impl) as stream:
            output = self.vision_tower(pixel_values, **{**kwargs, "output_hidden_states": False, "return_dict": True})
        return ImageFeatures(tuple(stream.sources), *plan.reduced()), dict(output)

    def _image_states(
        self, pixel_values: Tensor | None, image_features: ImageFeatures | None = None, **kwargs: Any
    ) -> tuple[ImageFeatures, dict[str, Any]]:
        """As ``_run_tower``; of encoded images there is no output of the tower."""
        _check_one_is_given(pixel_values=pixel_values, image_features=image_features)
        if image_features is None:
            return self._run_tower(pixel_values, **kwargs)
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: for the vision tower, which image_features have left behind")
        made_of, plan = self._read_plan.reduced()
        got = image_features
        if (got.made_of, got.plan) != (made_of, plan):
            raise ValueError(
                f"image_features: got the sources {got.made_of} of {got.made_of.num_states} states, to be mixed as "
                f"{got.plan}; need {made_of} of {made_of.num_states} states, to be mixed as {plan}"
            )
        return image_features, {}

    def _connect(
        self, features: ImageFeatures, sentence_embeds: Tensor | None, image_index: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Visual tokens ``[R, P, H]`` and layer weights ``[R, K]``."""
        if self.fuser is not None:
            fused = self.fuser(self._taps(features, slice(self._num_connected)))
            return self.multi_modal_projector([fused], plan=_ONE_STATE, image_index=image_index), None
        weights = self._weights(features, sentence_embeds, image_index)
        plan = _blocks(features.plan, slice(self._num_connected))
        tokens = self.multi_modal_projector(features.sources, weights, plan=plan, image_index=image_index)
        return tokens, weights

    @property
    def _read_plan(self) -> MixPlan:
        """What is read from the tower: the levels of the fuser, the blocks of the connector's plan, and one block for
        each injection."""
        plan, fuser = self.multi_modal_projector.plan, self.config.fuser_plan
        if fuser is None and self.injection_projectors is None:
            return plan
        levels = () if fuser is None else MixPlan.concat(fuser.levels).blocks
        taps = [block for projector in self.injection_projectors or () for block in projector.plan.blocks]
        return MixPlan((*levels, *plan.blocks, *taps), plan.num_states)

    @property
    def _num_connected(self) -> int:
        """How many of the first blocks of ``_read_plan`` become visual tokens."""
        fuser = self.config.fuser_plan
        return (0 if fuser is None else len(fuser.levels)) + self.multi_modal_projector.plan.num_blocks

    def _taps(self, features: ImageFeatures, which: slice) -> list[Tensor]:
        """The states of these blocks of ``_read_plan``, each of which is a state as it is."""
        return [features.sources[block[0].layer] for block in features.plan.blocks[which]]

    def _injected_plans(self, features: ImageFeatures) -> list[MixPlan]:
        """The plan of each injection over the sources: one of them, as it is."""
        plan = features.plan
        return [_blocks(plan, slice(g, g + 1)) for g in range(self._num_connected, plan.num_blocks)]

    def _injected_features(self, features: ImageFeatures, image_index: Tensor | None) -> tuple[Tensor, ...]:
        """``[R, P, H]`` for each injection."""
        assert self.injection_projectors is not None
        return self.injection_projectors(
            features.sources, plans=self._injected_plans(features), image_index=image_index
        )

    def _project(self, member: int, state: Tensor, image_index: Tensor | None) -> Tensor:
        assert self.injection_projectors is not None
        return self.injection_projectors[member]([state], plan=_ONE_STATE, image_index=image_index)

    def _injected_images(
        self, features: ImageFeatures, image_index: Tensor | None, places: Tensor
    ) -> InjectedImages | None:
        if self.injection_projectors is None:
            return None
        if self.config.injection_plan.when == "encode":
            projected = self._injected_features(features, image_index)
            return InjectedImages(projected, True, None, token_rows(places))
        states = tuple(self._taps(features, slice(self._num_connected, None)))
        return InjectedImages(states, False, image_index, token_rows(places))

    def _injected_of_output(self, encoded: Any, rows: int, places: Tensor) -> InjectedImages | None:
        if self.injection_projectors is None:
            return None
        features = encoded.get("injected_features")
        if features is None or len(features[0]) != rows:
            raise ValueError(
                f"mm_encoder_outputs: need injected_features of {rows} images, as get_image_features returns them, got "
                f"{'none' if features is None else f'those of {len(features[0])}'}"
            )
        return InjectedImages(tuple(features), True, None, token_rows(places))

    def _injection(self, images: InjectedImages | None, batch: int) -> dict[str, Any]:
        """The argument by which the language model injects; none in a decode step."""
        if images is None:
            return {}
        if self.injection_projectors is None:
            raise ValueError("injected_images: got some, need None, because the config has no injection")
        rows, copies = images.token_rows, batch // len(images.token_rows)
        places = len(images.members[0]) if images.image_index is None else len(images.image_index)
        if copies > 1:
            num_patches = images.members[0].shape[1] - (0 if images.is_projected else self.config.skip_tokens)
            rows = rows_of_copies(rows, copies, places * num_patches)
        return self.token_injection.given(partial(self._feature, images, copies), rows)

    def _feature(self, images: InjectedImages, copies: int, member: int) -> Tensor:
        """``[R * copies, P, H]``, right before the layer that it is added in front of."""
        feature = images.members[member]
        if not images.is_projected:
            arguments = (member, feature, images.image_index)
            if torch.is_grad_enabled() and self.training:
                # The states are kept anyway; what the projector would keep beside them is computed anew.
                feature = checkpoint(self._project, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                feature = self._project(*arguments)
        return feature if copies == 1 else feature.repeat(copies, 1, 1)

    def _weights(
        self, features: ImageFeatures, sentence_embeds: Tensor | None, image_index: Tensor | None
    ) -> Tensor | None:
        allocator = self.weight_allocator
        if allocator is None:
            return None
        if isinstance(allocator, LearnedWeights):
            return allocator(len(features) if image_index is None else len(image_index))
        if sentence_embeds is None:
            raise ValueError(
                "sentence_embeds: images are weighted by their instructions, got none; need sentence_embeds or "
                "instructions, or aggregation='uniform' in the config"
            )
        sentence_embeds = sentence_embeds.to(features.sources[0].device)
        if isinstance(allocator, TextAllocator):
            return allocator(sentence_embeds)
        impl = self.multi_modal_projector.impl
        summaries = column_summaries(features.sources, features.plan, self.config.vision_has_cls, impl)
        if image_index is not None:
            summaries = summaries[image_index]
        # impl="reference" runs the published steps throughout; any other impl concerns the connector alone.
        return allocator(sentence_embeds, summaries, impl=impl if impl == "reference" else None)

    def _image_places(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """Bool ``[B, S]``: where the prompt holds image tokens."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    def _images_per_sample(self, places: Tensor, rows: int, num_patches: int, whole: bool = True) -> Tensor:
        """int64 ``[B]``: how many images each sample has, or, where it is a part of a prompt, has begun or ended."""
        counts = places.sum(dim=1)
        per_sample = counts // num_patches
        if has_values(counts) and (counts.sum() != rows * num_patches or (whole and per_sample.sum() != rows)):
            raise ValueError(
                f"input_ids: got {counts.tolist()} image tokens in the samples, need {num_patches} for each of "
                f"{rows} images"
            )
        return per_sample


class LlavaIgvaForConditionalGeneration(_FrozenTowerMixin, LlavaForConditionalGeneration):
    """LLaVA-IGVA with its language-model head: training with the balance loss, and ``generate``."""

    config_class = LlavaIgvaConfig

    def __init__(self, config: LlavaIgvaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaIgvaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_llava(
        cls, model_or_path: LlavaForConditionalGeneration | str | os.PathLike[str], **config_overrides: Any
    ) -> LlavaIgvaForConditionalGeneration:
        """Upgrade a Llava: it answers at first as before, and can learn to read further layers.

        The Llava's projector becomes the part of ``linear_1`` that reads the plan's base layer; the part that reads the
        mix starts at zero, and so does what a ``fuser`` or an ``injection`` adds. The allocator is new. Weights are
        shared, not copied: a Llava passed as a model must not be trained any further.

        Args:
            model_or_path: any transformers Llava, or the name or directory of its checkpoint, of any version.
            config_overrides: fields of ``LlavaIgvaConfig`` (``aggregation``, ``mix_plan``, ``fuser``, ``injection``,
                ...).

        Raises:
            ValueError: a layer that the Llava reads has no block of its own in the plan.
            TypeError: ``model_or_path`` is neither a Llava nor a path.
        """
        llava = model_or_path
        if isinstance(llava, (str, os.PathLike)):
            llava = LlavaForConditionalGeneration.from_pretrained(llava)
        if not isinstance(llava, LlavaForConditionalGeneration) or isinstance(llava, cls):
            raise TypeError(
                f"model_or_path: need a LlavaForConditionalGeneration or a path to one, got {type(llava).__name__}"
            )
        config = upgraded_config(llava.config, config_overrides)
        state_dict = upgraded_state_dict(llava, config)
        model = load_state_dict(cls, config, state_dict, llava.dtype, new=_NEW_IN_LLAVA)
        model.generation_config = llava.generation_config
        return model.to(llava.device)

    def encode_sentences(self, instructions: Sequence[str]) -> Tensor:
        """As ``LlavaIgvaModel.encode_sentences``."""
        return self.model.encode_sentences(instructions)

    def encode_images(self, pixel_values: Tensor) -> ImageFeatures:
        """As ``LlavaIgvaModel.encode_images``."""
        return self.model.encode_images(pixel_values)

    def get_image_features(self, *args: Any, **kwargs: Any) -> LlavaIgvaImageOutput:
        """As ``LlavaIgvaModel.get_image_features``."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        sentence_embeds: Tensor | None = None,
        instructions: Sequence[str] | None = None,
        image_features: ImageFeatures | None = None,
        image_index: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        injected_images: InjectedImages | None = None,
        **kwargs: Any,
    ) -> LlavaIgvaCausalLMOutputWithPast:
        """Logits, layer weights, and with ``labels`` the training loss.

        The loss is ``1/N * sum over the N supervised tokens t of (CE_t - lambda * entropy(w of the sample of t))``: the
        balance term is charged per token, as the cross-entropy is, and normalised with it, by the tokens of the
        micro-batch or by ``num_items_in_batch`` if the Trainer gives it. So a step has the same loss and gradient
        however it is split into micro-batches or over ranks. A sample with several images has their mean entropy, one
        without images has none. If all samples have equally many supervised tokens, this is the mean over the batch
        that the authors of IGVA use.

        Args:
            labels: ``[B, S]``, -100 where a token is not supervised.
            logits_to_keep: for how many of the last tokens to compute logits (0: all), or for which tokens.
            kwargs: for the language model and the loss (``num_items_in_batch``).

        The other arguments, and the errors, are those of ``LlavaIgvaModel.forward``.
        """
        outputs = self.model(
            input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, sentence_embeds=sentence_embeds,
            instructions=instructions, image_features=image_features, image_index=image_index,
            mm_encoder_outputs=mm_encoder_outputs, injected_images=injected_images,
            always_connect=labels is not None,  # ranks that evaluate a sharded model also make the same calls
            **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            if outputs.layer_weights is not None and self.config.balance_coefficient:
                share = share_of_loss(labels, outputs.images_per_sample, len(outputs.layer_weights), **kwargs)
                loss = loss + self.config.balance_coefficient * balance_loss(outputs.layer_weights, share)
        return LlavaIgvaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            layer_weights=outputs.layer_weights,
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """``GenerationMixin.generate`` with the image arguments of ``forward``.

        The images are encoded once and enter the embeddings of the prompt before it is expanded into beams, so that
        samples with none or several images need no bookkeeping. ``prepare_inputs_for_generation`` hands on the part
        that a step reads: all of it at first, a chunk (``prefill_chunk_size``), all of it again (``use_cache=False``),
        or, in assisted decoding, what the assistant has not seen. The prompt's tokens go through generation beside
        them, for all that looks at tokens: penalties, prompt lookup, assistants.
        """
        images = {name: kwargs.pop(name) for name in _IMAGE_ARGUMENTS if name in kwargs}
        images["mm_encoder_outputs"] = images.get("mm_encoder_outputs") or None  # transformers hands assistants a {}
        if any(value is not None for value in images.values()):
            embeds = kwargs.get("inputs_embeds")
            input_ids = None if embeds is not None else kwargs.get("input_ids") if inputs is None else inputs
            embeds, injected, outputs = self.model.embed(input_ids, embeds, **images)
            if outputs.image_hidden_states is not None:
                kwargs["inputs_embeds" if input_ids is None else "prompt_embeds"] = embeds
                kwargs["injected_images"] = injected
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        prompt_embeds: Tensor | None = None,
        injected_images: InjectedImages | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """``GenerationMixin.prepare_inputs_for_generation`` for prompts with images.

        Args:
            prompt_embeds: ``[B, S, H]``, the embeddings of the prompt, images included; ``generate`` makes them.
            injected_images: what is injected into the prompt; ``generate`` makes it too.

        The other arguments are transformers'.

        Raises:
            NotImplementedError: chunks of a prompt that continues a cache and does not hold the cached tokens.
        """
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs = {name: value for name, value in kwargs.items() if name not in _IMAGE_ARGUMENTS}
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values,
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs,
        )  # fmt: skip
        ids = inputs.get("input_ids")
        if ids is None and injected_images is not None:
            inputs["injected_images"] = injected_images.last(inputs["inputs_embeds"].shape[1])
        if prompt_embeds is None or ids is None:
            return inputs
        length = prompt_embeds.shape[1]
        if next_sequence_length is not None or past_key_values is None or input_ids.shape[1] >= length:
            start = input_ids.shape[1] - ids.shape[1]
        else:
            start = int(past_key_values.get_seq_length())
            if start + ids.shape[1] > length:
                raise NotImplementedError(
                    f"prefill_chunk_size: the cache holds {start} tokens, and {ids.shape[1]} more are beyond the "
                    f"{length} of the prompt; need a prompt that starts with the cached tokens and a version of "
                    f"transformers that skips them, or no chunks"
                )
        if start < length:
            embeds = prompt_embeds[:, start : start + ids.shape[1]].contiguous()
            new = ids[:, embeds.shape[1] :]
            if new.shape[1]:
                embeds = torch.cat([embeds, self.get_input_embeddings()(new).to(embeds.device)], dim=1)
            inputs.update(input_ids=None, inputs_embeds=embeds)
            if injected_images is not None:
                inputs["injected_images"] = injected_images.part(start, embeds.shape[1])
        return inputs

    def heal_tokens(self, input_ids: Tensor, tokenizer: Any = None) -> Tensor:
        """``GenerationMixin.heal_tokens``, for prompts of text.

        Raises:
            NotImplementedError: the prompt has images; transformers drops their tokens when it writes the prompt anew.
        """
        if (input_ids == self.config.image_token_id).any():
            raise NotImplementedError(
                "token_healing: it writes the prompt anew without its image tokens, got a prompt that has some; need "
                "token_healing=False"
            )
        return super().heal_tokens(input_ids, tokenizer)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Another model that assists decoding reads the prompt's tokens: these embeddings are not its own."""
        assistant = kwargs.get("assistant_model")
        if assistant is not None and not self._shares_embeddings_with(assistant):
            model_kwargs = kwargs["model_kwargs"]
            embedded = ("prompt_embeds", "injected_images")
            kwargs["model_kwargs"] = {name: x for name, x in model_kwargs.items() if name not in embedded}
        elif assistant is not None and assistant.config.injection is None:
            kwargs["model_kwargs"] = {**kwargs["model_kwargs"], "injected_images": None}
        return super()._get_candidate_generator(*args, **kwargs)

    def _shares_embeddings_with(self, assistant: Any) -> bool:
        return isinstance(assistant, type(self)) and assistant.get_input_embeddings() is self.get_input_embeddings()


_NEW_IN_LLAVA = ("weight_allocator", "injection_projectors", "fuser")
"""Modules that a Llava has no weights for."""

_IMAGE_ARGUMENTS = (
    "pixel_values",
    "image_features",
    "image_index",
    "sentence_embeds",
    "instructions",
    "mm_encoder_outputs",
)
"""The arguments of ``forward`` that ``generate`` turns into embeddings of the prompt."""


def _allocator(config: LlavaIgvaConfig) -> WeightAllocator | TextAllocator | LearnedWeights | None:
    columns, hidden_dim = config.plan.num_columns, config.allocator_hidden_dim
    if columns == 0:
        return None
    if config.aggregation == "learned":
        return LearnedWeights(columns)
    if config.aggregation == "text":
        return TextAllocator(config.sentence_embed_dim, columns, hidden_dim)
    return WeightAllocator(
        config.sentence_embed_dim, config.vision_config.hidden_size, columns, hidden_dim,
        config.allocator_num_blocks, config.allocator_num_heads,
    )  # fmt: skip


def _projector(config: LlavaIgvaConfig, plan: MixPlan, layernorm_eps: float | None = None) -> LayerMixProjector:
    return LayerMixProjector(
        plan, config.vision_config.hidden_size, config.text_config.hidden_size,
        bias=config.multimodal_projector_bias, activation=config.projector_activation, layernorm_eps=layernorm_eps,
        skip_tokens=config.skip_tokens, impl=config.impl,
    )  # fmt: skip


_ONE_STATE = MixPlan.concat([0], 1)
"""Of a projector that is given the one state that it reads: that of a fuser, or of an injection."""


def _blocks(plan: MixPlan, which: slice) -> MixPlan:
    return MixPlan(plan.blocks[which], plan.num_states)


def _check_pixels(pixel_values: Tensor) -> None:
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values: got shape {tuple(pixel_values.shape)}, need [images, 3, height, width]")


def _check_one_is_given(**arguments: Any) -> None:
    given = [value is not None for value in arguments.values()]
    if sum(given) != 1:
        got = "both" if all(given) else "neither"
        raise ValueError(f"{', '.join(arguments)}: got {got}, need exactly one of the two")


def share_of_loss(
    labels: Tensor, images_per_sample: Tensor, rows: int, num_items_in_batch: Tensor | int | None = None, **_: Any
) -> Tensor:
    """``[R]``: the share of the supervised tokens that belong to each image place."""
    supervised = (labels[:, 1:] != -100).sum(dim=1)  # token t is predicted at t - 1, so the first is not counted
    total = supervised.sum() if num_items_in_batch is None else num_items_in_batch
    share = supervised / total / images_per_sample.to(labels.device)
    return share.repeat_interleave(images_per_sample.to(labels.device), output_size=rows)


# Checkpoints are read and written in Llava's layout, by the renaming rules of transformers' own Llava.
register_checkpoint_conversion_mapping(
    LlavaIgvaConfig.model_type, get_checkpoint_conversion_mapping("llava"), overwrite=True
)
register_checkpoint_conversion_mapping(
    LlavaIgvaModel.__name__, get_checkpoint_conversion_mapping("LlavaModel"), overwrite=True
)
