"""Every layout a tensor argument can have: what the operators make of it, beside what they make of dense copies."""

from __future__ import annotations

import torch

from igva_kernels import MixPlan
from igva_kernels.nn import WeightAllocator
from igva_kernels.ops.weighted_mix.program import lower
from igva_kernels.ops.weighted_mix.steps import Keep

OPS = torch.ops.igva_kernels


def _around(x, shape):
    """Memory that holds what no result may show: NaN, and an index that is nowhere."""
    return torch.full(shape, float("nan") if x.is_floating_point() else 1 << 40, dtype=x.dtype)


def _column(x):
    wide = _around(x, (*x.shape, 3))
    wide[..., 1] = x
    return wide[..., 1]


def _every_other(x):
    long = _around(x, (2 * x.shape[0], *x.shape[1:]))
    long[::2] = x
    return long[::2]


def _slice(x):
    large = _around(x, [n + 3 for n in x.shape])
    inner = large[tuple(slice(1, n + 1) for n in x.shape)]
    inner.copy_(x)
    return inner


LAYOUTS = {
    "column of a matrix": _column,
    "every other": _every_other,
    "slice": _slice,
    "transposed": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "two last swapped": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded last": lambda x: x[..., :1].expand(x.shape),
}
"""A tensor of the same shape, dtype and, unless expanded, values."""

PLAN = MixPlan((((2, None, 1.0),), ((0, 0, 0.5), (1, 0, 0.5), (1, 1, 2.0), (2, None, -1.0))), 3)
IMAGES, TOKENS, WIDTH, HIDDEN, OUT, SKIP, EPS = 3, 5, 8, 12, 10, 1, 1e-5
ROW = PLAN.num_blocks * WIDTH
BATCH = 4


def draw(dtype):
    """The arguments of every public operator, by the names that these have for them."""
    tensors = {f"layer{i}": torch.randn(IMAGES, TOKENS, WIDTH) for i in range(3)}
    tensors |= {
        "weight1": torch.randn(HIDDEN, ROW) / 4, "bias1": torch.randn(HIDDEN),
        "weight2": torch.randn(OUT, HIDDEN) / 4, "bias2": torch.randn(OUT),
        "norm_weight": torch.rand(ROW) + 0.5, "norm_bias": torch.randn(ROW),
    }  # fmt: skip
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors |= {"mix_weights": torch.rand(BATCH, 2), "image_index": torch.tensor([2, 0, 2, 1])}
    rows = (BATCH, TOKENS - SKIP)
    tensors |= {f"grad of {name}": torch.randn(*rows, size).to(dtype) for name, size in OUTPUTS.items()}
    return tensors


OUTPUTS = {"layer_mix": ROW, "layer_mix_linear": HIDDEN, "layer_mix_mlp": OUT}
_OF_LINEAR = ["weight1", "bias1", "norm_weight", "norm_bias"]


def _kept(keep, tensors, impl):
    """``(sources, rows, stats, z)`` as a forward with this ``keep`` saves them."""
    layers = [tensors[f"layer{i}"] for i in range(3)]
    _, saved = OPS.projector(
        layers, *(tensors[n] for n in ["mix_weights", "image_index", *_OF_LINEAR, "weight2", "bias2"]),
        PLAN.code, SKIP, EPS, "gelu", keep.value, True, impl,
    )  # fmt: skip
    *kept, mean, rstd, z = saved
    if keep == Keep.ROWS:
        return [], kept[0], [mean, rstd], z
    return lower(PLAN).gather(layers, kept), None, [mean, rstd], z


REGISTERED = [
    "layer_mix", "projector: one Linear", "projector: two", "layer_mix_backward", "projector_backward: sources",
    "projector_backward: rows",
]  # fmt: skip


def registered_calls(impl):
    """The arguments of a dense call of every registered operator, by the names of ``REGISTERED``."""
    t = draw(torch.float32)
    layers = [t[f"layer{i}"] for i in range(3)]
    mix = [t["mix_weights"], t["image_index"]]
    linear = [t[n] for n in _OF_LINEAR]
    options = [PLAN.code, SKIP, EPS, "gelu", Keep.SOURCES.value, True, impl]
    shape, needs = [IMAGES, TOKENS, WIDTH], [True] * 3
    calls = {
        "layer_mix": [layers, *mix, PLAN.code, SKIP, Keep.SOURCES.value, impl],
        "projector: one Linear": [layers, *mix, *linear, None, None, *options],
        "projector: two": [layers, *mix, *linear, t["weight2"], t["bias2"], *options],
        "layer_mix_backward": [
            t["grad of layer_mix"], _kept(Keep.SOURCES, t, impl)[0], *mix, PLAN.code, SKIP, shape, torch.float32,
            [True, *needs], impl,
        ],
    }  # fmt: skip
    for keep in (Keep.SOURCES, Keep.ROWS):
        sources, rows, stats, z = _kept(keep, t, impl)
        asked = [keep == Keep.SOURCES, *[True] * 7, *needs]
        calls[f"projector_backward: {keep.value}"] = [
            t["grad of layer_mix_mlp"], sources, rows, stats, z, *mix, t["weight1"], t["norm_weight"], t["norm_bias"],
            t["weight2"], PLAN.code, SKIP, EPS, "gelu", shape, torch.float32, asked, impl,
        ]  # fmt: skip
    return calls


def allocate_call(impl):
    """The same of the operator that some backends have."""
    module = WeightAllocator(20, 24, 4, 32, 2, 2).requires_grad_(False)
    weights = [p for m in module.modules() for p in m._parameters.values() if p is not None]
    return [torch.randn(2, 20), torch.randn(2, 4, 24), weights, 2, [1e-5] * 4, impl]


def places(arguments):
    """Where the tensors stand in the arguments of a call: ``(position, position in a list or None)``."""
    for position, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            yield position, None
        elif isinstance(argument, list):
            yield from ((position, i) for i, item in enumerate(argument) if isinstance(item, torch.Tensor))


def changed(arguments, where, change):
    """The arguments with ``change`` made to the tensors at these places."""
    out = [list(argument) if isinstance(argument, list) else argument for argument in arguments]
    for position, item in where:
        if item is None:
            out[position] = change(out[position])
        else:
            out[position][item] = change(out[position][item])
    return out


def check_registered(name, arguments, layout):
    """A direct call of a registered operator, with each of its tensors in turn in another layout."""
    op = getattr(OPS, name.split(":")[0])
    unchanged = None if layout.startswith("expanded") else op(*arguments)  # what is expanded has other values
    for place in places(arguments):
        actual = op(*changed(arguments, [place], LAYOUTS[layout]))
        expected = unchanged
        if expected is None:
            expected = op(*changed(arguments, [place], lambda x: LAYOUTS[layout](x).contiguous()))
        where = f"{op.default._schema.arguments[place[0]].name}[{place[1]}], {layout}"
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, msg=lambda m, w=where: f"{w}: {m}")


def check_registered_at_once(name, arguments, layout):
    """The same with all of them at once, where a call takes long."""
    op, everywhere = getattr(OPS, name.split(":")[0]), [*places(arguments)]
    actual = op(*changed(arguments, everywhere, LAYOUTS[layout]))
    expected = op(*changed(arguments, everywhere, lambda x: LAYOUTS[layout](x).contiguous()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
