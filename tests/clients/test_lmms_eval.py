"""lmms-eval finds the adapter by the entry point of this package and evaluates a checkpoint with one command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5")

from checkpoints import IMAGES, QUESTIONS, TEMPLATE, new_tokens, question, save

CHECKOUT = Path(__file__).parents[2]

TASK = """
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
task: four_pictures
test_split: test
output_type: generate_until
doc_to_visual: !function answers.pictures
doc_to_text: !function answers.asked
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false, until: ["{end}"]}}
process_results: !function answers.compared
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
ANSWERS = """
def pictures(doc):
    return [doc["image"].convert("RGB")]
def asked(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
def compared(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


@pytest.mark.slow
def test_one_command_evaluates_a_checkpoint(tmp_path, client_row):
    client_row("lmms-eval", "reference")
    pytest.importorskip("lmms_eval")
    model, processor = save(tmp_path / "model")
    end = "w"
    answers = [_answer(model, processor, row).split(end)[0] for row in range(4)]
    assert len(set(answers)) > 1
    _write_task(tmp_path, [*answers[:3], "something else"], end)
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_igva", "--tasks", "four_pictures"]
    options = ["--model_args", f"pretrained={tmp_path / 'model'}", "--include_path", str(tmp_path / "task")]
    results = ["--batch_size", "3", "--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "site")}
    _register(tmp_path / "site")
    ran = subprocess.run([*command, *options, *results], env=environment, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (logged,) = (tmp_path / "out").rglob("*samples_four_pictures.jsonl")
    samples = sorted(map(json.loads, logged.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == answers
    (summary,) = (tmp_path / "out").rglob("*results.json")
    assert json.loads(summary.read_text())["results"]["four_pictures"]["right,none"] == 0.75


def test_a_checkpoint_without_a_chat_template_and_a_video_are_refused(tmp_path, client_row):
    client_row("lmms-eval", "reference")
    pytest.importorskip("lmms_eval")
    from igva_kernels.evaluation.lmms_eval import LlavaIgva

    model, processor = save(tmp_path / "model")
    processor.chat_template = processor.tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "bare")
    processor.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"chat_template: .* has none"):
        LlavaIgva(str(tmp_path / "bare"), device="cpu")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    evaluated = LlavaIgva(str(tmp_path / "bare"), device="cpu", chat_template=tmp_path / "template.jinja")
    with pytest.raises(NotImplementedError, match="got 1 videos and 0 sounds"):
        evaluated._chat([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


def _answer(model, processor, row):
    prompt = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template([question(row)], **prompt)
    return processor.decode(new_tokens(model, inputs)[0], skip_special_tokens=True)


def _write_task(path, answers, end):
    from datasets import Dataset, DatasetDict, Image

    rows = {"image": IMAGES, "question": list(QUESTIONS), "answer": answers}
    DatasetDict({"test": Dataset.from_dict(rows).cast_column("image", Image())}).save_to_disk(path / "data")
    (path / "task").mkdir()
    (path / "task" / "four_pictures.yaml").write_text(TASK.format(data=path / "data", end=end))
    (path / "task" / "answers.py").write_text(ANSWERS)


def _register(path):
    """A distribution with the entry points of pyproject.toml: those of an editable install may be older."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    points = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    info = path / "as_in_pyproject-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: as_in_pyproject\nVersion: 1\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))
