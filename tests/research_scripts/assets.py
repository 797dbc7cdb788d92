"""Tiny models, pictures and questions for the training scripts: ``python assets.py FOLDER``."""

import io
import json
import sys
from pathlib import Path

import sentencepiece
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer, models
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (250, 250, 250)}
SHADES = ("plain", "light", "dark")


def liven(model):
    """Weights as large as a trained model's, so that the answers depend on the images."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def samples(folder):
    """Twelve pictures with a caption, and the same with one or two questions; one of these has no picture."""
    captions, questions = [], []
    for i, (shade, colour) in enumerate((s, c) for s in SHADES for c in COLOURS):
        factor = {"plain": 1.0, "light": 0.9, "dark": 0.5}[shade]
        pixels = tuple(int(factor * value) for value in COLOURS[colour])
        Image.new("RGB", (40 + 4 * i, 36), pixels).save(folder / f"{i}.png")
        answer = f"a {shade} {colour} wall"
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": answer}]
        captions.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
        second = [{"from": "human", "value": "Which colour is it?"}, {"from": "gpt", "value": colour}]
        questions.append({"id": str(i), "image": f"{i}.png", "conversations": turns + second * (i % 2)})
    questions[5] = {"id": "5", "conversations": second}
    return captions, questions


def main(folder):
    """Writes everything into the folder."""
    torch.manual_seed(0)
    images = folder / "images"
    images.mkdir(parents=True)
    captions, questions = samples(images)
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "questions.json").write_text(json.dumps(questions))
    texts = [turn["value"] for sample in questions for turn in sample["conversations"]]
    texts += ["A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 4), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        pad_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=False)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=512,
    )  # fmt: skip
    liven(LlamaForCausalLM(config)).save_pretrained(folder / "vicuna")
    tokenizer.save_pretrained(folder / "vicuna")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=24, num_attention_heads=4, image_size=28, patch_size=14
    )
    liven(CLIPVisionModel(vision)).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder / "clip"
    )
    # The encoder of sentences: one layer over characters, of all-mpnet-base-v2's width.
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map(chr, range(33, 127)),
        *(f"##{chr(i)}" for i in range(33, 127)),
    ]
    mpnet = folder / "mpnet-parts"
    mpnet.mkdir()
    (mpnet / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(mpnet / "vocab.txt")).save_pretrained(mpnet)
    sizes = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(mpnet)
    transformer = models.Transformer(str(mpnet))
    SentenceTransformer(modules=[transformer, models.Pooling(768)]).save(str(folder / "mpnet"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
