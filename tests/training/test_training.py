"""The recipe of ``examples`` in one process: data, stages, accumulation, resumption, precision."""

import json
import signal
import subprocess
import sys
import time

import assemble_llava_igva
import pytest
import torch
import train_llava_igva
from llava_data import LlavaCollator, LlavaDataset, embed_instructions
from PIL import Image
from recipe import (
    CONNECTORS,
    EXAMPLES,
    arguments,
    assert_same,
    environment,
    launch,
    make_inputs,
    result,
    run_recipe,
    weights,
)
from safetensors.torch import load_file
from seeds import seeded
from torch.utils.checkpoint import checkpoint
from transformers import AutoProcessor, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

import igva_kernels as ik
from igva_kernels.models import LlavaIgvaForConditionalGeneration
from igva_kernels.models.llava_igva.chat_templates import CHAT_TEMPLATES

TURNS = [("human", "<image>\nWhat shape is red?"), ("gpt", "circle"), ("human", "Which letter?"), ("gpt", "A")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Checkpoint, pictures, samples."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture
def processor(inputs):
    return AutoProcessor.from_pretrained(inputs / "base")


@pytest.fixture
def train(inputs, tmp_path):
    """Run the recipe in this process and read what it left behind."""

    def run(name, *more, patch=False, **options):
        run_recipe(arguments(inputs, tmp_path / name, *more, **options), patch)
        return result(tmp_path / name)

    return run


def assert_same_losses(actual, expected, tolerance):
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=tolerance, atol=0)


def load(folder, **options):
    return LlavaIgvaForConditionalGeneration.from_pretrained(folder, **options)


def some_batch(inputs):
    dataset = LlavaDataset(inputs / "train.json", inputs / "images", sentence_embeds=None)
    batch = LlavaCollator(AutoProcessor.from_pretrained(inputs / "base"))([dataset[i] for i in range(4)])
    return {**batch, "sentence_embeds": torch.randn(4, 384, generator=torch.Generator().manual_seed(seeded()))}


class TestData:
    @pytest.fixture
    def sample(self, tmp_path):
        Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
        turns = [{"from": role, "value": text} for role, text in TURNS]
        samples = [{"image": "a.png", "conversations": turns}, {"conversations": turns[2:]}]
        (tmp_path / "data.json").write_text(json.dumps(samples))
        return tmp_path

    @pytest.mark.parametrize("version", ["plain", "vicuna_v1", None])
    def test_only_the_answers_are_supervised(self, sample, processor, version):
        if version:
            processor.chat_template = CHAT_TEMPLATES[version]
        dataset = LlavaDataset(sample / "data.json", sample)
        batch = LlavaCollator(processor)([dataset[0], dataset[1]])
        answers = [processor.tokenizer.decode(row[row != -100]).split() for row in batch["labels"]]
        end = [] if version == "plain" else ["</s>"]
        assert answers == [["circle", *end, "A", *end], ["A", *end]]
        supervised = batch["labels"] != -100
        assert torch.equal(batch["labels"][supervised], batch["input_ids"][supervised])

    def test_an_image_has_its_tokens_and_its_pixels(self, sample, processor):
        dataset = LlavaDataset(sample / "data.json", sample)
        collator = LlavaCollator(processor)
        batch = collator([dataset[0], dataset[1]])
        places = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
        assert places.tolist() == [collator.tokens_per_image, 0] and collator.tokens_per_image == 36
        assert batch["pixel_values"].shape == (1, 3, 48, 48)
        assert "pixel_values" not in collator([dataset[1]])

    def test_long_prompts_are_cut(self, sample, processor):
        dataset = LlavaDataset(sample / "data.json", sample)
        assert LlavaCollator(processor, max_length=40)([dataset[0]])["labels"].shape == (1, 40)

    def test_embedding_is_the_mean_over_the_questions(self, sample, processor):
        encoder = processor.sentence_encoder
        first, second = embed_instructions(json.loads((sample / "data.json").read_text()), encoder)
        alone = embed_instructions([{"conversations": [{"from": "human", "value": "What shape is red?"}]}], encoder)
        torch.testing.assert_close(first, (alone[0] + second) / 2)

    def test_embeddings_are_made_once_and_read_again(self, sample, processor):
        file = sample / "embeds.safetensors"
        made = LlavaDataset(sample / "data.json", sample, processor.sentence_encoder, file)
        written = file.stat().st_mtime_ns
        again = LlavaDataset(sample / "data.json", sample, processor.sentence_encoder, file)
        live = LlavaDataset(sample / "data.json", sample, processor.sentence_encoder)
        assert file.stat().st_mtime_ns == written
        for dataset in (again, live):
            torch.testing.assert_close(dataset[1]["sentence_embeds"], made[1]["sentence_embeds"])
        (sample / "data.json").write_text("[]")
        with pytest.raises(ValueError, match="2 rows for 0 samples"):
            LlavaDataset(sample / "data.json", sample, processor.sentence_encoder, file)

    def test_padding_is_square_and_centred(self, sample):
        Image.new("RGB", (40, 20), "red").save(sample / "a.png")
        dataset = LlavaDataset(sample / "data.json", sample, image_aspect_ratio="pad", pad_colour=(1, 2, 3))
        image = dataset[0]["images"][0]
        assert image.size == (40, 40)
        assert [image.getpixel((20, y)) for y in (5, 20, 35)] == [(1, 2, 3), (255, 0, 0), (1, 2, 3)]


class TestStages:
    def test_stage_1_trains_the_projector_and_stage_2_adds_allocator_and_language_model(self, train, inputs, tmp_path):
        before = weights(inputs / "base")
        first = train("stage1", stage=1, data_path=inputs / "captions.json").weights
        changed = {name for name, weight in first.items() if not torch.equal(weight, before[name])}
        assert changed == {name for name in before if "multi_modal_projector" in name}
        assert not any("weight_allocator" in name for name in first)

        second = train(
            "stage2", stage=2, model_name_or_path=tmp_path / "stage1", data_path=inputs / "train.json"
        ).weights
        changed = {name for name in first if not torch.equal(first[name], second[name])}
        assert changed == {name for name in first if "vision_tower" not in name}
        model, loading = load(tmp_path / "stage2", output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        assert model.config.aggregation == "instruction" and model.model.weight_allocator is not None

    def test_a_new_allocator_is_the_same_whoever_makes_it(self, train, inputs, tmp_path):
        train("stage1", stage=1)
        options = {"model_name_or_path": tmp_path / "stage1", "learning_rate": 0.0, "max_steps": 1}
        one, two = train("one", **options), train("two", **options)
        assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)

    def test_projector_has_its_own_rate(self, train, inputs):
        before = weights(inputs / "base")
        after = train("run", mm_projector_lr=0.0).weights
        unchanged = {name for name in before if torch.equal(before[name], after[name])}
        assert unchanged == {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}

    def test_options_reach_the_model(self, inputs):
        args = train_llava_igva.ModelArguments(
            model_name_or_path=str(inputs / "base"), mix_groups="[[1], [2, 3], [4, 5], [6, 7, 8]]",
            mm_vision_select_layer=-3, balance_coefficient=0.5, attn_implementation="eager", freeze_backbone=True,
            unfreeze_vision_tower=True, impl="reference", dtype="bfloat16",
        )  # fmt: skip
        model = train_llava_igva.load_model(args)
        assert model.config.plan == ik.MixPlan.igva(8, [[1], [2, 3], [4, 5], [6, 7, 8]], base=-3)
        assert model.config.balance_coefficient == 0.5 and model.dtype == torch.bfloat16
        assert model.model.multi_modal_projector.impl == "reference"
        assert model.config.vision_config._attn_implementation == "eager"
        assert model.model.vision_tower.embeddings.patch_embedding.weight.requires_grad
        assert not any(p.requires_grad for p in model.model.language_model.parameters())


class TestAssembly:
    def test_from_a_tower_and_a_language_model(self, train, inputs, tmp_path):
        whole = load(inputs / "base")
        processor = AutoProcessor.from_pretrained(inputs / "base")
        whole.model.vision_tower.save_pretrained(tmp_path / "tower")
        processor.image_processor.save_pretrained(tmp_path / "tower")
        language = LlamaForCausalLM(whole.config.text_config)
        language.save_pretrained(tmp_path / "language")
        processor.tokenizer.save_pretrained(tmp_path / "language")

        config = {"mix_groups": 2, "sentence_embed_dim": 384, "sentence_encoder": processor.sentence_encoder}
        assemble_llava_igva.from_parts(
            str(tmp_path / "tower"), str(tmp_path / "language"), str(tmp_path / "joined"), torch.float32, **config
        )
        joined, loading = load(tmp_path / "joined", output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        for part, original in (
            (joined.model.vision_tower, whole.model.vision_tower),
            (joined.lm_head, language.lm_head),
        ):
            for name, weight in original.state_dict().items():
                assert torch.equal(part.state_dict()[name], weight)
        assert torch.equal(joined.model.language_model.norm.weight, language.model.norm.weight)
        trained = train(
            "run", model_name_or_path=tmp_path / "joined", stage=1, data_path=inputs / "captions.json", version="plain"
        )
        assert trained.losses[-1] < trained.losses[0]

    def test_from_a_llava(self, inputs, tmp_path):
        config = load(inputs / "base").config
        llava = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=config.vision_config,
                text_config=config.text_config,
                image_token_index=config.image_token_id,
            )
        ).eval()
        llava.save_pretrained(tmp_path / "llava")
        AutoProcessor.from_pretrained(inputs / "base").save_pretrained(tmp_path / "llava")
        assemble_llava_igva.from_llava(
            str(tmp_path / "llava"), str(tmp_path / "upgraded"), torch.float32, sentence_embed_dim=384
        )
        upgraded = load(tmp_path / "upgraded").eval()
        batch = some_batch(inputs)
        expected = llava(**{name: value for name, value in batch.items() if name != "sentence_embeds"})
        torch.testing.assert_close(upgraded(**batch).logits, expected.logits, rtol=1e-4, atol=3e-5)


class TestSameTraining:
    """Native and patched connectors train what the plain one trains."""

    @pytest.fixture
    def plain(self, train):
        return train("plain", impl="reference")

    @pytest.mark.parametrize("frozen", [True, False], ids=["frozen tower", "trained tower"])
    def test_native_and_patched_equal_plain(self, train, frozen):
        more = () if frozen else ("--unfreeze_vision_tower",)
        plain = train("plain", *more, impl="reference")
        for name, how in CONNECTORS.items():
            assert_same(train(name, *more, **how), plain)

    @pytest.mark.parametrize("size", [1, 4])
    def test_micro_batches_make_no_difference(self, train, plain, size):
        split = train("split", per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        assert_same(split, plain)

    def test_gradient_checkpointing(self, train, plain):
        assert_same(train("run", gradient_checkpointing=True), plain)

    def test_bf16_autocast(self, train, plain):
        losses = train("run", bf16=True).losses
        assert_same_losses(losses, train("plain_bf16", bf16=True, impl="reference").losses, 5e-3)
        assert_same_losses(losses, plain.losses, 2e-2)

    def test_bf16_weights(self, train, plain):
        assert_same_losses(train("run", bf16=True, dtype="bfloat16").losses, plain.losses, 3e-2)


class TestLora:
    options = ("--lora_enable", "--lora_r", "4", "--lora_dropout", "0")

    def run(self, inputs, output, impl="reference", patch=False):
        run_recipe(arguments(inputs, output, *self.options, impl=impl), patch)
        adapter = load_file(output / "adapter_model.safetensors")
        return adapter, json.loads((output / "trainer_state.json").read_text())["log_history"]

    def test_native_and_patched_equal_plain_and_the_adapter_loads(self, inputs, tmp_path):
        peft = pytest.importorskip("peft", reason="peft is not installed: pip install igva-kernels[train]")
        plain, plain_log = self.run(inputs, tmp_path / "plain")
        assert any("linear_1" in name for name in plain) and any("weight_allocator" in name for name in plain)
        assert any(weight.any() for name, weight in plain.items() if "linear_1.lora_B" in name)
        for kind, how in CONNECTORS.items():
            adapter, log = self.run(inputs, tmp_path / kind, **how)
            assert_same_losses([e["loss"] for e in log[:-1]], [e["loss"] for e in plain_log[:-1]], 2e-5)
            assert adapter.keys() == plain.keys()
            for name, weight in plain.items():
                torch.testing.assert_close(adapter[name], weight, rtol=2e-5, atol=2e-5)

        model = peft.PeftModel.from_pretrained(load(inputs / "base"), tmp_path / "native").eval()
        batch = some_batch(inputs)
        adapted = model(**batch)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, adapted.logits, rtol=1e-4, atol=3e-5)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(
            load(tmp_path / "merged").eval()(**batch).logits, adapted.logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.plain_memory
def test_compiled_step(train):
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    plain = train("plain", impl="reference")
    for name, how in CONNECTORS.items():
        assert_same(train(name, torch_compile=True, **split, **how), plain, 1e-4)


def test_fp16_with_a_gradient_scaler(inputs):
    losses = {}
    for name, how in {"plain": {"impl": "reference", "patch": False}, **CONNECTORS}.items():
        model = load(inputs / "base", impl=how["impl"]).train()
        if how["patch"]:
            ik.patch(model)
        batch = some_batch(inputs)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)
        losses[name] = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[name].append(loss.item())
        assert scaler.get_scale() < 2.0**24, "the first steps must have overflowed and been skipped"
        assert losses[name][-1] < losses[name][0]
        assert_same_losses(losses[name], losses["plain"], 1e-2)


def test_activation_checkpointing_over_the_connector(inputs):
    model = load(inputs / "base").model
    states = [torch.randn(2, 37, 16, requires_grad=True) for _ in range(9)]
    weights = torch.full((2, 4), 0.25, requires_grad=True)
    grads = []
    for run in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        out = run(model.multi_modal_projector, states, weights)
        wanted = [*states[1:], weights, *model.multi_modal_projector.parameters()]
        grads.append(torch.autograd.grad(out.square().sum(), wanted))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}


class TestResumption:
    def test_resumed_run_ends_with_the_same_bits(self, train, tmp_path):
        whole = train("whole", **ADAM)
        resumed = train("resumed", **ADAM, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
        assert resumed.losses == whole.losses
        assert all(torch.equal(resumed.weights[name], whole.weights[name]) for name in whole.weights)

    @pytest.mark.slow
    def test_killed_run_resumes_and_ends_with_the_same_bits(self, inputs, tmp_path):
        options = {**ADAM, "max_steps": 40}
        output = tmp_path / "killed"
        command = [sys.executable, str(EXAMPLES / "train_llava_igva.py"), *arguments(inputs, output, **options)]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not train_llava_igva.last_complete_checkpoint(output):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (output / "model.safetensors").exists()

        runs = [{"argv": arguments(inputs, folder, **options)} for folder in (output, tmp_path / "whole")]
        launch(tmp_path, runs, processes=1)
        killed, whole = result(output), result(tmp_path / "whole")
        assert killed.losses == whole.losses
        assert all(torch.equal(killed.weights[name], whole.weights[name]) for name in whole.weights)

    def test_a_checkpoint_cut_off_while_written_is_passed_over(self, tmp_path):
        for step, state in ((2, "{}"), (10, "{}"), (12, '{"epoch'), (14, None)):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            if state is not None:
                (folder / "trainer_state.json").write_text(state)
        assert train_llava_igva.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
        assert train_llava_igva.last_complete_checkpoint(tmp_path / "none") is None
