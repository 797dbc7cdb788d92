"""The three models that clients are run on, and the plain code that each must answer like."""

from types import MethodType

from compatibility import MODELS
from harness import quick_impls
from hosts import close, host_inputs, host_model

from igva_kernels.ops.weighted_mix import layer_mix
from igva_kernels.runtime.activations import ACTIVATIONS

__all__ = ["MODELS"]

LAYERS = [-2, -3, 1]
"""Of the Llava: a list, so that a patch has a concat to save."""

KERNEL = next(iter(quick_impls("weighted_mix")), "reference")
"""The ``impl`` of patched and reference models: kernels, where they serve CPU tensors here."""


def build(kind, host="Llava", **overrides):
    """A model of this column before any client or patch: tiny, with random weights, in eval mode."""
    if kind != "reference":
        return host_model(host, LAYERS, **overrides)
    from tiny import igva_model  # the reference model needs transformers 5

    return igva_model(**{"freeze_vision_tower": False, "impl": KERNEL, **overrides})


def plain_code(model):
    """The model with a projector that calls its modules one after another; a Llava's does so by itself."""
    projector = model.model.multi_modal_projector
    if hasattr(projector, "plan"):
        projector.forward = MethodType(_one_after_another, projector)
    return model


def _one_after_another(self, hidden_states, mix_weights=None, *, plan=None, image_index=None):
    rows = layer_mix(
        hidden_states, plan or self.plan, mix_weights,
        skip_tokens=self.skip_tokens, image_index=image_index, impl="reference",
    )  # fmt: skip
    if self.projector_layernorm is not None:
        rows = self.projector_layernorm(rows)
    return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(rows)))


def inputs_of(kind, labels=False):
    """Inputs of ``forward`` for a model of this column."""
    if kind != "reference":
        return host_inputs(host_model("Llava", LAYERS), labels=labels)
    from tiny import batch

    return batch(labels=labels)


def assert_same_step(found, expected):
    assert found[2].keys() == expected[2].keys(), set(found[2]) ^ set(expected[2])
    for a, b in zip(found[:2], expected[:2], strict=True):
        close(a, b)
    for name, grad in expected[2].items():
        distance = (found[2][name] - grad).norm()
        assert distance <= 1e-3 * grad.norm() + 1e-6, f"{name}: the gradient is {distance:.2e} off"
