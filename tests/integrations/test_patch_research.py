"""Patching models of the research repositories: answers, gradients, several images, and the way back."""

import copy
import inspect
import pickle

import pytest
import torch
from seeds import seeded
from torch import nn

import igva_kernels as ik
from igva_kernels.nn import WeightAllocator, negative_entropy

pytest.importorskip("transformers")

from hosts import gradients
from recording import Dispatched
from research_hosts import (
    IGVA,
    TGIF,
    DenseConnector,
    LayerSelectFuse,
    LayerSelectFuseInternal,
    LayerSelectFuseModular,
    LLaVA,
    MMFuser,
    inputs,
    make,
)
from threads import in_threads
from tiny import EMBED, FUSED, VISION
from transformers import Trainer, TrainingArguments

from igva_kernels.testing import relative_error

pytestmark = pytest.mark.skipif(not FUSED, reason="no kernel serves CPU tensors here")

HOSTS = {
    "IGVA": (IGVA, {}),
    "IGVA, average": (IGVA, {"average": True}),
    "DenseConnector sci": (DenseConnector, {"kind": "sci"}),
    "DenseConnector dci": (DenseConnector, {"kind": "dci"}),
    "DenseConnector sci siglip": (DenseConnector, {"kind": "sci", "tower": "siglip"}),
    "DenseConnector dci siglip": (DenseConnector, {"kind": "dci", "tower": "siglip"}),
    **{f"Layer_Select_Fuse {name}": (LayerSelectFuse, {"using": name})
       for name in ("18", "3-18-23", "former", "latter", "all")},
    "Layer_Select_Fuse 3-18-23 siglip": (LayerSelectFuse, {"using": "3-18-23", "tower": "siglip"}),
    "Layer_Select_Fuse latter siglip": (LayerSelectFuse, {"using": "latter", "tower": "siglip"}),
    "Layer_Select_Fuse I_D 3-18-23": (LayerSelectFuseInternal, {"using": "3-18-23"}),
    "Layer_Select_Fuse I_D latter siglip": (LayerSelectFuseInternal, {"using": "latter", "tower": "siglip"}),
    "Layer_Select_Fuse E_M 3-18-23": (LayerSelectFuseModular, {"using": "3-18-23"}),
    "Layer_Select_Fuse E_M latter siglip": (LayerSelectFuseModular, {"using": "latter", "tower": "siglip"}),
    "MMFuser": (MMFuser, {}),
    "TGIF": (TGIF, {}),
    "TGIF siglip": (TGIF, {"tower": "siglip"}),
    "LLaVA": (LLaVA, {}),
}  # fmt: skip


MORE_HOSTS = {
    **{f"Layer_Select_Fuse I_D {name}": (LayerSelectFuseInternal, {"using": name})
       for name in ("18", "3-18", "former", "latter", "all")},
    "Layer_Select_Fuse E_M all": (LayerSelectFuseModular, {"using": "all"}),
    "Layer_Select_Fuse I_D 3-18-23 siglip": (LayerSelectFuseInternal, {"using": "3-18-23", "tower": "siglip"}),
}  # fmt: skip
"""Other choices of layers in a host that is among HOSTS."""


def host(name, **kwargs):
    host_class, arguments = {**HOSTS, **MORE_HOSTS}[name]
    return make(host_class, **{**arguments, **kwargs})


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


def sentences(name):
    return name == "IGVA"


@pytest.mark.parametrize("name", [*HOSTS, *MORE_HOSTS])
def test_a_patched_model_has_the_same_answers_gradients_and_greedy_tokens(name):
    model = host(name).train()
    batch = inputs((1, 0, 1), labels=True, sentences=sentences(name))
    model(**batch).loss.backward()
    expected, keys = gradients(model), list(model.state_dict())
    model.eval().zero_grad()
    logits = model(**batch).logits
    prompt = {k: v for k, v in inputs((1, 1), sentences=sentences(name)).items() if k != "attention_mask"}
    prompt["input_ids"] = prompt["input_ids"][:, :7]
    prompt["inputs"] = prompt.pop("input_ids")
    tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    with ik.patch(model), Dispatched() as calls:
        assert list(model.state_dict()) == keys
        close(model(**batch).logits, logits)
        assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), tokens)
        model.train()(**batch).loss.backward()
    assert "igva_kernels::projector" in calls.names
    assert gradients(model).keys() == expected.keys()
    for parameter, grad in gradients(model).items():
        close(grad, expected[parameter])


@pytest.mark.parametrize("name", HOSTS)
def test_bf16_is_as_near_as_the_repository_s_own_roundings(name):
    model, batch = host(name), inputs((1, 1), sentences=sentences(name))
    text = {"text_embeddings": torch.randn(2, 32)} if "TGIF" in name else {}
    text = {"sentence_embeds": batch["sentence_embeds"]} if name == "IGVA" else text

    def encode(dtype):
        out = model.to(dtype).encode_images(batch["images"].to(dtype), **{k: v.to(dtype) for k, v in text.items()})
        return first(out)

    def first(out):
        """The visual tokens; of a list, which I_D returns, all features."""
        return torch.stack(out) if isinstance(out, list) else out[0] if isinstance(out, tuple) else out

    exact, plain = encode(torch.float64), encode(torch.bfloat16)
    with ik.patch(model):
        tokens = model.encode_images(batch["images"].bfloat16(), **{k: v.bfloat16() for k, v in text.items()})
    tokens = first(tokens)
    assert tokens.dtype == torch.bfloat16
    assert relative_error(tokens, exact) <= 2 * relative_error(plain, exact) + 2**-8


@pytest.mark.parametrize("name", HOSTS)
def test_revert_restores_the_very_objects(name):
    model = host(name)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    tensors = {path: p.data_ptr() for path, p in model.named_parameters()}
    ik.patch(model).revert()
    assert {path: p.data_ptr() for path, p in model.named_parameters()} == tensors
    for path, module in model.named_modules():
        assert vars(module).keys() == before[path].keys()
        assert all(vars(module)[key] is value for key, value in before[path].items())
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("name", HOSTS)
def test_a_copy_of_a_patched_model_is_bound_to_itself(name):
    model, batch = host(name), inputs((1, 1), sentences=sentences(name))
    with ik.patch(model):
        duplicate = copy.deepcopy(model)
        logits = model(**batch).logits
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        close(duplicate(**batch).logits, logits)


@pytest.mark.parametrize("name", HOSTS)
def test_patching_twice_is_an_error_and_other_models_stay_as_they_are(name):
    model, other = host(name), host(name)
    with torch.no_grad(), ik.patch(model):
        with pytest.raises(ValueError, match="patched already"):
            ik.patch(model)
        assert "encode_images" not in vars(other)
        with Dispatched() as calls:
            other(**inputs((1, 1), sentences=sentences(name)))
    assert not any("igva_kernels" in call for call in calls.names)


def test_igva_keeps_no_state_beside_its_sources():
    """The 5 states of the tiny tower become 3, and no stack of them is made."""
    model, batch = host("IGVA"), inputs((1, 1), sentences=True)
    with Dispatched() as plain, torch.no_grad():
        model.encode_images(batch["images"], batch["sentence_embeds"])
    with ik.patch(model), Dispatched() as fused, torch.no_grad():
        model.encode_images(batch["images"], batch["sentence_embeds"])
    assert plain.names.count("aten::stack") + plain.names.count("aten::mean.dim") > 0
    assert fused.names.count("aten::stack") == 0
    assert fused.names.count("aten::cat") < plain.names.count("aten::cat")


def test_igva_returns_the_weights_that_its_loss_asks_for():
    model, batch = host("IGVA").train(), inputs((1, 1), labels=True, sentences=True)
    with ik.patch(model):
        outputs = model(**batch)
        assert outputs.get("weights").shape == (2, 2)
        close(outputs["weights"].sum(-1), torch.ones(2))
        negative_entropy(outputs["weights"]).mean().backward()
        assert model.model.vision_aggregator.linear.weight.grad.any()
        assert model.instructions.layer_weights is None  # no graph outlives the step
    assert "weights" not in model(**batch)


@pytest.mark.parametrize("average", [False, True])
def test_igva_with_several_images_a_sample_answers_as_it_does_tile_by_tile(average):
    """Where its own code fails: images as a list, of which some are tiles of one picture."""
    model = make(IGVA, average=average)
    batch = inputs((2, 0, 1), sentences=True)
    tiles = [batch["images"][0], batch["images"][1].repeat(2, 1, 1, 1), batch["images"][2], batch["images"][3]]
    with pytest.raises(AttributeError, match="aggregate_layers"):
        model(**{**batch, "images": tiles})
    rows = batch["sentence_embeds"][[0, 0, 0, 1, 2]]
    stacked = torch.stack([x for image in tiles for x in (image if image.ndim == 4 else image[None])])
    tokens = model.encode_images(stacked, rows).split([1, 2, 1, 1])
    prepared = model.insert(batch["input_ids"], batch["attention_mask"], None, [x.flatten(0, 1) for x in tokens])
    expected = model(inputs_embeds=prepared[4], attention_mask=prepared[2]).logits
    with ik.patch(model):
        close(model(**{**batch, "images": tiles}).logits, expected)
        flat = model(**batch).logits  # four images in one tensor, three samples
        with pytest.raises(ValueError, match=r"images: got 3, need 4: the samples have \[2, 1, 1\] places"):
            model(**{**batch, "images": batch["images"][:3]})
    assert flat.isfinite().all()


def test_igva_without_instructions_is_refused():
    model, batch = host("IGVA"), inputs((1, 1))
    with ik.patch(model), pytest.raises(ValueError, match=r"sentence_embeds: got None, need \[B, E\]"):
        model(**batch)
    model = host("IGVA, average")
    with ik.patch(model):
        assert model(**batch).logits.isfinite().all()


def test_dense_connector_aggregates_the_frames_of_a_video():
    model = host("DenseConnector dci")
    frames = torch.randn(3, 3, 28, 28)
    model.config.is_video = True
    expected = model.encode_images(frames)
    with ik.patch(model):
        close(model.encode_images(frames), expected)
    assert expected.shape[:2] == (1, 12)


def test_tgif_returns_its_weights_and_does_not_stack_the_layers():
    model = host("TGIF")
    images, text = torch.randn(2, 3, 28, 28), torch.randn(2, 32)
    tokens, weights = model.encode_images(images, text)
    with ik.patch(model), Dispatched() as calls:
        fused_tokens, fused_weights = model.encode_images(images, text)
    close(fused_tokens, tokens)
    close(fused_weights, weights)
    assert "aten::stack" not in calls.names


def spoilt(name, **changes):
    model = host(name)
    for path, value in changes.items():
        owner, _, attribute = path.replace("__", ".").rpartition(".")
        setattr(model.get_submodule(owner) if owner != "config" else model.config, attribute, value)
    return model


class Renamed(LLaVA):
    def encode_images(self, images, prompts=None):
        return super().encode_images(images)


REFUSED = {
    "token concatenation": (lambda: spoilt("DenseConnector dci", config__mm_dense_connector_type="sti"), "'sti'"),
    "CLS among the tokens": (
        lambda: spoilt("DenseConnector dci", model__vision_tower__select_feature="cls_patch"), "cls_patch"),
    "no block of modular fusion": (
        lambda: spoilt("Layer_Select_Fuse 18", config__layer_fusing_strategy="E_M"), "of 3 modules, need MSCrossAttnB"),
    "modular fusion, no square": (
        lambda: make(LayerSelectFuseModular, "latter", "siglip", "patch"), "got 'patch', which leaves no square"),
    "MMFuser, one layer": (lambda: spoilt("MMFuser", model__vision_tower__select_layer=-2), "got -2, need a list"),
    "MMFuser, CLS": (lambda: make(MMFuser, feature="cls_patch"), "got 'cls_patch', need 'patch'"),
    "MMFuser, too few layers": (lambda: make(MMFuser, [3, 8, 23]), "reads 4 of 3 states"),
    "internal modular fusion": (lambda: spoilt("Layer_Select_Fuse 18", config__layer_fusing_strategy="I_M"), "'I_M'"),
    "two features for one layer": (
        lambda: make(LayerSelectFuseInternal, "all", layers=16), "24 features for 16 of the 16 layers"),
    "no such layers of SigLIP": (lambda: make(LayerSelectFuseInternal, "18", "siglip"), "got '18', for which a Sel"),
    "a tower that is too short": (
        lambda: make(LayerSelectFuseInternal, "latter", tower_layers=12), "of 13 states has no features"),
    "images in parts": (
        lambda: spoilt("Layer_Select_Fuse I_D 3-18-23", config__mm_patch_merge_type="spatial_unpad"), "'spatial_un"),
    "no such SigLIP": (
        lambda: spoilt("Layer_Select_Fuse latter siglip", config__layer_using_strategy="former"), "'former'"),
    "one Linear": (lambda: spoilt("IGVA", model__mm_projector=nn.Linear(32, 32)), "mm_projector: got a Linear"),
    "another activation": (
        lambda: spoilt("LLaVA", model__mm_projector=nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32))),
        "Tanh"),
    "several scales": (lambda: spoilt("LLaVA", model__vision_tower__s2_scales=[336]), "several scales"),
    "another signature": (lambda: make(Renamed), "encode_images takes images, prompts"),
}  # fmt: skip


@pytest.mark.parametrize(("make_model", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_mix_of_layers_is_refused_and_nothing_changes(make_model, said):
    model = make_model()
    with pytest.raises(NotImplementedError, match=said):
        ik.patch(model)
    assert "encode_images" not in vars(model)


def test_a_tower_that_is_not_loaded_is_refused():
    model = spoilt("LLaVA", model__vision_tower__is_loaded=False)
    with pytest.raises(ValueError, match="load_model"):
        ik.patch(model)


@pytest.mark.parametrize(
    "name", ["Layer_Select_Fuse former", "Layer_Select_Fuse E_M 3-18-23", "DenseConnector dci siglip"]
)
def test_towers_that_the_repository_trains_are_trained(name):
    grads = []
    for patched in (False, True):
        model, batch = host(name).train(), inputs((1, 1), labels=True)
        model.model.vision_tower.requires_grad_(True)
        with ik.patch(model) if patched else torch.enable_grad():
            model(**batch).loss.backward()
        grads.append(gradients(model))
    assert any("vision_tower" in path for path in grads[0])
    assert grads[0].keys() == grads[1].keys()
    for path, grad in grads[0].items():
        close(grads[1][path], grad)


def test_a_hook_on_the_block_of_mmfuser_sees_the_patches_alone():
    model, batch, seen = host("MMFuser"), inputs((1, 1)), []
    block = model.model.mm_projector[0]
    expected = model.encode_images(batch["images"])
    with block.register_forward_hook(lambda module, args, out: seen.append((args, out))), ik.patch(model):
        close(model.encode_images(batch["images"]), expected)
    (((states,), out),) = seen
    assert [tuple(state.shape) for state in states] == [tuple(out.shape)] * 5


# ---- LLaVA, given a plan ----

PLAN = ik.MixPlan.igva(4, 2)


def allocator():
    torch.manual_seed(seeded(5))
    return WeightAllocator(EMBED, VISION, 2, hidden_dim=16, num_blocks=1, num_heads=2)


@pytest.mark.parametrize("plan", [PLAN, ik.MixPlan.igva_uniform(4, 2), ik.MixPlan.concat([1, -2, 0])])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_llava_with_a_plan_answers_at_first_as_before(plan, kind):
    model, batch = make(LLaVA, kind), inputs((1, 0, 1), sentences=plan.num_columns > 0)
    plain = {k: v for k, v in batch.items() if k != "sentence_embeds"}
    logits = model(**plain).logits
    prompt = {"inputs": batch["input_ids"][:1, :7], "images": batch["images"][:1]}
    tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    with ik.patch(model, plan=plan, allocator=allocator() if plan.num_columns else None):
        close(model(**batch).logits, logits)
        if plan.num_columns:
            prompt["sentence_embeds"] = batch["sentence_embeds"][:1]
        assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), tokens)
    assert torch.equal(model(**plain).logits, logits)


def test_it_then_computes_igva():
    model, batch = make(LLaVA), inputs((1, 1), sentences=True)
    ik.patch(model, plan=PLAN, allocator=allocator())
    projector = model.model.mm_projector
    nn.init.normal_(projector[0].weight)
    states = model.model.vision_tower.states(batch["images"])
    means = torch.stack([(states[1] + states[2]) / 2, (states[3] + states[4]) / 2], dim=1)
    weights = projector.weight_allocator(batch["sentence_embeds"], means[:, :, 0])
    rows = torch.cat([states[3], (weights[:, :, None, None] * means).sum(1)], dim=-1)[:, 1:]
    hidden = nn.functional.gelu(rows @ projector[0].weight.T + projector[0].bias)
    expected = hidden @ projector[2].weight.T + projector[2].bias
    prepared = model.insert(batch["input_ids"], batch["attention_mask"], None, list(expected))
    outputs = model(**batch)
    close(outputs.logits, model(inputs_embeds=prepared[4], attention_mask=prepared[2]).logits)
    close(outputs.layer_weights, weights)


@pytest.mark.parametrize("name", ["IGVA", "LLaVA"])
def test_threads_that_share_a_model_do_not_mix_their_instructions(name):
    model = host(name)
    options = {"plan": PLAN, "allocator": allocator()} if name == "LLaVA" else {}
    prompts = [inputs((1, 1), sentences=True, seed=seed) for seed in range(4)]
    key = "layer_weights" if name == "LLaVA" else "weights"
    with torch.no_grad(), ik.patch(model, **options):
        outputs = [model(**prompt) for prompt in prompts]
        assert (outputs[0][key] - outputs[1][key]).abs().max() > 1e-4

        @torch.no_grad()
        def ask(client):
            for i in [(client + turn) % 4 for turn in range(6)]:
                output = model(**prompts[i])
                close(output[key], outputs[i][key])
                close(output.logits, outputs[i].logits)

        in_threads(ask)


def test_it_trains_with_the_balance_loss_and_every_part_of_the_projector_learns():
    model, batch = make(LLaVA).train(), inputs((2, 0, 1), labels=True, sentences=True)
    losses = []
    for coefficient in (0.0, 0.5):
        with ik.patch(model, plan=PLAN, allocator=allocator(), balance_coefficient=coefficient):
            nn.init.constant_(model.model.mm_projector[0].weight, 0.1)
            outputs = model(**batch)
            outputs.loss.backward()
            losses.append(outputs.loss)
            learned = {name: p.grad for name, p in model.model.mm_projector.named_parameters()}
            assert model.instructions.layer_weights is None
    assert outputs.layer_weights.shape == (4, 2)  # one row per image
    close(losses[1] - losses[0], 0.5 * negative_entropy(outputs.layer_weights).mean())
    assert all(grad.isfinite().all() for grad in learned.values())
    assert {"weight_allocator.head.weight", "0.weight", "2.bias"} <= learned.keys()
    assert learned["0.weight"][:, VISION:].any() and learned["weight_allocator.head.weight"].any()


def test_the_allocator_is_part_of_the_projector_and_checkpoints_load_into_a_model_patched_alike(tmp_path):
    model = make(LLaVA)
    narrow = dict(model.state_dict())
    handle = ik.patch(model, plan=PLAN, allocator=allocator())
    wide = dict(model.state_dict())
    new = wide.keys() - narrow.keys()
    assert new and all(name.startswith("model.mm_projector.weight_allocator.") for name in new)
    assert {n for n in narrow if wide[n].shape != narrow[n].shape} == {"model.mm_projector.0.weight"}
    assert wide["model.mm_projector.0.weight"].shape == (32, 2 * VISION)
    nn.init.normal_(model.model.mm_projector[0].weight)
    torch.save(model.state_dict(), tmp_path / "model.bin")
    other = make(LLaVA, seed=1)
    ik.patch(other, plan=PLAN, allocator=allocator())
    other.load_state_dict(torch.load(tmp_path / "model.bin"))
    batch = inputs((1, 1), sentences=True)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    handle.revert()
    assert list(model.state_dict()) == list(narrow)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in narrow.items())


def test_the_trainer_reads_of_the_forward_that_it_takes_sentence_embeddings():
    model = make(LLaVA)
    before = list(inspect.signature(model.forward).parameters)
    with ik.patch(model):
        assert list(inspect.signature(model.forward).parameters) == [*before, "sentence_embeds"]
    assert list(inspect.signature(model.forward).parameters) == before


class Samples(torch.utils.data.Dataset):
    """What the data set of a LLaVA script yields, and the embedding of the instruction."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        sample = inputs((1,), labels=True, sentences=True, seed=index)
        return {name: value[0] for name, value in sample.items()}


def collate(samples):
    return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}


@pytest.mark.plain_memory
def test_a_llava_script_trains_the_projector_and_the_allocator_with_it(tmp_path):
    """As its stage 1 does: the Trainer, and of the model only what is called mm_projector."""
    trained = []
    for impl in ("reference", FUSED[0]):
        model = make(LLaVA)
        ik.patch(model, plan=PLAN, allocator=allocator(), balance_coefficient=0.5, impl=impl)
        model.requires_grad_(False)
        model.get_model().mm_projector.requires_grad_(True)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, max_steps=3, learning_rate=0.5, optim="sgd", use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=Samples(), data_collator=collate).train()
        trained.append({name: p for name, p in model.named_parameters() if "mm_projector" in name})
    plain, fused = trained
    start = allocator().state_dict()
    for name, value in plain.items():
        close(fused[name], value)
        if "weight_allocator" in name and "key" not in name:
            assert not torch.equal(value, start[name.rpartition("weight_allocator.")[2]]), name
    assert plain["model.mm_projector.0.weight"][:, VISION:].abs().max() > 0


def test_a_llava_with_lora_is_given_a_plan():
    peft = pytest.importorskip("peft")
    model, batch = make(LLaVA), inputs((1, 0, 1), labels=True, sentences=True)
    logits = model(**{k: v for k, v in batch.items() if k != "sentence_embeds"}).logits
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    with ik.patch(lora, plan=PLAN, allocator=allocator()):
        outputs = lora(**batch)
        close(outputs.logits, logits)
        outputs.loss.backward()
        prompt = {"images": batch["images"][:1], "sentence_embeds": batch["sentence_embeds"][:1]}
        assert lora.generate(inputs=batch["input_ids"][:1, :7], **prompt, max_new_tokens=3).shape == (1, 3)


def test_a_plan_that_does_not_fit_a_llava_is_refused_and_nothing_changes():
    model = make(LLaVA)
    for options, said in (
        ({"plan": PLAN}, "allocator"),
        ({"plan": ik.MixPlan.concat([-2, 1]), "allocator": allocator()}, "allocator"),
        ({"plan": ik.MixPlan.concat([0, 1])}, "reads layer 3"),
        ({"plan": ik.MixPlan.igva(24, 4), "allocator": allocator()}, "hidden states"),
    ):
        with pytest.raises(ValueError, match=said):
            ik.patch(model, **options)
    with pytest.raises(TypeError, match="plan"):
        ik.patch(host("IGVA"), plan=PLAN)
    assert model.model.mm_projector[0].in_features == VISION
    missing = pytest.raises(ValueError, match=r"sentence_embeds: got None, need \[B, E\]")
    with ik.patch(model, plan=PLAN, allocator=allocator()), missing:
        model(**inputs((1, 1)))
