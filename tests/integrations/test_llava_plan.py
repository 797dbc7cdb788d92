"""A plan that was given to a plain LLaVA travels with its checkpoints: two stages, LoRA, merging, inference."""

import copy
import json
import pickle
import subprocess
import sys
from functools import wraps

import pytest
import torch
from seeds import seeded
from torch import nn

import igva_kernels as ik
from igva_kernels.nn import LearnedWeights, TextAllocator, WeightAllocator, negative_entropy

pytest.importorskip("transformers")

from research_hosts import IGVA, LLaVA, inputs, load_llava, make, mlp
from safetensors.torch import save_file
from tiny import EMBED, VISION
from transformers.modeling_outputs import CausalLMOutputWithPast

PLAN, UNIFORM = ik.MixPlan.igva(4, 2), ik.MixPlan.igva_uniform(4, 2)
ALLOCATORS = {
    "WeightAllocator": lambda: WeightAllocator(EMBED, VISION, 2, hidden_dim=16, num_blocks=1, num_heads=2),
    "TextAllocator": lambda: TextAllocator(EMBED, 2, hidden_dim=8),
    "LearnedWeights": lambda: LearnedWeights(2),
}


def allocator(kind="WeightAllocator", seed=5):
    torch.manual_seed(seeded(seed))
    made = ALLOCATORS[kind]()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.eval()


def trained(plan=PLAN, kind="WeightAllocator", seed=0, **options):
    """A patched model whose wide projector has learned something."""
    model = make(LLaVA, seed=seed)
    ik.patch(model, plan=plan, allocator=allocator(kind) if plan.num_columns else None, **options)
    nn.init.normal_(model.model.mm_projector[0].weight, std=0.2)
    return model


def projector_of(model, prefix=""):
    """What the scripts put into mm_projector.bin, and with a prefix into non_lora_trainables.bin."""
    return {f"{prefix}{name}": p.detach().clone() for name, p in model.named_parameters() if "mm_projector" in name}


# Each saves a model as one of LLaVA's scripts does.


def save_adapter(model, folder):
    torch.save(projector_of(model), folder / "mm_projector.bin")


def save_lora(model, folder):
    torch.save(projector_of(model, "base_model.model."), folder / "non_lora_trainables.bin")


def save_whole(model, folder):
    """In shards, beside the projector of stage 1, as LLaVA's published models have it."""
    state, shards = model.state_dict(), {}
    for i, part in enumerate((lambda name: "allocator" in name, lambda name: "allocator" not in name)):
        file = f"model-0000{i}-of-00002.safetensors"
        tensors = {name: value.clone() for name, value in state.items() if part(name)}
        shards |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    torch.save({"model.mm_projector.0.weight": torch.zeros(32, VISION)}, folder / "mm_projector.bin")


def save_pickled(model, folder):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


SAVED = [save_adapter, save_lora, save_whole, save_pickled]


@pytest.mark.parametrize("save", SAVED)
@pytest.mark.parametrize("kind", ALLOCATORS)
def test_what_llava_s_loader_makes_of_a_checkpoint_is_completed_by_a_patch(tmp_path, kind, save):
    model, batch = trained(kind=kind, balance_coefficient=0.3), inputs((1, 1), labels=True, sentences=True)
    model.config.save_pretrained(tmp_path)
    save(model, tmp_path)
    again = load_llava(tmp_path, model.state_dict())
    random = torch.get_rng_state()
    ik.patch(again, weights=tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    expected, outputs = model(**batch), again(**batch)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.layer_weights, expected.layer_weights)
    assert torch.equal(outputs.loss, expected.loss)  # the balance coefficient was recorded, too
    assert again.state_dict().keys() == model.state_dict().keys()
    assert type(again.model.mm_projector.weight_allocator) is type(model.model.mm_projector.weight_allocator)
    assert all(p.requires_grad for p in again.model.mm_projector.parameters())


def test_stage_2_begins_with_the_projector_of_stage_1(tmp_path):
    stage_1 = trained(UNIFORM, balance_coefficient=0.0)
    save_adapter(stage_1, tmp_path)
    stage_2, mine = make(LLaVA, seed=1), allocator()
    start = copy.deepcopy(mine.state_dict())
    ik.patch(stage_2, plan=PLAN, allocator=mine, balance_coefficient=0.5, weights=tmp_path / "mm_projector.bin")
    for i in (0, 2):
        for name, value in stage_1.model.mm_projector[i].named_parameters():
            assert torch.equal(stage_2.model.mm_projector[i].get_parameter(name), value)
    assert all(torch.equal(mine.state_dict()[name], value) for name, value in start.items())
    # The same from a checkpoint of stage 1, whose config records its plan.
    stage_1.config.save_pretrained(tmp_path)
    loaded = load_llava(tmp_path, stage_1.state_dict())
    ik.patch(loaded, plan=PLAN, allocator=mine)
    assert torch.equal(loaded.model.mm_projector[0].weight, stage_1.model.mm_projector[0].weight)
    assert loaded.config.igva_kernels["allocator"]["num_weights"] == 2


def test_a_narrow_adapter_is_widened_and_answers_as_it_did(tmp_path):
    model, batch = make(LLaVA), inputs((1, 1), sentences=True)
    save_adapter(model, tmp_path)
    wide = make(LLaVA)
    wide.model.mm_projector = mlp(VISION)
    ik.patch(wide, plan=PLAN, allocator=allocator(), weights=tmp_path)
    plain = {name: value for name, value in batch.items() if name != "sentence_embeds"}
    torch.testing.assert_close(wide(**batch).logits, model(**plain).logits, rtol=1e-4, atol=3e-5)


def test_loading_behind_the_patch_is_the_same(tmp_path):
    model, batch = trained(), inputs((1, 1), sentences=True)
    other = make(LLaVA, seed=1)
    ik.patch(other, plan=PLAN, allocator=allocator(seed=9))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_a_model_on_the_meta_device_is_patched_and_loaded_later():
    model, batch = trained(), inputs((1, 1), sentences=True)
    empty = make(LLaVA, seed=1).to("meta")
    ik.patch(empty, plan=PLAN, allocator=allocator(seed=9))
    empty.load_state_dict(model.state_dict(), assign=True)
    buffers = dict(model.named_buffers())
    for name, buffer in empty.named_buffers():  # transformers' frequencies are in no checkpoint
        if buffer.is_meta:
            owner, _, attribute = name.rpartition(".")
            setattr(empty.get_submodule(owner), attribute, buffers[name].clone())
    assert torch.equal(empty(**batch).logits, model(**batch).logits)


def test_revert_gives_back_the_config_and_the_old_weights(tmp_path):
    save_adapter(trained(), tmp_path)
    model, batch = make(LLaVA, seed=1), inputs((1, 1))
    settings, logits = copy.deepcopy(vars(model.config)), model(**batch).logits
    handle = ik.patch(model, plan=PLAN, allocator=allocator(), weights=tmp_path)
    assert model.config.mm_hidden_size == 2 * VISION
    assert ik.MixPlan.from_dict(json.loads(model.config.to_json_string())["igva_kernels"]["plan"]) == PLAN
    handle.revert()
    assert vars(model.config) == settings
    assert torch.equal(model(**batch).logits, logits)


def recorded(tmp_path, plan=PLAN):
    model = trained(plan)
    model.config.save_pretrained(tmp_path)
    save_adapter(model, tmp_path)
    return load_llava(tmp_path, model.state_dict())


REFUSED = {
    "no weights": (lambda folder: {}, "weights: got None, the config of this model records an allocator"),
    "a new allocator in place of the trained one": (
        lambda folder: {"plan": PLAN, "allocator": allocator()}, "weights: got None"),
    "weights without the allocator": (
        lambda folder: {"weights": saved(folder / "x.bin", projector_of(trained(UNIFORM)))}, "without an allocator"),
    "another plan": (lambda folder: {"plan": ik.MixPlan.concat([-2, 1]), "weights": folder}, "plan: got .* records"),
    "other groups": (
        lambda folder: {"plan": ik.MixPlan.igva(4, [[1, 3], [2, 4]]), "weights": folder}, "plan: got .* records"),
    "another layer": (lambda folder: {"plan": ik.MixPlan.igva(4, 2, base=-1), "weights": folder}, "plan: got"),
    "no such folder": (lambda folder: {"weights": folder / "nothing"}, "no file or folder"),
    "no projector": (lambda folder: {"weights": saved(folder / "x.bin", {"a": torch.ones(1)})}, "no mm_projector"),
    "half a file": (lambda folder: {"weights": damaged(folder / "mm_projector.bin")}, "bin' cannot be read"),
    "a pointer": (lambda folder: {"weights": pointer(folder / "x.bin")}, "Git LFS pointer"),
    "half a projector": (
        lambda folder: {"weights": saved(folder / "x.bin", {"mm_projector.0.bias": torch.ones(32)}, folder)},
        r"need \['0.bias', '0.weight', '2.bias', '2.weight'\]"),
    "another width": (
        lambda folder: {"weights": saved(folder / "x.bin", {"mm_projector.0.weight": torch.ones(32, 3)}, folder)},
        r"has weights \[32, 3\], need \[H, 16\], .* or \[H, 32\]"),
    "another allocator": (
        lambda folder: {"allocator": WeightAllocator(EMBED, VISION, 3, hidden_dim=16, num_heads=2), "weights": folder},
        "do not fit the allocator"),
}  # fmt: skip


def saved(file, tensors, folder=None):
    """A file of these tensors; with a folder, of all that its projector has, these in place of its own."""
    if folder is not None:
        kept = torch.load(folder / "mm_projector.bin")
        if len(tensors) == 1 and "mm_projector.0.bias" in tensors:
            kept = {name: value for name, value in kept.items() if "allocator" in name}
        tensors = {**{name.removeprefix("model."): value for name, value in kept.items()}, **tensors}
    torch.save(tensors, file)
    return file


def damaged(file):
    file.write_bytes(file.read_bytes()[:-200])
    return file


def pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return file


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_nothing_is_left_at_random_and_nothing_contradicts_the_record(tmp_path, options, said):
    model = recorded(tmp_path)
    before = dict(vars(model.config))
    with pytest.raises(ValueError, match=said):
        ik.patch(model, **options(tmp_path))
    assert "encode_images" not in vars(model)
    assert vars(model.config) == before


def test_a_projector_of_another_width_than_layer_or_plan_is_refused():
    model = make(LLaVA, mm_hidden_size=3 * VISION)
    with pytest.raises(ValueError, match=r"mm_projector\[0\].* need \[H, 16\], .* or \[H, 32\]"):
        ik.patch(model, plan=UNIFORM)


def test_a_custom_allocator_is_recorded_by_name_and_must_be_given_again(tmp_path):
    class Mine(WeightAllocator):
        pass

    mine = Mine(EMBED, VISION, 2, hidden_dim=16, num_blocks=1, num_heads=2)
    model = make(LLaVA)
    ik.patch(model, plan=PLAN, allocator=mine)
    model.config.save_pretrained(tmp_path)
    save_adapter(model, tmp_path)
    again = load_llava(tmp_path, model.state_dict())
    with pytest.raises(ValueError, match="records a Mine"):
        ik.patch(again, weights=tmp_path)
    ik.patch(again, weights=tmp_path, allocator=Mine(EMBED, VISION, 2, hidden_dim=16, num_blocks=1, num_heads=2))
    batch = inputs((1, 1), sentences=True)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


# ---- what the forward returns ----

RETURNED = {
    "LLaVA": (lambda: trained(balance_coefficient=0.5), "layer_weights"),
    "IGVA": (lambda: patched(make(IGVA)), "weights"),
    "IGVA, average": (lambda: patched(make(IGVA, average=True)), "weights"),
}


def patched(model):
    ik.patch(model)
    return model


@pytest.mark.parametrize(("make_model", "name"), RETURNED.values(), ids=RETURNED)
def test_layer_weights_are_declared_by_the_class_of_the_output(make_model, name):
    model, batch = make_model(), inputs((1, 1), labels=True, sentences=True)
    outputs = model(**batch)
    assert isinstance(outputs, CausalLMOutputWithPast) and outputs[name] is getattr(outputs, name)
    assert list(outputs)[-1] == name and outputs.to_tuple()[-1] is outputs[name]
    assert type(model(**batch)) is type(outputs)
    copies = pickle.loads(pickle.dumps(outputs.__class__(logits=outputs.logits, **{name: outputs[name]})))
    assert torch.equal(copies[name], outputs[name]) and type(copies) is type(outputs)
    assert type(model(input_ids=batch["input_ids"].clamp_min(0))) is CausalLMOutputWithPast  # no image, no weights
    values = model(**batch, return_dict=False)
    assert torch.equal(values[0], outputs.loss)  # the balance loss is in it
    assert torch.equal(values[-1], outputs[name])


@pytest.mark.parametrize(("make_model", "name"), RETURNED.values(), ids=RETURNED)
def test_ddp_that_looks_for_unused_parameters_takes_the_output_apart(tmp_path, make_model, name):
    """transformers' Trainer asks for it, unless it checkpoints; DDP calls the output's class with what it found."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model, batch = make_model().train(), inputs((1, 1), labels=True, sentences=True)
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        outputs = ddp(**batch)
        assert torch.equal(outputs[name], model(**batch)[name])
        outputs.loss.backward()
    finally:
        torch.distributed.destroy_process_group()


def test_igva_s_first_stage_returns_equal_weights_for_its_loss():
    model, batch = patched(make(IGVA, average=True)), inputs((2, 1), labels=True)
    batch["sentence_embeds"] = None
    weights = model(**batch).weights
    assert torch.equal(weights, torch.full((3, 2), 0.5))  # a row per image
    assert negative_entropy(weights.softmax(-1)).allclose(-torch.tensor(2.0).log())


def test_importing_and_patching_draw_no_random_number():
    """Scripts seed torch once; what they draw behind the patch must not depend on it."""
    script = """
import torch
state = torch.get_rng_state()
import igva_kernels.nn
from igva_kernels.integrations import FAMILIES
for name in FAMILIES:
    __import__(f"igva_kernels.integrations.{name}")
assert torch.equal(torch.get_rng_state(), state)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    model, mine = make(LLaVA), allocator()
    state = torch.get_rng_state()
    ik.patch(model, plan=PLAN, allocator=mine)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_with_the_hooks_of_an_old_accelerate_is_patched_and_reverted():
    """LLaVA's accelerate (0.21) calls the forward that it found, not the one in ``_old_forward``; its loader hooks a
    model that it merges with LoRA."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, batch = make(LLaVA), inputs((1, 1), sentences=True)
    logits = model(**{name: value for name, value in batch.items() if name != "sentence_embeds"}).logits

    def hook(module):
        old = module._old_forward = module.forward
        module._hf_hook = hooks.ModelHook()

        @wraps(old)
        def forward(*args, **kwargs):
            args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
            return module._hf_hook.post_forward(module, old(*args, **kwargs))

        module.forward = forward

    hooked = (model, model.model.mm_projector, model.model.mm_projector[2])
    for module in hooked:
        hook(module)
    before = [dict(vars(module)) for module in hooked]
    handle = ik.patch(model, plan=PLAN, allocator=allocator())
    outputs = model(**batch)
    torch.testing.assert_close(outputs.logits, logits, rtol=1e-4, atol=3e-5)
    assert outputs.layer_weights.shape == (2, 2)
    with pytest.raises(ValueError, match="patched already"):
        ik.patch(model, plan=PLAN, allocator=allocator())
    handle.revert()
    for module, attributes in zip(hooked, before, strict=True):
        assert all(vars(module)[name] is value for name, value in attributes.items() if name != "_modules")
