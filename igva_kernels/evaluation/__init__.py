"""Evaluation of LLaVA-IGVA by lmms-eval, which finds it by this package's entry point ``lmms_eval.models``."""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """The manifest of the model that ``lmms-eval --model llava_igva`` runs."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llava_igva", chat_class_path="igva_kernels.evaluation.lmms_eval.LlavaIgva")
