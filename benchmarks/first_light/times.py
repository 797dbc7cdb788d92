"""How long everything takes, as replays of graphs and by the clock, beside plain torch and the card's ceilings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import igva_kernels as ik
from benchmarks.first_light.bench import DEVICE, IS_CARD, OPS, PLAIN_FORMS, SHAPES, block, clocks, impl_here, rate
from benchmarks.measure import memory_of
from benchmarks.providers import PLAIN, bind, providers
from benchmarks.steps import figures
from benchmarks.workloads import Connector, operations
from igva_kernels import MixPlan
from igva_kernels.ops.deform_attn.cases import DeformCase
from igva_kernels.ops.weighted_mix.cases import Inputs
from igva_kernels.registry import REFERENCE, operators

Call = Callable[[], Any]


def impl_of_block(backend: str) -> str:
    """``backend`` for the block; in a rehearsal, what serves the CPU."""
    return impl_here(operators()["weighted_mix"], backend, *block("mlp", 1).case.demands)


def ceilings() -> bool:
    """The card's own: a copy, a large product, the block's bare products by the library, GELU."""
    oks = [figures({"what": "copy"}, rate=_copy), figures({"what": "8192^3"}, rate=_product)]
    for batch in SHAPES.batches:
        (m, n, k), _ = block("mlp", batch).products()
        a, z, one, two = _normal(m, k), _normal(m, n), _normal(n, k), _normal(n, n)

        def gemms(a: Tensor = a, z: Tensor = z, one: Tensor = one, two: Tensor = two) -> None:
            F.linear(a, one)
            F.linear(z, two)

        calls: dict[str, Call] = {
            "us": gemms, "gemm1_us": partial(F.linear, a, one), "gemm2_us": partial(F.linear, z, two),
            "gelu_us": partial(F.gelu, z),
        }  # fmt: skip
        makers = {name: partial(clocks().graph_us, call) for name, call in calls.items()}
        oks.append(figures({"what": "two bare GEMMs", "B": batch}, **makers))
    return all(oks)


def _copy(size: int = 1 << 30 if IS_CARD else 1 << 16) -> dict[str, float | None]:
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    us = clocks().graph_us(partial(torch.empty_like(source).copy_, source))
    return {"us": us, "gbps": rate(2 * size, us, 1e9)}


def _product(side: int = 8192 if IS_CARD else 32) -> dict[str, float | None]:
    us = clocks().graph_us(partial(torch.mm, _normal(side, side), _normal(side, side)))
    return {"us": us, "tflops": rate(2 * side**3, us, 1e12)}


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def forward(connector: Connector, inputs: Inputs, run: Callable[[Inputs], Tensor]) -> Call:
    """A call without gradients."""
    return bind(connector, run, inputs).call


def plain() -> bool:
    """Plain torch, and its mix alone."""
    oks = []
    for batch in SHAPES.batches:
        mlp, mix = block("mlp", batch), block("mix", batch)
        inputs = mlp.draw(DEVICE)
        for form, code in PLAIN_FORMS.items():
            whole = forward(mlp, inputs, partial(code, mlp.case))
            alone = forward(mix, inputs, partial(code, mix.case))
            row = {"form": form, "B": batch}
            oks.append(figures(row, **clocks().both(whole), mix_us=partial(clocks().graph_us, alone)))
    return all(oks)


def blocks(backend: str) -> bool:
    """A backend's mix, Linear and whole block."""
    oks = []
    for batch in SHAPES.batches:
        inputs = block("mlp", batch).draw(DEVICE)
        makers: dict[str, Call] = {}
        for what in OPS:
            part = block(what, batch)
            call = forward(part, inputs, partial(part.case.forward, impl=impl_of_block(backend)))
            makers |= {f"{what}_us": partial(clocks().graph_us, call)}
            makers |= {f"{what}_wall_us": partial(clocks().wall_us, call)}
        oks.append(figures({"B": batch}, **makers))
    return all(oks)


def launches(backend: str) -> bool:
    """The kernels that a call of the block launches, by name, with the microseconds of each."""
    oks = []
    for batch in SHAPES.batches[:3:2]:
        mlp = block("mlp", batch)
        call = forward(mlp, mlp.draw(DEVICE), partial(mlp.case.forward, impl=impl_of_block(backend)))
        oks.append(figures({"B": batch}, kernels=partial(_kernels, call)))
    return all(oks)


def _kernels(call: Call) -> list[list[Any]]:
    for _ in range(2):
        call()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if IS_CARD else activity.CPU]) as profile:
        call()
        if IS_CARD:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if IS_CARD else torch.autograd.DeviceType.CPU
    found = [event for event in profile.events() if event.device_type == kind]
    return [[event.name[:120], round(event.time_range.elapsed_us(), 1)] for event in found[:40]]


def training(backend: str, label: str) -> bool:
    """Forward and backward, plain torch first; gradients of the mix weights and all parameters."""
    oks = []
    for batch in SHAPES.batches[-2:]:
        connector = block("mlp", batch)
        inputs = connector.draw(DEVICE)
        ours = partial(connector.case.forward, impl=impl_of_block(backend))
        runs = {"plain": partial(PLAIN_FORMS["published"], connector.case), label: ours}
        for name, run in runs.items():
            both = bind(replace(connector, mode="both"), run, inputs).call

            def peak(both: Call = both) -> int:
                both()
                return round(memory_of(both, DEVICE)[1].peak / 2**20)

            row = {"provider": name, "B": batch}
            oks.append(figures(row, peak_mib=peak, **clocks().both(both)))
    return all(oks)


def compiled(mode: str) -> bool:
    """Plain torch as additions, the form that compiles best, under torch.compile; the published one too at the end."""
    batches = SHAPES.batches[-1:] if mode != "default" else (SHAPES.batches[-1], *SHAPES.batches[:-1])
    oks = [_compiled(mode, "additions", batch) for batch in batches]
    if mode == "default":
        oks.append(_compiled(mode, "published", SHAPES.batches[-1]))
    return all(oks)


def _compiled(mode: str, form: str, batch: int) -> bool:
    torch.compiler.reset()
    connector = block("mlp", batch)
    inputs = connector.draw(DEVICE)
    # Graphs of torch's own cannot be captured into another one, and would copy the inputs first.
    options = {} if mode == "default" else {"mode": f"{mode}-no-cudagraphs"}
    code = torch.compile(partial(PLAIN_FORMS[form], connector.case), dynamic=False, **options)
    call = forward(connector, inputs, code)

    def seconds() -> float:
        start = time.perf_counter()
        call()
        return round(time.perf_counter() - start, 1)

    row = {"mode": mode, "form": form, "B": batch}
    return figures(row, compile_s=seconds, **clocks().both(call))


def deform(backend: str) -> bool:
    """MMFuser's attention, forward and with its backward, beside plain torch's code."""
    grid, heads, width = ((24, 24), 16, 64) if IS_CARD else ((3, 4), 2, 16)
    oks = []
    for batch in (1, 16) if IS_CARD else (1,):
        for dtype in (torch.bfloat16, torch.float32):
            case = DeformCase("", batch, (grid,) * 4, heads, width, 4, joined=True)
            inputs = case.draw(0, dtype, DEVICE)
            leaves = [tensor.detach().requires_grad_() for tensor in (*inputs.value, inputs.sampling, inputs.logits)]
            for name in (REFERENCE, backend):
                impl = name if name == REFERENCE else impl_here(operators()["deform_attn"], name, *case.demands)

                def attend(impl: str = impl, leaves: list[Tensor] = leaves, case: DeformCase = case) -> Tensor:
                    return ik.deform_attn(leaves[0], case.shapes, leaves[1], leaves[2], impl=impl)

                row = {"provider": name, "B": batch, "dtype": str(dtype)[6:]}
                oks.append(_both_modes(row, attend, leaves, inputs.grad_out, graph=name != REFERENCE))
    return all(oks)


def inject(backend: str) -> bool:
    """DeepStack's injection, forward and with its backward, beside the masked write of transformers."""
    from benchmarks.injection import DEEPSTACK, deepstack_process

    tokens, width, count = DEEPSTACK.values() if IS_CARD else (16, 32, 12)
    hidden, features = (_normal(1, tokens, width).requires_grad_(), _normal(count, width).requires_grad_())
    mask = torch.zeros(1, tokens, dtype=torch.bool, device=DEVICE)
    mask[0, torch.randperm(tokens, device=DEVICE)[:count]] = True
    rows, grad = ik.token_rows(mask), _normal(1, tokens, width)
    impl = impl_here(operators()["inject_tokens"], backend)
    calls: dict[str, Callable[[], Tensor]] = {
        "masked write": lambda: deepstack_process(hidden, mask, features),
        REFERENCE: lambda: ik.inject_tokens(hidden, features, rows, impl=REFERENCE),
        backend: lambda: ik.inject_tokens(hidden, features, rows, impl=impl),
        f"{backend}, with token_rows": lambda: ik.inject_tokens(hidden, features, ik.token_rows(mask), impl=impl),
    }
    return all([
        _both_modes({"provider": name}, call, [hidden, features], grad, graph=name not in ("masked write", REFERENCE))
        for name, call in calls.items()
    ])  # fmt: skip


def _both_modes(
    row: dict[str, Any], call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor, graph: bool = True
) -> bool:
    """Rows of a forward, and of a forward and backward; without ``graph`` for code that may wait for the GPU, as a
    masked write does: a capture that fails would leave this process broken."""

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), leaves, grad)

    oks = []
    for mode, run in (("forward", torch.no_grad()(call)), ("both", both)):
        makers: dict[str, Call] = {"graph_us": partial(clocks().graph_us, run)} if graph else {}
        makers |= {"events_us": partial(clocks().events_us, run), "wall_us": partial(clocks().wall_us, run)}
        oks.append(figures({**row, "mode": mode}, **makers))
    return all(oks)


def all_operators() -> bool:
    """The large case of every other operator, by plain torch and by each backend."""
    oks = []
    for workload in operations(DEVICE, "bf16" if IS_CARD else "fp32"):
        inputs = workload.case.draw(0, workload.torch_dtype, DEVICE)
        for name, provider in providers(workload, DEVICE).items():
            call = provider.bind(inputs).call
            row = {"case": workload.name, "provider": name, "B": workload.batch}
            # Plain torch may wait for the GPU, which no graph can hold; see ``_both_modes``.
            makers: dict[str, Call] = {} if name == PLAIN else {"graph_us": partial(clocks().graph_us, call)}
            makers |= {"events_us": partial(clocks().events_us, call), "wall_us": partial(clocks().wall_us, call)}
            oks.append(figures(row, **makers))
        if not IS_CARD:
            break  # one shows that it works
    return all(oks)


def ablations() -> bool:
    """The first Linear of the CUDA backend with parts left out, through public calls.

    With ``IGVA_KERNELS_FUSED_GEMM=1`` it is the GEMM that overlaps with the mix, without it the mix kernel and cuBLAS.
    """
    impl, oks = impl_of_block("cuda"), []
    overlapped = os.environ.get("IGVA_KERNELS_FUSED_GEMM") == "1"
    for batch in SHAPES.batches:
        whole = block("linear", batch)
        taps = block("linear", batch, plan=MixPlan.concat([-2, -3], SHAPES.tower.layers + 1))
        narrow = block("linear", batch, hidden=256)
        # By connector, so that its inputs are drawn once: what is left in of bias and activation.
        parts: list[tuple[Connector, dict[str, tuple[bool, str | None]]]] = [
            (whole, {"whole": (True, "gelu"), "no activation": (True, None), "no bias": (False, "gelu")}),
            (taps, {"taps only": (True, "gelu"), "product alone": (False, None)}),
            (narrow, {"mix only (H 256)": (True, "gelu")}),
        ]
        for connector, kept in parts:
            inputs, case = connector.draw(DEVICE), connector.case
            for part, (has_bias, activation) in kept.items():
                call = torch.no_grad()(partial(
                    ik.layer_mix_linear, inputs.layers, case.plan, inputs.mix_weights, inputs.params["weight1"],
                    inputs.params["bias1"] if has_bias else None, activation=activation, skip_tokens=case.skip,
                    impl=impl,
                ))  # fmt: skip
                row = {"B": batch, "part": part, "overlapped": overlapped}
                oks.append(figures(row, us=partial(clocks().graph_us, call)))
    return all(oks)
