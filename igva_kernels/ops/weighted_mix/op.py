"""The operator as torch sees it: ``layer_mix``, ``projector`` (the mix and what reads it), and a backward of each.

Forward and backward are written once; ``layer_mix`` is the projector without weights. The plan travels as its ``code``
string. A forward returns ``(out, kept)``: what the backward needs beyond the inputs is an output, and ``keep`` says
which tensors these are.

An operator that is composed of this one calls ``projection``, ``kept``, ``save``, ``flops`` and
``differentiate_projector`` with the arguments of ``projector``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import Program, lower, shares
from igva_kernels.ops.weighted_mix.steps import (
    Keep,
    LayerShape,
    MixArgs,
    Mixed,
    Needs,
    Projection,
    Projector,
    Saved,
    Shapes,
    WeightedMix,
)
from igva_kernels.registry import Operator
from igva_kernels.runtime.context import check_storage
from igva_kernels.runtime.torch_op import Differentiate, define, no_second_derivative

OPERATOR = Operator("weighted_mix", __package__)


class Kept(NamedTuple):
    """The tensors that a forward keeps, in the order in which it returns them; it leaves out those that are None."""

    rows: Tensor | None
    """Keep.ROWS: the mixed row before the norm ``[B, P, G*D]``."""
    sums: Sequence[Tensor]
    """Keep.SOURCES: those sources of the plan that are not taps."""
    mean: Tensor | None
    """The mean of every row ``[B, P]``, where there is a norm and anything is kept."""
    rstd: Tensor | None
    z: Tensor | None
    """The result of the first product, before the activation: ``[M, N]``."""

    def flat(self) -> list[Tensor]:
        """The tensors that are kept."""
        return [x for x in (self.rows, *self.sums, self.mean, self.rstd, self.z) if x is not None]

    @classmethod
    def of(cls, flat: Iterable[Tensor], given: SimpleNamespace) -> Kept:
        """From a flat list, for the arguments of the forward that returned it; an iterator is left behind the last."""
        rest = iter(flat)
        rows = next(rest) if given.keep == Keep.ROWS else None
        sums = [next(rest) for _ in range(_program(given).num_sums)] if given.keep == Keep.SOURCES else []
        normed = given.norm_eps is not None and given.keep != Keep.NOTHING
        mean, rstd = (next(rest), next(rest)) if normed else (None, None)
        return cls(rows, sums, mean, rstd, next(rest) if given.keep_z else None)


def _program(given: SimpleNamespace) -> Program:
    return lower(MixPlan.from_code(given.plan))


def _projector(given: SimpleNamespace) -> Projector:
    norm = None
    if given.norm_eps is not None:
        norm = _dense(given.norm_weight), _dense(given.norm_bias), given.norm_eps
    return Projector(given.weight1, given.bias1, given.weight2, given.bias2, norm, given.activation)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor made contiguous, for kernels that take no strides for it; ``MixArgs`` does so for the index."""
    return None if tensor is None else tensor.contiguous()


def _args(given: SimpleNamespace) -> MixArgs:
    plan = MixPlan.from_code(given.plan)
    return MixArgs(given.layers, plan, given.mix_weights, given.image_index, given.skip_tokens)


def projection(given: SimpleNamespace) -> Projection:
    """The call of ``WeightedMix.project`` that the arguments of ``projector`` ask for."""
    return Projection(_args(given), _projector(given), Keep(given.keep), given.keep_z)


def kept(call: Projection, mixed: Mixed, z: Tensor | None) -> list[Tensor]:
    """What the backward needs beyond the inputs, of the results of that call."""
    _, projector, keep, keep_z = call
    rows = (mixed.rows if projector.norm is None else mixed.raw_rows) if keep == Keep.ROWS else None
    mean, rstd = (mixed.mean, mixed.rstd) if keep != Keep.NOTHING else (None, None)
    return Kept(rows, mixed.sums, mean, rstd, z if keep_z else None).flat()


def _forward(given: SimpleNamespace, implementation: WeightedMix) -> tuple[Tensor, list[Tensor]]:
    if given.weight1 is None:
        mixed = implementation.mix(_args(given), given.layers[0].dtype, None, Keep(given.keep))
        assert mixed.rows is not None
        return mixed.rows, list(mixed.sums)
    call = projection(given)
    out, mixed, z = implementation.project(*call)
    return out, kept(call, mixed, z)


def save(given: SimpleNamespace, output: tuple[Tensor, Iterable[Tensor]]) -> dict[str, Any]:
    """What the backward operator takes, except the gradient and the needs."""
    found, first = Kept.of(output[1], given), given.layers[0]
    values = {name: value for name, value in vars(given).items() if name not in ("layers", "bias1", "bias2")}
    values |= {"layer_shape": tuple(first.shape), "layer_dtype": first.dtype}
    values["sources"] = _program(given).gather(given.layers, found.sums) if given.keep == Keep.SOURCES else []
    if given.weight1 is not None:
        values |= {"rows": found.rows, "stats": [] if found.mean is None else [found.mean, found.rstd], "z": found.z}
    return values


def _backward(given: SimpleNamespace, implementation: WeightedMix) -> list[Tensor]:
    """``given.needs`` has one flag per name in ``_fields``, then one per layer; the result has the gradients asked for,
    in the order of the names."""
    plan, grad_out, fields = MixPlan.from_code(given.plan), given.grad_out.contiguous(), _fields(given)
    needs = Needs(**dict(zip(fields, given.needs, strict=False)))
    mix_weights, index = given.mix_weights, _dense(given.image_index)
    sources = None
    if given.sources:
        sources = MixArgs.over_sources(plan, given.sources, mix_weights, index, given.skip_tokens)
    grads: dict[str, Any] = {}
    if given.weight1 is not None:
        mean, rstd = map(_dense, given.stats) if given.stats else (None, None)
        saved = Saved(sources, _dense(given.rows), mean, rstd, _dense(given.z))
        grads = implementation.project_backward(grad_out, saved, _projector(given), needs)
    elif needs.mix_weights:
        assert sources is not None
        grads["mix_weights"] = implementation.mix_backward(grad_out, sources)
    wanted, _ = shares(plan, tuple(given.needs[len(fields) :]))
    grads["layers"] = []
    if wanted.num_grads:
        shape = LayerShape._make([*given.layer_shape, given.layer_dtype, given.skip_tokens])
        grads["layers"] = implementation.layer_grads(grads.get("rows", grad_out), wanted, mix_weights, index, shape)
    found = [grads[name] for name in fields if getattr(needs, name)]
    return [grad for each in found for grad in (each if isinstance(each, list) else [each])]


def _check_storages(given: SimpleNamespace) -> None:
    """Refuses weights freed before the backward reads them again; names are those of ``layer_mix_mlp``."""
    names = {"weight1": "weight1", "norm_weight": "norm[0]", "norm_bias": "norm[1]", "weight2": "weight2"}
    for argument, name in names.items():
        if getattr(given, argument) is not None:
            check_storage(name, getattr(given, argument))


def _differentiate(backward: Callable[..., list[Tensor]]) -> Differentiate:
    def differentiate(grad: Tensor, needs: SimpleNamespace, saved: SimpleNamespace) -> dict[str, Any]:
        layers = tuple(needs.layers)
        asked = {name: any(layers) if name == "layers" else getattr(needs, name) for name in _fields(saved)}
        rest = iter(backward(**vars(saved), grad_out=grad, needs=[*asked.values(), *layers]))
        wanted, own = shares(MixPlan.from_code(saved.plan), layers)
        grads: dict[str, Any] = {}
        for name in (name for name, need in asked.items() if need):
            if name == "layers":  # layers of the same signature share one
                found = [next(rest) for _ in range(wanted.num_grads)]
                grads[name] = [None if i is None else found[i] for i in own]
            else:
                grads[name] = next(rest)
        return grads

    return differentiate


def _fields(given: SimpleNamespace) -> tuple[str, ...]:
    """The arguments whose gradients may be asked for."""
    return Needs._fields if given.weight1 is not None else ("mix_weights", "layers")


def flops(given: SimpleNamespace) -> int:
    """Of the products of the forward; the mix is work by elements."""
    if given.weight1 is None:
        return 0
    rows = (given.layers[0] if given.image_index is None else given.image_index).shape[0]
    weights = given.weight1.numel() + (0 if given.weight2 is None else given.weight2.numel())
    return 2 * rows * (given.layers[0].shape[1] - given.skip_tokens) * weights


def _backward_flops(given: SimpleNamespace) -> int:
    """A product for the gradient of each weight, and one for that of each product's input."""
    if given.weight1 is None:
        return 0
    needs = Needs(**dict(zip(_fields(given), given.needs, strict=False)))
    weights = given.weight1.numel() * (needs.weight1 + needs.rows)
    if given.weight2 is not None:
        weights += given.weight2.numel() * (needs.weight2 + needs.z)
    return 2 * given.grad_out.shape[0] * given.grad_out.shape[1] * weights


def _register_backward(schema: str) -> Differentiate:
    """Registers a backward; how a forward is differentiated by it."""

    def run(given: SimpleNamespace) -> list[Tensor]:
        _check_storages(given)
        return _backward(given, OPERATOR.serving(given.impl, given.grad_out))

    return _differentiate(
        define(
            schema, run, lambda given: _backward(given, Shapes()), None, no_second_derivative, _LEFT_OUT,
            _backward_flops,
        )
    )  # fmt: skip


def _register_forward(schema: str, differentiate: Differentiate) -> Callable[..., Any]:
    """Registers a forward, and returns it as a function of its arguments by name."""
    return define(
        schema, lambda given: _forward(given, OPERATOR.serving(given.impl, given.layers[0])),
        lambda given: _forward(given, Shapes()), save, differentiate, _LEFT_OUT, flops,
    )  # fmt: skip


_LEFT_OUT: dict[str, Any] = {
    "weight1": None, "bias1": None, "norm_weight": None, "norm_bias": None, "weight2": None, "bias2": None,
    "norm_eps": None, "activation": None, "keep_z": False, "rows": None, "stats": [], "z": None,
}  # fmt: skip
"""Values for the arguments that one of the schemas has and another leaves out."""

_MIX = "Tensor? mix_weights, Tensor? image_index"
_OPTIONS = "str plan, int skip_tokens, float? norm_eps, str? activation"
_LAYERS = "SymInt[] layer_shape, ScalarType layer_dtype, bool[] needs, str impl"

_differentiate_mix = _register_backward(
    f"layer_mix_backward(Tensor grad_out, Tensor[] sources, {_MIX}, str plan, int skip_tokens, {_LAYERS}) -> Tensor[]"
)
layer_mix = _register_forward(
    f"layer_mix(Tensor[] layers, {_MIX}, str plan, int skip_tokens, str keep, str impl) -> (Tensor, Tensor[])",
    _differentiate_mix,
)
differentiate_projector = _register_backward(
    f"projector_backward(Tensor grad_out, Tensor[] sources, Tensor? rows, Tensor[] stats, Tensor? z, {_MIX},"
    f" Tensor weight1, Tensor? norm_weight, Tensor? norm_bias, Tensor? weight2, {_OPTIONS}, {_LAYERS}) -> Tensor[]"
)
projector = _register_forward(
    f"projector(Tensor[] layers, {_MIX}, Tensor weight1, Tensor? bias1, Tensor? norm_weight, Tensor? norm_bias,"
    f" Tensor? weight2, Tensor? bias2, {_OPTIONS}, str keep, bool keep_z, str impl) -> (Tensor, Tensor[])",
    differentiate_projector,
)
