"""The operators registered with torch.library under ``igva_kernels``.

Each has a hand-written schema, a fake and a backward operator of its own, so that a profiler, a dispatch mode and
torch.compile see them. The plan travels as its ``code`` string. A forward returns ``(out, saved)``: a tensor that the
backward needs and that is not an input is an output, and ``keep`` says which ones there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from igva_kernels import dispatch
from igva_kernels.backends.base import (
    AllocatorWeights,
    Keep,
    LayerShape,
    MixArgs,
    ProjectorNeeds,
    ProjectorWeights,
    Signature,
    accumulation_dtype,
    take_blocks,
)
from igva_kernels.checks import check_storage
from igva_kernels.context import has_tangent, saveable, transform
from igva_kernels.plan import MixPlan, is_tap
from igva_kernels.reference import Norm

_MIX = "Tensor[] layers, Tensor? mix_weights, Tensor? image_index"
_WEIGHTS1 = "Tensor weight1, Tensor? bias1, Tensor? norm_weight, Tensor? norm_bias"
_OPTIONS = "str plan, int skip_tokens, float? norm_eps, str? activation, str keep, bool keep_z, str impl"
_SCHEMAS = {
    "layer_mix": f"({_MIX}, str plan, int skip_tokens, str keep, str impl) -> (Tensor, Tensor[])",
    "layer_mix_linear": f"({_MIX}, {_WEIGHTS1}, {_OPTIONS}) -> (Tensor, Tensor[])",
    "layer_mix_mlp": f"({_MIX}, {_WEIGHTS1}, Tensor weight2, Tensor? bias2, {_OPTIONS}) -> (Tensor, Tensor[])",
    "layer_mix_backward": (
        "(Tensor grad_rows, Tensor[] sources, Tensor? mix_weights, Tensor? image_index, str plan, int skip_tokens,"
        " SymInt[] layer_shape, ScalarType layer_dtype, bool[] needs, str impl) -> Tensor[]"
    ),
    "projector_backward": (
        "(Tensor grad_out, Tensor[] sources, Tensor? rows, Tensor[] stats, Tensor? z, Tensor? mix_weights,"
        " Tensor? image_index, Tensor weight1, Tensor? norm_weight, Tensor? norm_bias, Tensor? weight2, str plan,"
        " int skip_tokens, float? norm_eps, str? activation, SymInt[] layer_shape, ScalarType layer_dtype,"
        " bool[] needs, str impl) -> Tensor[]"
    ),
    "allocate": (
        "(Tensor sentences, Tensor summaries, Tensor[] weights, int num_heads, float[] eps, str impl) -> Tensor"
    ),
}


def _mix_args(
    layers: Sequence[Tensor], mix_weights: Tensor | None, image_index: Tensor | None, plan: str, skip_tokens: int
) -> MixArgs:
    return MixArgs(layers, MixPlan.from_code(plan), mix_weights, image_index, skip_tokens)


def _norm(weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Norm | None:
    return None if eps is None else (_dense(weight), _dense(bias), eps)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """What kernels take without strides; the layers and the index are seen to by ``MixArgs``."""
    return None if tensor is None else tensor.contiguous()


def _without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The dtypes are settled at the surface; autocast must not change the GEMMs inside an operator."""

    @wraps(fn)
    def run(first: Any, *args: Any) -> Any:
        if has_tangent((first, *args)):
            raise _without_derivative("forward-mode AD")
        device = (first[0] if isinstance(first, (list, tuple)) else first).device.type
        if not torch.is_autocast_enabled(device):
            return fn(first, *args)
        with torch.autocast(device, enabled=False):
            return fn(first, *args)

    return run


def _refuse_transform(*args: Any) -> Any:
    raise _without_derivative(transform())


def _without_derivative(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"igva_kernels: its operators have first derivatives in reverse mode only, got a call under {what}; the public "
        f"functions and modules support it with impl='reference' or 'auto'"
    )


def _layer_mix(
    layers: list[Tensor], mix_weights: Tensor | None, image_index: Tensor | None,
    plan: str, skip_tokens: int, keep: str, impl: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    args = _mix_args(layers, mix_weights, image_index, plan, skip_tokens)
    mixed = dispatch.get(impl).mix(args, layers[0].dtype, None, Keep(keep))
    return mixed.rows, mixed.kept


def _layer_mix_fake(
    layers: list[Tensor], mix_weights: Tensor | None, image_index: Tensor | None,
    plan: str, skip_tokens: int, keep: str, impl: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    args = _mix_args(layers, mix_weights, image_index, plan, skip_tokens)
    return _fake_rows(args, layers[0].dtype), _fake_sums(args) if keep == Keep.SOURCES else []


def _fake_rows(args: MixArgs, dtype: torch.dtype) -> Tensor:
    shape = (args.num_rows, args.num_patches, args.plan.num_blocks * args.width)
    return args.layers[0].new_empty(shape, dtype=dtype)


def _fake_sums(args: MixArgs) -> list[Tensor]:
    shape = (args.layers[0].shape[0], args.num_patches, args.width)
    sums = [block for block in args.plan.reduced()[0].blocks if not is_tap(block)]
    return [args.layers[0].new_empty(shape) for _ in sums]


def _projector(
    layers: list[Tensor], mix_weights: Tensor | None, image_index: Tensor | None, weights: ProjectorWeights,
    norm_weight: Tensor | None, norm_bias: Tensor | None, plan: str, skip_tokens: int, norm_eps: float | None,
    activation: str | None, keep: str, keep_z: bool, impl: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """``saved`` is, as far as kept: the rows or the sums, mean and rstd, z."""
    args = _mix_args(layers, mix_weights, image_index, plan, skip_tokens)
    norm = _norm(norm_weight, norm_bias, norm_eps)
    out, mixed, z = dispatch.get(impl).project(args, norm, weights, activation, Keep(keep), keep_z)
    saved = list(mixed.kept)
    if keep == Keep.ROWS and norm is None:
        assert mixed.rows is not None
        saved.append(mixed.rows)
    if keep != Keep.NOTHING and norm is not None:
        assert mixed.mean is not None and mixed.rstd is not None
        saved += [mixed.mean, mixed.rstd]
    if keep_z:
        assert z is not None
        saved.append(z)
    return out, saved


def _projector_fake(
    layers: list[Tensor], mix_weights: Tensor | None, image_index: Tensor | None, weights: ProjectorWeights,
    norm_weight: Tensor | None, norm_bias: Tensor | None, plan: str, skip_tokens: int, norm_eps: float | None,
    activation: str | None, keep: str, keep_z: bool, impl: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    args = _mix_args(layers, mix_weights, image_index, plan, skip_tokens)
    weight1, last = weights.weight1, weights.weight1 if weights.weight2 is None else weights.weight2
    tokens = (args.num_rows, args.num_patches)
    saved: list[Tensor] = []
    if keep == Keep.ROWS:
        saved.append(_fake_rows(args, weight1.dtype))
    elif keep == Keep.SOURCES:
        saved += _fake_sums(args)
    if keep != Keep.NOTHING and norm_eps is not None:
        saved += [layers[0].new_empty(tokens, dtype=accumulation_dtype(layers[0].dtype)) for _ in range(2)]
    if keep_z:
        saved.append(weight1.new_empty((tokens[0] * tokens[1], weight1.shape[0])))
    return last.new_empty((*tokens, last.shape[0])), saved


def _linear_form(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``_projector`` with the arguments of the schema ``layer_mix_linear``."""

    def run(
        layers: Any, w: Any, index: Any, weight1: Any, bias1: Any, norm_weight: Any, norm_bias: Any, *rest: Any
    ) -> Any:
        return fn(layers, w, index, ProjectorWeights(weight1, bias1, None, None), norm_weight, norm_bias, *rest)

    return run


def _mlp_form(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``_projector`` with the arguments of the schema ``layer_mix_mlp``."""

    def run(
        layers: Any, w: Any, index: Any, weight1: Any, bias1: Any, norm_weight: Any, norm_bias: Any,
        weight2: Any, bias2: Any, *rest: Any,
    ) -> Any:  # fmt: skip
        return fn(layers, w, index, ProjectorWeights(weight1, bias1, weight2, bias2), norm_weight, norm_bias, *rest)

    return run


def _allocate(
    sentences: Tensor, summaries: Tensor, weights: list[Tensor], num_heads: int, eps: list[float], impl: str
) -> Tensor:
    flat = AllocatorWeights.of([weight.contiguous() for weight in weights])
    return dispatch.get(impl).allocate(sentences.contiguous(), summaries.contiguous(), flat, num_heads, eps)


def _allocate_fake(
    sentences: Tensor, summaries: Tensor, weights: list[Tensor], num_heads: int, eps: list[float], impl: str
) -> Tensor:
    return summaries.new_empty(summaries.shape[:2], dtype=torch.float32)


# ---- gradients ------------------------------------------------------------------------------------------------------


def _signatures(plan: MixPlan, needs: Sequence[bool]) -> tuple[list[Signature], list[int | None]]:
    """The distinct signatures of the layers that need a gradient, and for each layer which one is its own."""
    index: dict[Signature, int] = {}
    own: list[int | None] = []
    for layer, need in enumerate(needs):
        signature = tuple(
            (g, e.column, e.scale) for g, block in enumerate(plan.blocks) for e in block if e.layer == layer
        )
        own.append(index.setdefault(signature, len(index)) if need else None)
    return list(index), own


def _layer_mix_backward(
    grad_rows: Tensor, sources: list[Tensor], mix_weights: Tensor | None, image_index: Tensor | None,
    plan: str, skip_tokens: int, layer_shape: list[int], layer_dtype: torch.dtype, needs: list[bool], impl: str,
) -> list[Tensor]:  # fmt: skip
    """``[grad of mix_weights] + [a gradient a signature]``, as far as needed."""
    backend = dispatch.get(impl)
    args = _mix_args([], mix_weights, image_index, plan, skip_tokens)
    grad_rows = grad_rows.contiguous()
    grads = []
    if needs[0]:
        blocks = args.plan.weighted_blocks
        taken = take_blocks(grad_rows, blocks, layer_shape[2])
        grads.append(backend.mix_weights_grad(taken, blocks, args.over_sources(sources)))
    signatures, _ = _signatures(args.plan, needs[1:])
    if signatures:
        shape = LayerShape(layer_shape[0], layer_shape[1], layer_shape[2], layer_dtype)
        grads += backend.layer_grads(grad_rows, signatures, mix_weights, args.image_index, skip_tokens, shape)
    return grads


def _layer_mix_backward_fake(
    grad_rows: Tensor, sources: list[Tensor], mix_weights: Tensor | None, image_index: Tensor | None,
    plan: str, skip_tokens: int, layer_shape: list[int], layer_dtype: torch.dtype, needs: list[bool], impl: str,
) -> list[Tensor]:  # fmt: skip
    return _fake_mix_grads(grad_rows, mix_weights, plan, layer_shape, layer_dtype, needs[0], needs[1:])


def _fake_mix_grads(
    like: Tensor, mix_weights: Tensor | None, plan: str, layer_shape: list[int], layer_dtype: torch.dtype,
    need_mix_weights: bool, layer_needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    grads = []
    if need_mix_weights:
        assert mix_weights is not None
        grads.append(mix_weights.new_empty(mix_weights.shape))
    signatures, _ = _signatures(MixPlan.from_code(plan), layer_needs)
    return grads + [like.new_empty(layer_shape, dtype=layer_dtype) for _ in signatures]


def _projector_backward(
    grad_out: Tensor, sources: list[Tensor], rows: Tensor | None, stats: list[Tensor], z: Tensor | None,
    mix_weights: Tensor | None, image_index: Tensor | None, weight1: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, weight2: Tensor | None, plan: str, skip_tokens: int, norm_eps: float | None,
    activation: str | None, layer_shape: list[int], layer_dtype: torch.dtype, needs: list[bool], impl: str,
) -> list[Tensor]:  # fmt: skip
    """``[grad of mix_weights] + [a gradient a signature] + [weight1 .. bias2]``, as far as needed."""
    for name, weight in (("weight1", weight1), ("norm[0]", norm_weight), ("norm[1]", norm_bias), ("weight2", weight2)):
        if weight is not None:
            check_storage(name, weight)
    backend = dispatch.get(impl)
    asked = ProjectorNeeds(*needs[: len(ProjectorNeeds._fields)])
    args = _mix_args([], mix_weights, image_index, plan, skip_tokens)
    grads = backend.project_backward(
        grad_out.contiguous(), args.over_sources(sources) if sources else None, _dense(rows),
        _norm(norm_weight, norm_bias, norm_eps), (stats[0].contiguous(), stats[1].contiguous()) if stats else None,
        _dense(z),
        ProjectorWeights(weight1, None, weight2, None), activation, asked,
    )  # fmt: skip
    out = [grads.mix_weights] if asked.mix_weights else []
    if asked.layers:
        assert grads.rows is not None
        signatures, _ = _signatures(args.plan, needs[len(asked) :])
        shape = LayerShape(layer_shape[0], layer_shape[1], layer_shape[2], layer_dtype)
        out += backend.layer_grads(grads.rows, signatures, mix_weights, args.image_index, skip_tokens, shape)
    return out + [grad for grad in grads[2:] if grad is not None]


def _projector_backward_fake(
    grad_out: Tensor, sources: list[Tensor], rows: Tensor | None, stats: list[Tensor], z: Tensor | None,
    mix_weights: Tensor | None, image_index: Tensor | None, weight1: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, weight2: Tensor | None, plan: str, skip_tokens: int, norm_eps: float | None,
    activation: str | None, layer_shape: list[int], layer_dtype: torch.dtype, needs: list[bool], impl: str,
) -> list[Tensor]:  # fmt: skip
    asked = ProjectorNeeds(*needs[: len(ProjectorNeeds._fields)])
    layer_needs = needs[len(asked) :]
    grads = _fake_mix_grads(grad_out, mix_weights, plan, layer_shape, layer_dtype, asked.mix_weights, layer_needs)
    params = (
        (asked.weight1, weight1, weight1.shape),
        (asked.bias1, weight1, weight1.shape[:1]),
        (asked.norm_weight, norm_weight, weight1.shape[1:]),
        (asked.norm_bias, norm_bias, weight1.shape[1:]),
        (asked.weight2, weight2, None if weight2 is None else weight2.shape),
        (asked.bias2, weight2, None if weight2 is None else weight2.shape[:1]),
    )
    return grads + [like.new_empty(shape) for need, like, shape in params if need and like is not None]


def _save(ctx: Any, plan: str, skip_tokens: int, impl: str, layers: list[Tensor], **tensors: Any) -> None:
    """Save ``tensors`` (each a tensor, None, or a list of tensors) by name, and what describes the layers."""
    ctx.set_materialize_grads(False)
    ctx.plan, ctx.skip_tokens, ctx.impl = plan, skip_tokens, impl
    ctx.layer_shape, ctx.layer_dtype = list(layers[0].shape), layers[0].dtype
    flat: list[Tensor | None] = []
    ctx.slots = {}
    for name, value in tensors.items():
        values = value if isinstance(value, list) else [value]
        ctx.slots[name] = (len(flat), len(values), isinstance(value, list))
        flat += values
    ctx.save_for_backward(*map(saveable, flat))


def _saved(ctx: Any) -> dict[str, Any]:
    flat = ctx.saved_tensors
    return {
        name: list(flat[start : start + length]) if is_list else flat[start]
        for name, (start, length, is_list) in ctx.slots.items()
    }


def _sources(layers: list[Tensor], plan: str, sums: list[Tensor]) -> list[Tensor]:
    """The outputs of ``plan.reduced()``: its taps are inputs, saved where they lie, its sums come from the forward."""
    rest = iter(sums)
    blocks = MixPlan.from_code(plan).reduced()[0].blocks
    return [layers[block[0].layer] if is_tap(block) else next(rest) for block in blocks]


def _mix_grads(ctx: Any, grads: list[Tensor], needs: Sequence[bool]) -> tuple[list[Tensor | None], Tensor | None]:
    """Deal the gradients out: one a layer (layers with the same signature share it), one for mix_weights."""
    grad_mix_weights = grads.pop(0) if needs[0] else None
    _, own = _signatures(MixPlan.from_code(ctx.plan), needs[1:])
    count = 1 + max((i for i in own if i is not None), default=-1)
    unique = [grads.pop(0) for _ in range(count)]
    return [None if i is None else unique[i] for i in own], grad_mix_weights


def _layer_mix_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    layers, mix_weights, image_index, plan, skip_tokens, keep, impl = inputs
    sums = output[1]
    ctx.mark_non_differentiable(*sums)
    sources = _sources(layers, plan, sums) if keep == Keep.SOURCES else []
    _save(ctx, plan, skip_tokens, impl, layers, sources=sources, mix_weights=mix_weights, image_index=image_index)


def _layer_mix_grad(ctx: Any, grad_rows: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad_rows is None:
        return ([None] * len(ctx.needs_input_grad[0]), *[None] * 6)
    needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[0]]
    saved = _saved(ctx)
    grads = OPS.layer_mix_backward(
        grad_rows, saved["sources"], saved["mix_weights"], saved["image_index"],
        ctx.plan, ctx.skip_tokens, ctx.layer_shape, ctx.layer_dtype, needs, ctx.impl,
    )  # fmt: skip
    grad_layers, grad_mix_weights = _mix_grads(ctx, list(grads), needs)
    return (grad_layers, grad_mix_weights, *[None] * 5)


def _projector_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    layers, mix_weights, image_index, weight1, _, norm_weight, norm_bias, *rest = inputs
    weight2 = rest.pop(0) if len(rest) == 9 else None
    *_, plan, skip_tokens, norm_eps, activation, keep, keep_z, impl = rest
    ctx.mark_non_differentiable(*output[1])
    ctx.norm_eps, ctx.activation = norm_eps, activation
    saved = list(output[1])
    z = saved.pop() if keep_z else None
    stats = [saved.pop(-2), saved.pop(-1)] if keep != Keep.NOTHING and norm_eps is not None else []
    rows = saved.pop() if keep == Keep.ROWS else None
    sources = _sources(layers, plan, saved) if keep == Keep.SOURCES else []
    _save(
        ctx, plan, skip_tokens, impl, layers, sources=sources, rows=rows, stats=stats, z=z, mix_weights=mix_weights,
        image_index=image_index, weight1=weight1, norm_weight=norm_weight, norm_bias=norm_bias, weight2=weight2,
    )  # fmt: skip


def _projector_grad(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    need_layers, need_mix_weights, _, *need_params = ctx.needs_input_grad
    if grad_out is None:
        return ([None] * len(need_layers), *[None] * (len(ctx.needs_input_grad) - 1))
    has_weight2 = len(need_params) == 13
    weight2_needs = need_params[4:6] if has_weight2 else (False, False)
    asked = ProjectorNeeds(need_mix_weights, any(need_layers), *need_params[:4], *weight2_needs)
    saved = _saved(ctx)
    grads = OPS.projector_backward(
        grad_out, saved["sources"], saved["rows"], saved["stats"], saved["z"], saved["mix_weights"],
        saved["image_index"], saved["weight1"], saved["norm_weight"], saved["norm_bias"], saved["weight2"],
        ctx.plan, ctx.skip_tokens, ctx.norm_eps, ctx.activation, ctx.layer_shape, ctx.layer_dtype,
        [*asked, *need_layers], ctx.impl,
    )  # fmt: skip
    rest = list(grads)
    grad_layers, grad_mix_weights = _mix_grads(ctx, rest, [need_mix_weights, *need_layers])
    grad_params = [rest.pop(0) if need else None for need in (asked[2:] if has_weight2 else asked[2:6])]
    return (grad_layers, grad_mix_weights, None, *grad_params, *[None] * 7)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "igva_kernels has first derivatives only; impl='reference' can be differentiated any number of times"
    )


def _no_allocate_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("igva_kernels::allocate is for inference; nn.WeightAllocator trains by torch's own code")


def _register() -> torch.library.Library:
    library = torch.library.Library("igva_kernels", "DEF")
    registrations: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Any]] = {
        "layer_mix": (_layer_mix, _layer_mix_fake, _layer_mix_grad, _layer_mix_setup),
        "layer_mix_linear": (
            _linear_form(_projector), _linear_form(_projector_fake), _projector_grad, _projector_setup,
        ),
        "layer_mix_mlp": (_mlp_form(_projector), _mlp_form(_projector_fake), _projector_grad, _projector_setup),
        "layer_mix_backward": (_layer_mix_backward, _layer_mix_backward_fake, _no_second_derivative, None),
        "projector_backward": (_projector_backward, _projector_backward_fake, _no_second_derivative, None),
        "allocate": (_allocate, _allocate_fake, _no_allocate_backward, None),
    }  # fmt: skip
    for name, (kernel, fake, backward, setup_context) in registrations.items():
        library.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _without_autocast(kernel), "CompositeExplicitAutograd")
        # Where torch.func and autograd's vmap enter: below, jvp would drop tangents, the others fail without a reason.
        for key in ("FuncTorchDynamicLayerFrontMode", "Batched"):
            if torch._C._parse_dispatch_key(key) is not None:  # as long as this torch has it
                library.impl(name, _refuse_transform, key)
        torch.library.register_fake(f"igva_kernels::{name}", fake, lib=library)
        torch.library.register_autograd(f"igva_kernels::{name}", backward, setup_context=setup_context, lib=library)
    return library


_LIBRARY = _register()

OPS = torch.ops.igva_kernels
