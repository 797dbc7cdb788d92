"""What every form of the reference model must do, whatever is fused or injected in it."""

import torch
from hosts import close, gradients
from tiny import batch


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
