"""Two processes on gloo, each with half of a projector's rows, or of a language model's: what test_tensor_parallel.py
asks for, as ``{case: "same", a refusal, or what differs}`` in the file that is named on the command line."""

import json
import sys
import warnings
from pathlib import Path

import torch
from clients import KERNEL, assert_same_step, build, inputs_of, plain_code
from hosts import step
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import igva_kernels as ik


def parallel_projector(kind, first, mesh):
    model = build(kind)
    plan = {"linear_1": ColwiseParallel(), "linear_2": RowwiseParallel()}
    handle = ik.patch(model, impl=KERNEL) if first == "patch" else None
    parallelize_module(model.model.multi_modal_projector, mesh, plan)
    if kind == "patched" and handle is None:
        handle = ik.patch(model, impl=KERNEL)
    return model, handle


def whole(results):
    loss, logits, grads = results
    return loss, logits, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def projector(kind, first, mesh):
    inputs = inputs_of(kind, labels=True)
    expected = step(plain_code(build(kind)), inputs)
    model, handle = parallel_projector(kind, first, mesh)
    assert isinstance(model.model.multi_modal_projector.linear_1.weight, DTensor)
    assert_same_step(whole(step(model, inputs)), expected)
    if handle is not None:
        handle.revert()
        assert_same_step(whole(step(model, inputs)), expected)


def language_model(kind, first, folder):
    """The plan that transformers has for Llama, by ``from_pretrained``."""
    inputs, model = inputs_of(kind), build(kind)
    with torch.no_grad():
        expected = model(**inputs).logits
        if distributed.get_rank() == 0:
            model.save_pretrained(folder)
        distributed.barrier()
        model = type(model).from_pretrained(folder, tp_plan="auto").eval()
        assert isinstance(model.model.language_model.layers[0].mlp.up_proj.weight, DTensor)
        if kind == "patched":
            ik.patch(model, impl=KERNEL)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=3e-5)


def outcome(case, *args):
    try:
        case(*args)
    except NotImplementedError as refusal:
        return f"refused: {refusal}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "same"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    mesh, file = init_device_mesh("cpu", (2,)), Path(sys.argv[1])
    found = {}
    for kind, first in (("plain", ""), ("patched", "patch"), ("patched", "parallel"), ("reference", "")):
        found[f"projector {kind} {first}"] = outcome(projector, kind, first, mesh)
    for kind in ("plain", "patched", "reference"):
        found[f"language model {kind}"] = outcome(language_model, kind, "", file.parent / kind)
    gathered = [None, None]
    distributed.all_gather_object(gathered, found)
    if distributed.get_rank() == 0:
        file.write_text(json.dumps(gathered))
    distributed.barrier()
    distributed.destroy_process_group()
