"""Every layout that a tensor argument can have: an operator's results for it, beside those for dense copies."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


def _around(x, shape):
    """Memory full of what no result may contain: NaN, or an index that nothing has."""
    filler = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    return x.new_full(shape, filler)


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
"""By name: a function that gives a tensor of the same shape, dtype and, unless expanded, values."""


def outcome(call, *args):
    """The results of a call, or its complaint about values, as of an index that an expanded tensor repeats."""
    try:
        return call(*args)
    except ValueError as error:
        return {"error": str(error)}


def check(operator, args, layout, at_once=False):
    """A direct call of an operator gives what it gives for dense copies: each of its tensors in turn in this layout, or
    all of them where a call takes long."""
    leaves, structure = tree_flatten(args)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def run(places, change):
        return operator(*tree_unflatten([change(x) if i in places else x for i, x in enumerate(leaves)], structure))

    for places in [tensors] if at_once else [[i] for i in tensors]:
        actual = outcome(run, places, LAYOUTS[layout])
        expected = outcome(run, places, lambda x: LAYOUTS[layout](x).contiguous())
        where = f"{operator}, tensors {places}, {layout}"
        assert_same(actual, expected, 1e-4, where)


def assert_same(actual, expected, tolerance, where):
    """Two outcomes are the same complaint, or results that are close."""
    if isinstance(expected, dict) and "error" in expected:
        assert actual == expected, where
    else:
        # Entries that are nearly zero are sums of large ones, whose rounding they have.
        sizes = [leaf.abs().nan_to_num().max().item() for leaf in tree_flatten(expected)[0] if _has_size(leaf)]
        close = {"rtol": tolerance, "atol": tolerance * max([1.0, *sizes]), "equal_nan": True}
        torch.testing.assert_close(actual, expected, **close, msg=lambda m: f"{where}: {m}")


def _has_size(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() > 0
