"""The operator as torch sees it: schemas, fakes and gradients of the mix and of the projector over it.

The plan travels as its ``code`` string. A forward returns ``(out, kept)``: what the backward needs and is not an input
is an output, and ``keep`` says which tensors there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from igva_kernels.ops.weighted_mix.plan import MixPlan
from igva_kernels.ops.weighted_mix.program import Program, lower, shares
from igva_kernels.ops.weighted_mix.steps import (
    Keep,
    LayerShape,
    MixArgs,
    ProjectorNeeds,
    ProjectorSaved,
    ProjectorWeights,
    WeightedMix,
)
from igva_kernels.registry import Operator
from igva_kernels.runtime.context import check_storage
from igva_kernels.runtime.dense import Norm
from igva_kernels.runtime.torch_op import OPS, define, no_second_derivative

OPERATOR = Operator("weighted_mix", __package__)

_MIX = "Tensor[] layers, Tensor? mix_weights, Tensor? image_index"
_WEIGHTS = "Tensor weight1, Tensor? bias1, Tensor? norm_weight, Tensor? norm_bias, Tensor? weight2, Tensor? bias2"
_LAYERS = "SymInt[] layer_shape, ScalarType layer_dtype, bool[] needs, str impl"


class Kept(NamedTuple):
    """What a forward keeps, in the order in which it returns it; what it does not keep is left out there."""

    rows: Tensor | None
    """Keep.ROWS: the mixed row before the norm ``[B, P, G*D]``."""
    sums: Sequence[Tensor]
    """Keep.SOURCES: those sources of the plan that are no taps."""
    mean: Tensor | None
    """Of the norm, ``[B, P]``."""
    rstd: Tensor | None
    z: Tensor | None
    """``[M, H]``."""

    def flat(self) -> list[Tensor]:
        """The tensors that there are."""
        return [x for x in (self.rows, *self.sums, self.mean, self.rstd, self.z) if x is not None]

    @classmethod
    def of(cls, flat: Sequence[Tensor], given: SimpleNamespace) -> Kept:
        """From a flat list, for the arguments of the forward that returned it."""
        rest = iter(flat)
        keep, normed = Keep(given.keep), given.norm_eps is not None and given.keep != Keep.NOTHING
        rows = next(rest) if keep == Keep.ROWS else None
        sums = [next(rest) for _ in range(_program(given).num_sums)] if keep == Keep.SOURCES else []
        mean, rstd = (next(rest), next(rest)) if normed else (None, None)
        return cls(rows, sums, mean, rstd, next(rest) if given.keep_z else None)


def _implementation(given: SimpleNamespace) -> WeightedMix:
    return OPERATOR.implementation(given.impl)


def _program(given: SimpleNamespace) -> Program:
    return lower(MixPlan.from_code(given.plan))


def _args(given: SimpleNamespace, layers: Sequence[Tensor] | None = None) -> MixArgs:
    plan = MixPlan.from_code(given.plan)
    return MixArgs(
        given.layers if layers is None else layers, plan, given.mix_weights, given.image_index, given.skip_tokens
    )  # fmt: skip


def _norm(given: SimpleNamespace) -> Norm | None:
    return None if given.norm_eps is None else (_dense(given.norm_weight), _dense(given.norm_bias), given.norm_eps)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """What kernels take without strides; ``MixArgs`` sees to the layers and the index."""
    return None if tensor is None else tensor.contiguous()


# ---- the mix --------------------------------------------------------------------------------------------------------


def _layer_mix(given: SimpleNamespace) -> tuple[Tensor, list[Tensor]]:
    mixed = _implementation(given).mix(_args(given), given.layers[0].dtype, None, Keep(given.keep))
    return mixed.rows, list(mixed.sums)


def _layer_mix_fake(given: SimpleNamespace) -> tuple[Tensor, list[Tensor]]:
    args = _args(given)
    return args.new_rows(given.layers[0].dtype), args.new_sums() if given.keep == Keep.SOURCES else []


def _save_mix(given: SimpleNamespace, output: tuple[Tensor, list[Tensor]]) -> dict[str, Any]:
    return {"sources": _sources(given, output[1]), **_save_options(given)}


def _sources(given: SimpleNamespace, sums: Sequence[Tensor]) -> list[Tensor]:
    return _program(given).gather(given.layers, sums) if given.keep == Keep.SOURCES else []


def _save_options(given: SimpleNamespace) -> dict[str, Any]:
    """What both backward operators must know of the mix."""
    first = given.layers[0]
    return {
        "mix_weights": given.mix_weights, "image_index": given.image_index, "plan": given.plan,
        "skip_tokens": given.skip_tokens, "layer_shape": tuple(first.shape), "layer_dtype": first.dtype,
        "impl": given.impl,
    }  # fmt: skip


def _layer_mix_backward(given: SimpleNamespace) -> list[Tensor]:
    """``needs`` is for mix_weights and every layer; the result is the gradient of the one, and one per signature."""
    grad_rows = given.grad_rows.contiguous()
    need_weights, *layers = given.needs
    sources = _args(given, []).over_sources(given.sources) if need_weights else None
    grads = [] if sources is None else [_implementation(given).mix_backward(grad_rows, sources)]
    return grads + _layer_grads(given, grad_rows, layers)


def _layer_grads(given: SimpleNamespace, grad_rows: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    args, (wanted, _) = _args(given, []), shares(MixPlan.from_code(given.plan), tuple(needs))
    if not wanted.num_grads:
        return []
    num_images, num_tokens, width = given.layer_shape
    return _implementation(given).layer_grads(
        grad_rows, wanted, args.mix_weights, args.image_index, args.skip_tokens,
        LayerShape(num_images, num_tokens, width, given.layer_dtype),
    )  # fmt: skip


def _layer_mix_backward_fake(given: SimpleNamespace) -> list[Tensor]:
    need_weights, *layers = given.needs
    grads = [given.mix_weights.new_empty(given.mix_weights.shape)] if need_weights else []
    return grads + _layer_grads_fake(given, given.grad_rows, layers)


def _layer_grads_fake(given: SimpleNamespace, like: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    wanted, _ = shares(MixPlan.from_code(given.plan), tuple(needs))
    return [like.new_empty(given.layer_shape, dtype=given.layer_dtype) for _ in range(wanted.num_grads)]


def _differentiate_mix(grad_rows: Tensor, needs: SimpleNamespace, saved: SimpleNamespace) -> dict[str, Any]:
    grads = OPS.layer_mix_backward(
        grad_rows, saved.sources, saved.mix_weights, saved.image_index, saved.plan, saved.skip_tokens,
        saved.layer_shape, saved.layer_dtype, [needs.mix_weights, *needs.layers], saved.impl,
    )  # fmt: skip
    return _by_name(grads, saved.plan, {"mix_weights": needs.mix_weights, "layers": needs.layers})


def _by_name(grads: Sequence[Tensor], plan: str, needs: Mapping[str, Any]) -> dict[str, Any]:
    """The gradients that a backward operator returned; layers with the same signature share one."""
    rest, named = iter(grads), {}
    for name, need in needs.items():
        if name == "layers":
            wanted, own = shares(MixPlan.from_code(plan), tuple(need))
            found = [next(rest) for _ in range(wanted.num_grads)]
            named[name] = [None if i is None else found[i] for i in own]
        elif need:
            named[name] = next(rest)
    return named


# ---- the projector --------------------------------------------------------------------------------------------------


def _projector(given: SimpleNamespace) -> tuple[Tensor, list[Tensor]]:
    weights = ProjectorWeights(given.weight1, given.bias1, given.weight2, given.bias2)
    norm, keep = _norm(given), Keep(given.keep)
    out, mixed, z = _implementation(given).project(
        _args(given), norm, weights, given.activation, keep, given.keep_z
    )  # fmt: skip
    rows = (mixed.rows if norm is None else mixed.raw_rows) if keep == Keep.ROWS else None
    mean, rstd = (mixed.mean, mixed.rstd) if keep != Keep.NOTHING else (None, None)
    return out, Kept(rows, mixed.sums, mean, rstd, z if given.keep_z else None).flat()


def _projector_fake(given: SimpleNamespace) -> tuple[Tensor, list[Tensor]]:
    args, weight1 = _args(given), given.weight1
    tokens, last = (args.num_rows, args.num_patches), weight1 if given.weight2 is None else given.weight2
    rows = args.new_rows(weight1.dtype) if given.keep == Keep.ROWS else None
    sums = args.new_sums() if given.keep == Keep.SOURCES else ()
    mean, rstd = args.new_stats() if given.keep != Keep.NOTHING and given.norm_eps is not None else (None, None)
    z = weight1.new_empty((tokens[0] * tokens[1], weight1.shape[0])) if given.keep_z else None
    return last.new_empty((*tokens, last.shape[0])), Kept(rows, sums, mean, rstd, z).flat()


def _save_projector(given: SimpleNamespace, output: tuple[Tensor, list[Tensor]]) -> dict[str, Any]:
    kept = Kept.of(output[1], given)
    return {
        "sources": _sources(given, kept.sums), "rows": kept.rows,
        "stats": [] if kept.mean is None else [kept.mean, kept.rstd], "z": kept.z,
        "weight1": given.weight1, "norm_weight": given.norm_weight, "norm_bias": given.norm_bias,
        "weight2": given.weight2, "norm_eps": given.norm_eps, "activation": given.activation, **_save_options(given),
    }  # fmt: skip


def _projector_backward(given: SimpleNamespace) -> list[Tensor]:
    """``needs`` is ``ProjectorNeeds`` and every layer; the result is what it asks for, in its order."""
    for argument, name in _WEIGHT_NAMES.items():
        if getattr(given, argument) is not None:
            check_storage(name, getattr(given, argument))
    asked, layers = _projector_needs(given)
    mean, rstd = map(_dense, given.stats) if given.stats else (None, None)
    sources = _args(given, []).over_sources(given.sources) if given.sources else None
    grads = _implementation(given).project_backward(
        given.grad_out.contiguous(), ProjectorSaved(sources, _dense(given.rows), mean, rstd, _dense(given.z)),
        _norm(given), ProjectorWeights(given.weight1, None, given.weight2, None), given.activation, asked,
    )  # fmt: skip
    found: list[Any] = []
    for name in _wanted(asked):
        found += _layer_grads(given, grads["rows"], layers) if name == "layers" else [grads[name]]
    return found


def _projector_backward_fake(given: SimpleNamespace) -> list[Tensor]:
    asked, layers = _projector_needs(given)
    weight1, last = given.weight1, given.weight1 if given.weight2 is None else given.weight2
    like = {
        "mix_weights": (given.mix_weights, () if given.mix_weights is None else given.mix_weights.shape),
        "weight1": (weight1, weight1.shape), "bias1": (weight1, weight1.shape[:1]),
        "norm_weight": (given.norm_weight, weight1.shape[1:]), "norm_bias": (given.norm_bias, weight1.shape[1:]),
        "weight2": (last, last.shape), "bias2": (last, last.shape[:1]),
    }  # fmt: skip
    grads: list[Tensor] = []
    for name in _wanted(asked):
        if name == "layers":
            grads += _layer_grads_fake(given, given.grad_out, layers)
        else:
            tensor, shape = like[name]
            grads.append(tensor.new_empty(shape))
    return grads


_WEIGHT_NAMES = {"weight1": "weight1", "norm_weight": "norm[0]", "norm_bias": "norm[1]", "weight2": "weight2"}
"""What the backward reads again, by the names that the public functions have for it."""


def _projector_needs(given: SimpleNamespace) -> tuple[ProjectorNeeds, list[bool]]:
    count = len(ProjectorNeeds._fields)
    return ProjectorNeeds(*given.needs[:count]), given.needs[count:]


def _wanted(asked: ProjectorNeeds) -> list[str]:
    return [name for name, need in asked._asdict().items() if need]


def _differentiate_projector(grad_out: Tensor, needs: SimpleNamespace, saved: SimpleNamespace) -> dict[str, Any]:
    asked = {name: getattr(needs, name) for name in ProjectorNeeds._fields}
    flags = ProjectorNeeds(**asked | {"layers": any(needs.layers)})
    grads = OPS.projector_backward(
        grad_out, saved.sources, saved.rows, saved.stats, saved.z, saved.mix_weights, saved.image_index, saved.weight1,
        saved.norm_weight, saved.norm_bias, saved.weight2, saved.plan, saved.skip_tokens, saved.norm_eps,
        saved.activation, saved.layer_shape, saved.layer_dtype, [*flags, *needs.layers], saved.impl,
    )  # fmt: skip
    return _by_name(grads, saved.plan, asked)


define(
    f"layer_mix({_MIX}, str plan, int skip_tokens, str keep, str impl) -> (Tensor, Tensor[])",
    _layer_mix, _layer_mix_fake, _save_mix, _differentiate_mix,
)  # fmt: skip
define(
    f"layer_mix_backward(Tensor grad_rows, Tensor[] sources, Tensor? mix_weights, Tensor? image_index, str plan,"
    f" int skip_tokens, {_LAYERS}) -> Tensor[]",
    _layer_mix_backward, _layer_mix_backward_fake, None, no_second_derivative,
)  # fmt: skip
define(
    f"projector({_MIX}, {_WEIGHTS}, str plan, int skip_tokens, float? norm_eps, str? activation, str keep, bool keep_z,"
    f" str impl) -> (Tensor, Tensor[])",
    _projector, _projector_fake, _save_projector, _differentiate_projector,
)  # fmt: skip
define(
    f"projector_backward(Tensor grad_out, Tensor[] sources, Tensor? rows, Tensor[] stats, Tensor? z,"
    f" Tensor? mix_weights, Tensor? image_index, Tensor weight1, Tensor? norm_weight, Tensor? norm_bias,"
    f" Tensor? weight2, str plan, int skip_tokens, float? norm_eps, str? activation, {_LAYERS}) -> Tensor[]",
    _projector_backward, _projector_backward_fake, None, no_second_derivative,
)  # fmt: skip
