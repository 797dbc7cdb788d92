"""Programs that torch.export and the ONNX exporter make of ``get_image_features`` answer as the model does."""

import io

import pytest
import torch
from clients import KERNEL, MODELS, build, inputs_of
from hosts import close
from torch import nn

import igva_kernels as ik

pytestmark = [pytest.mark.slow, pytest.mark.plain_memory]


class ImageFeatures(nn.Module):
    """The visual tokens of images, ``[I, P, H]``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return torch.stack(list(self.model.get_image_features(*args).pooler_output))


def features_and_arguments(kind, impl):
    """Two sets of arguments: one for the export, one to ask what was exported."""
    model = build(kind, **({"impl": impl} if kind == "reference" else {}))
    if kind == "patched":
        ik.patch(model, impl=impl)
    names = ("pixel_values", "sentence_embeds") if kind == "reference" else ("pixel_values",)
    asked = [inputs_of(kind)[name] for name in names]
    model.model.vision_tower(asked[0], output_hidden_states=True)  # transformers installs its hooks at the first call
    return ImageFeatures(model.model.eval()), asked, [torch.randn_like(value) for value in asked]


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_torch_export(kind, strict, client_row):
    client_row("torch.export", kind)
    module, example, other = features_and_arguments(kind, KERNEL)
    expected = module(*other)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, tuple(example), strict=strict), buffer)
    buffer.seek(0)
    close(torch.export.load(buffer).module()(*other), expected)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_onnx_of_the_plain_implementation(kind, client_row):
    client_row("ONNX", kind)
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, example, other = features_and_arguments(kind, "reference")
    expected = module(*other)
    program = torch.onnx.export(module, tuple(example), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, other, strict=True)})
    close(torch.from_numpy(found), expected)
