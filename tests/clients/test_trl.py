"""trl's supervised fine-tuning learns what transformers' Trainer learns, which uses the loss of the model."""

import copy

import pytest
import torch

pytest.importorskip("transformers", "5")

from checkpoints import IMAGES, QUESTIONS, build, save
from clients import MODELS
from transformers import Trainer, TrainingArguments

import igva_kernels as ik
from igva_kernels.models import BalanceLossMixin

ANSWERS = ("Red.", "Two, and a nest.", "No.", "A man with a hat.")
SETTINGS = {
    "max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "lr_scheduler_type":
    "constant", "max_grad_norm": 0.0, "optim": "sgd", "gradient_checkpointing": True, "seed": 0,
}  # fmt: skip


def rows(form):
    """Images, questions and answers in one of the forms of dataset that trl reads."""
    from datasets import Dataset

    asked = [{"role": "user", "content": text} for text in QUESTIONS]
    answered = [{"role": "assistant", "content": text} for text in ANSWERS]
    pairs = zip(asked, answered, IMAGES, strict=True)
    if form == "messages":
        return Dataset.from_list([{"messages": [q, a], "images": [image]} for q, a, image in pairs])
    return Dataset.from_list([{"prompt": [q], "completion": [a], "images": [image]} for q, a, image in pairs])


def trained(trainer):
    """The losses of the steps, and the model that comes out."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def by_trl(model, form, folder, mixins=(), processor=None, **options):
    trl = pytest.importorskip("trl")
    settings = trl.SFTConfig(str(folder), max_length=None, **SETTINGS, **options)
    trainer = type("SFT", (*mixins, trl.SFTTrainer), {})
    return trainer(model=model, args=settings, train_dataset=rows(form), processing_class=processor)


def by_transformers(model, like, folder):
    """The Trainer of transformers over the batches of another trainer."""
    settings = TrainingArguments(str(folder), remove_unused_columns=False, **SETTINGS)
    return Trainer(model, settings, data_collator=like.data_collator, train_dataset=like.train_dataset)


def assert_learned_the_same(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    want = dict(want[1].named_parameters())
    for name, value in got[1].named_parameters():
        torch.testing.assert_close(
            value, want[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_trl_trains_every_model_as_transformers_does(kind, client_row, tmp_path):
    client_row("trl", kind)
    model, processor = build(kind)
    plain, given = copy.deepcopy(model), model
    if kind == "patched":
        ik.patch(model)
    if kind == "reference":
        save(tmp_path / "model")
        given, processor = str(tmp_path / "model"), None  # by its path, as trl's command does
    trainer = by_trl(given, "messages", tmp_path, [BalanceLossMixin] * (kind == "reference"), processor)
    want = trained(by_transformers(plain, trainer, tmp_path))
    assert_learned_the_same(trained(trainer), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "options"),
    [("prompt", {}), ("messages", {"assistant_only_loss": True}), ("messages", {"loss_type": "dft"})],
    ids=["prompts and completions", "answers only", "another loss per token"],
)
def test_the_balance_loss_survives_every_loss_of_trl(form, options, client_row, tmp_path):
    client_row("trl", "reference")
    model, processor = save(tmp_path / "model", balance_coefficient=2.0)
    trainer = by_trl(str(tmp_path / "model"), form, tmp_path, [BalanceLossMixin], **options)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    silent = copy.deepcopy(model)
    silent.config.balance_coefficient = silent.model.config.balance_coefficient = 0.0
    for count in (None, 7):
        added = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
        without = by_trl(silent, form, tmp_path, processor=processor, **options)
        added = added - without.compute_loss(without.model, dict(batch), num_items_in_batch=count)
        own = model(**batch, num_items_in_batch=count).loss - silent(**batch, num_items_in_batch=count).loss
        assert abs(own.item()) > 1e-2
        torch.testing.assert_close(added, own, rtol=1e-4, atol=1e-5)


def test_the_mixin_adds_nothing_to_the_loss_of_the_model_and_what_is_left_out_by_label_smoothing(tmp_path):
    model, processor = build(balance_coefficient=2.0)
    batch = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "What?"}]}],
        tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    batch = {**batch, "labels": batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)}
    trainer = type("T", (BalanceLossMixin, Trainer), {})
    own = model(**batch).loss
    with_it = trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    torch.testing.assert_close(with_it.compute_loss(model, dict(batch)), own)
    settings = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=0.1)
    smooth = [cls(model, settings).compute_loss(model, dict(batch)) for cls in (trainer, Trainer)]
    silent = copy.deepcopy(model)
    silent.config.balance_coefficient = silent.model.config.balance_coefficient = 0.0
    torch.testing.assert_close(smooth[0] - smooth[1], own - silent(**batch).loss, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="inputs: the balance loss is charged per supervised token, need labels"):
        with_it.compute_loss(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(TypeError, match="model: need one LLaVA-IGVA model, got 0"):
        with_it.compute_loss(torch.nn.Linear(1, 1), dict(batch))
