"""transformers' own common tests of models and processors, over the reference model.

They come from the sdist of the installed transformers (``transformers_sources``). ``tests/models/test_mixins.py`` runs
this file in a process of its own; to run one of the tests:

    pytest -o addopts=--import-mode=importlib tests/helpers/transformers_mixins.py -k test_attention_outputs

The sdist has the modules of ``tests/`` and none of its folders. What the common tests import from there is empty here:
the common tests of generation (``test_llava_igva.py`` has ours) and of exporters, and a helper that downloads pictures.
The common tests of pipelines need tiny models of the hub (``tests/clients`` runs pipelines).
"""

import importlib
import sys
import types
import unittest
from pathlib import Path

import torch
from tiny import EMBED, PATCHES, igva_config, vision_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers_sources import SOURCES

from igva_kernels.models import (
    LlavaIgvaConfig,
    LlavaIgvaForConditionalGeneration,
    LlavaIgvaModel,
    LlavaIgvaProcessor,
)

PHOTOGRAPH = next((Path(__file__).parents[2] / "igva_kernels" / "demo").glob("*.jpg"))


def absent(name, **contents):
    """A module that the sdist lacks."""
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module


def common(name):
    """A module of the sdist's tests; they import each other as parts of a package."""
    package = "transformers_tests"
    if package not in sys.modules:
        module = types.ModuleType(package)
        module.__path__ = [str(SOURCES / "tests")]
        sys.modules[package] = module
        for folder in ("exporters", "generation", "utils"):
            absent(f"{package}.{folder}", __path__=[])
        absent(f"{package}.exporters.test_export", ExportTesterMixin=object)
        absent(f"{package}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        absent(f"{package}.utils.test_configuration_utils", config_common_kwargs={})
        absent("fetch_hub_objects_for_ci", url_to_local_path=lambda url: str(PHOTOGRAPH))
    return importlib.import_module(f"{package}.{name}")


modeling = common("test_modeling_common")
ConfigTester = common("test_configuration_common").ConfigTester
ProcessorTesterMixin = common("test_processing_common").ProcessorTesterMixin

# The tests know a model's task by its name in transformers' own lists, which no registration reaches.
modeling.MODEL_MAPPING_NAMES = {**modeling.MODEL_MAPPING_NAMES, "llava_igva": "LlavaIgvaModel"}
modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = {
    **modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "llava_igva": "LlavaIgvaForConditionalGeneration"
}  # fmt: skip

IMAGE = 4
"""The image token: some tests cut the vocabulary down, and an image must be left."""


class Tester:
    """A tiny model and its inputs, as transformers' tests ask for them."""

    batch_size, seq_length, is_training = 3, 4 + PATCHES, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 64

    def __init__(self, **fields):
        self.fields = {"impl": "auto"} | fields
        self.vision_config = vision_config(num_hidden_layers=2).to_dict()

    def get_config(self):
        return igva_config(vision_config=self.vision_config, image_token_index=IMAGE, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(IMAGE + 1, self.vocab_size, (self.batch_size, self.seq_length))
        ids[:, 1 : 1 + PATCHES] = IMAGE
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(self.batch_size, 3, 28, 28),
            "sentence_embeds": torch.randn(self.batch_size, EMBED),
        }


class ModelTest(modeling.ModelTesterMixin, modeling.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (LlavaIgvaModel, LlavaIgvaForConditionalGeneration)
    _is_composite = True
    test_all_params_have_gradient = False  # nothing reads the tower's pooled output, nor its norm, as in Llava

    def setUp(self):
        # These tests thaw every parameter after train(), which leaves a frozen tower in eval mode: it would not be
        # checkpointed. A tower that is to learn is one that is not frozen.
        thawed = "gradient_checkpointing" in self._testMethodName
        self.model_tester = Tester(freeze_vision_tower=not thawed)
        self.config_tester = ConfigTester(self, config_class=LlavaIgvaConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _image_features_prepare_config_and_inputs(self):
        config, inputs = super()._image_features_prepare_config_and_inputs()
        return config, inputs | {"sentence_embeds": torch.randn(len(inputs["pixel_values"]), EMBED)}


CHAT = """{% for message in messages %}{{ message['role'] }} : {% if message['content'] is string %}\
{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}assistant :{% endif %}"""


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavaIgvaProcessor

    @classmethod
    def _setup_tokenizer(cls):
        letters = ["<pad>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"]
        )

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})

    @staticmethod
    def prepare_processor_dict():
        return {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
                "chat_template": CHAT}  # fmt: skip

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        # They are Llava's, and Llava's processor is not the first of the bases.
        return ProcessorTesterMixin.does_processor_return_mm_offsets(LlavaProcessor, method_name)

    @unittest.skip("sentence_embeds are an input of the model, and there are none without an instruction")
    def test_model_input_names(self):
        pass
