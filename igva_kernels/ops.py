"""The public operators, their registration with torch.library, and their gradients.

Three operators are registered under the namespace ``igva_kernels``, each with a hand-written schema, a fake, and a
backward operator of its own, so that a profiler, a dispatch mode and torch.compile see them. The plan travels as its
``code`` string. A forward returns ``(out, saved)``: every tensor that the backward needs and that is not an input is an
output, and what is saved depends on the gradients that are asked for (``Keep``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from igva_kernels import dispatch, reference
from igva_kernels.backends.base import (
    Keep,
    LayerShape,
    MixArgs,
    ProjectorNeeds,
    ProjectorWeights,
    Signature,
    accumulation_dtype,
    check_image_range,
    take_blocks,
)
from igva_kernels.plan import MixPlan, is_tap
from igva_kernels.reference import ACTIVATIONS, Norm


def layer_mix(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None = None,
    *,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The mixed row ``A``: layers weighted, summed and concatenated in one pass.

    ``A[m, g*D + d] = sum over entries (l, c, s) of block g of s * w[b, c] * h_l[image(b), skip + p, d]``.

    Args:
        hidden_states: the L hidden states, a sequence of tensors ``[I, T, D]``: separate allocations, any batch and
            token strides (they may differ between layers), last dimension contiguous. They are never stacked nor
            copied. A layer that the plan does not use may be None.
        plan: which layers go where.
        mix_weights: ``[B, C]`` or ``[1, C]`` (broadcast), used in fp32 (fp64 with fp64 layers), differentiable; None
            where the plan has no columns.
        skip_tokens: tokens left out at the start of every state (1 for CLIP's CLS); P = T - skip_tokens.
        image_index: int64 ``[B]``, the image that each row of the batch reads; None where row b reads image b. Out of
            range: ValueError on a CPU, NaN rows on a GPU.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        ``[B, P, G*D]`` in the layers' dtype, accumulated in fp32 and rounded once.

    Raises:
        ValueError: shapes, devices or values that do not fit; the message names the argument.
        TypeError: wrong types or dtypes.
        NotImplementedError: an explicit ``impl`` that cannot serve the call.
    """
    call = _Call(hidden_states, plan, mix_weights, skip_tokens, image_index, impl)
    if call.impl == "reference":
        return reference.layer_mix(
            call.layers, call.plan, call.mix_weights, skip_tokens=skip_tokens, image_index=image_index
        )
    keep = Keep.SOURCES if call.mix_weights_need_grad else Keep.NOTHING
    rows, _ = torch.ops.igva_kernels.layer_mix(
        call.layers, call.mix_weights, image_index, call.code, skip_tokens, keep.value, call.impl
    )
    return rows


def layer_mix_linear(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    norm: Norm | None = None,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``act(norm?(A) @ weight.T + bias)``, A as in ``layer_mix``.

    Args:
        hidden_states: as in ``layer_mix``.
        plan: as in ``layer_mix``.
        mix_weights: as in ``layer_mix``.
        weight: ``[H, G*D]``; A is rounded once to its dtype (or to autocast's).
        bias: ``[H]`` or None.
        activation: None, "gelu" (erf), "gelu_tanh", "relu" or "silu".
        norm: None or ``(weight or None, bias or None, eps)``: LayerNorm over the whole row of A, statistics in fp32
            from the unrounded mix, one rounding after.
        skip_tokens: as in ``layer_mix``.
        image_index: as in ``layer_mix``.
        impl: as in ``layer_mix``.

    Returns:
        ``[B, P, H]`` in the dtype of ``weight`` (or autocast's).

    Raises:
        ValueError, TypeError, NotImplementedError: as in ``layer_mix``.
    """
    call = _Call(hidden_states, plan, mix_weights, skip_tokens, image_index, impl)
    weights, norm = call.check_projector(ProjectorWeights(weight, bias, None, None), activation, norm, "")
    if call.impl == "reference":
        return reference.layer_mix_linear(
            call.layers, call.plan, call.mix_weights, weight, bias,
            activation=activation, norm=norm, skip_tokens=skip_tokens, image_index=image_index,
        )  # fmt: skip
    return call.project("layer_mix_linear", weights, activation, norm)


def layer_mix_mlp(
    hidden_states: Sequence[Tensor | None],
    plan: MixPlan,
    mix_weights: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str | None = "gelu",
    norm: Norm | None = None,
    skip_tokens: int = 0,
    image_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``act(norm?(A) @ weight1.T + bias1) @ weight2.T + bias2``, A as in ``layer_mix``: the whole connector.

    Args:
        hidden_states: as in ``layer_mix``.
        plan: as in ``layer_mix``.
        mix_weights: as in ``layer_mix``.
        weight1: ``[N, G*D]``; A is rounded once to its dtype (or to autocast's).
        bias1: ``[N]`` or None.
        weight2: ``[H, N]``.
        bias2: ``[H]`` or None.
        activation: as in ``layer_mix_linear``.
        norm: as in ``layer_mix_linear``.
        skip_tokens: as in ``layer_mix``.
        image_index: as in ``layer_mix``.
        impl: as in ``layer_mix``.

    Returns:
        ``[B, P, H]`` in the dtype of ``weight1`` (or autocast's).

    Raises:
        ValueError, TypeError, NotImplementedError: as in ``layer_mix``.
    """
    call = _Call(hidden_states, plan, mix_weights, skip_tokens, image_index, impl)
    weights, norm = call.check_projector(ProjectorWeights(weight1, bias1, weight2, bias2), activation, norm, "1")
    if call.impl == "reference":
        return reference.layer_mix_mlp(
            call.layers, call.plan, call.mix_weights, weight1, bias1, weight2, bias2,
            activation=activation, norm=norm, skip_tokens=skip_tokens, image_index=image_index,
        )  # fmt: skip
    return call.project("layer_mix_mlp", weights, activation, norm)


@torch.compiler.assume_constant_result
def _lower(code: str, num_states: int | None, length: int) -> tuple[tuple[int, ...], str, int, int]:
    """``(layers in use, code of the compact plan, C, G)`` of a plan for ``length`` hidden states.

    A function of constants only, so that torch.compile evaluates it while tracing.
    """
    return _lower_once(code, num_states, length)


@cache
def _lower_once(code: str, num_states: int | None, length: int) -> tuple[tuple[int, ...], str, int, int]:
    layers, plan = MixPlan(MixPlan.from_code(code).blocks, num_states).resolve(length).compact()
    return layers, plan.code, plan.num_columns, plan.num_blocks


class _Call:
    """The checked arguments of one call."""

    def __init__(
        self,
        hidden_states: Sequence[Tensor | None],
        plan: MixPlan,
        mix_weights: Tensor | None,
        skip_tokens: int,
        image_index: Tensor | None,
        impl: str,
    ) -> None:
        if not isinstance(plan, MixPlan):
            raise TypeError(f"plan: need a MixPlan, got {type(plan).__name__}")
        if isinstance(hidden_states, Tensor) or not isinstance(hidden_states, Sequence):
            raise TypeError(
                f"hidden_states: need a sequence of tensors [I, T, D], got {type(hidden_states).__name__}; "
                f"pass the states as they are, not stacked"
            )
        used, self.code, num_columns, self.num_blocks = _lower(plan.code, plan.num_states, len(hidden_states))
        self.layers = _check_layers(hidden_states, used)
        first = self.layers[0]
        num_images, num_tokens, self.width = first.shape
        if isinstance(skip_tokens, bool) or not isinstance(skip_tokens, int):
            raise TypeError(f"skip_tokens: need an int, got {type(skip_tokens).__name__}")
        if not 0 <= skip_tokens <= num_tokens:
            raise ValueError(f"skip_tokens: got {skip_tokens}, need 0 to {num_tokens}, the tokens of a hidden state")
        self.skip_tokens = skip_tokens
        self.impl = dispatch.select(impl, first.device.type, first.dtype)
        self.image_index = image_index
        num_rows = num_images
        if image_index is not None:
            _check_image_index(image_index, first.device, num_images, self.impl == "reference")
            num_rows = image_index.shape[0]
        self.mix_weights = _check_mix_weights(mix_weights, num_columns, num_rows, first)
        self.mix_weights_need_grad = (
            self.mix_weights is not None and self.mix_weights.requires_grad and torch.is_grad_enabled()
        )

    @property
    def plan(self) -> MixPlan:
        """The plan over the layers in use."""
        return MixPlan.from_code(self.code)

    def check_projector(
        self, weights: ProjectorWeights, activation: str | None, norm: Norm | None, first: str
    ) -> tuple[ProjectorWeights, Norm | None]:
        """The weights, cast to autocast's dtype where it is on, and the norm; ``first`` numbers the first Linear."""
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, need None or one of {', '.join(map(repr, ACTIVATIONS))}")
        weight1, bias1, weight2, bias2 = weights
        row = self.num_blocks * self.width
        device = self.layers[0].device
        _check_weight(f"weight{first}", weight1, device, weight1, (None, row))
        _check_weight(f"bias{first}", bias1, device, weight1, (weight1.shape[0],))
        if weight2 is not None:
            _check_weight("weight2", weight2, device, weight1, (None, weight1.shape[0]))
            _check_weight("bias2", bias2, device, weight1, (weight2.shape[0],))
        if norm is not None:
            if not isinstance(norm, (tuple, list)) or len(norm) != 3:
                raise TypeError(f"norm: need None or (weight or None, bias or None, eps), got {norm!r}")
            norm_weight, norm_bias, eps = norm
            _check_weight("norm[0]", norm_weight, device, norm_weight, (row,))
            _check_weight("norm[1]", norm_bias, device, norm_bias, (row,))
            norm = (norm_weight, norm_bias, float(eps))
        if torch.is_autocast_enabled(device.type) and weight1.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
            weights = ProjectorWeights(*(None if weight is None else weight.to(dtype) for weight in weights))
        return weights, norm

    def project(self, name: str, weights: ProjectorWeights, activation: str | None, norm: Norm | None) -> Tensor:
        """Run the registered operator ``name``; what it keeps depends on the gradients that are asked for."""
        weight1, bias1, weight2, bias2 = weights
        norm_weight, norm_bias, norm_eps = (None, None, None) if norm is None else norm
        keep, keep_z = Keep.NOTHING, False
        if torch.is_grad_enabled():
            into_rows = self.mix_weights_need_grad or any(layer.requires_grad for layer in self.layers)
            into_norm = _requires_grad(norm_weight) or _requires_grad(norm_bias)
            if self.mix_weights_need_grad:
                keep = Keep.SOURCES
            elif weight1.requires_grad or into_norm or (into_rows and norm is not None):
                keep = Keep.ROWS
            into_z = into_rows or into_norm or weight1.requires_grad or _requires_grad(bias1)
            keep_z = (activation is not None and into_z) or _requires_grad(weight2)
        args = [self.layers, self.mix_weights, self.image_index, weight1, bias1, norm_weight, norm_bias]
        if weight2 is not None:
            args += [weight2, bias2]
        op = getattr(torch.ops.igva_kernels, name)
        out, _ = op(*args, self.code, self.skip_tokens, norm_eps, activation, keep.value, keep_z, self.impl)
        return out


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _check_layers(hidden_states: Sequence[Tensor | None], used: tuple[int, ...]) -> list[Tensor]:
    layers: list[Tensor] = []
    for index in used:
        layer = hidden_states[index]
        if not isinstance(layer, Tensor):
            if layer is None:
                raise ValueError(f"hidden_states[{index}]: the plan reads this layer, got None")
            raise TypeError(f"hidden_states[{index}]: need a tensor [I, T, D], got {type(layer).__name__}")
        first = layers[0] if layers else layer
        if layer.dim() != 3 or layer.shape != first.shape:
            expected = "[I, T, D]" if layer is first or first.dim() != 3 else f"{list(first.shape)} as the others"
            raise ValueError(f"hidden_states[{index}]: need shape {expected}, got {list(layer.shape)}")
        if not layer.is_floating_point() or layer.dtype != first.dtype:
            raise TypeError(f"hidden_states[{index}]: need one floating dtype for all layers, got {layer.dtype}")
        if layer.device != first.device:
            raise ValueError(f"hidden_states[{index}]: need all layers on {first.device}, got {layer.device}")
        if layer.stride(2) != 1 and layer.shape[2] > 1 and layer.numel() > 0:
            raise ValueError(
                f"hidden_states[{index}]: the last dimension must be contiguous, got strides {list(layer.stride())}"
            )
        layers.append(layer)
    return layers


def _check_image_index(image_index: Tensor, device: torch.device, num_images: int, check_range: bool) -> None:
    if not isinstance(image_index, Tensor) or image_index.dtype != torch.int64:
        given = image_index.dtype if isinstance(image_index, Tensor) else type(image_index).__name__
        raise TypeError(f"image_index: need an int64 tensor [B], got {given}")
    if image_index.dim() != 1:
        raise ValueError(f"image_index: need shape [B], got {list(image_index.shape)}")
    if image_index.device != device:
        raise ValueError(f"image_index: need device {device} as the hidden states, got {image_index.device}")
    # The kernels check the range themselves, so that compiled code does too; torch's indexing would wrap negatives.
    if check_range and device.type == "cpu" and not torch.compiler.is_compiling():
        check_image_range(image_index, num_images)


def _check_mix_weights(mix_weights: Tensor | None, num_columns: int, num_rows: int, first: Tensor) -> Tensor | None:
    """The weights as ``[B, C]`` in the accumulation dtype."""
    if mix_weights is None:
        if num_columns:
            raise ValueError(f"mix_weights: the plan has {num_columns} weight columns, got None")
        return None
    if not isinstance(mix_weights, Tensor) or not mix_weights.is_floating_point():
        given = mix_weights.dtype if isinstance(mix_weights, Tensor) else type(mix_weights).__name__
        raise TypeError(f"mix_weights: need a floating tensor [B, C] or [1, C], got {given}")
    if not num_columns:
        raise ValueError("mix_weights: the plan has no weight column, need None")
    if mix_weights.dim() != 2 or mix_weights.shape[1] != num_columns or mix_weights.shape[0] not in (1, num_rows):
        raise ValueError(
            f"mix_weights: need shape [{num_rows}, {num_columns}] or [1, {num_columns}] "
            f"(rows of the batch, columns of the plan), got {list(mix_weights.shape)}"
        )
    if mix_weights.device != first.device:
        raise ValueError(f"mix_weights: need device {first.device} as the hidden states, got {mix_weights.device}")
    return mix_weights.to(accumulation_dtype(first.dtype)).expand(num_rows, num_columns)


def _check_weight(
    name: str, weight: Tensor | None, device: torch.device, like: Tensor | None, shape: tuple[int | None, ...]
) -> None:
    """A weight of the projector: its shape (None for any size), its dtype like ``like``'s, its device, its storage."""
    if weight is None:
        if name.startswith("weight"):
            raise TypeError(f"{name}: need a tensor, got None")
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: need a floating tensor, got {given}")
    if hasattr(weight, "device_mesh"):
        raise TypeError(
            f"{name}: got a DTensor; call the module that owns it, whose forward gathers it, or pass a local tensor"
        )
    if weight.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, weight.shape, strict=True)):
        wanted = ["any" if n is None else n for n in shape]
        hint = " (G * D, the mixed row)" if name in ("weight", "weight1") else ""
        gathered = "; a sharded weight is empty outside its owner's forward" if weight.numel() == 0 else ""
        raise ValueError(f"{name}: need shape {wanted}{hint}, got {list(weight.shape)}{gathered}")
    assert like is not None
    if weight.dtype != like.dtype:
        raise TypeError(f"{name}: need dtype {like.dtype} as the first weight, got {weight.dtype}")
    if weight.device != device:
        raise ValueError(f"{name}: need device {device} as the hidden states, got {weight.device}")
    if not torch.compiler.is_compiling() and weight.numel() and not weight.untyped_storage().size():
        raise ValueError(
            f"{name}: its storage has been freed, as sharded training does outside the forward of the module that owns "
            f"it; read the weight inside that forward"
        )


# ---- the registered operators --------------------------------------------------------------------------------------

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
}


def _mix_args(
    layers: Sequence[Tensor], mix_weights: Tensor | None, image_index: Tensor | None, plan: str, skip_tokens: int
) -> MixArgs:
    return MixArgs(layers, MixPlan.from_code(plan), mix_weights, image_index, skip_tokens)


def _norm(weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Norm | None:
    return None if eps is None else (weight, bias, eps)


def _without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The dtypes are settled at the surface; autocast must not change the GEMMs inside an operator."""

    @wraps(fn)
    def run(first: Any, *args: Any) -> Any:
        device = (first[0] if isinstance(first, (list, tuple)) else first).device.type
        if not torch.is_autocast_enabled(device):
            return fn(first, *args)
        with torch.autocast(device, enabled=False):
            return fn(first, *args)

    return run


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
        shape = LayerShape(*layer_shape, layer_dtype)
        grads += backend.layer_grads(grad_rows, signatures, mix_weights, image_index, skip_tokens, shape)
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
    backend = dispatch.get(impl)
    asked = ProjectorNeeds(*needs[: len(ProjectorNeeds._fields)])
    args = _mix_args([], mix_weights, image_index, plan, skip_tokens)
    grads = backend.project_backward(
        grad_out.contiguous(), args.over_sources(sources) if sources else None, rows,
        _norm(norm_weight, norm_bias, norm_eps), (stats[0], stats[1]) if stats else None, z,
        ProjectorWeights(weight1, None, weight2, None), activation, asked,
    )  # fmt: skip
    out = [grads.mix_weights] if asked.mix_weights else []
    if asked.layers:
        assert grads.rows is not None
        signatures, _ = _signatures(args.plan, needs[len(asked) :])
        shape = LayerShape(*layer_shape, layer_dtype)
        out += backend.layer_grads(grads.rows, signatures, mix_weights, image_index, skip_tokens, shape)
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
    ctx.save_for_backward(*flat)


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
    grads = torch.ops.igva_kernels.layer_mix_backward(
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
    grads = torch.ops.igva_kernels.projector_backward(
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
    }  # fmt: skip
    for name, (kernel, fake, backward, setup_context) in registrations.items():
        library.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _without_autocast(kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"igva_kernels::{name}", fake, lib=library)
        torch.library.register_autograd(f"igva_kernels::{name}", backward, setup_context=setup_context, lib=library)
    return library


_LIBRARY = _register()
