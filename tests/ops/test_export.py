"""Calls that leave Python: torch.export, torch.jit.trace and ONNX."""

import io

import block
import pytest
import torch
from harness import quick_impls
from hosts import host_inputs, host_model
from tiny import batch, igva_model
from torch.export import Dim, export

import igva_kernels as ik
from igva_kernels import MixPlan
from igva_kernels.nn import LayerMixProjector

pytestmark = [pytest.mark.plain_memory, pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")]

BATCH = Dim("batch", min=1, max=64)
IMPLS = ["auto", "reference"]


class Mix(torch.nn.Module):
    """``layer_mix`` with a plan that is made while it is traced."""

    def __init__(self, impl):
        super().__init__()
        self.impl = impl

    def forward(self, hidden_states, mix_weights):
        return ik.layer_mix(hidden_states, MixPlan.igva(6, 3), mix_weights, skip_tokens=1, impl=self.impl)


def projector(impl):
    return LayerMixProjector(block.IGVA, 8, 12, layernorm_eps=1e-5, skip_tokens=1, impl=impl)


def draw(images):
    states, weights, _ = block.make(images=images)
    return tuple(states), weights


def ours(program):
    return [str(node.target) for node in program.graph.nodes if "igva_kernels" in str(node.target)]


SHAPES = {"hidden_states": ({0: BATCH},) * 7, "mix_weights": {0: BATCH}}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [Mix, projector])
def test_torch_export_serves_every_batch_size_and_survives_a_file(make, impl, strict, tmp_path):
    module = make(impl)
    with torch.no_grad():
        torch.export.save(export(module, draw(4), dynamic_shapes=SHAPES, strict=strict), tmp_path / "program.pt2")
        program = torch.export.load(tmp_path / "program.pt2")
        for images in (1, 4, 7):
            args = draw(images)
            torch.testing.assert_close(program.module()(*args), module(*args))
    name = "layer_mix" if make is Mix else "projector"
    assert ours(program) == ([] if impl == "reference" else [f"igva_kernels.{name}.default"])


def test_a_program_whose_backend_does_not_serve_its_tensors_is_refused():
    """As one that was exported for a GPU and runs on a CPU, or the other way round."""
    layers, weights = draw(2)
    args = (layers[:6], weights, None, block.IGVA.compact()[1].code, 0, "nothing", "cuda")
    with pytest.raises(NotImplementedError, match=r"impl='cuda' cannot serve torch.float32 tensors on 'cpu'"):
        torch.ops.igva_kernels.layer_mix(*args)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_trace_of_torch_jit_gives_the_answers_and_gradients_of_the_module(impl):
    module = projector(impl)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, draw(3)), file)  # it compares with a second trace, made under no_grad
    file.seek(0)
    traced = torch.jit.load(file)
    args = draw(3)
    torch.testing.assert_close(traced(*args), module(*args))
    for one in (traced, module):
        one(*args).square().sum().backward()
    for (name, parameter), (_, expected) in zip(traced.named_parameters(), module.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=lambda m, n=name: f"{n}: {m}")
    mix = Mix(impl)
    call = lambda weights, *states: mix(states, weights)  # noqa: E731
    states, weights = draw(3)
    traced = torch.jit.trace(call, (weights, *states))
    states, weights = draw(3)
    torch.testing.assert_close(traced(weights, *states), call(weights, *states))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["patched Llava", "reference model"])
def test_transformers_exporter_takes_a_whole_model_with_its_operator(kind):
    """Of dynamic sizes; what of a model leaves for ONNX is tested with the clients."""
    exporters = pytest.importorskip("transformers.exporters", reason="only newer versions of transformers export")
    model = igva_model(impl="auto") if kind == "reference model" else host_model("Llava", [-2, -3])
    inputs = batch() if kind == "reference model" else host_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits  # transformers installs its hooks at the first call
        if kind == "patched Llava":
            ik.patch(model)
        exported = exporters.DynamoExporter().export(model, inputs, config=exporters.DynamoConfig(dynamic=True))
        torch.testing.assert_close(exported(**inputs).logits, expected, rtol=1e-4, atol=3e-5)
    assert "igva_kernels.projector.default" in ours(exported.program)


# ---- ONNX ----


def onnx_program(module, args):
    pytest.importorskip("onnxscript")
    return torch.onnx.export(module, args, dynamo=True, dynamic_shapes=SHAPES, verbose=False)


def run_onnx(program, args, path):
    """By onnxruntime where it is installed, otherwise by ONNX's own evaluator."""
    inputs = dict(zip([value.name for value in program.model.graph.inputs], [*args[0], args[1]], strict=True))
    inputs = {name: tensor.numpy() for name, tensor in inputs.items()}
    program.save(path)
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return torch.from_numpy(ReferenceEvaluator(str(path)).run(None, inputs)[0])
    return torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, inputs)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [Mix, projector])
def test_onnx_gets_plain_torch_for_every_batch_size(make, impl, tmp_path):
    module = make(impl).requires_grad_(False)
    program = onnx_program(module, draw(4))
    assert not {node.domain for node in program.model.graph} - {"", "ai.onnx"}
    for images in (1, 4, 7):
        args = draw(images)
        torch.testing.assert_close(run_onnx(program, args, tmp_path / "model.onnx"), module(*args))


@pytest.mark.parametrize("impl", quick_impls("weighted_mix"))
def test_kernels_that_were_asked_for_by_name_cannot_go_into_an_onnx_model(impl):
    with pytest.raises(Exception, match=f"impl='{impl}' cannot serve the call while torch.onnx exports it"):
        onnx_program(projector(impl).requires_grad_(False), draw(2))
