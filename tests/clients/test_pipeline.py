"""transformers' pipelines answer as the model does."""

import pytest

pytest.importorskip("transformers", "5")

from checkpoints import IMAGES, build, new_tokens, question
from clients import MODELS
from transformers import pipeline

import igva_kernels as ik

PROMPT = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
TOKENS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("kind", MODELS)
def test_the_pipeline_answers_chats_as_the_model(kind, client_row, tmp_path):
    client_row("pipeline", kind)
    model, processor = build(kind)
    processor.tokenizer.padding_side = "left"
    chats = [[question(0)], [question(1)]]
    inputs = processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **PROMPT)
    want = new_tokens(model, inputs)
    if kind == "patched":
        ik.patch(model)
    given = {"model": model, "processor": processor}
    if kind == "reference":
        for part in (model, processor):
            part.save_pretrained(tmp_path)
        given = {"model": str(tmp_path)}
    pipe = pipeline("image-text-to-text", **given)
    if kind == "reference":
        pipe.processor.tokenizer.padding_side = "left"
    for size in (1, 2):
        answers = pipe(chats, batch_size=size, return_tensors=True, generate_kwargs=dict(TOKENS))
        assert [answer[0]["generated_token_ids"][-6:].tolist() for answer in answers] == want


def test_a_pipeline_without_a_chat_takes_the_instruction_as_an_argument(client_row):
    client_row("pipeline", "reference")
    model, processor = build()
    prompt = "USER: <image>\nIs it a cat? ASSISTANT:"
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    with pytest.raises(ValueError, match=r"sentence_embeds: .* need sentence_embeds or instructions"):
        pipe(images=IMAGES[0], text=prompt)
    answers = pipe(
        images=IMAGES[0], text=prompt, return_tensors=True, generate_kwargs=dict(TOKENS),
        processor_kwargs={"instructions": "Is it a cat?"},
    )  # fmt: skip
    inputs = processor(images=IMAGES[0], text=prompt, instructions="Is it a cat?", return_tensors="pt")
    assert [answers[0]["generated_token_ids"][-6:].tolist()] == new_tokens(model, inputs)
