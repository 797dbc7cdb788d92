"""Make the checkpoint that ``train_llava_igva.py`` starts from, of a vision tower and a language model or of a Llava.

    python examples/assemble_llava_igva.py --vision_tower openai/clip-vit-large-patch14-336 \\
        --language_model lmsys/vicuna-7b-v1.5 --output_dir base
    python examples/assemble_llava_igva.py --llava llava-hf/llava-1.5-7b-hf --output_dir base

Projector and allocator are new; a model upgraded from a Llava answers at first as the Llava does.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from llava_data import IMAGE
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17's top-level one needs torchvision

from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaForConditionalGeneration, LlavaIgvaProcessor


def from_parts(
    vision_tower: str, language_model: str, output_dir: str, dtype: torch.dtype = torch.bfloat16, **config_fields: Any
) -> None:
    """Join a vision tower and a language model, and save the result with its processor.

    Args:
        vision_tower: name or directory of the tower, alone or in a CLIP or SigLIP.
        language_model: name or directory of the language model.
        output_dir: where the result goes.
        dtype: of its weights.
        config_fields: of ``LlavaIgvaConfig``.
    """
    vision_config = AutoConfig.from_pretrained(vision_tower)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    tower = AutoModel.from_pretrained(vision_tower, config=vision_config, dtype=dtype)
    language = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    language.resize_token_embeddings(len(tokenizer))
    config = LlavaIgvaConfig(
        vision_config=vision_config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        **config_fields,
    )
    state_dict = {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    state_dict |= {f"model.language_model.{name}": value for name, value in language.base_model.state_dict().items()}
    state_dict["lm_head.weight"] = language.get_output_embeddings().weight
    model = LlavaIgvaForConditionalGeneration.from_pretrained(None, config=config, state_dict=state_dict, dtype=dtype)
    model.save_pretrained(output_dir)
    images = AutoImageProcessor.from_pretrained(vision_tower)
    LlavaIgvaProcessor.from_config(config, images, tokenizer).save_pretrained(output_dir)


def from_llava(llava: str, output_dir: str, dtype: torch.dtype = torch.bfloat16, **config_fields: Any) -> None:
    """Upgrade a Llava, and save the result with its processor; arguments as in ``from_parts``."""
    plain = LlavaForConditionalGeneration.from_pretrained(llava, dtype=dtype)
    model = LlavaIgvaForConditionalGeneration.from_llava(plain, **config_fields)
    model.save_pretrained(output_dir)
    processor = AutoProcessor.from_pretrained(llava)
    LlavaIgvaProcessor.from_config(
        model.config, processor.image_processor, processor.tokenizer, chat_template=processor.chat_template
    ).save_pretrained(output_dir)


def main() -> None:
    """Assemble as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision_tower")
    parser.add_argument("--language_model")
    parser.add_argument("--llava")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--config", type=json.loads, default={}, help='fields of the config: {"mix_groups": 4}')
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.llava:
        from_llava(args.llava, args.output_dir, dtype, **args.config)
    elif args.vision_tower and args.language_model:
        from_parts(args.vision_tower, args.language_model, args.output_dir, dtype, **args.config)
    else:
        parser.error("need --llava, or --vision_tower and --language_model")


if __name__ == "__main__":
    main()
