"""The operator's schema, fake and gradient."""

from types import SimpleNamespace

import torch
from torch import Tensor

from igva_kernels.registry import Operator
from igva_kernels.runtime.torch_op import define, no_second_derivative

OPERATOR = Operator("layer_max", __package__)


def _save(given: SimpleNamespace, output: tuple[Tensor, list[Tensor]]) -> dict[str, object]:
    return {"layers": given.layers, "impl": given.impl}


def _differentiate(grad: Tensor, needs: SimpleNamespace, saved: SimpleNamespace) -> dict[str, object]:
    return {"layers": backward(grad=grad, layers=saved.layers, impl=saved.impl)}


backward = define(
    "layer_max_backward(Tensor grad, Tensor[] layers, str impl) -> Tensor[]",
    lambda given: OPERATOR.implementation(given.impl).backward(given.grad, given.layers),
    lambda given: [torch.empty_like(layer) for layer in given.layers],
    None, no_second_derivative,
)  # fmt: skip
forward = define(
    "layer_max(Tensor[] layers, str impl) -> (Tensor, Tensor[])",
    lambda given: (OPERATOR.implementation(given.impl).layer_max(given.layers), []),
    lambda given: (torch.empty_like(given.layers[0]), []),
    _save, _differentiate,
)  # fmt: skip
