"""Checkpoints are loaded by their path, also in a process that never imports this package."""

import json

import pytest
import torch

pytest.importorskip("transformers", "5")

import transformers
from checkpoints import fresh_process, new_tokens, question, save
from transformers import AutoProcessor

from igva_kernels.models.llava_igva.configuration_llava_igva import AUTO_CLASSES

PROMPT = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}

STRANGER = """
import json, sys
import transformers

path, first, inputs, target = sys.argv[1:]
try:
    transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
getattr(transformers, first).from_pretrained(path, trust_remote_code=True)
model = transformers.AutoModelForMultimodalLM.from_pretrained(path, trust_remote_code=True)
processor = transformers.AutoProcessor.from_pretrained(path, trust_remote_code=True)
model.save_pretrained(target)
processor.save_pretrained(target)
from safetensors.torch import load_file
out = model.generate(**load_file(inputs), max_new_tokens=6, min_new_tokens=6, do_sample=False)
print(json.dumps([type(processor).__name__, out[:, -6:].tolist()]))
"""


@pytest.mark.slow
def test_a_process_that_imports_nothing_loads_saves_and_answers(tmp_path, client_row):
    client_row("loading (Auto classes)", "reference")
    from safetensors.torch import save_file

    model, processor = save(tmp_path / "a")
    inputs = processor.apply_chat_template([question(0)], **PROMPT)
    save_file(dict(inputs), tmp_path / "inputs.safetensors")
    want = ["LlavaIgvaProcessor", new_tokens(model, inputs)]
    for first, source, target in (("AutoModelForMultimodalLM", "a", "b"), ("AutoProcessor", "b", "c")):
        printed = fresh_process(STRANGER, tmp_path / source, first, tmp_path / "inputs.safetensors", tmp_path / target)
        assert json.loads(printed.splitlines()[-1]) == want
    names = [sorted(file.name for file in (tmp_path / folder).iterdir()) for folder in "abc"]
    assert names[0] == names[1] == names[2]  # our own source files are not copied into them


def test_every_auto_class_finds_the_model_in_a_process_that_has_the_package(tmp_path):
    processor = save(tmp_path)[1]
    for auto, name in AUTO_CLASSES.items():
        assert type(getattr(transformers, auto).from_pretrained(tmp_path)).__name__ == name
    loaded = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor.apply_chat_template([question(0)], **PROMPT)
    for name, value in loaded.apply_chat_template([question(0)], **PROMPT).items():
        assert torch.equal(value, inputs[name])
