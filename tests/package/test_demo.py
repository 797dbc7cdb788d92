"""The demo, with a small model in place of the full-size one."""

from importlib.resources import files

import pytest
import torch
from PIL import Image

from igva_kernels import cli

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


def test_an_image_or_a_model_that_cannot_be_read_is_a_message(tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama"}')
    for option, value, message in (
        ("--image", tmp_path / "none.jpg", "No such file"),
        ("--image", tmp_path / "text.jpg", "cannot identify image"),
        ("--model", tmp_path, "got 'llava_llama'; `igva-kernels convert`"),
    ):
        assert cli.main(["demo", option, str(value), "--steps", "0"]) == 2
        assert message in capsys.readouterr().err


def test_training_leaves_the_weights_as_they_were():
    from igva_kernels.demo.compare import Conversation, run_model

    model, processor = demo.random_model(["What?", "That."])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    conversation = Conversation(processor, Image.new("RGB", (56, 56)), ["What?"], ["That."])
    run = run_model(model, conversation, "reference", 2, lambda: None)
    assert run.losses[1] < run.losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_answers_are_learned():
    from igva_kernels.demo.compare import Conversation

    answers = ["It is a cup.", "Yes."]
    _, processor = demo.random_model(answers)
    conversation = Conversation(processor, Image.new("RGB", (56, 56)), ["What is that?", "Is it?"], answers)
    labels = conversation.training["labels"]
    learned = [processor.tokenizer.decode(row[row != -100]) for row in labels]
    assert learned == [f" {answer}</s>" for answer in answers]
    assert conversation.training["pixel_values"].shape[0] == 1
