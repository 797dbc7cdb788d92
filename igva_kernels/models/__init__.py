"""Reference models. Needs transformers: ``pip install igva-kernels[models]``."""

from igva_kernels.models.llava_igva import (
    ImageFeatures,
    LlavaIgvaConfig,
    LlavaIgvaForConditionalGeneration,
    LlavaIgvaModel,
    LlavaIgvaProcessor,
)

__all__ = [
    "ImageFeatures",
    "LlavaIgvaConfig",
    "LlavaIgvaForConditionalGeneration",
    "LlavaIgvaModel",
    "LlavaIgvaProcessor",
]
