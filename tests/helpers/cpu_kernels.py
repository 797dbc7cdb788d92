"""What the tests of the C++ kernels share: plans, inputs, plain torch's answers, instruction sets and libraries."""

import plain_torch
import pytest
import torch

from igva_kernels import testing
from igva_kernels.ops.weighted_mix import MixPlan, is_tap
from igva_kernels.ops.weighted_mix import cpu as backend
from igva_kernels.ops.weighted_mix.program import Shares
from igva_kernels.ops.weighted_mix.steps import Keep, LayerShape, MixArgs, Needs, Projector, Saved
from igva_kernels.runtime import native
from igva_kernels.runtime.cpu import dense
from igva_kernels.runtime.cpu import products as gemm
from igva_kernels.testing import relative_error

MODULE, WHY_NOT = native.load()
needs_module = pytest.mark.skipif(MODULE is None, reason=WHY_NOT)

CPU = backend.IMPLEMENTATION
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOW = [torch.bfloat16, torch.float16]
PLANS = {
    "igva": MixPlan.igva(6, 3, -2).resolve(7).compact()[1],
    "uneven": MixPlan((((0, 1, 0.5), (1, 0, 0.5), (2, None, 0.25), (1, 1, 0.5)), ((2, None, 1.0),)), 3),
    "weighted_sum": MixPlan.weighted_sum([0, 1, 2, 3], residual=1, num_states=4),
    "concat": MixPlan.concat([2, 0], 3).compact()[1],
    "repeated": MixPlan(
        (((0, None, 0.125),) * 9, ((0, 0, 0.5), (0, 1, 2.0), (0, 0, 0.5), (0, 1, 2.0), (0, 1, 2.0))), 1
    ),
}


def isas():
    """Every instruction set of this CPU, or only the one that the environment names for this run."""
    if MODULE is None:
        return ["none"]
    return [MODULE.isa()] if native.forced_isa() else MODULE.isas()


ROUTES = [gemm.TORCH, gemm.OWN]


def routes(library):
    """A replacement of ``products.route``: every dtype by this one."""
    return lambda dtype: gemm.Route(library, "")


class Near:
    """The judge for fp64, in which plain torch is the oracle itself: results must agree to within a few roundings."""

    def add(self, actual, oracle, plain, name="result", rounded_once=False):
        assert relative_error(actual, oracle) <= 1e-13, name


def within_rule(dtype):
    """The error rule, by as many draws as it takes."""
    return iter([Near()]) if dtype == torch.float64 else testing.within_rule(dtype)


def make(plan, dtype, images=3, tokens=6, width=16, skip=1, index=None, layout="contiguous"):
    """MixArgs of random layers, and the same in fp64."""

    def layer(k):
        if layout == "tokens first" or (layout == "mixed" and k % 2):
            return torch.randn(tokens, images, width).to(dtype).transpose(0, 1)
        if layout == "strided" or layout == "mixed":
            return torch.randn(images, tokens + 2, width + 3).to(dtype)[:, 1:-1, 2:-1]
        return torch.randn(images, tokens, width).to(dtype)

    layers = [layer(k) for k in range(max(plan.layers) + 1)]
    index = None if index is None else torch.tensor(index)
    rows = images if index is None else len(index)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(rows, plan.num_columns, dtype=wide) if plan.num_columns else None
    args = MixArgs(layers, plan, weights, index, skip)
    return args, to64(args)


def to64(args):
    weights = None if args.mix_weights is None else args.mix_weights.double()
    return MixArgs([layer.double() for layer in args.layers], args.plan, weights, args.image_index, args.skip_tokens)


def plain_mix(args):
    return plain_torch.layer_mix(
        args.layers, args.plan, args.mix_weights, skip_tokens=args.skip_tokens, image_index=args.image_index
    )


def plain_sums(args):
    sums = MixPlan(tuple(block for block in args.plan.reduced()[0].blocks if not is_tap(block)))
    rows = plain_torch.layer_mix(args.layers, sums, skip_tokens=args.skip_tokens)
    return rows.split(args.width, dim=-1)


def over_sources(args, sources):
    """The same mix from the sources of its reduced plan, as a backward has it."""
    return MixArgs.over_sources(args.plan, sources, args.mix_weights, args.image_index, args.skip_tokens)


def inputs_of_kernels():
    """Inputs of every kernel, large enough for several threads; products have several strips, slices and tiles."""
    torch.manual_seed(0)
    args, _ = make(PLANS["igva"], torch.float32, images=2, tokens=40, width=300, index=[1, 0, 1])
    sources = [torch.randn(2, 40 if is_tap(block) else 39, 300) for block in args.plan.reduced()[0].blocks]
    norm = (torch.rand(600), torch.randn(600), 1e-5)
    projector = Projector(torch.randn(530, 600) / 25, torch.randn(530), torch.randn(70, 530) / 23, None, norm, "gelu")
    return args, over_sources(args, sources), torch.randn(3, 39, 600), projector, torch.randn(2, 50, 3000)


def every_kernel(args, sources, grad_rows, projector, rows):
    """What each kernel returns; sums depend on shapes only, so the number of threads must not change a bit."""
    norm = (torch.ones(600), torch.zeros(600), 1e-5)
    mixed, normal = CPU.mix(args, torch.float32, None, Keep.SOURCES), CPU.mix(args, torch.float32, norm, Keep.ROWS)
    z, grad_y = rows
    y, copy, grad_z, again = (torch.empty_like(z) for _ in range(4))
    dense.epilogue(z, "gelu", y, copy)
    dense.activation_grad(grad_y, z, "gelu", grad_z, again)
    shape = LayerShape(2, 40, 300, torch.float32, args.skip_tokens)
    wanted = Shares((0, 1, 0), (-1, 0, -1), (1.0, 0.5, 2.0), (1, 0, 1))
    layers = CPU.layer_grads(grad_rows, wanted, args.mix_weights, args.image_index, shape)
    weights = CPU.mix_weights_grad(grad_rows[..., 300:], [1], sources)
    of_mixes = [mixed.rows, *mixed.sums, normal.rows, normal.raw_rows, normal.mean, normal.rstd]
    products = [x for norm in (None, projector.norm) for x in a_step(args, projector._replace(norm=norm))]
    return [*of_mixes, y, copy, grad_z, again, weights, *layers, *products]


def a_step(args, projector, grad_out=None, keep=Keep.SOURCES):
    """The output of a projector and every gradient, as a training step computes them; by name, see ``named_step``."""
    return list(named_step(args, projector, grad_out, keep).values())


def named_step(args, projector, grad_out=None, keep=Keep.SOURCES):
    out, mixed, z = CPU.project(args, projector, keep, True)
    grad_out = out / out.shape[-1] ** 0.5 if grad_out is None else grad_out
    sources = rows = None
    if keep == Keep.SOURCES:
        sources = over_sources(args, args.program.gather(args.layers, mixed.sums))
    elif keep == Keep.ROWS:
        rows = mixed.rows if projector.norm is None else mixed.raw_rows
    has_norm = keep != Keep.NOTHING and projector.norm is not None and projector.norm[0] is not None
    needs = Needs(
        mix_weights=keep == Keep.SOURCES, layers=False, weight1=keep != Keep.NOTHING, bias1=projector.bias1 is not None,
        norm_weight=has_norm, norm_bias=has_norm, weight2=projector.weight2 is not None,
        bias2=projector.bias2 is not None,
    )  # fmt: skip
    saved = Saved(sources, rows, mixed.mean, mixed.rstd, z)
    grads = CPU.project_backward(grad_out, saved, projector, needs)
    results = {"out": out, "z": z, **grads}
    return {name: x for name, x in results.items() if x is not None}


def assert_same(actual, expected):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.isfinite().all() and torch.equal(a, e), f"result {i}"
