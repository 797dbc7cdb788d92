"""accelerate's mixed precision and offload, before and after a patch, and its hooks removed before the revert."""

import pytest
import torch
from clients import KERNEL, MODELS, build, inputs_of, plain_code
from hosts import close, step

import igva_kernels as ik

pytest.importorskip("accelerate")

import accelerate
from accelerate.hooks import remove_hook_from_submodules

pytestmark = pytest.mark.slow

AGGREGATIONS = ("instruction", "text", "learned", "uniform")


def patch_of(kind, model):
    return ik.patch(model, impl=KERNEL) if kind == "patched" else None


def revert_all(handle, model):
    """After the revert nothing of the patch is left, and another patch is possible."""
    if handle is not None:
        handle.revert()
        ik.patch(model, impl=KERNEL).revert()


@pytest.fixture
def fresh_state():
    """Accelerator keeps its settings for the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("unwrap", [False, True], ids=["wrapped", "unwrapped"])
@pytest.mark.parametrize("first", ["prepare", "patch"])
@pytest.mark.parametrize("kind", MODELS)
def test_mixed_precision(kind, first, unwrap, client_row, fresh_state):
    client_row("accelerate: mixed precision", kind)
    inputs = inputs_of(kind, labels=True)
    exact = step(plain_code(build(kind)), inputs)
    model = plain_code(build(kind))
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    plain = step(accelerator.prepare(model), inputs)

    model = build(kind)
    handle = patch_of(kind, model) if first == "patch" else None
    wrapped = accelerator.prepare(model)
    handle = handle or patch_of(kind, wrapped)
    found = step(wrapped, inputs)
    assert found[1].dtype == plain[1].dtype
    assert (found[1] - exact[1]).norm() <= 2 * (plain[1] - exact[1]).norm()
    assert found[2].keys() == exact[2].keys()
    if unwrap:
        model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    revert_all(handle, model)
    if unwrap:
        assert_exact(model, inputs, exact)


def assert_exact(model, inputs, expected):
    with torch.no_grad():
        close(model(**inputs).logits, expected[1])


def send_away(model, offload, folder):
    if offload == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif offload == "disk_offload":
        accelerate.disk_offload(model, folder, execution_device="cpu")
    else:
        parts = ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"]
        places = dict.fromkeys(parts, "cpu")
        if hasattr(model.model, "weight_allocator"):
            places["model.weight_allocator"] = "disk"
        places["model.multi_modal_projector"] = "disk"
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


CASES = [("plain", {}), ("patched", {}), *(("reference", {"aggregation": name}) for name in AGGREGATIONS)]


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize(("kind", "fields"), CASES, ids=[" ".join((kind, *fields.values())) for kind, fields in CASES])
def test_offload_and_hooks_that_are_removed_before_the_revert(kind, fields, offload, client_row, tmp_path):
    client_row(f"accelerate: {offload}", kind)
    inputs = inputs_of(kind)
    with torch.no_grad():
        logits = plain_code(build(kind, **fields))(**inputs).logits
    for first in ("offload", "patch") if kind == "patched" else ("offload",):
        model = build(kind, **fields)
        handle = patch_of(kind, model) if first == "patch" else None
        send_away(model, offload, tmp_path / first)
        handle = handle or patch_of(kind, model)
        assert model.model.multi_modal_projector.linear_1.weight.device.type == "meta"
        with torch.no_grad():
            for _ in range(2):
                close(model(**inputs).logits, logits)
        remove_hook_from_submodules(model)
        revert_all(handle, model)


@pytest.mark.parametrize("kind", MODELS)
def test_a_device_map_that_from_pretrained_is_given(kind, client_row, tmp_path):
    client_row("accelerate: device_map", kind)
    model, inputs = build(kind), inputs_of(kind)
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "model")
    places = {"model.vision_tower": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}
    places |= {"model.multi_modal_projector": "disk", "model.weight_allocator": "disk"}
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk").eval()
    handle = patch_of(kind, loaded)
    with torch.no_grad():
        close(loaded(**inputs).logits, logits)
    revert_all(handle, loaded)
