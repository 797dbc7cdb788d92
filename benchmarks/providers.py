"""Who computes a workload: plain torch in its forms, the backends, and the floors that nothing can go below.

A provider binds a workload and one draw of its inputs to a call. What the call returns is judged before it is timed; a
floor returns nothing that could be judged, and shows how fast the machine does the work that cannot be left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import igva_kernels as ik
from benchmarks.workloads import Connector, Model, Operation, Workload
from igva_kernels.ops.weighted_mix.cases import LINEARS, Case, Inputs
from igva_kernels.ops.weighted_mix.cuda import gemm as cuda_gemm
from igva_kernels.ops.weighted_mix.op import OPERATOR
from igva_kernels.ops.weighted_mix.plan import terms
from igva_kernels.registry import REFERENCE, all_backends, operators
from igva_kernels.runtime.activations import ACTIVATIONS

Call = Callable[[], Any]
"""Returns results by name; a floor's returns anything."""

PLAIN = "plain"
"""The provider that every other one is compared with."""


@dataclass
class Bound:
    """A provider on one draw of inputs."""

    call: Call
    keeps: Call | None = None
    """A forward that keeps what its backward needs; None if the workload has no backward."""
    note: str = ""


@dataclass(frozen=True)
class Provider:
    """One way to compute a workload."""

    name: str
    label: str
    bind: Callable[[Any], Bound] = field(repr=False)
    """Takes a draw of the workload's inputs."""
    is_floor: bool = False
    in_graph: bool = True
    """Whether a CUDA graph can hold it."""

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile compiles it, in its first call."""
        return self.name.endswith("-compiled")

    @property
    def is_extra(self) -> bool:
        """Whether it is left out if time is short, as it is neither plain torch nor a backend nor a floor."""
        return not (self.is_floor or self.name == PLAIN or self.name in tuple(all_backends()))


def providers(workload: Workload, device: str) -> dict[str, Provider]:
    """What can compute the workload on ``device``, by name, plain first; compiled forms if ``_COMPILED`` lists it."""
    if isinstance(workload, Model):
        found = _of_model(workload, device)
    elif isinstance(workload, Operation):
        found = _of_operation(workload, device)
    else:
        assert isinstance(workload, Connector)
        found = _of_connector(workload, device)
    return {provider.name: provider for provider in found}


def kernels(device: str, dtype: torch.dtype) -> list[str]:
    """The backends that can serve the connectors here, as far as device and dtype decide it."""
    return OPERATOR.candidates(torch.device(device), dtype, None)


def _of_operation(workload: Operation, device: str) -> list[Provider]:
    """Plain torch and every backend that serves the operator."""
    operator, demands = operators()[workload.operator], workload.case.demands
    able = operator.candidates(torch.device(device), workload.torch_dtype, *demands)
    labels = {PLAIN: "plain torch"} | {name: f"igva_kernels, {name}" for name in able}

    def bind(impl: str, inputs: Any) -> Bound:
        return Bound(torch.no_grad()(partial(workload.case.run, inputs, impl)))

    return [
        Provider(name, label, partial(bind, REFERENCE if name == PLAIN else name)) for name, label in labels.items()
    ]


# ---- connectors ------------------------------------------------------------------------------------------------------


def _of_connector(workload: Connector, device: str) -> list[Provider]:
    case = workload.case
    forms: dict[str, tuple[str, Callable[[Inputs], Tensor]]] = {
        PLAIN: ("plain torch, as published", partial(case.forward, impl="reference")),
        "additions": ("plain torch, as additions", partial(additions, case)),
    }
    if _worth_compiling(workload, device):
        for name, (label, forward) in list(forms.items()):
            compiled = torch.compile(forward, dynamic=False)
            forms[f"{name}-compiled"] = (f"{label}, torch.compile", compiled)
    able = kernels(device, workload.torch_dtype)
    if able and case.op != "layer_mix":
        forms["mix+library"] = (f"{able[0]} mix, torch's products", partial(mix_then_library, case))
    for name in able:
        forms[name] = (f"igva_kernels, {name}", partial(case.forward, impl=name))
    # Every call makes its image index from Python data, which no graph can hold.
    graph = not case.image_index
    found = [Provider(n, label, partial(bind, workload, f), in_graph=graph) for n, (label, f) in forms.items()]
    if "cuda" in able and case.op != "layer_mix" and cuda_gemm.why_not_capability(torch.cuda.current_device()) is None:
        label = "igva_kernels, cuda, overlapped GEMM"
        found.append(Provider("cuda-fused", label, partial(_bind_fused, workload), in_graph=graph))
    if case.op == "layer_mix":
        copy = Provider("copy", "copy of the same bytes", partial(_copy, workload), is_floor=True)
        return [*found, copy]
    products = Provider("products", "bare matrix products", partial(_products, workload), is_floor=True)
    return [*found, products]


_COMPILED: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("igva-2", "forward"): {"cpu": (2,), "cuda": (1, 4, 16, 64, 128)},
    ("igva-2", "both"): {"cpu": (2,), "cuda": (16, 64)},
    ("igva-2-mix", "forward"): {"cpu": (2,), "cuda": (16,)},
}
"""By workload, mode and device: the batch sizes at which compiled forms are measured; each compiles for about 10 s."""


def _worth_compiling(workload: Connector, device: str) -> bool:
    trains_in_fp32 = workload.mode == "both" and workload.dtype == "fp32"  # sums bias gradients in too long a chain
    return workload.batch in _COMPILED.get((workload.name, workload.mode), {}).get(device, ()) and not trains_in_fp32


def bind(workload: Connector, forward: Callable[[Inputs], Tensor], inputs: Inputs) -> Bound:
    """The call of the workload's mode; in a backward, gradients of mix weights and parameters."""
    if workload.mode == "forward":

        @torch.no_grad()
        def infer() -> dict[str, Tensor]:
            return {"output": forward(inputs)}

        return Bound(infer)

    inputs = inputs.detached()
    leaves = {f"grad {name}": param for name, param in inputs.params.items()}
    if inputs.mix_weights is not None:
        leaves["grad mix_weights"] = inputs.mix_weights
    for leaf in leaves.values():
        leaf.requires_grad_()

    def keeps() -> Tensor:
        return forward(inputs)

    def gradients(out: Tensor, retain_graph: bool) -> dict[str, Tensor]:
        grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out, retain_graph=retain_graph)
        return dict(zip(leaves, grads, strict=True))

    if workload.mode == "backward":
        ahead: list[Tensor] = []

        def backward() -> dict[str, Tensor]:
            if not ahead:
                ahead.append(keeps())
            return gradients(ahead[0], retain_graph=True)

        return Bound(backward, keeps)

    def both() -> dict[str, Tensor]:
        out = keeps()
        return {"output": out.detach(), **gradients(out, retain_graph=False)}

    return Bound(both, keeps)


def _bind_fused(workload: Connector, inputs: Inputs) -> Bound:
    """The CUDA backend with the GEMM that an environment variable forces on, read at every call."""

    def switched_on(call: Call) -> Call:
        def run() -> Any:
            with patch.dict(os.environ, {cuda_gemm.SWITCH: "1"}):
                return call()

        return run

    bound = bind(workload, partial(workload.case.forward, impl="cuda"), inputs)
    return Bound(switched_on(bound.call), None if bound.keeps is None else switched_on(bound.keeps))


def additions(case: Case, inputs: Inputs) -> Tensor:
    """Plain torch with the stacks and means written as sums, the form that a compiler fuses best."""
    blocks = []
    index = None if case.image_index is None else torch.tensor(case.image_index, device=inputs.grad_out.device)
    for block in case.plan.blocks:
        mixed: Tensor | None = None
        for column, scale, layers in terms(block):
            first, *others = (inputs.layers[layer] for layer in layers)
            assert first is not None
            total = first
            for layer in others:
                total = total + layer
            total = total[:, case.skip :] if index is None else total[index, case.skip :]
            if column is not None:
                assert inputs.mix_weights is not None
                total = total * (scale * inputs.mix_weights[:, column, None, None]).to(total.dtype)
            elif scale != 1.0:
                total = total * scale
            mixed = total if mixed is None else mixed + total
        assert mixed is not None
        blocks.append(mixed)
    return _linears(case, inputs, torch.cat(blocks, dim=-1))


def mix_then_library(case: Case, inputs: Inputs) -> Tensor:
    """The mix by the best kernel, everything else by torch."""
    index = None if case.image_index is None else torch.tensor(case.image_index, device=inputs.grad_out.device)
    rows = ik.layer_mix(inputs.layers, case.plan, inputs.mix_weights, skip_tokens=case.skip, image_index=index)
    return _linears(case, inputs, rows)


def _linears(case: Case, inputs: Inputs, rows: Tensor) -> Tensor:
    params = inputs.params
    if case.norm_eps is not None:
        rows = F.layer_norm(rows, rows.shape[-1:], params["norm weight"], params["norm bias"], case.norm_eps)
    linears = [params[name] for name in LINEARS[case.op]]
    if linears:
        rows = F.linear(rows, *linears[:2])
        rows = ACTIVATIONS[case.activation](rows) if case.activation else rows
    return F.linear(rows, *linears[2:]) if linears[2:] else rows


# ---- floors ----------------------------------------------------------------------------------------------------------


def library_products(device: str, dtype: torch.dtype) -> Mapping[str, tuple[torch.dtype, Callable[..., Tensor]]]:
    """``x [M, K] @ weight [N, K].T`` by the libraries behind torch: by name, the dtype of the operands and the call."""
    ways: dict[str, tuple[torch.dtype, Callable[..., Tensor]]] = {"torch.mm": (dtype, _mm)}
    if device == "cpu":
        onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
        if onednn is not None:
            ways["oneDNN"] = (dtype, lambda x, weight: onednn(x, weight, None, "none", [], ""))
            if dtype != torch.float32:
                # Where the CPU has no instructions for a dtype, its products are computed in fp32.
                ways["oneDNN in fp32"] = (torch.float32, ways["oneDNN"][1])
    return ways


TRIAL = (1024, 4096, 2048)
"""``(m, n, k)`` of the product by which the fastest library is found."""
TRIAL_SECONDS = 0.5
"""Seconds of a trial above which it is not repeated."""
SHORT_TRIAL = (256, 4096, 2048)
"""``(m, n, k)`` of the product that shows how fast plain torch multiplies, which may be very slow."""


def plain_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of plain torch's products, roughly: of a single one, after a small one to warm up."""
    m, n, k = SHORT_TRIAL
    x, weight = _operands(SHORT_TRIAL, device, dtype)
    _mm(x[:8], weight)
    return 2 * m * n * k / _seconds(lambda: _mm(x, weight))


def products(
    device: str, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int]]
) -> tuple[str, Callable[[], list[Tensor]]]:
    """Products of these sizes by the library that is fastest here, and its name."""
    name = _fastest_library(device, dtype)
    taken, multiply = library_products(device, dtype)[name]
    operands = [_operands(size, device, taken) for size in sizes]

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [multiply(x, weight) for x, weight in operands]

    return name, call


@cache
def _fastest_library(device: str, dtype: torch.dtype) -> str:
    ways = library_products(device, dtype)
    seconds: dict[str, float] = {}
    for name, (taken, multiply) in ways.items() if len(ways) > 1 else ():
        with suppress(RuntimeError):  # oneDNN has no fp16 on a CPU without instructions for it
            operands = _operands(TRIAL, device, taken)
            call = partial(multiply, *operands)
            first = _seconds(call)
            # A library that is this slow has only a plain loop for the dtype, and is not timed again.
            seconds[name] = first if first > TRIAL_SECONDS else min(first, _seconds(call), _seconds(call))
    return min(seconds, key=lambda name: seconds[name]) if seconds else next(iter(ways))


def _operands(size: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m, n, k = size
    return torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)


def _mm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _products(workload: Connector, inputs: Inputs) -> Bound:
    name, call = products(inputs.grad_out.device.type, workload.torch_dtype, workload.products())
    return Bound(call, note=name)


def _copy(workload: Connector, inputs: Inputs) -> Bound:
    assert workload.num_bytes is not None
    source = torch.ones(int(workload.num_bytes) // 2, dtype=torch.uint8, device=inputs.grad_out.device)
    target = torch.empty_like(source)
    return Bound(lambda: target.copy_(source))


# ---- the reference model ---------------------------------------------------------------------------------------------


def _of_model(workload: Model, device: str) -> list[Provider]:
    graph = workload.task == "connector"  # the one task without the tower and without tensors made from Python

    def provider(name: str, label: str, call: Callable[..., Any], is_floor: bool = False, **options: Any) -> Provider:
        return Provider(name, label, lambda inputs: Bound(lambda: call(inputs, **options)), is_floor, graph)

    from benchmarks import models  # needs transformers, which the connectors do without

    run = models.TASKS[workload.task]
    found = [provider(PLAIN, "plain torch, as published", run, impl="reference")]
    for name in kernels(device, workload.torch_dtype):
        label = f"igva_kernels, {name}"
        if workload.task == "tower":
            found.append(provider(f"{name}-unstreamed", f"{label}, all states kept", run, impl=name, mode=None))
            found.append(provider(f"{name}-layer", f"{label}, streamed by layer", run, impl=name, mode="layer"))
        found.append(provider(name, f"{label}, streamed" if workload.task == "tower" else label, run, impl=name))
    if workload.task in ("tower", "questions"):
        found.append(provider("tower", "the vision tower alone", models.tower_alone, is_floor=True))
    return found
