"""Where the instruction of a sample comes from: the argument, the chat, or the prompt that a chat was rendered to."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from checkpoints import IMAGES, QUESTIONS, answer, build, encoder, question
from transformers import AutoProcessor

from igva_kernels.models.llava_igva import processing_llava_igva
from igva_kernels.models.llava_igva.chat_templates import CHAT_TEMPLATES
from igva_kernels.models.llava_igva.sentence_encoder import encode_sentences

TENSORS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
TURNS = [question(0), answer(), question(1, image=False)]


@pytest.fixture(scope="module")
def pair():
    return build()


def mean(*questions):
    return encode_sentences(encoder(), questions).mean(0, keepdim=True)


CHATS = {
    "one question": ([question(0)], {}, QUESTIONS[:1]),
    "two questions, the last of which is to be answered": (TURNS, {}, QUESTIONS[1:2]),
    "an answer that goes on": ([*TURNS, answer()], {"continue_final_message": True}, QUESTIONS[1:2]),
    "a sample for training": ([*TURNS, answer()], {}, QUESTIONS[:2]),
    "several parts of text": (
        [{"role": "user", "content": [*question(0)["content"], {"type": "text", "text": " Be brief. "}]}],
        {},
        [f"{QUESTIONS[0]}\nBe brief."],
    ),
    "a last message without text": ([TURNS[0], {"role": "user", "content": []}], {}, QUESTIONS[:1]),
    "an instruction that is given": ([question(0)], {"instructions": "Other?"}, ["Other?"]),
    "one that is given among processor_kwargs": (
        [question(0)],
        {"processor_kwargs": {"instructions": [["Other?", "And this?"]]}},
        ["Other?", "And this?"],
    ),
}


@pytest.mark.parametrize(("chat", "options", "want"), CHATS.values(), ids=CHATS)
def test_a_chat_is_embedded_by_what_the_user_says(pair, chat, options, want):
    inputs = pair[1].apply_chat_template(chat, **TENSORS, **options)
    torch.testing.assert_close(inputs["sentence_embeds"], mean(*want), rtol=1e-5, atol=1e-6)


def test_every_chat_of_a_batch_has_its_own_instruction(pair):
    options = {**TENSORS, "processor_kwargs": {"padding": True}}
    inputs = pair[1].apply_chat_template([[question(0)], TURNS], **options)
    want = torch.cat([mean(QUESTIONS[0]), mean(QUESTIONS[1])])
    torch.testing.assert_close(inputs["sentence_embeds"], want, rtol=1e-5, atol=1e-6)


def test_a_prompt_that_was_rendered_here_has_the_instruction_of_its_chat(pair, monkeypatch):
    processor = pair[1]
    chats = [[question(0)], TURNS, [{"role": "user", "content": f"<image>\n{QUESTIONS[2]} "}]]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(images=IMAGES[:3], text=prompts, return_tensors="pt", padding=True)
    want = torch.cat([mean(QUESTIONS[0]), mean(QUESTIONS[1]), mean(QUESTIONS[2])])
    torch.testing.assert_close(inputs["sentence_embeds"], want, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(processing_llava_igva, "REMEMBERED_PROMPTS", 1)
    processor.apply_chat_template([question(3)])
    assert "sentence_embeds" not in processor(images=IMAGES[0], text=prompts[0], return_tensors="pt")


def test_a_prompt_of_another_origin_has_no_instruction_and_the_model_asks_for_one(pair):
    model, processor = pair
    inputs = processor(images=IMAGES[0], text="USER: <image>\nWho has written this? ASSISTANT:", return_tensors="pt")
    with pytest.raises(ValueError, match=r"sentence_embeds: .* need sentence_embeds or instructions"):
        model.generate(**inputs)


def test_an_image_without_a_word_of_the_user_is_refused(pair):
    chat = [{"role": "user", "content": question(0)["content"][:1]}]
    with pytest.raises(ValueError, match=r"chat 1 shows an image and has no text of the user.*instructions"):
        pair[1].apply_chat_template([[question(0)], chat], **TENSORS)


def test_an_encoder_is_only_asked_where_the_model_reads_the_answer():
    chats = [[question(0, image=False)], [question(0)]]
    _, unread = build(aggregation="uniform", sentence_encoder="no/such/encoder")
    _, default = build(sentence_encoder=None)
    assert "sentence_embeds" not in unread.apply_chat_template(chats[1], **TENSORS)
    assert "sentence_embeds" not in default.apply_chat_template(chats[0], **TENSORS)  # no image, nothing to weigh
    with pytest.raises(ValueError, match=r"sentence_encoder: .* got None"):
        default.apply_chat_template(chats[1], **TENSORS)


def test_whether_the_instruction_is_read_is_saved_with_the_processor(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).reads_instructions
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "reads_instructions"}))
    older = AutoProcessor.from_pretrained(tmp_path)  # answers as it did before processors read chats
    assert "sentence_embeds" not in older.apply_chat_template([question(0)], **TENSORS)


@pytest.mark.parametrize("version", CHAT_TEMPLATES)
def test_llavas_prompts_take_content_as_a_string_and_as_parts(pair, version):
    parts = [*TURNS, answer("No.")]
    strings = [{"role": m["role"], "content": "".join(p.get("text", "<image>\n") for p in m["content"])} for m in parts]
    render = pair[1].tokenizer.apply_chat_template
    options = {"chat_template": CHAT_TEMPLATES[version], "return_assistant_tokens_mask": True, **TENSORS}
    got, want = render(parts, **options), render(strings, **options)
    for name in ("input_ids", "assistant_masks"):
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(want[name]))
    text = pair[1].tokenizer.decode(got["input_ids"][0])
    assert text == pair[1].apply_chat_template(parts, chat_template=CHAT_TEMPLATES[version])
    assert text.count("<image>") == 1 and "Red." in text
