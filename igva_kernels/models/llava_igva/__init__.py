"""LLaVA-IGVA on transformers; importing this package registers it with the Auto classes."""

import transformers
from transformers.models.auto import modeling_auto

from igva_kernels.models.llava_igva.balance import BalanceLossMixin
from igva_kernels.models.llava_igva.configuration_llava_igva import AUTO_CLASSES, LlavaIgvaConfig
from igva_kernels.models.llava_igva.image_features import ImageFeatureCache, ImageFeatures
from igva_kernels.models.llava_igva.modeling_llava_igva import LlavaIgvaForConditionalGeneration, LlavaIgvaModel
from igva_kernels.models.llava_igva.processing_llava_igva import LlavaIgvaProcessor

transformers.AutoConfig.register(LlavaIgvaConfig.model_type, LlavaIgvaConfig, exist_ok=True)
for _auto, _name in AUTO_CLASSES.items():
    if _auto != "AutoConfig":
        getattr(transformers, _auto).register(LlavaIgvaConfig, globals()[_name], exist_ok=True)
# Pipelines and `transformers serve` look the model up in these tables of names, for which there is no registration.
for _table in (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
):
    _table.setdefault(LlavaIgvaConfig.model_type, LlavaIgvaForConditionalGeneration.__name__)

__all__ = [
    "BalanceLossMixin",
    "ImageFeatureCache",
    "ImageFeatures",
    "LlavaIgvaConfig",
    "LlavaIgvaForConditionalGeneration",
    "LlavaIgvaModel",
    "LlavaIgvaProcessor",
]
