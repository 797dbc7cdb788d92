"""Everything on one GPU in one go: checks first, then measures, within eight minutes.

    python benchmarks/gpu_suite.py [--impl triton|cuda] [--out DIR] [--seconds 480] [--skip-checks] [--tune]

Checks: the backend's GPU tests, and compute-sanitizer on small shapes where the tool is there; nothing is measured if
they fail. Measures, at the shapes of CLIP-L/336 and a 7B language model in bf16: copy bandwidth and bare cuBLAS
products; the mix kernel; the block, forward and with its backward, beside the plain code (as published, and rewritten
with additions), each eager, compiled, and as CUDA-graph replays; the whole connector from the group CLS on; memory.

The variants of a group are timed in turn, round by round, and compared with the group's baseline round by round.
Writes gpu_suite_IMPL.csv and environment.json to DIR (benchmarks/results by default); a group that no longer fits the
time is left out, and said so.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import igva_kernels as ik
from igva_kernels.nn import WeightAllocator, column_summaries

ROOT = Path(__file__).parent.parent
PLAN = ik.MixPlan.igva()
TOKENS, WIDTH, HIDDEN, SENTENCE = 577, 1024, 4096, 768
BATCHES = (1, 4, 16, 64, 128)

Call = Callable[[], object]


class Record(NamedTuple):
    """One figure: a line of the CSV."""

    group: str
    variant: str
    mode: str
    """How it ran: "graph" (CUDA-graph replays) or "eager"."""
    batch: int
    unit: str
    p50: float
    p20: float
    p80: float
    baseline: str = ""
    ratio: float = 1.0
    """Median over the rounds of this variant's time / the baseline's."""


class Connector:
    """Random inputs of one batch size, and the variants of the block."""

    impl = "triton"
    """The backend that is measured."""

    def __init__(self, batch: int) -> None:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device="cuda") * scale).bfloat16()

        self.batch = batch
        self.states = [normal(batch, TOKENS, WIDTH) for _ in range(25)]
        self.weights = torch.randn(batch, 4, device="cuda").softmax(-1)
        self.params = [
            normal(HIDDEN, 2 * WIDTH, scale=(2 * WIDTH) ** -0.5), normal(HIDDEN),
            normal(HIDDEN, HIDDEN, scale=HIDDEN**-0.5), normal(HIDDEN),
        ]  # fmt: skip
        self.allocator = WeightAllocator(SENTENCE, WIDTH, 4).cuda().bfloat16()
        self.sentence = normal(batch, SENTENCE)

    def fused(self) -> Tensor:
        return ik.layer_mix_mlp(self.states, PLAN, self.weights, *self.params, skip_tokens=1, impl=self.impl)

    def published(self) -> Tensor:
        return ik.layer_mix_mlp(self.states, PLAN, self.weights, *self.params, skip_tokens=1, impl="reference")

    def additions(self) -> Tensor:
        """The plain code with the stack and the mean written as sums, which the compiler fuses best."""
        mixed = 0
        for k in range(4):
            group = self.states[1 + 6 * k]
            for layer in range(2 + 6 * k, 7 + 6 * k):
                group = group + self.states[layer]
            mixed = mixed + group[:, 1:] * (self.weights[:, k, None, None] / 6).bfloat16()
        w1, b1, w2, b2 = self.params
        return F.linear(F.gelu(F.linear(torch.cat([self.states[23][:, 1:], mixed], -1), w1, b1)), w2, b2)

    def two_gemms(self) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "operands"):
            rows = self.batch * (TOKENS - 1)
            self.operands = [torch.randn(rows, n, device="cuda").bfloat16() for n in (2 * WIDTH, HIDDEN)]
        return self.operands[0] @ self.params[0].t(), self.operands[1] @ self.params[2].t()

    def mix(self) -> Tensor:
        return ik.layer_mix(self.states, PLAN, self.weights, skip_tokens=1, impl=self.impl)

    def whole(self, impl: str) -> Tensor:
        """From the group CLS to the visual tokens."""
        weights = self.allocator(self.sentence, column_summaries(self.states, PLAN, impl=impl))
        return ik.layer_mix_mlp(self.states, PLAN, weights, *self.params, skip_tokens=1, impl=impl)

    def step(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        """Forward and the gradients of stage 2."""
        leaves = [self.weights, *self.params]
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad():
            out = forward()
            return list(torch.autograd.grad(out, leaves, torch.ones_like(out)))


def captured(call: Call) -> Call:
    """``call`` as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def in_turn(variants: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every round by variant; each round runs all, after three that are not counted.

    A product that takes longer than a Python launch goes ahead of every measured call, so that an eager call's kernels
    follow one another as they do behind other work; what it costs the CPU shows where it exceeds that head start.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    ahead = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    for i in range(3 + rounds):
        for name, call in variants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            ahead @ ahead
            start.record()
            call()
            end.record()
            if i >= 3:
                events.append((name, start, end))
    torch.cuda.synchronize()
    for name, start, end in events:
        times[name].append(start.elapsed_time(end) * 1e3)
    return times


def records(group: str, mode: str, batch: int, times: dict[str, list[float]], baseline: str) -> Iterator[Record]:
    """The rows of a group, each beside the baseline."""
    for name, values in times.items():
        p20, *_, p80 = quantiles(values, n=5)
        ratio = median(a / b for a, b in zip(values, times[baseline], strict=True))
        yield Record(group, name, mode, batch, "us", median(values), p20, p80, baseline, ratio)


def ceilings(rounds: int) -> Iterator[Record]:
    """The card's own: a device copy, and the products of the block by cuBLAS."""
    source = torch.randn(1 << 29, device="cuda").bfloat16()
    target = torch.empty_like(source)
    values = [2 * source.nbytes / us / 1e3 for us in in_turn({"copy": lambda: target.copy_(source)}, rounds)["copy"]]
    p20, *_, p80 = quantiles(values, n=5)
    yield Record("copy", "device to device", "eager", 0, "GB/s", median(values), p20, p80)
    for batch in BATCHES:
        connector = Connector(batch)
        yield from records(
            "two bare GEMMs", "graph", batch, in_turn({"cublas": captured(connector.two_gemms)}, rounds), "cublas"
        )


def mix_forward(rounds: int) -> Iterator[Record]:
    """The mix kernel beside a copy of as many bytes."""
    for batch in BATCHES:
        connector = Connector(batch)
        moved = (24 + 2) * batch * (TOKENS - 1) * WIDTH * 2
        source = torch.randn(moved // 4, device="cuda").bfloat16()
        target = torch.empty_like(source)
        variants = {"copy of as many bytes": captured(lambda s=source, t=target: t.copy_(s)),
                    "fused": captured(connector.mix)}  # fmt: skip
        yield from records("mix", "graph", batch, in_turn(variants, rounds), "copy of as many bytes")
        yield from records("mix", "eager", batch, in_turn({"fused": connector.mix}, rounds), "fused")


def block_forward(rounds: int) -> Iterator[Record]:
    """The block beside its bare products, the plain code, and the plain code compiled in both forms."""
    for batch in BATCHES:
        connector = Connector(batch)
        # Each batch size compiles anew; the compiler would give up after a few.
        torch.compiler.reset()
        calls: dict[str, Call] = {
            "published": connector.published,
            "published, compiled": torch.compile(connector.published),
            "additions, compiled": torch.compile(connector.additions),
            "fused": connector.fused,
        }
        graphs = {"two bare GEMMs": captured(connector.two_gemms)} | {k: captured(c) for k, c in calls.items()}
        yield from records("block forward", "graph", batch, in_turn(graphs, rounds), "two bare GEMMs")
        yield from records("block forward", "eager", batch, in_turn(calls, rounds), "published")


def concat_forward(rounds: int) -> Iterator[Record]:
    """VipLlava's five taps and its first Linear: the concat, or a GEMM that reads the taps."""
    plan = ik.MixPlan.concat([-2, -5, -8, -11, 6], 25)
    for batch in (1, 16, 64):
        connector = Connector(batch)
        weight, bias = torch.randn(HIDDEN, 5 * WIDTH, device="cuda").bfloat16() / 64, connector.params[1]
        calls = {
            name: lambda s=connector.states, w=weight, b=bias, i=impl: ik.layer_mix_linear(
                s, plan, None, w, b, activation="gelu", skip_tokens=1, impl=i
            )
            for name, impl in (("published", "reference"), ("fused", connector.impl))
        }  # fmt: skip
        graphs = {name: captured(call) for name, call in calls.items()}
        yield from records("concat + Linear", "graph", batch, in_turn(graphs, rounds), "published")


def training(rounds: int) -> Iterator[Record]:
    """Forward and backward of stage 2."""
    for batch in (1, 64):
        connector = Connector(batch)
        forwards = {"published": connector.published, "fused": connector.fused,
                    "additions, compiled": torch.compile(connector.additions)}  # fmt: skip
        variants = {name: lambda c=connector, f=f: c.step(f) for name, f in forwards.items()}
        yield from records("training step", "eager", batch, in_turn(variants, rounds), "published")


def whole_connector(rounds: int) -> Iterator[Record]:
    """Group CLS, allocator, weights, block."""
    for batch in (1, 64):
        connector = Connector(batch)
        calls = {
            name: lambda c=connector, i=impl: c.whole(i)
            for name, impl in (("plain", "reference"), ("fused", connector.impl))
        }
        graphs = {name: captured(call) for name, call in calls.items()}
        yield from records("whole connector", "graph", batch, in_turn(graphs, rounds), "plain")
        yield from records("whole connector", "eager", batch, in_turn(calls, rounds), "plain")


def memory(rounds: int) -> Iterator[Record]:
    """MB an image: at inference beyond the inputs, output included; saved for backward beyond the output."""
    batch = 16
    connector = Connector(batch)
    for name, call in (("published", connector.published), ("fused", connector.fused)):
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = (torch.cuda.max_memory_allocated() - before) / batch / 1e6
        leaves = [connector.weights, *connector.params]
        for leaf in leaves:
            leaf.requires_grad_()
        before = torch.cuda.memory_allocated()
        with torch.enable_grad():
            out = call()
        assert isinstance(out, Tensor)
        saved = (torch.cuda.memory_allocated() - before - out.nbytes) / batch / 1e6
        for leaf in leaves:
            leaf.requires_grad_(False)
        yield Record("memory, inference", name, "eager", batch, "MB an image", peak, peak, peak)
        yield Record("memory, saved", name, "eager", batch, "MB an image", saved, saved, saved)


GROUPS = (ceilings, mix_forward, block_forward, training, memory, whole_connector, concat_forward)


def check(seconds: float) -> None:
    """Exits where a GPU test or the memory checker fails."""
    file = ROOT / "tests" / f"test_{Connector.impl}_gpu.py"
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", str(file)]
    # Most of the time goes into compiling, which several processes share.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    paths = dict(os.environ, PYTHONPATH=str(ROOT))
    subprocess.run([*tests, *workers], env=paths, cwd=ROOT, check=True, timeout=seconds)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer: not on this machine, left out")
        return
    # Torch's cache would hide an access beyond a tensor but within its block.
    uncached = paths | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    runs = {
        "triton": [("memcheck", [*tests, "-k", "obey and odd and bf16"])],
        "cuda": [(tool, [sys.executable, str(file)]) for tool in ("memcheck", "racecheck")],
    }
    for tool, command in runs[Connector.impl]:
        sanitized = [sanitizer, "--tool", tool, "--error-exitcode", "1", *command]
        subprocess.run(sanitized, env=uncached, cwd=ROOT, check=True, timeout=seconds)


def environment() -> dict[str, object]:
    """What the figures depend on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count, "memory": properties.total_memory, "torch": torch.__version__,
        "cuda": torch.version.cuda, "triton": triton.__version__, "python": sys.version.split()[0],
        "igva_kernels": ik.__version__, "revision": revision,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", choices=("triton", "cuda"), default="triton", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=480, help="for everything")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--skip-checks", action="store_true", help="after a run that passed them")
    parser.add_argument("--tune", action="store_true", help="tune for this card first, and measure with that")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_suite: torch sees no CUDA device")
    Connector.impl = options.impl
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    if not options.skip_checks:
        check(options.seconds / 2)
    if options.tune:
        from igva_kernels.backends.triton.config import file_name
        from igva_kernels.backends.triton.tune import tune

        tune(output=options.out / file_name(torch.cuda.get_device_name()), log=print)
        os.environ["IGVA_KERNELS_CONFIG_DIR"] = str(options.out)
    with open(options.out / f"gpu_suite_{options.impl}.csv", "w", newline="") as file, torch.no_grad():
        writer = csv.writer(file)
        writer.writerow(Record._fields)
        for group in GROUPS:
            try:
                for record in group(options.rounds):
                    writer.writerow(record)
                    file.flush()
                    print(f"{record.group:18} {record.mode:6} B {record.batch:<4} {record.variant:24} "
                          f"{record.p50:10.1f} {record.unit:12} x {record.ratio:.3f}")  # fmt: skip
                    if time.monotonic() > deadline:
                        raise TimeoutError
            except torch.OutOfMemoryError:
                print(f"{group.__name__}: the rest of it needs more memory than this card has")
            except TimeoutError:
                raise SystemExit(f"out of time in {group.__name__}; what follows it was left out") from None
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
