"""Configuration of LLaVA-IGVA."""

# No annotations from __future__: strict checks the fields by their types, and would skip types that are strings.

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from igva_kernels.models.llava_igva.fuser import FuserPlan
from igva_kernels.models.llava_igva.injection import InjectionPlan
from igva_kernels.models.llava_igva.remote_code import CarriesRemoteCode, auto_map
from igva_kernels.ops.weighted_mix import Entry, MixPlan, is_tap
from igva_kernels.runtime.activations import hidden_acts, of_hidden_act

# By a tower's model type: whether token 0 of its states is a CLS token.
_HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}

_MODEL = "LlavaIgvaForConditionalGeneration"
AUTO_CLASSES = {
    "AutoConfig": "LlavaIgvaConfig",
    "AutoModel": "LlavaIgvaModel",
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
    "AutoProcessor": "LlavaIgvaProcessor",
}
"""Our classes by the Auto classes of transformers that find them."""


@strict
class LlavaIgvaConfig(CarriesRemoteCode, LlavaConfig):
    """A ``LlavaConfig`` (vision tower, language model, projector) and how the tower's layers are mixed.

    Args:
        aggregation: where the weights of the plan's columns come from: "instruction" (IGVA's stage 2: an allocator
            computes them from instruction and image), "text" (an MLP computes them from the instruction alone),
            "learned" (they are parameters) or "uniform" (IGVA's stage 1: each of the K columns weighs 1 / K).
        mix_groups: the layer groups of IGVA's plan: a number of equal groups, which must divide the number of the
            tower's layers, or the layers of each group. The plan's base layer is ``vision_feature_layer``.
        mix_plan: a plan in place of IGVA's: a ``MixPlan``, or plain data, either what ``MixPlan.to_dict`` writes or a
            constructor with its arguments, such as ``{"dense_connector": {"kind": "dci"}}``.
        fuser: deformable fusion: the base state reads others by deformable attention, and the projector reads the sum
            of both. None for none; ``{"mmfuser": {}}`` for MMFuser's four states of CLIP-L; ``{"layer_select":
            {"strategy": "3-18-23"}}`` for E_M of Layer_Select_Fuse, one of "18", "3-18-23", "former", "latter" and
            "all"; or the states, ``{"levels": [3, 8, 13, 18]}``. Each takes "heads" (16) and "points" (4) beside its
            own field. The base is ``vision_feature_layer``, or the ``mix_plan``, which then is a single state.
        injection: internal direct fusion (I_D of Layer_Select_Fuse): states of the tower that are projected and added
            to the image tokens before layers of the language model, beside the visual tokens of the plan. None for
            none; ``{"strategy": "3-18-23"}``, one of "18", "3-18", "3-18-23", "former", "latter" and "all"; or the
            states and the layers, ``{"taps": [3, 18], "layers": [3, 23]}``. With ``"when": "encode"`` (the default) all
            are projected along with the visual tokens, with "inject" each is projected right before its layer, and in
            training once more in the backward, so that only the states are kept.
        projector_layernorm_eps: eps of a LayerNorm over the mixed row in front of the projector; None for no LayerNorm.
        vision_has_cls: whether token 0 of the tower's states is a CLS token; None for CLIP and SigLIP, which are known.
        vision_feature_select_strategy: "default" drops the CLS token from the visual tokens, "full" keeps every token.
            None chooses "default" for towers with a CLS token and "full" for the others.
        sentence_encoder: name or directory of the sentence-transformers model that embeds instructions given as text.
        sentence_embed_dim: E, the width of its embeddings.
        allocator_hidden_dim: hidden width of the allocator, whichever kind it is.
        allocator_num_blocks: cross-attention blocks of the allocator from instruction and image.
        allocator_num_heads: attention heads per block.
        balance_coefficient: lambda, the factor of the negative entropy of the layer weights in the training loss.
        freeze_vision_tower: whether the vision tower is frozen.
        stream_hidden_states: whether a tower without gradients folds its states into the plan's sources while it runs,
            instead of keeping them all. Ignored if ``impl`` is "reference", which runs the published steps, and inside
            a compiled model.
        impl: which implementation the connector uses, as in ``layer_mix``. It is not saved: a checkpoint says nothing
            about the machine that it will run on.

    Raises:
        ValueError: the plan, the fuser or the injection does not fit the tower or the language model, the tower is
            unknown and ``vision_has_cls`` is None, or the strategy or the activation is not supported.
        StrictDataclassFieldValidationError: a field of another type, or an ``aggregation`` that there is not.
    """

    model_type = "llava_igva"

    aggregation: Literal["instruction", "text", "learned", "uniform"] = "instruction"
    mix_groups: Any = 4
    mix_plan: Any = None
    fuser: Any = None
    injection: Any = None
    projector_layernorm_eps: float | int | None = None
    vision_has_cls: bool | None = None
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    sentence_encoder: str | None = "sentence-transformers/all-mpnet-base-v2"
    sentence_embed_dim: int = 768
    allocator_hidden_dim: int = 1024
    allocator_num_blocks: int = 4
    allocator_num_heads: int = 4
    balance_coefficient: float | int = 0.02
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
                raise ValueError(f"vision_has_cls: need True or False for the tower {tower!r}, got None")
            self.vision_has_cls = _HAS_CLS[tower]
        if self.vision_feature_select_strategy is None:
            self.vision_feature_select_strategy = "default" if self.vision_has_cls else "full"
        if self.vision_feature_select_strategy == "default" and not self.vision_has_cls:
            raise ValueError(
                f"vision_feature_select_strategy: 'default' drops the CLS token and the tower {tower!r} has none; "
                f"need 'full'"
            )
        if self.projector_hidden_act not in hidden_acts():
            raise ValueError(
                f"projector_hidden_act: got {self.projector_hidden_act!r}, need one of {', '.join(hidden_acts())}"
            )
        _ = self.plan  # raises if the plan does not fit the tower
        kind = tower.removesuffix("_vision_model")
        if self.fuser is not None:
            sizes = self.vision_config.num_hidden_layers, self.vision_config.hidden_size
            self.fuser = FuserPlan.from_dict(self.fuser, *sizes, kind).to_dict()
            self._check_fuser()
        if self.injection is not None:
            layers = self.vision_config.num_hidden_layers, self.text_config.num_hidden_layers
            self.injection = InjectionPlan.from_dict(self.injection, *layers, kind).to_dict()
        self.auto_map = auto_map(AUTO_CLASSES, getattr(self, "auto_map", None))

    def _check_fuser(self) -> None:
        """Raises if a fuser would read something else than the patches of one base state."""
        blocks = self.plan.blocks
        if len(blocks) != 1 or not is_tap(blocks[0]):
            raise ValueError(f"mix_plan: got {self.plan}, need None or a single state, which a fuser adds to")
        if self.vision_has_cls and not self.skip_tokens:
            raise ValueError(
                "vision_feature_select_strategy: 'full' keeps the CLS token, which has no place in the grid of patches "
                "that a fuser reads; need 'default'"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that ``to_dict`` wrote.

        Raises:
            ValueError: it is another model's, whose fields would be ignored and whose weights would be new.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"model_type: need a config of {cls.model_type!r}, got {kind!r}; `igva-kernels convert` converts a "
                f"checkpoint of the IGVA or LLaVA repository, and from_llava upgrades transformers' Llava"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def plan(self) -> MixPlan:
        """The connector's plan over the states of the vision tower; without columns if ``aggregation`` is "uniform".

        With a ``fuser`` it is the base state alone, to which the fuser adds what it finds in its levels.
        """
        layers = self.vision_config.num_hidden_layers
        if self.mix_plan is None:
            if not isinstance(self.vision_feature_layer, int):
                if self.fuser is not None:
                    raise ValueError(f"vision_feature_layer: a fuser has one base, got {self.vision_feature_layer}")
                raise ValueError(
                    f"vision_feature_layer: IGVA's plan has one base layer, got {self.vision_feature_layer}; "
                    f"for a list of layers give mix_plan=MixPlan.concat({list(self.vision_feature_layer)})"
                )
            if self.fuser is not None:
                return MixPlan.concat([self.vision_feature_layer], layers + 1)
            plan = MixPlan.igva(layers, self.mix_groups, self.vision_feature_layer)
        else:
            plan = MixPlan.from_dict(self.mix_plan).resolve(layers + 1)
        return uniform_plan(plan) if self.aggregation == "uniform" else plan

    @property
    def fuser_plan(self) -> FuserPlan | None:
        """What ``fuser`` says, as tuples."""
        if self.fuser is None:
            return None
        return FuserPlan(tuple(self.fuser["levels"]), self.fuser["heads"], self.fuser["points"])

    @property
    def injection_plan(self) -> InjectionPlan | None:
        """What ``injection`` says, as tuples."""
        if self.injection is None:
            return None
        taps, layers = tuple(self.injection["taps"]), tuple(self.injection["layers"])
        return InjectionPlan(taps, layers, self.injection["when"])

    @property
    def reads_instructions(self) -> bool:
        """Whether an allocator computes the layers' weights from the instruction."""
        return self.aggregation in ("instruction", "text") and self.plan.num_columns > 0

    @property
    def skip_tokens(self) -> int:
        """Tokens left out at the start of every state."""
        return 1 if self.vision_feature_select_strategy == "default" else 0

    @property
    def projector_activation(self) -> str:
        """``projector_hidden_act`` as ``layer_mix_mlp`` calls it."""
        return of_hidden_act(self.projector_hidden_act)

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        data.pop("impl", None)
        return data


def uniform_plan(plan: MixPlan) -> MixPlan:
    """The plan with the constant 1 / K in place of each of its K weights; IGVA's becomes ``MixPlan.igva_uniform``."""
    return MixPlan(
        tuple(
            tuple(e if e.column is None else Entry(e.layer, None, e.scale / plan.num_columns) for e in block)
            for block in plan.blocks
        ),
        plan.num_states,
    )
