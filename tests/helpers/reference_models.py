"""What every form of the reference model must do, whatever is fused or injected in it."""

import copy

import pytest
import torch
from hosts import close, gradients
from tiny import batch, llava_config
from torch import nn
from transformers import LlavaForConditionalGeneration

from igva_kernels.models import ImageFeatures, LlavaIgvaForConditionalGeneration


def assert_step_is(model, inputs, logits_of):
    """Logits, loss and all gradients are those of ``logits_of(model, inputs)``; returns the gradients by name."""
    out, logits = model(**inputs), logits_of(model, inputs)
    close(out.logits, logits)
    loss = model.loss_function(logits=logits, labels=inputs["labels"], vocab_size=64)
    close(out.loss, loss)
    out.loss.backward()
    ours = gradients(model)
    model.zero_grad()
    loss.backward()
    expected = gradients(model)
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        close(ours[name], grad)
    return ours


def assert_samples_answer_alone_as_in_a_batch(model, padding):
    inputs = batch((2, 0, 1), padding)
    together, image = model(**inputs).logits, 0
    for sample, images in enumerate((2, 0, 1)):
        keep = inputs["attention_mask"][sample] == 1
        alone = {"input_ids": inputs["input_ids"][sample : sample + 1, keep]}
        if images:
            alone["pixel_values"] = inputs["pixel_values"][image : image + images]
        close(together[sample, keep], model(**alone).logits[0])
        image += images


def assert_a_compiled_step_is_the_step(model):
    inputs = batch((1, 1), labels=True)
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(**inputs).loss.backward()
    for name, grad in gradients(model).items():
        close(grad, expected[name])


def assert_zero_gradients_without_images(model, part):
    """Those of the parameters of ``part``, so that no rank of a sharded training waits for the others."""
    model(**batch((0, 0), labels=True)).loss.backward()
    grads = [p.grad for p in part.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def assert_many_questions_read_one_encoded_image(model, other, folder):
    """``other`` reads other states, and refuses what ``model`` has encoded."""
    inputs = batch((1, 1, 1))
    inputs["pixel_values"] = inputs["pixel_values"][:1].expand(3, -1, -1, -1)
    expected = model(**inputs).logits
    features = model.encode_images(inputs.pop("pixel_values")[:1])
    features.save(folder / "image.safetensors")
    features = ImageFeatures.load(folder / "image.safetensors")
    close(model(**inputs, image_features=features, image_index=torch.zeros(3, dtype=torch.long)).logits, expected)
    with pytest.raises(ValueError, match="image_features"):
        other(**inputs, image_features=features)


def assert_a_checkpoint_gives_the_same_bits(model, folder):
    """Returns the model that was loaded from it."""
    inputs = batch((1,))
    model.save_pretrained(folder)
    again = LlavaIgvaForConditionalGeneration.from_pretrained(folder, impl="reference")
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    return again


def assert_an_upgraded_llava_answers_as_before(**overrides):
    """Returns the upgraded model, with the gradients of a step."""
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(llava_config()).eval()
    inputs = batch((1,), labels=True)
    inputs.pop("sentence_embeds")
    expected = llava(**inputs).logits
    model = LlavaIgvaForConditionalGeneration.from_llava(llava, **overrides)
    out = model(**inputs)
    close(out.logits, expected)
    out.loss.backward()
    return model


def assert_a_copy_answers_by_itself(model):
    inputs = batch((1,))
    expected = model(**inputs).logits
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    close(other(**inputs).logits, expected)
