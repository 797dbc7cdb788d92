"""Random calls of the CPU operators, forward and backward, beside the reference in fp64; `make sanitize` runs 10,000.

    python tests/helpers/fuzz_cpu.py --calls 1000 --seed 0 [--processes 2] [--verbose]

Every process has a seed of its own, which draws the same calls on every machine; each call runs on every instruction
set of the machine. ``--verbose`` prints a call before it runs, and so names the call in which a sanitizer ended the
process. A wrong result is shrunk to a small call and printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # more threads than cores must not wait in a loop

import plain_torch
import strides
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import igva_kernels as ik
from igva_kernels import MixPlan
from igva_kernels.ops.weighted_mix import cpu as mix_backend
from igva_kernels.runtime import native
from igva_kernels.runtime.activations import ACTIVATIONS
from igva_kernels.runtime.cpu import products as gemm

WIDTHS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70]
"""Widths around those of one vector and of several that a loop unrolls."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SCALES = [1.0, 0.5, 1 / 3, -1.0, 0.0, 3.0, 1e20]
"""The last one is drawn only where no norm squares it and no fp16 overflows."""

LITTLE_MEMORY = "ours in the least memory"
PRODUCTS = [gemm.TORCH, gemm.OWN, LITTLE_MEMORY]

COLUMNS = [None, 0, 1, 3]
EPS = 1e-5

TOLERANCE = 8
"""Roundings that a result may be off by, each of the size of the largest sum that its terms could make."""


@dataclass(frozen=True)
class Call:
    """One call; ``layouts`` and ``needs`` are by the names of the tensors."""

    op: str
    plan: MixPlan
    states: int
    images: int
    tokens: int
    width: int
    skip: int
    index: tuple[int, ...] | None
    weight_rows: bool
    """Whether mix_weights has a row for every row of the batch, rather than one for all."""
    sizes: tuple[int, int]
    """The widths of the hidden row and of the output."""
    dtypes: tuple[str, str, str]
    """The dtypes of layers, projector and mix_weights."""
    activation: str | None
    biases: tuple[bool, bool]
    norm: tuple[bool, bool] | None
    layouts: dict[str, str]
    needs: frozenset[str]
    threads: int
    products: str
    """Who multiplies, one of ``PRODUCTS``."""
    values: int
    """Seed of all values."""


NAMES = ["mix_weights", "image_index", "weight1", "bias1", "weight2", "bias2", "norm_weight", "norm_bias", "grad"]


@st.composite
def calls(draw) -> Call:
    op = draw(st.sampled_from(["layer_mix", "layer_mix_linear", "layer_mix_mlp"]))
    dtypes = draw(st.sampled_from([*product(DTYPES, repeat=3)]))
    states = draw(st.integers(1, 4))
    scales = SCALES if op == "layer_mix" and dtypes[0] != "fp16" else SCALES[:-1]
    entry = st.sampled_from([*product(range(-states, states), COLUMNS, scales)])
    plan = MixPlan(draw(st.lists(st.lists(entry, min_size=1, max_size=7), min_size=1, max_size=3)))
    images, tokens, width = draw(st.integers(0, 3)), draw(st.integers(0, 6)), draw(st.sampled_from(WIDTHS))
    hidden, out = draw(st.sampled_from([0, 1, 5, 16, 33])), draw(st.sampled_from([0, 1, 7, 16]))
    if draw(st.integers(0, 19)) == 19:  # enough for several threads, and for several slices of a product
        images, tokens, width = 3, 12, draw(st.sampled_from([640, 1030]))
    if op != "layer_mix" and draw(st.integers(0, 5)) == 3:  # and for several strips, tiles and blocks of rows
        images, tokens, width = 3, draw(st.sampled_from([41, 67])), draw(st.sampled_from([7, 65, 180, 530]))
        hidden, out = draw(st.sampled_from([1, 67, 530])), draw(st.sampled_from([1, 33, 130]))
    index = None
    if images and draw(st.booleans()):
        index = tuple(draw(st.lists(st.integers(0, images - 1), max_size=5)))
    norm = draw(st.none() | st.tuples(st.booleans(), st.booleans())) if width and op != "layer_mix" else None
    names = [f"layer{i}" for i in range(states)] + NAMES
    needs = draw(st.just(0) | st.integers(0, 2 ** len(names) - 1))  # none is a path of its own
    moved = draw(st.lists(st.sampled_from([*product(names, strides.LAYOUTS)]), max_size=4))
    return Call(
        op, plan, states, images, tokens, width, draw(st.integers(0, min(tokens, 6))), index, draw(st.booleans()),
        (hidden, out), dtypes,
        draw(st.sampled_from([None, *ACTIVATIONS])), draw(st.tuples(st.booleans(), st.booleans())), norm, dict(moved),
        frozenset(name for i, name in enumerate(names) if needs >> i & 1), draw(st.integers(1, 5)),
        draw(st.sampled_from(PRODUCTS)), draw(st.integers(0, 2**31)),
    )  # fmt: skip


def tensors_of(call: Call) -> dict[str, Tensor]:
    """The arguments by name, those that are None left out, and the gradient of the output."""
    torch.manual_seed(call.values)
    layers, weights, mix = (DTYPES[name] for name in call.dtypes)
    batch = call.images if call.index is None else len(call.index)
    row, (hidden, out) = call.plan.num_blocks * call.width, call.sizes
    used = {layer % call.states for layer in call.plan.layers}
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        f"layer{i}": ((call.images, call.tokens, call.width), layers) for i in sorted(used)
    }
    if call.plan.num_columns:
        shapes["mix_weights"] = ((batch if call.weight_rows else 1, call.plan.num_columns), mix)
    if call.op != "layer_mix":
        shapes["weight1"] = ((hidden, row), weights)
        if call.biases[0] or call.activation == "relu":
            shapes["bias1"] = ((hidden,), weights)
        for name, given in zip(("norm_weight", "norm_bias"), call.norm or (False, False), strict=True):
            if given:
                shapes[name] = ((row,), weights)
    if call.op == "layer_mix_mlp":
        shapes["weight2"] = ((out, hidden), weights)
        if call.biases[1]:
            shapes["bias2"] = ((out,), weights)
    last, dtype = {"layer_mix": (row, layers), "layer_mix_linear": (hidden, weights)}.get(call.op, (out, weights))
    shapes["grad"] = ((batch, call.tokens - call.skip, last), dtype)
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        scale = max(shape[1], 1) ** -0.5 if name in ("weight1", "weight2") else 1.0
        tensors[name] = (torch.randn(shape) * scale).to(dtype)
    if call.index is not None:
        tensors["image_index"] = torch.tensor(call.index, dtype=torch.int64)
    if call.activation == "relu" and call.op != "layer_mix":
        # No z near the kink, where a rounding decides on a whole gradient.
        first = replace(call, op="layer_mix_linear", needs=frozenset())
        (flat,), _ = bound(first, {**tensors, "bias1": torch.zeros(hidden)})
        away = 1 + 2 * float(flat.max()) if flat.numel() else 1.0
        tensors["bias1"] = (away * torch.randn(hidden).sign()).to(weights)
    return {n: strides.LAYOUTS[call.layouts[n]](x) if n in call.layouts else x for n, x in tensors.items()}


def run(call: Call, tensors: dict[str, Tensor], impl: str) -> list[Tensor | None]:
    """The output, and the gradients that the call needs."""
    leaves = {n: x.detach().requires_grad_(n in call.needs and x.is_floating_point()) for n, x in tensors.items()}
    states = [leaves.get(f"layer{i}") for i in range(call.states)]
    projector = [leaves.get(n) for n in ("weight1", "bias1", "weight2", "bias2")]
    options = {"skip_tokens": call.skip, "image_index": leaves.get("image_index"), "impl": impl}
    if call.op != "layer_mix":
        norm = None if call.norm is None else (leaves.get("norm_weight"), leaves.get("norm_bias"), EPS)
        options |= {"activation": call.activation, "norm": norm}
    taken = {"layer_mix": 0, "layer_mix_linear": 2, "layer_mix_mlp": 4}[call.op]
    out = getattr(ik, call.op)(states, call.plan, leaves.get("mix_weights"), *projector[:taken], **options)
    return [out.detach(), *gradients(out, leaves, leaves["grad"].detach())]


def gradients(out: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> list[Tensor | None]:
    wanted = [x for n, x in leaves.items() if x.requires_grad and n != "grad"]
    if not wanted or not out.requires_grad:
        return [None] * len(wanted)
    return list(torch.autograd.grad(out, wanted, grad, allow_unused=True))


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense copies, in fp64."""
    return {n: (x.double() if x.is_floating_point() else x).contiguous() for n, x in tensors.items()}


def bound(call: Call, tensors: dict[str, Tensor]) -> tuple[list[Tensor | None], float]:
    """What ``run`` would return if no two terms cancelled, and by how many roundings of that it may be off.

    The network runs on absolute values; an activation and its slope pass on at most a little more than they get. The
    factor allows for what an error of z does to the slope, and an error of the row to the norm.
    """
    exact = wide(tensors)
    leaves = {
        n: (x.abs() if x.is_floating_point() else x).requires_grad_(n in call.needs and x.is_floating_point())
        for n, x in exact.items()
    }
    blocks = tuple(tuple((e.layer, e.column, abs(e.scale)) for e in block) for block in call.plan.blocks)

    def mix(plan: MixPlan, of: dict[str, Tensor]) -> Tensor:
        states = [of.get(f"layer{i}") for i in range(call.states)]
        options = {"skip_tokens": call.skip, "image_index": of.get("image_index")}
        return plain_torch.layer_mix(states, plan.resolve(call.states), of.get("mix_weights"), **options)

    row, factor = mix(MixPlan(blocks), leaves), 1.0
    if call.op == "layer_mix":
        return [row.detach(), *gradients(row, leaves, leaves["grad"].detach())], factor
    if call.norm is not None:
        plain = mix(call.plan, exact)
        centred = plain - plain.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normal = (centred * rstd).abs()
        factor *= 1 + float((row.detach() * rstd).max()) if row.numel() else 1
        row = rstd * (row + row.mean(-1, keepdim=True) + normal * (row * normal).mean(-1, keepdim=True))
        row = row * leaves.get("norm_weight", 1.0) + leaves.get("norm_bias", 0.0)
    out = torch.nn.functional.linear(row, leaves["weight1"], leaves.get("bias1"))
    if call.activation is not None and out.numel():
        factor *= 1 + float(out.detach().max())
    if call.op == "layer_mix_mlp":
        out = torch.nn.functional.linear(out, leaves["weight2"], leaves.get("bias2"))
    return [out.detach(), *gradients(out, leaves, leaves["grad"].detach())], factor


def check(call: Call) -> None:
    """Raises AssertionError where the C++ operator is wrong, on any instruction set of the machine."""
    torch.set_num_threads(call.threads)
    tensors = tensors_of(call)
    expected, (bounds, factor) = run(call, wide(tensors), "reference"), bound(call, tensors)
    for isa in native.load()[0].isas():
        native.load()[0].set_isa(isa)
        with products_by(call.products):
            actual = run(call, tensors, "cpu")
        compare(call, tensors, actual, expected, bounds, factor)


@contextmanager
def products_by(whom: str) -> Iterator[None]:
    """Every product by this library, on every instruction set and not only on those that it suits."""
    with ExitStack() as stack:
        library = gemm.TORCH if whom == gemm.TORCH else gemm.OWN
        stack.enter_context(patch.object(gemm, "route", lambda dtype: gemm.Route(library, "")))
        for name in ("BLOCK_BYTES", "PRODUCT_BYTES", "TRAINING_BYTES"):
            if whom == LITTLE_MEMORY:
                stack.enter_context(patch.object(mix_backend, name, 0))
        yield


def compare(
    call: Call, tensors: dict[str, Tensor], actual: list[Tensor | None], expected: list[Tensor | None],
    bounds: list[Tensor | None], factor: float,
) -> None:  # fmt: skip
    used = [DTYPES[call.dtypes[0]]] if call.op == "layer_mix" else [DTYPES[name] for name in call.dtypes[:2]]
    # fp64 layers mixed into a narrower row, and the other way round, are as exact as the narrower of the two.
    eps = max(torch.finfo(dtype).eps for dtype in used)
    smallest = max(torch.finfo(dtype).smallest_normal for dtype in used)
    wanted = ["out", *(n for n, x in tensors.items() if n in call.needs and x.is_floating_point() and n != "grad")]
    for name, got, right, size in zip(wanted, actual, expected, bounds, strict=True):
        if got is None or right is None:
            assert got is None or not got.any(), f"{name}: a gradient where plain torch has none"
            assert right is None or not right.any(), f"{name}: no gradient"
            continue
        assert got.shape == right.shape, f"{name}: shape {list(got.shape)}, need {list(right.shape)}"
        own = torch.finfo(got.dtype)
        fits = right.abs() <= own.max / 2  # what lies beyond may overflow
        error = torch.where(fits, got.double() - right, 0.0).abs()
        allowed = TOLERANCE * factor * (max(eps, own.eps) * size + smallest)
        wrong = ~(error <= allowed)  # NaN is wrong
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} are wrong, "
            f"by up to {float((error / allowed)[wrong].nan_to_num(torch.inf).max()):.3g} times what is allowed"
        )


def fuzz(count: int, number: int, verbose: bool = False, progress: bool = False) -> None:
    """``count`` calls or a few more, drawn from the seed ``number``: what is drawn runs on every instruction set."""
    module = native.load()[0]
    times = len(module.isas())
    before = module.isa(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    start, done = time.perf_counter(), 0

    @seed(number)
    @settings(
        max_examples=-(-count // times), database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False, print_blob=False,
    )  # fmt: skip
    @given(calls())
    def one(call: Call) -> None:
        nonlocal done
        if verbose:
            print(done, call, flush=True)
        check(call)
        done += times
        if progress and done % 1000 < times:
            print(f"seed {number}: {done} calls in {time.perf_counter() - start:.0f} s", flush=True)

    try:
        one()
    finally:
        module.set_isa(before[0])
        torch.set_num_threads(before[1])
        torch.use_deterministic_algorithms(before[2])


def main() -> None:
    parser = argparse.ArgumentParser(description="random calls of the CPU operators beside the reference in fp64")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="share the calls; the seeds are SEED, SEED + 1, ...")
    parser.add_argument("--verbose", action="store_true", help="print every call before it runs")
    options = parser.parse_args()
    if options.processes > 1:
        share = -(-options.calls // options.processes)
        command = [sys.executable, __file__, "--calls", str(share), *["--verbose"] * options.verbose]
        numbers = range(options.seed, options.seed + options.processes)
        running = [subprocess.Popen([*command, "--seed", str(number)]) for number in numbers]
        raise SystemExit(max(abs(process.wait()) for process in running))
    sanitizers = native.build_info().get("sanitizers") or "none"
    if os.environ.get("IGVA_KERNELS_SANITIZE") == "1" and sanitizers == "none":
        raise SystemExit(f"IGVA_KERNELS_SANITIZE=1, but {native.load()[0].__file__} was built without sanitizers")
    isas = ", ".join(native.load()[0].isas())
    print(f"{options.calls} calls, seed {options.seed}; {isas}; sanitizers: {sanitizers}", flush=True)
    fuzz(options.calls, options.seed, options.verbose, progress=True)
    print(f"seed {options.seed}: all right")


if __name__ == "__main__":
    main()
