"""Train LLaVA-IGVA as its authors do, on transformers' Trainer: one process, DDP, FSDP2 or DeepSpeed ZeRO.

Stage 1 trains the projector on captions, with uniform layer weights. Stage 2 trains allocator, projector and
language model on instructions, with the entropy of the layer weights in the loss. ``docs/training.md`` has the launch
lines. Options that are not listed here are transformers' TrainingArguments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from llava_data import LlavaCollator, LlavaDataset
from torch import nn
from transformers import AutoProcessor, HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerState

from igva_kernels.models import LlavaIgvaForConditionalGeneration, LlavaIgvaProcessor
from igva_kernels.models.llava_igva.chat_templates import CHAT_TEMPLATES
from igva_kernels.streaming import encoder_layers


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ModelArguments:
    """What is trained; an option that is not given keeps the checkpoint's value."""

    model_name_or_path: str = _option(None, "LLaVA-IGVA checkpoint and processor; assemble_llava_igva.py makes one")
    stage: Literal[1, 2] = _option(2, "1: projector only, uniform weights. 2: allocator, projector, language model")
    mix_groups: str | None = _option(None, "layer groups: a number, or lists as JSON: [[1,2,3],[4,5,6]]")
    mm_vision_select_layer: int | None = _option(None, "the base layer beside the mix")
    balance_coefficient: float | None = _option(None, "lambda, the factor of the negative entropy in the loss")
    sentence_encoder: str | None = _option(None, "frozen sentence-transformers model that embeds the instructions")
    attn_implementation: str | None = _option(None, "flash_attention_2, sdpa or eager")
    impl: str = _option("auto", "which implementation the connector uses: auto, reference, cpu, triton or cuda")
    dtype: str = _option("float32", "of the weights; with --bf16, products of float32 weights run in bf16")
    freeze_backbone: bool = _option(False, "stage 2 without the language model")
    unfreeze_vision_tower: bool = _option(False, "stage 2 with the vision tower")
    lora_enable: bool = _option(False, "LoRA on projector and language model; the allocator is trained in full")
    lora_r: int = _option(64, "rank of LoRA")
    lora_alpha: int = _option(16, "scale of LoRA")
    lora_dropout: float = _option(0.05, "dropout of LoRA")


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = _option(None, "LLaVA's JSON")
    image_folder: str = _option("", "the folder that image names in it are relative to")
    version: Literal["plain", "vicuna_v1", "checkpoint"] | None = _option(
        None, "prompt: plain (default of stage 1), vicuna_v1 (of stage 2), or the checkpoint's chat template"
    )
    image_aspect_ratio: Literal["square", "pad"] = _option("pad", "pad: pad images to squares with the mean colour")
    model_max_length: int | None = _option(2048, "tokens after which a prompt is cut")
    sentence_embeds: str | None = _option(
        None, "safetensors file of instruction embeddings, made if missing; default: embedded when read"
    )


@dataclass
class TrainArguments(TrainingArguments):
    """TrainingArguments with a learning rate for the projector, and resumption by default."""

    mm_projector_lr: float | None = _option(None, "learning rate of the projector, if it differs")
    resume_from_checkpoint: str | None = _option(
        "auto", "a checkpoint; auto: the last complete one of output_dir, if any; never"
    )
    remove_unused_columns: bool = _option(False, "must stay false: the collator reads samples, not columns")


class LlavaTrainer(Trainer):
    """A Trainer with a learning rate for the projector, which can resume checkpoints with renamed weights."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with the projector in groups of its own."""
        optimizer = super().create_optimizer(model)
        if self.args.mm_projector_lr is not None:
            named = (self.model if model is None else model).named_parameters()
            projector = {id(p) for name, p in named if _is_projector(name)}
            groups = []
            for group in optimizer.param_groups:
                own = [p for p in group["params"] if id(p) in projector]
                others = [p for p in group["params"] if id(p) not in projector]
                groups += [{**group, "params": others}, {**group, "params": own, "lr": self.args.mm_projector_lr}]
            optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # A checkpoint has Llava's names of the weights, which only from_pretrained translates: the Trainer would load
        # none of them and go on with a warning (huggingface/transformers#43701).
        model = self.model if model is None else model
        if self.is_fsdp_enabled or not isinstance(model, LlavaIgvaForConditionalGeneration):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint).state_dict())


def load_model(args: ModelArguments) -> PreTrainedModel:
    """The checkpoint's model, in which only what the stage trains takes gradients."""
    overrides = {
        "aggregation": "uniform" if args.stage == 1 else "instruction",
        "mix_groups": None if args.mix_groups is None else json.loads(args.mix_groups),
        "vision_feature_layer": args.mm_vision_select_layer,
        "balance_coefficient": args.balance_coefficient,
        "sentence_encoder": args.sentence_encoder,
        "attn_implementation": args.attn_implementation,
        "freeze_vision_tower": not (args.stage == 2 and args.unfreeze_vision_tower),
    }
    model = LlavaIgvaForConditionalGeneration.from_pretrained(
        args.model_name_or_path, impl=args.impl, dtype=args.dtype,
        **{name: value for name, value in overrides.items() if value is not None},
    )  # fmt: skip
    model.config.use_cache = False
    if args.stage == 1:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_is_projector(name))
    elif args.freeze_backbone:
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    _freeze_unread(model)
    return with_lora(model, args) if args.lora_enable else model


def _is_projector(name: str) -> bool:
    """Whether a parameter belongs to the connector's projector, to its fuser, or to a projector of an injection."""
    return any(part in name for part in ("multi_modal_projector.", "fuser.", "injection_projectors."))


def _freeze_unread(model: PreTrainedModel) -> None:
    """Freeze what follows the last layer of the tower that the connector reads: DDP would wait for its gradients."""
    tower = model.model.vision_tower
    config = model.config
    fuser, injection = config.fuser_plan, config.injection_plan
    beside = (*(() if fuser is None else fuser.levels), *(() if injection is None else injection.taps))
    read = (*config.plan.layers, *beside)
    *_, last = encoder_layers(tower)[max(read) - 1].parameters()
    for parameter in reversed(list(tower.parameters())):
        if parameter is last:
            break
        parameter.requires_grad_(False)


def with_lora(model: PreTrainedModel, args: ModelArguments) -> PreTrainedModel:
    """LoRA on every Linear of the language model and the projector; allocator and fuser are trained and saved whole."""
    from peft import LoraConfig, get_peft_model

    whole = [*(["weight_allocator"] if args.stage == 2 else []), *(["fuser"] if model.config.fuser else [])]
    config = LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, task_type="CAUSAL_LM",
        target_modules=r".*language_model.*_proj|.*(multi_modal_projector|injection_projectors\.\d+)\.linear_[12]",
        modules_to_save=whole or None,
    )  # fmt: skip
    model.enable_input_require_grads()
    return get_peft_model(model, config)


def load_data(
    args: DataArguments, stage: int, processor: LlavaIgvaProcessor, sentence_encoder: str | None
) -> tuple[LlavaDataset, LlavaCollator]:
    """The dataset, and the collator with the processor's chat template set."""
    version = args.version or ("plain" if stage == 1 else "vicuna_v1")
    if version != "checkpoint":
        processor.chat_template = CHAT_TEMPLATES[version]
    mean = tuple(round(255 * value) for value in processor.image_processor.image_mean)
    dataset = LlavaDataset(
        args.data_path, args.image_folder, sentence_encoder if stage == 2 else None, args.sentence_embeds,
        args.image_aspect_ratio, mean,
    )  # fmt: skip
    return dataset, LlavaCollator(processor, args.model_max_length)


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint with a complete trainer state, which the Trainer writes last; None if there is none."""
    checkpoints = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return str(max(checkpoints, key=lambda path: int(path.name.split("-")[1]))) if checkpoints else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except json.JSONDecodeError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> TrainerState:
    """Train as the command line says; the state that is returned has the log."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainArguments), description=__doc__)
    model_args, data_args, args = parser.parse_args_into_dataclasses(list(sys.argv[1:] if argv is None else argv))
    set_seed(args.seed)  # a new allocator is the same on every rank
    model = load_model(model_args)
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    dataset, collator = load_data(data_args, model_args.stage, processor, model.config.sentence_encoder)
    trainer = LlavaTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=collator, processing_class=processor
    )
    checkpoint = {"auto": last_complete_checkpoint(args.output_dir), "never": None}.get(
        args.resume_from_checkpoint, args.resume_from_checkpoint
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    return trainer.state


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        # All ranks together, before Python exits: threads of the group that are left by then abort the process.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
