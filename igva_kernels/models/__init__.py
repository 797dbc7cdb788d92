"""Reference models. They need transformers: ``pip install igva-kernels[models]``."""

from igva_kernels.models.llava_igva import (
    ImageFeatureCache,
    ImageFeatures,
    LlavaIgvaConfig,
    LlavaIgvaForConditionalGeneration,
    LlavaIgvaModel,
    LlavaIgvaProcessor,
)

__all__ = [
    "ImageFeatureCache",
    "ImageFeatures",
    "LlavaIgvaConfig",
    "LlavaIgvaForConditionalGeneration",
    "LlavaIgvaModel",
    "LlavaIgvaProcessor",
]
