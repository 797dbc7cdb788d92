"""What every supported version of transformers does with a model: save, load, generate, train."""

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from clients import KERNEL, MODELS, assert_same_step, build, inputs_of, plain_code
from hosts import close, step

import igva_kernels as ik


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_saved_loaded_trained_and_asked(kind, client_row, tmp_path):
    row = f"transformers {transformers.__version__}"
    client_row(row, kind)
    if kind == "reference" and int(transformers.__version__.partition(".")[0]) < 5:
        with pytest.raises(ImportError, match="transformers"):
            build(kind)
        client_row(row, kind, "refused")
        return
    original, inputs = plain_code(build(kind)), inputs_of(kind, labels=True)
    expected, tokens = step(original, inputs), answer(original, inputs)
    model = build(kind)
    handle = ik.patch(model, impl=KERNEL) if kind == "patched" else None
    assert_same_step(step(model, inputs), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    if handle is not None:
        ik.patch(loaded, impl=KERNEL)
    assert torch.equal(answer(loaded, inputs), tokens)
    if handle is not None:
        handle.revert()
        close(model(**inputs).logits, expected[1])


def answer(model, inputs):
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    return model.generate(**asked, max_new_tokens=6, do_sample=False)
