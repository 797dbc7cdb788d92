"""Tiny and random: the attention modules of transformers' models with deformable attention, and two whole models."""

import inspect
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import transformers
from hosts import liven
from seeds import seeded

CLASSES = {
    "deformable_detr": "DeformableDetrMultiscaleDeformableAttention",
    "grounding_dino": "GroundingDinoMultiscaleDeformableAttention",
    "mm_grounding_dino": "MMGroundingDinoMultiscaleDeformableAttention",
    "omdet_turbo": "OmDetTurboMultiscaleDeformableAttention",
    "lw_detr": "LwDetrMultiscaleDeformableAttention",
    "rf_detr": "RfDetrMultiscaleDeformableAttention",
    "rt_detr": "RTDetrMultiscaleDeformableAttention",
    "pp_doclayout_v2": "PPDocLayoutV2MultiscaleDeformableAttention",
    "pp_doclayout_v3": "PPDocLayoutV3MultiscaleDeformableAttention",
    "pp_doclayout_v4": "PPDocLayoutV4MultiscaleDeformableAttention",
    "rt_detr_v2": "RTDetrV2MultiscaleDeformableAttention",
    "d_fine": "DFineMultiscaleDeformableAttention",
    "deimv2": "Deimv2MultiscaleDeformableAttention",
    "mask2former": "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention",
    "oneformer": "OneFormerPixelDecoderEncoderMultiscaleDeformableAttention",
}
"""By the folder of transformers."""
BY_LEVEL = ("rt_detr_v2", "d_fine", "deimv2")
"""Those that have a number of points for each level, and boxes as references."""
WIDTH, HEADS, POINTS, SHAPES, QUERIES, BATCH = 16, 2, 3, ((5, 7), (3, 4), (2, 2)), 9, 2
VARIED = [3, 1, 2]
"""Points of each level, where they may differ."""


class Inputs(NamedTuple):
    """What requires a gradient, and the other arguments."""

    leaves: dict
    others: dict


def folders():
    """The folders of the installed transformers in which a deformable attention is defined."""
    models = Path(transformers.__file__).parent / "models"
    return {path.parent.name for path in models.glob("*/modeling_*.py") if "DeformableAttention(nn" in path.read_text()}


def attention(name, method="default", seed=0):
    """The module of one folder, in eval mode; skips where this version of transformers lacks it."""
    try:
        module = import_module(f"transformers.models.{name}.modeling_{name}")
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    levels = len(SHAPES)
    config = SimpleNamespace(
        d_model=WIDTH, hidden_size=WIDTH, num_feature_levels=levels, disable_custom_kernels=True,
        decoder_attention_heads=HEADS, decoder_n_levels=levels, decoder_method=method, decoder_offset_scale=0.5,
        decoder_n_points=POINTS if name == "rt_detr_v2" else VARIED,
    )  # fmt: skip
    kind = getattr(module, CLASSES[name])
    by_name = {"config": config, "num_heads": HEADS, "n_points": POINTS, "embed_dim": WIDTH, "n_levels": levels}
    wanted = list(inspect.signature(kind).parameters)
    torch.manual_seed(seeded(seed))
    made = liven(kind(**{key: by_name[key] for key in wanted}).eval())
    with torch.no_grad():
        for parameter in made.parameters():  # offsets of whole pixels would lie on kinks
            if parameter.dim() == 1:
                parameter.normal_()
    return made


def inputs(module, boxes=False, dtype=torch.float32, seed=0):
    """Arguments of the module's forward, those that it takes."""
    generator = torch.Generator().manual_seed(seeded(seed))

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    taken = inspect.signature(module.forward).parameters
    shapes = torch.tensor(SHAPES)
    levels = 1 if hasattr(module, "num_points_list") or hasattr(module, "n_points_list") else len(SHAPES)
    references = torch.rand(BATCH, QUERIES, levels, 4 if boxes else 2, generator=generator)
    leaves = {
        "hidden_states": normal(BATCH, QUERIES, WIDTH),
        "encoder_hidden_states": normal(BATCH, int(shapes.prod(1).sum()), WIDTH),
        "reference_points": references.to(dtype).requires_grad_(),
    }
    others = {
        "spatial_shapes": shapes, "spatial_shapes_list": list(SHAPES),
        "level_start_index": torch.tensor([0, *shapes.prod(1).cumsum(0)[:-1]]),
    }  # fmt: skip
    return Inputs(leaves, {key: value for key, value in others.items() if key in taken})


def deformable_detr():
    """The whole model, with two levels."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage3", "stage4"],
    )  # fmt: skip
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_queries=5, num_feature_levels=2, num_labels=4,
    )  # fmt: skip
    return _model(transformers.DeformableDetrForObjectDetection, config)


def mask2former():
    """The whole model, of which the pixel decoder has deformable attention."""
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=2, decoder_layers=2, num_attention_heads=2, num_queries=5, num_labels=4,
    )  # fmt: skip
    return _model(transformers.Mask2FormerForUniversalSegmentation, config)


def _model(kind, config):
    torch.manual_seed(seeded())
    return liven(kind(config).eval())


WHOLE = {"deformable_detr": (deformable_detr, "logits"), "mask2former": (mask2former, "masks_queries_logits")}
"""Whole models, and the name of an output."""
