"""Configuration of LLaVA-IGVA."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from igva_kernels.ops.weighted_mix import Entry, MixPlan

# Whether token 0 of a tower's states is a CLS token.
_HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@strict
class LlavaIgvaConfig(LlavaConfig):
    """A ``LlavaConfig`` (vision tower, language model, projector) and how the tower's layers are mixed.

    Args:
        aggregation: where the weights of the plan's columns come from: "instruction" (IGVA's stage 2: an allocator,
            from the instruction and the image), "text" (an MLP, from the instruction alone), "learned" (parameters) or
            "uniform" (IGVA's stage 1: each column has 1 / K, nothing to learn).
        mix_groups: the layer groups of IGVA's plan, an int that divides the tower's layers or the layers of each group.
            Its base layer is ``vision_feature_layer``.
        mix_plan: any other ``MixPlan`` in place of IGVA's: itself, or plain data, either the blocks that
            ``MixPlan.to_dict`` writes or a constructor with its arguments, ``{"dense_connector": {"kind": "dci"}}``.
        projector_layernorm_eps: with a number, a LayerNorm over the mixed row comes before the projector.
        vision_has_cls: whether token 0 of the tower's states is a CLS token; known for CLIP and SigLIP.
        vision_feature_select_strategy: "default" drops the CLS token from the visual tokens, "full" keeps every token.
            "default" for towers that have a CLS token and "full" for the others, unless given.
        sentence_encoder: name or directory of the sentence-transformers model that embeds instructions given as text.
        sentence_embed_dim: E, the width of its embeddings.
        allocator_hidden_dim: width of the allocator, of either kind.
        allocator_num_blocks: cross-attention blocks of the allocator from instruction and image.
        allocator_num_heads: attention heads of a block.
        balance_coefficient: lambda, the factor of the negative entropy of the layer weights in the training loss.
        freeze_vision_tower: whether a new model's tower takes no gradient.
        stream_hidden_states: whether a tower that takes no gradient folds its states into the sources of the plan while
            it runs, in place of keeping them all. Not where ``impl`` is "reference", the published steps, nor inside a
            compiled model.
        impl: which implementation the connector uses, as in ``layer_mix``. It is not saved: a checkpoint says nothing
            about the machine that it will run on.

    Raises:
        ValueError: a plan that the tower cannot serve, an unknown tower without ``vision_has_cls``, or a strategy or
            activation that cannot be.
    """

    model_type = "llava_igva"

    aggregation: Literal["instruction", "text", "learned", "uniform"] = "instruction"
    mix_groups: int | list[list[int]] = 4
    mix_plan: Any = None
    projector_layernorm_eps: float | None = None
    vision_has_cls: bool | None = None
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    sentence_encoder: str | None = "sentence-transformers/all-mpnet-base-v2"
    sentence_embed_dim: int = 768
    allocator_hidden_dim: int = 1024
    allocator_num_blocks: int = 4
    allocator_num_heads: int = 4
    balance_coefficient: float = 0.02
    freeze_vision_tower: bool = True
    stream_hidden_states: bool = True
    impl: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.mix_plan is not None:
            plan = self.mix_plan if isinstance(self.mix_plan, MixPlan) else MixPlan.from_dict(self.mix_plan)
            self.mix_plan = plan.to_dict()
        tower = self.vision_config.model_type
        if self.vision_has_cls is None:
            if tower not in _HAS_CLS:
                raise ValueError(f"vision_has_cls: say whether the tower {tower!r} has a CLS token, got None")
            self.vision_has_cls = _HAS_CLS[tower]
        if self.vision_feature_select_strategy is None:
            self.vision_feature_select_strategy = "default" if self.vision_has_cls else "full"
        if self.vision_feature_select_strategy == "default" and not self.vision_has_cls:
            raise ValueError(
                f"vision_feature_select_strategy: 'default' drops the CLS token and the tower {tower!r} has none; "
                f"need 'full'"
            )
        if self.projector_hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"projector_hidden_act: got {self.projector_hidden_act!r}, need one of {', '.join(_ACTIVATIONS)}"
            )
        _ = self.plan  # a plan that does not fit the tower is an error here

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config of another model is an error: its fields would be passed over, and the model would be a new one."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"model_type: need a config of {cls.model_type!r}, got {kind!r}; `igva-kernels convert` makes a "
                f"checkpoint of the IGVA or LLaVA repository one, and from_llava a LLaVA of transformers"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def plan(self) -> MixPlan:
        """The plan of the connector, over the states of the vision tower; no columns where aggregation is uniform."""
        layers = self.vision_config.num_hidden_layers
        if self.mix_plan is None:
            if not isinstance(self.vision_feature_layer, int):
                raise ValueError(
                    f"vision_feature_layer: IGVA's plan has one base layer, got {self.vision_feature_layer}; "
                    f"for a list of layers give mix_plan=MixPlan.concat({list(self.vision_feature_layer)})"
                )
            plan = MixPlan.igva(layers, self.mix_groups, self.vision_feature_layer)
        else:
            plan = MixPlan.from_dict(self.mix_plan).resolve(layers + 1)
        return uniform_plan(plan) if self.aggregation == "uniform" else plan

    @property
    def skip_tokens(self) -> int:
        """Tokens left out at the start of every state."""
        return 1 if self.vision_feature_select_strategy == "default" else 0

    @property
    def projector_activation(self) -> str:
        """``projector_hidden_act`` as ``layer_mix_mlp`` calls it."""
        return _ACTIVATIONS[self.projector_hidden_act]

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        data.pop("impl", None)
        return data


def uniform_plan(plan: MixPlan) -> MixPlan:
    """The plan with the constant 1 / K in place of each of its K weights: for IGVA's, ``MixPlan.igva_uniform``."""
    return MixPlan(
        tuple(
            tuple(e if e.column is None else Entry(e.layer, None, e.scale / plan.num_columns) for e in block)
            for block in plan.blocks
        ),
        plan.num_states,
    )
