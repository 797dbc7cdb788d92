"""Tiny random models of transformers' LLaVA family, for every version of transformers that is tested."""

import inspect

import torch
import transformers
from seeds import seeded
from transformers import CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

IMAGE, VIDEO, VISION, TEXT, SIZE = 60, 61, 16, 32, 56
"""Image and video token, width of the tower and of the language model, pixels per side: 4 x 4 patches per tile."""

VIDEO_TOKENS = {
    "VideoLlavaForConditionalGeneration": 2 * 17,
    "LlavaNextVideoForConditionalGeneration": 2 * 4,
    "LlavaOnevisionForConditionalGeneration": 2 * 4 + 1,
}
"""Visual tokens of two frames: with CLS; pooled; pooled and a newline."""


def host_model(name, layers, tower="clip", seed=0, **overrides):
    """``XForConditionalGeneration`` in eval mode; ``layers`` is what ``vision_feature_layer`` says."""
    config_class = getattr(transformers, f"{name}Config")
    sizes = {"hidden_size": VISION, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower]
    fields = {
        "vision_config": vision(**sizes, image_size=SIZE, patch_size=14),
        "text_config": LlamaConfig(
            hidden_size=TEXT, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=62, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "image_token_index": IMAGE,
        "vision_feature_layer": layers,
    }  # fmt: skip
    if name == "VipLlava" and "vision_feature_layers" in inspect.signature(config_class).parameters:
        fields["vision_feature_layers"] = fields.pop("vision_feature_layer")  # its name before transformers 5.23
    if "Video" in name or "Onevision" in name:
        fields["video_token_index"] = VIDEO
    if "Next" in name or "Onevision" in name:
        fields["image_grid_pinpoints"] = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    if name != "VipLlava":
        fields["vision_feature_select_strategy"] = "full" if tower == "siglip" else "default"
    torch.manual_seed(seeded(seed))
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config_class(**{**fields, **overrides}))
    return liven(model.eval())


def liven(model):
    """Weights as large as a trained model's: with the usual ones so narrow a model hardly sees its images."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model


def pixels(model, video=False, seed=0):
    """Two images of different shapes where the model cuts them into tiles, or a video of two frames."""
    generator = torch.Generator().manual_seed(seeded(seed))
    if video:
        return {"pixel_values_videos": torch.randn(1, 2, 3, SIZE, SIZE, generator=generator)}
    key = "pixel_values_images" if "pixel_values_images" in _parameters(model) else "pixel_values"
    if not hasattr(model.config, "image_grid_pinpoints"):
        return {key: torch.randn(2, 3, SIZE, SIZE, generator=generator)}
    sizes = torch.tensor([[40, 100], [SIZE, SIZE]])
    return {key: torch.randn(2, 5, 3, SIZE, SIZE, generator=generator), "image_sizes": sizes}


def _parameters(model):
    """transformers 5 takes ``pixel_values_images`` of VideoLlava under a deprecated name."""
    names = inspect.signature(model.forward).parameters
    return names.keys() - ({"pixel_values_images"} if "pixel_values" in names else set())


def features(model, inputs):
    """The visual tokens of the images, one ``[tokens, TEXT]`` each, whatever a version returns them in."""
    (values,) = (inputs[key] for key in inputs if key.startswith("pixel_values"))
    sizes = {key: inputs[key] for key in inputs if key == "image_sizes"}
    return list(matrices(model.model.get_image_features(values, **sizes)))


def matrices(out):
    """The matrices in the output of ``get_image_features`` of any version; a batch of matrices is split."""
    out = getattr(out, "pooler_output", out)
    if isinstance(out, torch.Tensor):
        yield from [out] if out.dim() == 2 else out if out.dim() == 3 else []
    elif isinstance(out, (tuple, list)):
        for item in out:
            yield from matrices(item)


def host_inputs(model, video=False, labels=False, seed=0):
    """Inputs of ``forward``: a prompt of random tokens with as many places as the visual tokens need."""
    inputs = pixels(model, video, seed)
    with torch.no_grad():
        counts = [VIDEO_TOKENS[type(model).__name__]] if video else [len(rows) for rows in features(model, inputs)]
    generator = torch.Generator().manual_seed(seeded(seed))
    prompt = [torch.randint(3, 60, (4,), generator=generator)]
    for count in counts:
        prompt += [torch.full((count,), VIDEO if video else IMAGE), torch.randint(3, 60, (3,), generator=generator)]
    inputs["input_ids"] = torch.cat(prompt)[None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if labels:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE, -100)
    return inputs


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


def step(model, inputs):
    """Loss, logits and gradients of one backward pass."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), gradients(model)
