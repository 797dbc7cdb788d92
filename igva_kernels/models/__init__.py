"""Reference models. They need transformers: ``pip install igva-kernels[models]``."""

from igva_kernels.models.llava_igva import (
    BalanceLossMixin,
    ImageFeatureCache,
    ImageFeatures,
    LlavaIgvaConfig,
    LlavaIgvaForConditionalGeneration,
    LlavaIgvaModel,
    LlavaIgvaProcessor,
)

__all__ = [
    "BalanceLossMixin",
    "ImageFeatureCache",
    "ImageFeatures",
    "LlavaIgvaConfig",
    "LlavaIgvaForConditionalGeneration",
    "LlavaIgvaModel",
    "LlavaIgvaProcessor",
]
