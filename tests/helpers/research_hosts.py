"""Small models with the classes' and attributes' names of the research repositories, and their maths in plain torch.

Written from the description of each repository's code, not from its text. ``test_research_repos.py`` runs the same
comparisons on the repositories themselves where they are at hand.
"""

import json
from functools import partial
from types import SimpleNamespace

import torch
from published_fuser import published_fuser, random_weights
from seeds import seeded
from tiny import EMBED, PAD, VISION, liven, text_config, vision_config
from torch import nn
from transformers import CLIPVisionModel, LlamaForCausalLM, LlamaModel, SiglipVisionModel
from transformers.modeling_outputs import CausalLMOutputWithPast

IMAGE_TOKEN_INDEX, IGNORE_INDEX = -200, -100


class Tower(nn.Module):
    """A wrapper around transformers' tower: CLIP under no_grad, as all of them have it."""

    def __init__(self, kind, layers, select_layer, select_feature="patch"):
        super().__init__()
        config = vision_config(kind, num_hidden_layers=layers)
        self.vision_tower = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[kind](config)
        self.vision_tower.requires_grad_(False)
        self.vision_tower_name = f"openai/{kind}-tiny"
        self.select_layer, self.select_feature, self.is_loaded = select_layer, select_feature, True

    dtype = property(lambda self: self.vision_tower.dtype)
    device = property(lambda self: self.vision_tower.device)
    config = property(lambda self: self.vision_tower.config)

    def states(self, images):
        return self.vision_tower(images.to(self.dtype), output_hidden_states=True).hidden_states

    def cut(self, state):
        return state[:, 1:] if self.select_feature == "patch" else state


def mlp(width):
    return nn.Sequential(nn.Linear(width, text_config().hidden_size), nn.GELU(), nn.Linear(32, 32))


class Host(LlamaForCausalLM):
    """LLaVA's class as every repository has it; each overrides how images are encoded."""

    def __init__(self, tower, projector, **settings):
        super().__init__(text_config())
        for name, value in settings.items():
            setattr(self.config, name, value)
        self.model.vision_tower = tower
        self.model.mm_projector = projector

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.model.vision_tower

    def features_of(self, images, **inputs):
        """Encoded images as a list: several images, or tiles of them, come as a list or in five dimensions."""
        if isinstance(images, list) or images.ndim == 5:
            images = [x[None] if x.ndim == 3 else x for x in images]
            encoded = self.encode_several(torch.cat(list(images)), **inputs)
            return [x.flatten(0, 1) for x in encoded.split([len(x) for x in images])]
        return list(self.encode_single(images, **inputs))

    def encode_single(self, images, **inputs):
        return self.encode_images(images)

    encode_several = encode_single

    def insert(self, input_ids, attention_mask, labels, features):
        """Embeddings with the features in the places of the images, padded on the right."""
        rows, targets, features = [], [], iter(features)
        for sample, ids in enumerate(input_ids):
            keep = (
                attention_mask[sample].bool() if attention_mask is not None else torch.ones_like(ids, dtype=torch.bool)
            )
            row, target = [], []
            if not (ids[keep] == IMAGE_TOKEN_INDEX).any():
                next(features)  # a sample without an image comes with one that nobody sees
            for position in keep.nonzero()[:, 0]:
                if ids[position] == IMAGE_TOKEN_INDEX:
                    row.append(next(features))
                    target += [IGNORE_INDEX] * len(row[-1])
                else:
                    row.append(self.model.embed_tokens(ids[position : position + 1]))
                    target.append(int(labels[sample, position]) if labels is not None else IGNORE_INDEX)
            rows.append(torch.cat(row))
            targets.append(torch.tensor(target))
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        labels = None if labels is None else nn.utils.rnn.pad_sequence(targets, True, IGNORE_INDEX)
        return None, None, mask, None, nn.utils.rnn.pad_sequence(rows, batch_first=True), labels

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        if images is None:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        return self.insert(input_ids, attention_mask, labels, self.features_of(images))

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, images=None, image_sizes=None, return_dict=None,
    ):  # fmt: skip
        if inputs_embeds is None:
            prepared = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = prepared
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            return_dict=return_dict,
        )  # fmt: skip

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, **kwargs):
        _, _, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            inputs, None, kwargs.pop("attention_mask", None), None, None, images, image_sizes=image_sizes
        )
        return super().generate(attention_mask=mask, inputs_embeds=embeds, **kwargs)


class LLaVA(Host):
    def __init__(self, kind="clip", mm_hidden_size=VISION, **settings):
        tower = LLaVATower(kind, 4, -2, "patch" if kind == "clip" else "cls_patch")
        super().__init__(tower, mlp(mm_hidden_size), mm_hidden_size=mm_hidden_size, **settings)

    def encode_images(self, images):
        return self.model.mm_projector(self.model.vision_tower(images))


def load_llava(folder, state):
    """What LLaVA's own loader makes of a config and weights: it drops those that its projector does not name."""
    config = json.loads((folder / "config.json").read_text())
    model = LLaVA(**{name: config[name] for name in ("mm_hidden_size", "igva_kernels") if name in config})
    model.load_state_dict(state, strict=False)
    return model.eval()


class LLaVATower(Tower):
    @torch.no_grad()
    def forward(self, images):
        return self.cut(self.states(images)[self.select_layer])


# ---- IGVA ----


class IGVA(Host):
    def __init__(self, average=False):
        super().__init__(
            StatesTower("clip", 4, None), mlp(2 * VISION), vit_aggregate_groups="[[1, 2], [3, 4]]", vit_base_layer=-2,
            aggregate_by_average=average,
        )  # fmt: skip
        if not average:
            self.model.vision_aggregator = Aggregator(EMBED, VISION, 2)

    def encode_images(self, images, sentence_embeds=None):
        states = self.model.vision_tower(images)
        means = torch.stack([(states[1] + states[2]) / 2, (states[3] + states[4]) / 2])
        if self.config.aggregate_by_average:
            mixed = means.mean(0)
        else:
            weights = self.model.vision_aggregator(means[:, :, 0].transpose(0, 1), sentence_embeds)
            mixed = (means * weights.T[:, :, None, None]).sum(0)
        return self.model.mm_projector(torch.cat([states[-2], mixed], dim=-1)[:, 1:])

    def encode_single(self, images, sentence_embeds=None):
        return self.encode_images(images, sentence_embeds)

    def encode_several(self, images, sentence_embeds=None):
        aggregate_layers = self.get_model().aggregate_layers  # nothing sets it, in the repository as here
        return self.encode_images(images, aggregate_layers, sentence_embeds)

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, sentence_embeds=None,
        image_sizes=None,
    ):  # fmt: skip
        if images is None:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        features = self.features_of(images, sentence_embeds=sentence_embeds)
        return self.insert(input_ids, attention_mask, labels, features)

    def forward(
        self, input_ids=None, sentence_embeds=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, labels=None, use_cache=None, images=None, image_sizes=None, return_dict=None,
    ):  # fmt: skip
        if inputs_embeds is None:
            prepared = self.prepare_inputs_labels_for_multimodal(
                input_ids=input_ids, sentence_embeds=sentence_embeds, position_ids=position_ids, images=images,
                attention_mask=attention_mask, past_key_values=past_key_values, labels=labels, image_sizes=image_sizes,
            )  # fmt: skip
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = prepared
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache
        )

    @torch.no_grad()
    def generate(self, inputs=None, sentence_embeds=None, images=None, image_sizes=None, **kwargs):
        _, _, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            inputs, None, kwargs.pop("attention_mask", None), None, None, images, sentence_embeds, image_sizes
        )
        return LlamaForCausalLM.generate(self, attention_mask=mask, inputs_embeds=embeds, **kwargs)


class StatesTower(Tower):
    @torch.no_grad()
    def forward(self, images):
        return self.states(images)


class Aggregator(nn.Module):
    """The names of IGVA's allocator: one block, without its FFN."""

    def __init__(self, embed_dim, feature_dim, groups):
        super().__init__()
        self.sentence_proj = nn.Linear(embed_dim, 8)
        self.cls_proj = nn.Linear(feature_dim, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, groups)

    def forward(self, cls_features, sentence_embed):
        keys, query = self.cls_proj(cls_features), self.sentence_proj(sentence_embed)[:, None]
        return self.linear(self.attention(query, keys, keys)[0] + query).softmax(-1)[:, 0]


# ---- DenseConnector ----


class DenseConnector(Host):
    def __init__(self, kind="dci", tower="clip", **settings):
        layers = 24 if tower == "clip" else 26  # SigLIP's last layer is cut there
        super().__init__(
            OutputsTower(tower, layers, -2), mlp(3 * VISION), mm_dense_connector_type=kind, is_video=False, **settings
        )

    def is_siglip(self):
        return "siglip" in self.model.vision_tower.vision_tower_name

    def temporal_aggregation(self, features):
        return features.flatten(0, 1)[None]

    def encode_images(self, images):
        base, outputs = self.model.vision_tower(images)
        skip, half = (0, 13) if self.is_siglip() else (1, 12)
        states = [state[:, skip:] for state in outputs.hidden_states]
        if self.config.mm_dense_connector_type == "sci":
            parts = [states[7], states[15]]
        else:
            parts = [sum(states[:half]) / half, sum(states[half : 2 * half]) / half]
        tokens = self.model.mm_projector(torch.cat([base, *parts], dim=-1))
        return self.temporal_aggregation(tokens) if self.config.is_video else tokens


class OutputsTower(Tower):
    def forward(self, images):
        siglip = "siglip" in self.vision_tower_name
        with torch.set_grad_enabled(siglip and torch.is_grad_enabled()):
            states = self.states(images)
        base = states[-1] if siglip else self.cut(states[self.select_layer])
        return base, SimpleNamespace(hidden_states=states)


# ---- Layer_Select_Fuse ----

SELECTED = {
    ("clip", "18"): [18, 23],
    ("clip", "3-18"): [3, 18, 23],
    ("clip", "3-18-23"): [3, 18, 23, 23],
    ("clip", "former"): [*range(1, 13), 23],
    ("clip", "latter"): [*range(13, 25), 23],
    ("clip", "all"): [*range(1, 25), 23],
    ("siglip", "3-18-23"): [3, 20, 25, 25],
    ("siglip", "latter"): [*range(15, 27), 25],
}


class LayerSelectFuse(Host):
    def __init__(self, using="3-18-23", tower="clip", fusing="E_D"):
        layers = 24 if tower == "clip" else 26
        width = 3 if using in ("3-18-23", "all") else 2
        super().__init__(
            SelectedTower(tower, layers, using), None, layer_using_strategy=using, layer_fusing_strategy=fusing
        )
        del self.model.mm_projector
        self.model.mm_projector_f = mlp(width * VISION)

    def encode_images(self, images):
        states = self.model.vision_tower(images)
        parts = {
            "18": lambda: states[:2],
            "3-18-23": lambda: states[:3],
            "former": lambda: [sum(states[:12]) / 12, states[-1]],
            "latter": lambda: [sum(states[:12]) / 12, states[-1]],
            "all": lambda: [sum(states[:12]) / 12, sum(states[12:24]) / 12, states[-1]],
        }[self.config.layer_using_strategy]()
        return self.model.mm_projector_f(torch.cat(parts, dim=-1))


class SelectedTower(Tower):
    """Token 0 is dropped for SigLIP too, where it is a patch."""

    def feature_select(self, outputs):
        kind = "siglip" if "siglip" in self.vision_tower_name else "clip"
        if (kind, self.select_layer) in SELECTED:
            layers = SELECTED[kind, self.select_layer]
        return [self.cut(outputs.hidden_states[layer]) for layer in layers]

    def forward(self, images):
        return self.feature_select(SimpleNamespace(hidden_states=self.states(images)))


class LayerSelectFuseModular(Host):
    def __init__(self, using="3-18-23", tower="clip", feature=None):
        levels = {"18": 1, "3-18-23": 2, "former": 12, "latter": 12, "all": 24}[using]
        layers, feature = (24, "patch") if tower == "clip" else (26, "cls_patch") if feature is None else (26, feature)
        super().__init__(None, None, layer_using_strategy=using, layer_fusing_strategy="E_M")
        del self.model.mm_projector
        self.model.vision_tower = SelectedTower(tower, layers, using, feature)
        self.model.mm_projector_f = nn.Sequential(MSCrossAttnBlock(levels), *mlp(VISION))

    def encode_images(self, images):
        return self.model.mm_projector_f(self.model.vision_tower(images))


class LayerSelectFuseInternal(Host):
    """Internal direct fusion, with the loop that the repository has in front of the layers of its language model."""

    def __init__(self, using="3-18-23", tower="clip", layers=None, tower_layers=None):
        depth = tower_layers or {"clip": 24, "siglip": 26}[tower]
        layers = layers or {"all": 24, "former": 12, "latter": 12}.get(using, 8)
        super().__init__(None, None, layer_using_strategy=using, layer_fusing_strategy="I_D")
        self.config.num_hidden_layers = layers
        self.model = InjectingLlama(self.config)
        self.model.vision_tower = SelectedTower(tower, depth, using)
        count = {"former": 12, "latter": 12, "all": 24}.get(using, using.count("-") + 1)
        self.model.mm_projectors = nn.ModuleList(mlp(VISION) for _ in range(count))
        self.model.mm_projector_f = mlp(VISION)

    def encode_images(self, images):
        projectors = [*self.model.mm_projectors, self.model.mm_projector_f]
        states = self.model.vision_tower(images)
        return [projector(state) for projector, state in zip(projectors, states, strict=True)]

    def embed(self, input_ids, attention_mask=None, labels=None, images=None):
        """Arguments of the language model, and the labels."""
        if images is None:
            return {"inputs_embeds": self.model.embed_tokens(input_ids), "attention_mask": attention_mask}, labels
        features = self.encode_images(images)
        _, _, mask, _, embeds, padded = self.insert(input_ids, attention_mask, labels, list(features[-1]))
        marks = self.insert(input_ids, attention_mask, None, list(torch.full_like(features[-1], torch.nan)))[4]
        arguments = {"inputs_embeds": embeds, "attention_mask": mask, "images_features": features}
        return {**arguments, "image_token_mask": marks.isnan().any(-1).long()}, padded

    def forward(self, input_ids=None, attention_mask=None, labels=None, images=None, **kwargs):
        arguments, labels = self.embed(input_ids, attention_mask, labels, images)
        logits = self.lm_head(self.model(**arguments, **kwargs)[0])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(self, inputs, images=None, max_new_tokens=1, do_sample=False):
        """Greedy, with a cache; every step is given the features, as in the repository."""
        arguments, _ = self.embed(inputs, images=images)
        tokens, cache = [], None
        for _ in range(max_new_tokens):
            outputs = self.model(**arguments, past_key_values=cache, use_cache=True)
            tokens.append(self.lm_head(outputs[0][:, -1:]).argmax(-1))
            cache = outputs.past_key_values
            arguments |= {"inputs_embeds": self.model.embed_tokens(tokens[-1]), "attention_mask": None}
        return torch.cat(tokens, dim=1)


class InjectingLlama(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        count, using = config.num_hidden_layers, config.layer_using_strategy
        first, last = list(range(12)), list(range(count - 12, count))
        where = {"former": first, "latter": last, "all": first + last}
        if using not in where:
            where[using] = [int(int(layer) * count / 24 - 1) for layer in using.split("-")]
        self.where = where[using]
        for index, layer in enumerate(self.layers):
            layer.has_cross = index in self.where

    def forward(self, image_token_mask=None, images_features=None, past_key_values=None, **kwargs):
        hooks = []
        for index, layer in enumerate(self.layers):
            if layer.has_cross:
                feature = images_features[self.where.index(index)]
                if past_key_values is None:
                    hooks.append(layer.register_forward_pre_hook(partial(write, image_token_mask, feature)))
        try:
            return super().forward(past_key_values=past_key_values, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()


def write(image_token_mask, feature, layer, args):
    """A write into the states of each sample, from its first image token on."""
    for sample, mask in enumerate(image_token_mask):
        tokens = mask.nonzero()[:, 0]
        if len(tokens):
            place = slice(tokens[0], tokens[0] + len(tokens))
            args[0][sample, place] = args[0][sample, place] + feature[sample]


# ---- MMFuser ----


class MMFuser(Host):
    def __init__(self, selected=(-22, -17, -12, -7, -2), feature="patch", tower="clip"):
        super().__init__(ListTower(tower, 24, list(selected), feature), nn.Sequential(MSCrossAttnBlock(), *mlp(VISION)))

    def encode_images(self, images):
        return self.model.mm_projector(self.model.vision_tower(images))


class ListTower(Tower):
    @torch.no_grad()
    def forward(self, images):
        states = self.states(images)
        return torch.stack([self.cut(states[layer]) for layer in self.select_layer])


class MSDeformAttn(nn.Module):
    """Deformable DETR's attention; the block computes what it returns."""

    def __init__(self, n_levels, n_heads=2, n_points=4):
        super().__init__()
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(VISION, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(VISION, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(VISION, VISION)
        self.output_proj = nn.Linear(VISION, VISION)


class MSCrossAttnBlock(nn.Module):
    def __init__(self, n_levels=4):
        super().__init__()
        self.select_layer, self.query_layer = list(range(n_levels)), -1
        self.cross_attn, self.self_attn = MSDeformAttn(n_levels), MSDeformAttn(1)
        self.query_norm, self.feat_norm, self.norm1 = (nn.LayerNorm(VISION, eps=1e-6) for _ in range(3))
        self.gamma1, self.gamma2 = nn.Parameter(torch.zeros(VISION)), nn.Parameter(torch.zeros(VISION))

    def forward(self, srcs, masks=None, pos_embeds=None):
        states = [srcs[level] for level in (*self.select_layer, self.query_layer)]
        return published_fuser(dict(self.named_parameters()), states, heads=2)


# ---- TGIF ----


class TGIF(Host):
    def __init__(self, tower="clip"):
        super().__init__(StackedTower(tower, 4, -2), LayerSelectorWithMLP(), mm_projector_type="layer_selector")

    def encode_images(self, images, text_embeddings):
        features, _, layers, _ = self.model.vision_tower(images)
        return self.model.mm_projector(features, layers, text_embeddings)

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        if images is None:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeds = self.model.embed_tokens(input_ids.clamp_min(0)) * mask[..., None]
        features, _ = self.encode_images(images, embeds.sum(1) / mask.sum(1, keepdim=True))
        return self.insert(input_ids, attention_mask, labels, features)


class StackedTower(Tower):
    @torch.no_grad()
    def forward(self, images):
        siglip = "siglip" in self.vision_tower_name
        states = [state if siglip else self.cut(state) for state in self.states(images)]
        return states[self.select_layer], None, torch.stack(states[1:], dim=1), None


class LayerSelectorWithMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_selector = LayerSelector()
        self.mlp = mlp(VISION)

    def forward(self, image_features, all_layers_features, text_embeddings):
        mixed, weights = self.layer_selector(all_layers_features, text_embeddings)
        return self.mlp(mixed), weights


class LayerSelector(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_weights_projection = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4))
        self.norm = nn.LayerNorm(VISION)

    def forward(self, layers, text):
        weights = self.layer_weights_projection(text).softmax(-1)
        return self.norm((layers * weights[:, :, None, None]).sum(1) + layers[:, -2]), weights


def make(host_class, *args, seed=0, **kwargs):
    """A host with weights as large as a trained model's."""
    torch.manual_seed(seeded(seed))
    model = liven(host_class(*args, **kwargs).eval())
    for module in model.modules():
        if isinstance(module, MSCrossAttnBlock):
            random_weights(module, seed)
    return model


def inputs(images_per_sample=(1, 1, 1), labels=False, sentences=False, seed=0):
    """Prompts as LLaVA has them: one index per image; a sample without an image comes with one that nobody sees."""
    generator = torch.Generator().manual_seed(seeded(seed))
    rows = []
    for sample, images in enumerate(images_per_sample):
        row = [torch.randint(3, 60, (4 + sample,), generator=generator)]
        for _ in range(images):
            row += [torch.tensor([IMAGE_TOKEN_INDEX]), torch.randint(3, 60, (2,), generator=generator)]
        rows.append(torch.cat(row))
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    batch = {"input_ids": nn.utils.rnn.pad_sequence(rows, True, PAD), "attention_mask": mask}
    batch["images"] = torch.randn(sum(max(1, n) for n in images_per_sample), 3, 28, 28, generator=generator)
    if sentences:
        batch["sentence_embeds"] = torch.randn(len(images_per_sample), EMBED, generator=generator)
    if labels:
        hidden = (mask == 0) | (batch["input_ids"] < 0)
        batch["labels"] = batch["input_ids"].masked_fill(hidden, IGNORE_INDEX)
    return batch
