"""The demo, with a small model in place of the full-size one."""

import json
import re
import shutil
from importlib.resources import files

import pytest
import torch
from PIL import Image

from igva_kernels import MixPlan, cli

demo = pytest.importorskip("igva_kernels.demo", reason="needs the extra 'demo'")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    from igva_kernels.demo import model

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2}
    language = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 32}
    monkeypatch.setattr(model, "TOWER", {**model.TOWER, **tower, "image_size": 56})
    monkeypatch.setattr(model, "LANGUAGE_MODEL", {**model.LANGUAGE_MODEL, **language})


def test_the_bundled_photograph_has_a_licence():
    photograph = files(demo) / "coffee.jpg"
    assert Image.open(str(photograph)).size == (600, 400)
    assert "CC0" in (files(demo) / "coffee.LICENSE.txt").read_text()


def test_demo(tmp_path, capsys):
    assert cli.main(["demo", "--output", str(tmp_path), "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "RANDOM" in text
    assert "after 2 training steps" in text
    for question in demo.QUESTIONS:
        assert question.split()[0] in text
    for figure in ("error against fp64", "kept for backward", "training step, s"):
        assert figure in text
    assert Image.open(tmp_path / "demo.png").size[0] > 1000


def test_your_image_and_your_questions_without_training(tmp_path, capsys):
    image = tmp_path / "grey.png"
    Image.new("L", (80, 60), 128).save(image)
    asks = ["--ask", "Is it [bold]grey[/bold]?", "--ask", "Why?"]
    assert cli.main(["demo", "--image", str(image), *asks, "--steps", "0", "--output", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert "grey.png" in text
    assert "[bold]grey" in text
    assert "after" not in text
    assert (tmp_path / "new" / "demo.png").exists()


def test_a_checkpoint(tmp_path, capsys):
    model, processor = demo.random_model(["What is it?"])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    asks = ["--ask", "What is it?"]
    assert cli.main(["demo", "--model", str(tmp_path / "model"), *asks, "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "RANDOM" not in text
    assert "after" not in text


def save_checkpoint(folder, dtype=torch.float32, **fields):
    """The demo's model with other fields of its config; returns the command that asks it."""
    from igva_kernels.models import LlavaIgvaConfig, LlavaIgvaForConditionalGeneration, LlavaIgvaProcessor

    model, processor = demo.random_model(["What is it?"])
    small = {"allocator_hidden_dim": 32, "allocator_num_blocks": 1}
    config = LlavaIgvaConfig.from_dict({**model.config.to_dict(), **small, **fields})
    LlavaIgvaForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    LlavaIgvaProcessor.from_config(config, processor.image_processor, processor.tokenizer).save_pretrained(folder)
    return ["demo", "--model", str(folder), "--ask", "What is it?", "--ask", "Why?", "--output", str(folder / "drawn")]


GRADIENTS = ["grad weight1", "grad weight2"]
GROUPS = ["mean(h1, h2)", "mean(h3, h4)", "mean(h5, h6)", "mean(h7, h8)"]
THREE_BLOCKS = MixPlan((((1, 0, 0.5), (3, 0, 0.5)), ((2, 2, 1.0), (0, None, 1.0)), ((-1, None, 1.0),)))
CHECKPOINTS = {
    "uniform": ({"aggregation": "uniform", "sentence_encoder": None}, 0, None, GRADIENTS),
    "uniform, trained": ({"aggregation": "uniform"}, 2, [], GRADIENTS),
    "taps and a norm": ({"mix_plan": MixPlan.concat([-2, -3, 1]), "projector_layernorm_eps": 1e-5}, 0, None, GRADIENTS),
    "no biases": ({"multimodal_projector_bias": False}, 0, GROUPS, GRADIENTS),
    "a kink": ({"projector_hidden_act": "relu"}, 0, GROUPS, GRADIENTS[1:]),
    "one block, learned weights": (
        {"mix_plan": MixPlan.weighted_sum([1, 3], -2), "aggregation": "learned", "sentence_encoder": None},
        0, ["h1", "h3"], GRADIENTS,
    ),
    "three blocks, a column of nothing": (
        {"mix_plan": THREE_BLOCKS, "aggregation": "text"}, 0, ["mean(h1, h3)", "nothing", "h2"], GRADIENTS,
    ),
}  # fmt: skip
"""Fields of the config, training steps, what the columns of the figure weigh (None: there is no figure), and which
gradients are judged."""


@pytest.mark.parametrize(("fields", "steps", "columns", "judged"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_every_kind_of_checkpoint(fields, steps, columns, judged, tmp_path, capsys, monkeypatch):
    draw, run_connector, drawn, figures = demo.draw, demo.run_connector, [], {}
    monkeypatch.setattr(demo, "draw", lambda path, asked, *args: drawn.append(args[0]) or draw(path, asked, *args))
    monkeypatch.setattr(demo, "run_connector", lambda *args: figures.update(run_connector(*args)) or figures)
    assert cli.main([*save_checkpoint(tmp_path, **fields), "--steps", str(steps)]) == 0
    assert [verdict.name for verdict in figures["fused"].verdicts] == ["output", *judged]
    assert ("grad bias1" in figures["fused"].errors) == fields.get("multimodal_projector_bias", True)
    assert drawn == ([] if columns is None else [columns])
    assert (tmp_path / "drawn" / "demo.png").exists() == (columns is not None)
    assert ("figure: none" in capsys.readouterr().out) == (columns is None)


REFUSED = {
    "no encoder": ({"sentence_encoder": None}, "sentence_encoder: .* got None"),
    "another encoder": ({"sentence_embed_dim": 100}, "whose embeddings have 384 numbers, need one with 100"),
    "as exact as the oracle": ({"dtype": torch.float64}, "dtype: got a checkpoint in float64, need"),
}


@pytest.mark.parametrize(("fields", "said"), REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_that_cannot_be_asked_is_refused_in_a_sentence(fields, said, tmp_path, capsys):
    assert cli.main(save_checkpoint(tmp_path, **fields)) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_processor_that_embeds_no_instructions_is_refused_in_a_sentence(tmp_path, capsys):
    from transformers import LlavaProcessor

    command = save_checkpoint(tmp_path)
    _, processor = demo.random_model(["What is it?"])
    LlavaProcessor(processor.image_processor, processor.tokenizer, 14, "default").save_pretrained(tmp_path)
    assert cli.main(command) == 2
    assert "processor: got a LlavaProcessor, need the model's own" in capsys.readouterr().err


def test_a_check_that_fails_is_named_with_what_to_do(tmp_path, capsys, monkeypatch):
    run_model, run_connector = demo.run_model, demo.run_connector

    def another_answer(model, conversation, impl, steps, advance):
        run = run_model(model, conversation, impl, steps, advance)
        if impl != "reference":
            run.answers.texts[0] = "tea"
            run.answers.tokens[0, 1] = run.answers.logits[0, 1].argmin()
        return run

    def wrong_output(*args):
        figures = run_connector(*args)
        output = figures["fused"].verdicts[0]
        figures["fused"].verdicts[0] = output._replace(error=3 * output.plain, budget=2 * output.plain)
        return figures

    monkeypatch.setattr(demo, "run_model", another_answer)
    monkeypatch.setattr(demo, "run_connector", wrong_output)
    assert cli.main(["demo", "--output", str(tmp_path), "--steps", "0"]) == 1
    failures = " ".join(capsys.readouterr().out.split("FAILED:")[1].split())
    assert "answers to 'What colour is the saucer?' differ" in failures and "'tea' by the fused one" in failures
    assert "output of the fused connector" in failures and "3.00 times as much" in failures
    assert "igva-kernels verify" in failures and "igva-kernels info" in failures
    assert failures.count("*") == 2


def test_the_gap_of_answers_is_that_of_their_first_difference():
    from igva_kernels.demo.compare import Answers

    logits = torch.tensor([[[0.0, 1.0, 4.0], [3.0, 2.5, 0.0], [9.0, 0.0, 0.0]]])
    plain, fused = (Answers([""], torch.tensor([tokens]), logits) for tokens in ([2, 0, 0], [2, 1]))
    assert plain.gap(plain, 0) == 0
    assert plain.gap(fused, 0) == pytest.approx(0.5 / logits[0, 1].std().item())


def test_losses_of_zero_and_below_can_be_compared(capsys):
    from rich.console import Console

    from igva_kernels.demo.compare import Run

    one = {"logits": torch.ones(1), "grads": {"w": torch.ones(1)}, "layer_weights": [], "step_seconds": []}
    runs = {
        name: Run(answers=None, answer_seconds=0.0, losses=losses, trained_answers=None, **one)
        for name, losses in (("plain", [0.0, -4.0]), ("fused", [0.0, -3.0]))
    }
    demo._print_agreement(Console(), runs)
    assert "the losses of 2 training steps by at most 2.5e-01" in " ".join(capsys.readouterr().out.split())
    for run in runs.values():
        run.losses.pop()
    demo._print_agreement(Console(), runs)
    assert "the losses of 1 training step by at most 0.0e+00" in " ".join(capsys.readouterr().out.split())


def test_an_image_or_a_model_that_cannot_be_read_is_a_message(tmp_path, capsys, monkeypatch):
    photograph = tmp_path / "cut.jpg"
    photograph.write_bytes((files(demo) / "coffee.jpg").read_bytes()[:5000])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "llava_llama"}')
    save_checkpoint(tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    for option, value, message in (
        ("--image", tmp_path / "none.jpg", "No such file"),
        ("--image", tmp_path / "text.jpg", "cannot identify image"),
        ("--image", photograph, "truncated"),
        ("--image", tmp_path, "Is a directory"),
        ("--model", tmp_path / "none", "none is not a directory"),
        ("--model", tmp_path, "holds no config.json"),
        ("--model", tmp_path / "theirs", "got 'llava_llama'; `igva-kernels convert`"),
        ("--model", tmp_path / "cut", "model.safetensors: "),
        ("--model", tmp_path / "ours", "they do not belong together"),  # that model would take 20 GB
    ):
        assert cli.main(["demo", option, str(value), "--steps", "0", "--output", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("igva-kernels demo: ") and message in line, line
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert cli.main(["demo", "--steps", "0", "--output", str(tmp_path / "out")]) == 2
    assert "coffee.jpg: Image size (240000 pixels) exceeds limit" in capsys.readouterr().err


def test_training_leaves_the_weights_as_they_were():
    from igva_kernels.demo.compare import Conversation, run_model

    model, processor = demo.random_model(["What?", "That."])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    conversation = Conversation(processor, Image.new("RGB", (56, 56)), ["What?"], ["That."], 384)
    run = run_model(model, conversation, "reference", 2, lambda: None)
    assert run.losses[1] < run.losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("end", ["</s>", None])
def test_only_answers_are_learned(end):
    from igva_kernels.demo.compare import Conversation

    answers = ["It is a cup.", "Yes."]
    _, processor = demo.random_model(answers)
    processor.tokenizer.eos_token = end
    conversation = Conversation(processor, Image.new("RGB", (56, 56)), ["What is that?", "Is it?"], answers, None)
    labels = conversation.training["labels"]
    learned = [processor.tokenizer.decode(row[row != -100]) for row in labels]
    assert learned == [f" {answer}{end or ''}" for answer in answers]
    assert conversation.training["pixel_values"].shape[0] == 1
    assert "sentence_embeds" not in conversation.training
