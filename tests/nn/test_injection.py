"""``TokenInjection``: at which layers of a real decoder features are added, before or after them."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaModel

import igva_kernels as ik
from igva_kernels.nn import TokenInjection


def decoder():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=8)
    return LlamaModel(config).eval()


def inputs():
    torch.manual_seed(1)
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]])
    return torch.randn(2, 4, 16), torch.randn(2, 4, 16), mask


def add(features, mask):
    """A plain hook's work: features where the mask is."""
    return lambda hidden: hidden.masked_scatter(mask[..., None], hidden[mask] + features)


@pytest.mark.parametrize("when", ["before", "after"])
def test_features_are_added_before_or_after_the_layers_that_are_named(when):
    embeds, features, mask = inputs()
    model, plain = decoder(), decoder()
    injection = TokenInjection({0: 1, 2: 0}, when)
    injection.attach(model, model.layers)
    given = injection.given(list(features), ik.token_rows(mask))
    for layer, feature in {0: 1, 2: 0}.items():
        put = add(features[feature], mask)
        if when == "before":
            plain.layers[layer].register_forward_pre_hook(lambda _, args, put=put: (put(args[0]), *args[1:]))
        else:
            plain.layers[layer].register_forward_hook(lambda _, args, output, put=put: put(output))
    out = model(inputs_embeds=embeds, **given).last_hidden_state
    torch.testing.assert_close(out, plain(inputs_embeds=embeds).last_hidden_state)
    # The next call, without the argument, is the model's own.
    own = decoder()(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(model(inputs_embeds=embeds).last_hidden_state, own, rtol=0, atol=0)
    assert (out - own).abs().max() > 1e-3


def test_a_feature_is_computed_when_its_layer_is_reached():
    embeds, features, mask = inputs()
    model, order = decoder(), []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, index=index: order.append(f"layer {index}"))
    injection = TokenInjection({1: 0})
    injection.attach(model, model.layers)
    model(
        inputs_embeds=embeds, **injection.given(lambda j: order.append("feature") or features[j], ik.token_rows(mask))
    )
    assert order == ["layer 0", "feature", "layer 1", "layer 2"]


@pytest.mark.parametrize(("layers", "when"), [({}, "before"), ({-1: 0}, "before"), ({0: -1}, "before"), ({0: 0}, "in")])
def test_an_injection_that_cannot_be_meant_is_refused(layers, when):
    with pytest.raises(ValueError, match=r"layers|when"):
        TokenInjection(layers, when)


def test_a_layer_that_there_is_not_is_refused():
    model = decoder()
    with pytest.raises(ValueError, match="layer 3 of a language model with 3 layers"):
        TokenInjection({3: 0}).attach(model, model.layers)
