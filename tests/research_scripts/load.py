"""Loads a model by LLaVA's page for inference and asks it: ``python load.py MODEL BASE ASSETS`` (BASE may be empty).

Prints as JSON which of the saved weights are not those of the loaded model, and what the model answers.
"""

import json
import sys
from pathlib import Path

import torch
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from PIL import Image

import igva_kernels as ik

model_path, model_base, assets = sys.argv[1], sys.argv[2] or None, Path(sys.argv[3])
torch.manual_seed(1)  # whatever is left at random is not what was trained
tokenizer, model, image_processor, _ = load_pretrained_model(
    model_path, model_base, get_model_name_from_path(model_path), device_map="cpu", device="cpu"
)
handle = ik.patch(model, weights=model_path)

folder, saved = Path(model_path), {}
for name in ("model.safetensors", "non_lora_trainables.bin", "mm_projector.bin"):
    if (folder / name).exists() and not saved:
        if name.endswith("bin"):
            saved = torch.load(folder / name)
        else:
            from safetensors.torch import load_file

            saved = load_file(folder / name)
state = model.state_dict()
differ = [
    name
    for name, value in saved.items()
    if "vision_tower" not in name  # which LLaVA reads from the tower's own checkpoint
    for there in [name.removeprefix("base_model.model.")]
    if there not in state or not torch.equal(state[there], value.to(state[there].dtype))
]

model.eval()
image = Image.open(assets / "images/3.png")
images = process_images([image], image_processor, model.config).to(torch.float16)
ids = tokenizer_image_token("USER: <image>\nWhat is this? ASSISTANT:", tokenizer, return_tensors="pt")[None]
more = {}
if model.config.igva_kernels["allocator"]:
    more["sentence_embeds"] = torch.linspace(-1, 1, 768)[None]
with torch.inference_mode():
    outputs = model(ids, images=images, **more)
    tokens = model.generate(ids, images=images, do_sample=False, max_new_tokens=5, **more)
weights = outputs.get("layer_weights")
print(json.dumps({
    "differ": differ, "patched": bool(handle.is_active), "logits": float(outputs.logits.float().abs().mean()),
    "tokens": tokens.tolist(), "weights": None if weights is None else weights.tolist(),
}))  # fmt: skip
