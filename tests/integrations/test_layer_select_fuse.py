"""I_D of Layer_Select_Fuse beyond one image a sample, what its backward costs, and the files of its stage 1."""

from functools import partial

import pytest
import torch
from seeds import seeded

import igva_kernels as ik
from igva_kernels.integrations.layer_select_fuse import load_projectors, read_projectors

pytest.importorskip("transformers")

from hosts import gradients
from recording import Dispatched
from research_hosts import LayerSelectFuse, LayerSelectFuseInternal, inputs, make
from threads import in_threads
from tiny import FUSED, PATCHES

pytestmark = pytest.mark.skipif(not FUSED, reason="no kernel serves CPU tensors here")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


def add_by_mask(image_token_mask, features, layer, args):
    """Features in the order of the images, each where its tokens are."""
    return (args[0].masked_scatter(image_token_mask[..., None], args[0][image_token_mask] + features), *args[1:])


def test_several_images_of_a_sample_also_apart_get_their_own_features_where_the_loop_fails():
    model, batch = make(LayerSelectFuseInternal), inputs((2, 0, 1), labels=True)
    with pytest.raises(RuntimeError, match="size"):
        model(**batch)
    arguments, _ = model.embed(**batch)
    mask, used = arguments["image_token_mask"].bool(), [0, 1, 3]  # image 2 is that of the sample without
    features, where = arguments.pop("images_features"), [layer for layer in model.model.layers if layer.has_cross]
    hooks = []
    for layer, feature in zip(where, features, strict=False):
        layer.has_cross = False
        hook = partial(add_by_mask, mask, feature[used].flatten(0, 1))
        hooks.append(layer.register_forward_pre_hook(hook))
    expected = model.lm_head(model.model(**arguments)[0])
    for layer, hook in zip(where, hooks, strict=True):
        layer.has_cross = True
        hook.remove()
    with ik.patch(model):
        close(model(**batch).logits, expected)


def test_image_tokens_that_are_not_those_of_the_images_are_refused():
    model = make(LayerSelectFuseInternal)
    arguments, _ = model.embed(**inputs((1, 1)))
    with ik.patch(model):
        cut = arguments["image_token_mask"].clone()
        cut[0, 4] = 0
        for changes in (
            {"image_token_mask": cut},
            {"images_features": [feature[:1] for feature in arguments["images_features"]]},
        ):
            with pytest.raises(ValueError, match=r"images: got \d of 4 tokens, and the samples have \[\d, 4\]"):
                model.model(**{**arguments, **changes})
        model.model(**arguments)  # nothing is left of a call that failed


def test_a_prompt_without_images_runs_where_the_repository_fails():
    model, batch = make(LayerSelectFuseInternal), inputs((0, 0))
    del batch["images"]
    with pytest.raises(TypeError):
        model(**batch)
    with ik.patch(model):
        assert model(**batch).logits.isfinite().all()


@torch.no_grad()
def test_the_embeddings_that_it_is_given_stay_as_they_are_where_the_loop_writes_into_them():
    model = make(LayerSelectFuseInternal, "former")
    arguments, _ = model.embed(**inputs((1, 1)))
    before = arguments["inputs_embeds"].clone()
    with ik.patch(model):
        model.model(**arguments)
        assert torch.equal(arguments["inputs_embeds"], before)
    model.model(**arguments)
    assert not torch.equal(arguments["inputs_embeds"], before)


def operations_of_backward(model, samples):
    """Of the language model alone: the host's way of making embeddings takes longer for more samples."""
    arguments, _ = model.embed(**inputs((1,) * samples))
    arguments["inputs_embeds"] = arguments["inputs_embeds"].detach()
    arguments["images_features"] = [f.detach().requires_grad_() for f in arguments["images_features"]]
    output = model.model(**arguments)[0]
    with Dispatched() as calls:
        output.sum().backward()
    return len(calls.names)


def test_a_backward_has_as_many_operations_whatever_the_batch_where_the_loop_adds_some_for_each_sample():
    model = make(LayerSelectFuseInternal).requires_grad_(False)
    loop = [operations_of_backward(model, samples) for samples in (2, 8)]
    with ik.patch(model):
        patched = [operations_of_backward(model, samples) for samples in (2, 8)]
    injections = len(model.model.mm_projectors)
    assert patched[0] == patched[1] < loop[0]
    assert loop[1] - loop[0] >= 6 * injections


def test_threads_that_share_a_model_do_not_mix_their_features():
    model = make(LayerSelectFuseInternal)
    prompts = [inputs((1, 1), seed=seed) for seed in range(3)]
    with torch.no_grad(), ik.patch(model):
        logits = [model(**prompt).logits for prompt in prompts]

        @torch.no_grad()
        def ask(client):
            for i in [(client + turn) % 3 for turn in range(3)]:
                close(model(**prompts[i]).logits, logits[i])

        in_threads(ask)


def test_a_layer_that_runs_outside_of_its_language_model_is_an_error():
    """As a checkpoint around it would run it again in a backward, where the features are gone."""
    model = make(LayerSelectFuseInternal)
    with ik.patch(model), pytest.raises(NotImplementedError, match="ran outside of its language model"):
        next(layer for layer in model.model.layers if "forward" in vars(layer))(torch.zeros(1, PATCHES, 32))


def test_projectors_with_lora_answer_and_train_as_without_the_patch():
    peft = pytest.importorskip("peft")
    model, batch = make(LayerSelectFuseInternal), inputs((1, 1), labels=True)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*mm_projector(s\.\d|_f)\.[02]", r=2))
    found = []
    for patched in (False, True):
        torch.manual_seed(seeded())
        with ik.patch(lora) if patched else torch.enable_grad():
            loss = lora(**batch).loss
            loss.backward()
        found.append((loss, gradients(lora)))
        lora.zero_grad()
    close(found[1][0], found[0][0])
    assert any("mm_projectors" in name and "lora_B" in name for name in found[0][1])
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        close(found[1][1][name], grad)


def save_stage_1(model, folder):
    """As the repository does: what has ``mm_projectors.1`` in its name is of projector 1."""
    named = {f"model.{name}": p.data for name, p in model.model.named_parameters() if "mm_projector" in name}
    for index in range(len(getattr(model.model, "mm_projectors", ()))):
        own = {name: value for name, value in named.items() if f"mm_projectors.{index}" in name}
        torch.save(own, folder / f"mm_projector_{index}.bin")
    torch.save({n: v for n, v in named.items() if "mm_projector_f" in n}, folder / "mm_projector_f.bin")


@pytest.mark.parametrize("using", ["3-18-23", "all"])
def test_the_files_of_stage_1_are_loaded_also_where_file_1_has_the_projectors_from_10_on(tmp_path, using):
    model, other = make(LayerSelectFuseInternal, using), make(LayerSelectFuseInternal, using, seed=1)
    save_stage_1(model, tmp_path)
    assert len(torch.load(tmp_path / "mm_projector_1.bin")) == (4 if using == "3-18-23" else 44)
    load_projectors(other, tmp_path)
    for name, value in model.model.named_parameters():
        if "mm_projector" in name:
            assert torch.equal(other.get_parameter(f"model.{name}"), value), name


def test_the_file_of_stage_1_of_external_fusion_is_loaded_too(tmp_path):
    model, other = make(LayerSelectFuse, "18"), make(LayerSelectFuse, "18", seed=1)
    save_stage_1(model, tmp_path)
    load_projectors(other, tmp_path)
    assert torch.equal(other.model.mm_projector_f[2].weight, model.model.mm_projector_f[2].weight)


def test_files_of_another_strategy_or_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no mm_projector_f\.bin"):
        read_projectors(tmp_path)
    save_stage_1(make(LayerSelectFuseInternal, "3-18"), tmp_path)
    with pytest.raises(ValueError, match=r"folder: .* has the projectors .*, need .*mm_projectors\.2"):
        load_projectors(make(LayerSelectFuseInternal), tmp_path)
    with pytest.raises(ValueError, match="model: got Linear"):
        load_projectors(torch.nn.Linear(2, 2), tmp_path)
    (tmp_path / "mm_projector_0.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        read_projectors(tmp_path)
