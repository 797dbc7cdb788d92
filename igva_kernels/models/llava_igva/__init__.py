"""LLaVA-IGVA on transformers; importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from igva_kernels.models.llava_igva.configuration_llava_igva import LlavaIgvaConfig
from igva_kernels.models.llava_igva.image_features import ImageFeatureCache, ImageFeatures
from igva_kernels.models.llava_igva.modeling_llava_igva import LlavaIgvaForConditionalGeneration, LlavaIgvaModel
from igva_kernels.models.llava_igva.processing_llava_igva import LlavaIgvaProcessor

AutoConfig.register(LlavaIgvaConfig.model_type, LlavaIgvaConfig, exist_ok=True)
AutoModel.register(LlavaIgvaConfig, LlavaIgvaModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaIgvaConfig, LlavaIgvaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LlavaIgvaConfig, LlavaIgvaProcessor, exist_ok=True)

__all__ = [
    "ImageFeatureCache",
    "ImageFeatures",
    "LlavaIgvaConfig",
    "LlavaIgvaForConditionalGeneration",
    "LlavaIgvaModel",
    "LlavaIgvaProcessor",
]
