"""The benchmark suite at tiny sizes: what it refuses, what it writes, and what it makes of it."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as bench
from benchmarks import device, gpu_suite, host, measure, plots, providers, report, results, scaling, workloads
from benchmarks.first_light import report as first_light
from benchmarks.workloads import IGVA, Tower, connector
from igva_kernels import cli
from igva_kernels.ops.weighted_mix.cases import Case
from igva_kernels.verify import DTYPES

ROOT = Path(__file__).parents[2]
TINY = Tower(tokens=10, width=16, layers=24, skip=1)
ENV = results.Environment(
    date="2026-01-02T03:04:05Z", revision="abcdef0123", device="A Device", driver="1", threads=1, python="3.11.0",
    torch="2.13.0", triton="", igva_kernels="0.1.0",
)  # fmt: skip


def tiny(batch=3, dtype="fp32", mode="forward", op="layer_mix_mlp", **options):
    return connector("igva-2", IGVA, batch, dtype, mode, op=op, tower=TINY, hidden=24, **options)


@pytest.fixture(autouse=True, scope="module")
def _small_ceilings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "CEILING_SIZES", {"cpu": (2**16, (32, 32, 32)), "cuda": (2**16, (32, 32, 32))})
        yield


@cache
def machine(device="cpu"):
    return measure.Machine(device)


def found(workload, **chosen):
    """Results of a workload by all of its providers, or by plain torch and the ones given."""
    available = providers.providers(workload, "cpu")
    chosen = {"plain": available["plain"], **chosen} if chosen else available
    return list(measure.measure(workload, chosen, measure.CpuTimer(), machine(), budget=0.01))


def rows_of(workload, env=ENV):
    return [results.row_of(figures, env) for figures in found(workload)]


@pytest.fixture(scope="module")
def rows():
    """A small device's CSV: both main workloads at three batch sizes, and a training step."""
    some = [tiny(batch, dtype) for dtype in ("fp32", "bf16") for batch in (1, 3, 4)]
    some += [replace(tiny(batch, op="layer_mix"), name="igva-2-mix") for batch in (1, 3, 4)]
    return [row for workload in [*some, tiny(mode="both")] for row in rows_of(workload)]


# ---- a wrong provider ------------------------------------------------------------------------------------------------


def wrong_in(result, factor=2):
    """A provider that is right but for one result."""

    def bind(workload, inputs):
        bound = providers.providers(workload, "cpu")["plain"].bind(inputs)

        def call():
            answers = bound.call()
            answers[result] = answers[result] * factor
            return answers

        return providers.Bound(call, bound.keeps)

    return lambda workload: providers.Provider("wrong", "wrong", lambda inputs: bind(workload, inputs))


@pytest.mark.parametrize(
    ("mode", "result"),
    [("forward", "output"), ("both", "output"), ("both", "grad weight1"), ("backward", "grad bias2")],
)
def test_a_wrong_provider_is_refused_and_never_timed(mode, result):
    workload = tiny(mode=mode)
    plain, refused = sorted(found(workload, wrong=wrong_in(result)(workload)), key=lambda f: f.provider.name)
    assert isinstance(plain, measure.Figures)
    assert isinstance(refused, measure.Refused)
    assert refused.is_wrong
    assert result in refused.reason


def test_a_gradient_of_mix_weights_is_refused_when_grossly_wrong():
    workload = tiny(mode="both")
    provider = wrong_in("grad mix_weights", 1.01)(workload)
    assert all(isinstance(f, measure.Figures) for f in found(workload, almost=provider))  # one draw cannot tell

    def reversed_sign(inputs):
        call = provider.bind(inputs).call
        return providers.Bound(lambda: {name: -v if "mix" in name else v for name, v in call().items()})

    assert any(isinstance(f, measure.Refused) for f in found(workload, wrong=replace(provider, bind=reversed_sign)))


def test_what_was_refused_is_not_in_the_csv_and_shows_in_the_exit_status(tmp_path, monkeypatch, capsys):
    workload = tiny()
    honest = providers.providers(workload, "cpu")
    listed = {"plain": honest["plain"], "wrong": wrong_in("output")(workload)}
    monkeypatch.setattr(bench, "providers", lambda *_: listed)
    monkeypatch.setattr(bench, "suite", lambda *_: [workload])
    path = tmp_path / "some.csv"
    assert bench.main(["--device", "cpu", "--output", str(path)]) == 1
    assert [row.provider for row in results.read(path)] == ["plain"]
    assert "WRONG" in capsys.readouterr().out
    listed["wrong"] = replace(listed["wrong"], name="plain-compiled")
    assert bench.main(["--device", "cpu", "--output", str(tmp_path / "other.csv")]) == 0  # not our failure
    assert [row.provider for row in results.read(tmp_path / "other.csv")] == ["plain"]
    del listed["wrong"]
    assert bench.main(["--device", "cpu", "--output", str(path)]) == 0
    assert [row.provider for row in results.read(path)] == ["plain", "plain"]


def test_a_provider_that_cannot_serve_is_left_out_without_blame():
    def cannot(inputs):
        raise NotImplementedError("odd width")

    (refused,) = [f for f in found(tiny(), none=providers.Provider("none", "none", cannot))
                  if isinstance(f, measure.Refused)]  # fmt: skip
    assert refused.reason == "odd width"
    assert not refused.is_wrong


def test_a_provider_that_breaks_is_to_blame_and_the_others_go_on():
    def breaks(inputs):
        raise RuntimeError("an illegal access\nand a long trace")

    figures = found(tiny(), broken=providers.Provider("broken", "broken", breaks))
    (refused,) = [f for f in figures if isinstance(f, measure.Refused)]
    assert refused.is_wrong
    assert refused.reason == "an illegal access"
    assert [f.provider.name for f in figures if isinstance(f, measure.Figures)] == ["plain"]


# ---- workloads and providers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", range(len(workloads.family(1, "fp32"))))
def test_the_providers_compute_the_same_workload(kind, dtype):
    """Every connector of the suite at a tiny size: none is refused."""
    case = workloads.family(2, dtype)[kind].case
    small = replace(workloads.family(2, dtype)[kind], case=replace(case, tokens=9 + case.skip, width=32, hidden=48))
    figures = found(small)
    assert {f.provider.name for f in figures} >= {"plain", "additions", "products"}
    assert all(isinstance(f, measure.Figures) for f in figures)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_two_workloads_of_a_suite_share_a_key(device):
    def key(workload):
        return workload.name, workload.mode, workload.dtype, workload.batch, getattr(workload, "case", None)

    for name in ("full", "quick", "shapes"):
        every = list(map(key, workloads.suite(name, device)))
        assert len(set(every)) == len(every)


RATES = {"fp32": 13e10, "bf16": 26e10, "fp16": 13e10}


def test_a_machine_that_multiplies_fast_in_every_dtype_measures_the_suite_as_it_is_listed():
    assert workloads.affordable(workloads.cpu_suite(), RATES) == workloads.cpu_suite()


def test_where_a_dtype_is_slow_every_workload_stays_and_says_what_was_changed():
    listed = workloads.cpu_suite()
    slow = workloads.affordable(listed, RATES | {"bf16": 2e10, "fp16": 2e10})
    assert len(set(slow)) == len(slow)
    towers = {"vision-tower", "another-question", "training-step"}
    changed = {f"{name}-224px" for name in towers} | {"3-questions-224px"}
    assert {w.name for w in slow} == {w.name for w in listed} - towers - {"8-questions"} | changed
    assert {(w.name, w.mode) for w in slow} >= {(w.name, w.mode) for w in listed if not w.is_model}
    block = {(w.mode, w.dtype): {v.batch for v in slow if (v.name, v.mode, v.dtype) == ("igva-2", w.mode, w.dtype)}
             for w in slow if w.name == "igva-2"}  # fmt: skip
    assert block["forward", "bf16"] == {1, 2}
    assert block["forward", "fp32"] == {1, 2, 4}
    assert ("both", "bf16") not in block and 2 in block["both", "fp32"]
    by_key = {replace(w, note=""): w for w in slow}
    assert all(by_key[w].note == "" for w in listed if w in by_key)
    assert all("6.5 x slower" in w.note for w in slow if w not in listed)
    assert max(w.plain_flops / (2e10 if w.dtype in ("bf16", "fp16") else 13e10) for w in slow) < 10.0


def test_products_and_bytes_of_the_paper_shapes():
    """GEMM1 9.66 and GEMM2 19.33 GFLOP per image; a backward without the base half of dA."""
    forward, backward, both = (workloads.igva(1, "bf16", mode) for mode in workloads.MODES)
    assert forward.products() == [(576, 4096, 2048), (576, 4096, 4096)]
    gemms = sum(2 * m * n * k for m, n, k in backward.products()) / 1e9
    assert gemms == pytest.approx(53.2, abs=0.1)
    assert both.flops == pytest.approx(forward.flops + backward.flops)
    mix = workloads.igva_mix(1, "bf16")
    assert mix.num_bytes == 576 * 1024 * 2 * (24 + 2)
    assert both.num_bytes is None


def test_more_images_than_are_drawn_repeat_in_memory_of_their_own():
    inputs = tiny(batch=8).draw("cpu")
    assert inputs.layers[1].shape[0] == inputs.mix_weights.shape[0] == inputs.grad_out.shape[0] == 8
    assert torch.equal(inputs.layers[1][:4], inputs.layers[1][4:])
    copies = workloads.clones(inputs, 3)
    assert len({copy.layers[1].data_ptr() for copy in copies}) == 3


@pytest.mark.parametrize("task", ["tower", "connector", "questions", "another question", "training step"])
def test_the_tasks_of_the_model(task):
    mode = "both" if task == "training step" else "forward"
    workload = workloads.Model(name=task, dtype="fp32", batch=1, mode=mode, task=task, size="tiny",
                               questions=3 if task == "questions" else 1)  # fmt: skip
    chosen = providers.providers(workload, "cpu")
    figures = list(measure.measure(workload, chosen, InProcess(), machine(), budget=0.01)) if task != "tower" else []
    if task == "tower":
        inputs = measure.draw(workload, "cpu")
        exact = measure.exact_results(workload, inputs)
        plain = chosen["plain"].bind(inputs).call()
        for name, provider in chosen.items():
            if not provider.is_floor:
                answers = provider.bind(inputs).call()
                assert all(v.ok for v in measure.verdicts(workload, answers, exact, plain)), name
    assert all(isinstance(f, measure.Figures) for f in figures)
    assert {"plain", *providers.kernels("cpu", torch.float32)} <= set(chosen)


class InProcess(measure.CpuTimer):
    """As few rounds as can be."""

    def in_turn(self, calls, budget, *_, **options):
        return super().in_turn(calls, budget, 2, 2, **options)


# ---- time and memory -------------------------------------------------------------------------------------------------


class Ticks(measure.Timer):
    """A timer whose marks are the calls themselves."""

    def __init__(self):
        self.order = []

    def once(self, call):
        self.order.append(call())
        return len(self.order)

    def seconds(self, marks):
        return [float(mark) for mark in marks]

    def end_round(self):
        self.order.append("|")


def test_rounds_interleave_and_rotate():
    ticks = Ticks()
    calls = {"a": [lambda: "a0", lambda: "a1"], "b": [lambda: "b0", lambda: "b1"]}
    times = ticks.in_turn(calls, budget=0.0, least=3, most=9)
    warm, rounds = ticks.order[:2], ticks.order[2:]
    assert warm == ["a1", "b1"]  # the first copies ran in their check
    assert rounds == ["a0", "b0", "|", "b1", "a1", "|", "a0", "b0", "|"]
    assert times["a"] == [3.0, 7.0, 9.0]
    assert times["b"] == [4.0, 6.0, 10.0]


def test_a_quick_call_has_two_turns_a_round_and_a_ceiling_fewer():
    ticks = Ticks()
    calls = {name: [lambda name=name: name] for name in "abc"}
    times = ticks.in_turn(calls, budget=0.0, least=5, twice=["b", "c"], beside={"copy": lambda: "-"})
    assert "".join(ticks.order) == "abccb-|bccba-|abccb-|bccba|abccb-|"
    assert {name: len(found) for name, found in times.items()} == {"a": 5, "b": 10, "c": 10, "copy": 4}


def test_a_time_is_paired_with_plain_of_its_own_round():
    assert measure.paired([8.0, 6.0], [2.0, 4.0, 3.0, 1.0]) == [4.0, 2.0, 2.0, 6.0]
    assert measure.paired([8.0, 4.0, 6.0, 6.0], [2.0, 3.0]) == [4.0, 2.0, 2.0, 2.0]
    assert measure.paired([8.0, 6.0], [2.0, 3.0]) == [4.0, 2.0]


def test_where_time_is_short_extra_providers_go_and_the_others_have_two_rounds():
    available = providers.providers(tiny(), "cpu")
    results_ = list(measure.measure(tiny(), available, measure.CpuTimer(), machine(), budget=9.0, share=0.0))
    fused = providers.kernels("cpu", torch.float32)
    kept = [f for f in results_ if isinstance(f, measure.Figures)]
    assert [f.provider.name for f in kept] == ["plain", *fused, "products"]
    assert {f.rounds for f in kept} == {2}
    refused = [f for f in results_ if isinstance(f, measure.Refused)]
    assert {f.provider.name for f in refused} == {"additions", "mix+library"}
    assert not any(f.is_wrong for f in refused)


def test_inputs_are_rotated_until_they_exceed_the_cache():
    workload = tiny()
    inputs = workload.draw("cpu")
    timer = measure.CpuTimer()
    assert len(measure.rotated(workload, inputs, timer)) == 1
    timer.copies_bytes = 10 * sum(layer.nbytes for layer in inputs.layers if layer is not None)
    assert len(measure.rotated(workload, inputs, timer)) > 2


def test_spread_and_speedup_are_those_of_the_rounds():
    assert measure.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (3.5, 2.0, 5.0)
    plain = next(f for f in found(tiny()) if f.provider.name == "plain")
    assert plain.speedup == (1.0, 1.0, 1.0)


def test_the_connector_takes_less_memory_than_plain_torch():
    tower = TINY._replace(tokens=577, width=128)  # a product works in half a megabyte at least
    for mode in ("forward", "both"):
        workload = connector("igva-2", IGVA, 4, "fp32", mode, tower=tower, hidden=256)
        by_name = {f.provider.name: f for f in found(workload) if not f.provider.is_floor}
        fused = by_name[providers.kernels("cpu", torch.float32)[0]]
        if mode == "forward":
            assert fused.saved_bytes is None
            assert fused.peak_bytes < by_name["plain"].peak_bytes
        else:
            assert fused.saved_bytes < by_name["plain"].saved_bytes


@pytest.mark.plain_memory
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_the_ceilings_are_those_of_the_best_round(dtype):
    one = machine()
    assert all(min(times) > 0 for times in InProcess().in_turn(
        {name: [call] for name, call in one.calls(dtype).items()}, 0.0).values())  # fmt: skip
    times = {name: [2.0, 1.0] for name in one.calls(dtype)}
    assert one.ceilings(times) == (2 * 2**16 / 1e9, 2 * 32**3 / 1e12)


# ---- results ---------------------------------------------------------------------------------------------------------


def test_csv_round_trip(tmp_path, rows):
    path = tmp_path / "deep" / "some.csv"
    assert results.read(path) == []
    results.append(path, rows[:2])
    results.append(path, rows[2:])
    back = results.read(path)
    assert len(back) == len(rows)
    for before, after in zip(rows, back, strict=True):
        assert after.key == before.key
        assert after.ms == pytest.approx(before.ms, rel=1e-4)
        assert (after.peak_mib is None) == (before.peak_mib is None)
        assert after.floor is before.floor
    assert path.read_text().count("workload") == 1  # one header


def test_a_csv_of_another_version_is_refused(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("group,variant,ms\n")
    with pytest.raises(ValueError, match="columns"):
        results.append(path, [])
    with pytest.raises(ValueError, match="columns"):
        results.read(path)


def test_two_machines_share_no_file_and_are_not_compared(tmp_path, rows, monkeypatch, capsys):
    other = [replace(row, device="Another", revision="fedcba9876") for row in rows[:2]]
    path = tmp_path / "some.csv"
    results.append(path, rows[:2])
    with pytest.raises(ValueError, match="A Device, 1 thread and Another, 1 thread"):
        results.append(path, other)
    with pytest.raises(ValueError, match="not of A Device, 1 thread and A Device, 4 threads"):
        results.append(path, [replace(rows[0], threads=4)])
    assert len(results.read(path)) == 2
    with pytest.raises(ValueError, match="its rows are of Another, 1 thread, not of this machine"):
        results.compare(other, rows, "fedcba")
    monkeypatch.setattr(bench, "suite", lambda *_: [tiny()])
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("it measured before it looked at the file"))
    assert bench.main(["--device", "cpu", "--output", str(path)]) == 2
    assert "a CSV has the rows of one machine" in capsys.readouterr().err


def test_a_machine_is_its_device_and_threads():
    names = [ENV.device, "A  Device+", "Another"]
    paths = {results.default_path(replace(ENV, device=name, threads=n)).name for name in names for n in (1, 2)}
    assert paths == {"a-device-1-thread.csv", "a-device-2-threads.csv", "another-1-thread.csv", "another-2-threads.csv"}


def test_errors_and_what_does_not_apply(rows):
    fused = next(row for row in rows if row.provider == "additions" and row.mode == "forward")
    assert 0 < fused.error <= fused.budget
    assert fused.plain_error > 0
    assert fused.judged == "output"
    assert fused.saved_mib is None
    floor = next(row for row in rows if row.floor)
    assert floor.judged == ""
    assert floor.error is None
    assert next(row for row in rows if row.mode == "both" and row.provider == "plain").saved_mib > 0


def test_comparison_with_an_earlier_revision(rows):
    def times(row, factor, speedup=1.0):
        """The row of another run: its time times ``factor``, its speed-up over plain torch times ``speedup``."""
        scaled = {f"ms{q}": getattr(row, f"ms{q}") * factor for q in ("", "_p20", "_p80")}
        scaled |= {f"speedup{q}": getattr(row, f"speedup{q}") * speedup for q in ("", "_p20", "_p80")}
        return replace(row, date="2026-02-01T00:00:00Z", revision="0123456789", **scaled)

    at = {row.provider: row for row in rows[:5]}
    plain, other, fused = at["plain"], at["additions"], at[providers.kernels("cpu", torch.float32)[0]]

    def verdicts(*now):
        return [change.verdict for change in results.compare(rows, now, "abcdef")]

    assert verdicts(times(plain, 1), times(other, 1), times(fused, 99, 1 / 99)) == ["same", "same", "slower"]
    assert verdicts(times(plain, 1), times(other, 1), times(fused, 1 / 99, 99)) == ["same", "same", "faster"]
    assert verdicts(times(plain, 99), times(other, 99), times(fused, 99)) == ["drift", "same", "same"]
    assert verdicts(times(plain, 99), times(other, 1), times(fused, 50, 1 / 50)) == ["drift", "same", "drift"]
    now = [times(plain, 1), times(fused, 99, 1 / 99)]
    assert results.compare(rows, now, "abcdef")[1].ratio == pytest.approx(99)
    older = [replace(row, date="2025-01-01T00:00:00Z", ms=1e9) for row in rows]
    assert results.compare([*older, *rows], now, "abcdef")[0].before.ms == rows[0].ms  # the newest of that revision
    with pytest.raises(ValueError, match="no row of revision fedcba"):
        results.compare(rows, now, "fedcba")


def test_an_earlier_run_of_the_same_revision_can_be_compared(rows):
    again = [replace(row, date="2026-02-01T00:00:00Z") for row in rows]
    changes = results.compare(rows, again, "abcdef")
    assert len(changes) == len(rows)
    assert {change.before.date for change in changes} == {ENV.date}


def test_the_newest_row_counts(rows):
    newer = replace(rows[0], date="2026-02-01T00:00:00Z", ms=7.0)
    assert results.newest([newer, *rows])[0].ms == 7.0
    assert results.newest([*rows, newer])[0].ms == 7.0
    assert len(results.newest([*rows, newer])) == len(rows)


# ---- what a machine is called ----------------------------------------------------------------------------------------

AVX2 = ["avx2", "fma3", "f16c", "AVX2"]
ZEN4 = [*AVX2, "avx512_f", "avx512_bf16", "AVX512"]


@pytest.mark.parametrize(
    ("features", "environment", "name"),
    [
        (AVX2, {}, "AVX2"),
        ([*AVX2, "avx512_f"], {}, "AVX-512"),
        (ZEN4, {}, "AVX-512-BF16"),
        ([*ZEN4, "amx_tile", "amx_bf16"], {}, "AMX"),
        (ZEN4, {"IGVA_KERNELS_CPU_ISA": "avx2"}, "AVX2 by IGVA_KERNELS_CPU_ISA"),
        (ZEN4, {"IGVA_KERNELS_CPU_ISA": "scalar", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "scalar by IGVA_KERNELS_CPU_ISA"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "AVX-512 by ONEDNN_MAX_CPU_ISA"),
        (ZEN4, {"DNNL_MAX_CPU_ISA": "SSE41"}, "scalar by DNNL_MAX_CPU_ISA"),
        ([*ZEN4, "amx_tile"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}, "AVX-512-BF16 by ONEDNN_MAX_CPU_ISA"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "AVX-512-BF16"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "ALL"}, "AVX-512-BF16"),
        (AVX2, {"IGVA_KERNELS_CPU_ISA": "avx2"}, "AVX2"),
    ],
)
def test_the_instruction_set_that_may_be_used(features, environment, name):
    assert device.instruction_set(features, environment) == name


def test_two_cpus_of_one_name_are_two_devices(tmp_path, monkeypatch):
    def named(family, model, features):
        text = f"processor\t: 0\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
        (tmp_path / "cpuinfo").write_text(text + "\n" + text)
        cpu = {"name": "AMD EPYC", "features": features, "torch_capability": "DEFAULT"}
        monkeypatch.setattr(device.info, "collect", lambda: {"cpu": cpu})
        return device.device_name("cpu")

    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    for switch in device.SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    assert named(25, 1, AVX2) == "AMD EPYC (family 25 model 1 stepping 1, AVX2)"
    assert named(25, 17, ZEN4) == "AMD EPYC (family 25 model 17 stepping 1, AVX-512-BF16)"
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "none")
    assert named(25, 1, AVX2) == "AMD EPYC (AVX2)"


def test_this_machine_has_a_name():
    name = device.device_name("cpu")
    assert name == results.environment("cpu").device
    assert re.fullmatch(r".+ \(.+\)", name)


# ---- growth ----------------------------------------------------------------------------------------------------------


def test_exponents_of_synthetic_growth():
    sizes = [1, 2, 4, 8, 16]
    exact = scaling.fit(sizes, [3.0 * size**1.5 for size in sizes])
    assert exact.exponent == pytest.approx(1.5)
    assert exact.error == pytest.approx(0.0, abs=1e-6)
    noisy = scaling.fit(sizes, [size * (1.1 if i % 2 else 0.9) for i, size in enumerate(sizes)])
    assert abs(noisy.exponent - 1.0) < 3 * noisy.error
    assert scaling.fit(sizes, [5.0] * 5).exponent == pytest.approx(0.0)


def test_growth_is_fitted_to_the_rows(rows):
    linear = [replace(row, ms=2.0 * row.batch, peak_mib=None if row.floor else 3.0) for row in rows]
    fits = {(g.workload, g.dtype, g.provider): g for g in scaling.growths(linear)}
    plain = fits["igva-2", "fp32", "plain"]
    assert plain.sizes == (1, 3, 4)
    assert plain.time.exponent == pytest.approx(1.0)
    assert plain.memory.exponent == pytest.approx(0.0)
    assert fits["igva-2", "fp32", "products"].memory is None


# ---- pictures and pages ----------------------------------------------------------------------------------------------


def test_pictures_of_one_training_step_alone(tmp_path, rows):
    assert [p.stem for p in plots.draw_all([r for r in rows if r.mode == "both"], tmp_path, "d")] == ["d-speedup"]


def test_the_report_and_the_table_of_the_readme(tmp_path, rows):
    folder, page, readme = tmp_path / "results", tmp_path / "RESULTS.md", tmp_path / "README.md"
    results.append(folder / "device.csv", [replace(row, batch=2) if row.batch == 3 else row for row in rows])
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    written = report.write(folder, page, readme)
    text = page.read_text()
    assert ENV.device in text
    assert "results/a-device-1-thread-time.png" in text
    assert "### Growth" in text
    pictures = [path for path in written if path.suffix == ".png"]
    assert {p.stem for p in pictures} == {f"a-device-1-thread-{w}" for w in ("time", "memory", "roofline", "speedup")}
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert min(path.stat().st_size for path in (picture, picture.with_suffix(".svg"))) > 10_000
    told = readme.read_text()
    assert told.startswith("before\n")
    assert told.endswith("after\n")
    assert "old" not in told
    assert "its mix alone, fp32, B 2" in told
    readme.write_text("no marks")
    page.unlink()
    with pytest.raises(ValueError, match="benchmarks: begin"):
        report.write(folder, page, readme)
    assert not page.exists()


def test_two_machines_stand_beside_each_other_and_never_in_one_table(tmp_path, rows):
    folder, page, readme = tmp_path / "results", tmp_path / "RESULTS.md", tmp_path / "README.md"
    some = [replace(row, batch=2) if row.batch == 3 else row for row in rows if row.workload == "igva-2"]
    slower = [replace(row, device="Another", ms=1e6 + row.ms) for row in some]
    results.append(folder / "one.csv", some)
    results.append(folder / "other.csv", slower)
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.write(folder, page, readme)
    for text in (page.read_text(), readme.read_text()):
        one, other = text.split("Another, 1 thread", 1)
        assert ENV.device in one
        assert "1000" in other  # milliseconds of the second
        assert "10000" not in one
        assert "A Device" not in other
    assert {path.name for path in folder.glob("*-time.png")} == {
        "a-device-1-thread-time.png",
        "another-1-thread-time.png",
    }


def test_the_first_minutes_on_a_card_are_told_from_their_lines(tmp_path):
    told = "\n".join(first_light.sections(results.RESULTS))
    path = results.RESULTS / "nvidia-h100-80gb-hbm3-first-light.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert f"## {next(line['name'] for line in lines if 'name' in line)}, first light" in told
    for line in lines:
        if "mlp_us" in line:
            line["mlp_us"] *= 2
        if "ok" in line:
            line["ok"] = False
    (tmp_path / path.name).write_text("\n".join(map(json.dumps, lines)))
    again = "\n".join(first_light.sections(tmp_path))
    cuda = [line for line in lines if line["step"] == "time-cuda" and "B" in line]
    plain = {line["B"]: line["graph_us"] for line in lines if line.get("form") == "published"}
    most = max(plain[line["B"]] / line["mlp_us"] for line in cuda)
    assert f"to {most:.2f} times as fast" in again
    assert f"to {2 * most:.2f} times as fast" in told
    assert "* 0 of " in again
    assert list(first_light.sections(tmp_path / "nothing")) == []


def test_the_readme_has_the_marks():
    text = (ROOT / "README.md").read_text()
    assert text.index(report.BEGIN) < text.index(report.END)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_run_in_the_command_measures_what_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "suite", lambda *_: [tiny(), tiny(dtype="bf16"), replace(tiny(), name="other")])
    path = tmp_path / "some.csv"
    options = ["--device", "cpu", "--workload", "igva*", "--provider", "add*", "--dtype", "bf16", "--output", str(path)]
    assert bench.main(options) == 0
    assert {(r.workload, r.dtype, r.provider) for r in results.read(path)} == {
        ("igva-2", "bf16", "plain"), ("igva-2", "bf16", "additions"),
    }  # fmt: skip
    revision = results.read(path)[0].revision.rstrip("+")
    assert bench.main([*options, "--compare", revision or "none"]) == (0 if revision else 2)
    capsys.readouterr()
    assert bench.main([*options, "--compare", "fedcba9876"]) == 2
    assert "git worktree add" in capsys.readouterr().err


def test_what_no_longer_fits_the_time_is_left_out_and_said_so(monkeypatch, capsys):
    rows, wrong = bench.run([tiny()], [], "cpu", 0.01, -1.0, ENV, None, Console())
    assert (rows, wrong) == ([], 0)
    assert "out of time" in capsys.readouterr().out


def test_the_time_is_shared_out_and_what_is_left_goes_on(monkeypatch, capsys):
    shares, clock = [], [0.0]

    def spends(workload, chosen, timer, machine, budget, share):
        shares.append(share)
        clock[0] += spent[len(shares) - 1]
        yield from ()

    monkeypatch.setattr(bench, "measure", spends)
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    costs = [bench.Cost(5, 25), bench.Cost(10, 50), bench.Cost(50, 50), bench.Cost(15, 15)]
    listed, spent = [tiny(b) for b in (1, 2, 3, 4)], [15.0, 65.0, 0.0]
    bench.run(listed, [], "cpu", 0.01, 100.0, ENV, None, Console(width=200), costs)
    # First 20 s are left beyond the least of all, and two workloads want 20 and 40 s more; then 10 s are left beyond
    # it; then there is too little for both that remain.
    assert shares == pytest.approx([5 + 20 / 3, 10 + 10, 20])
    told = capsys.readouterr().out
    assert "2 of 4, 1:25 left: igva-2 forward fp32 B 2" in told
    assert "out of time, left out: igva-2 forward fp32 B 3\n" in told  # a cheaper one still runs


def test_a_workload_that_breaks_does_not_end_the_run(monkeypatch, capsys):
    def breaks(workload, *_):
        if workload.name == "broken":
            raise RuntimeError("no such luck")
        yield from measure.measure(workload, *_)

    monkeypatch.setattr(bench, "measure", breaks)
    both = [replace(tiny(), name="broken"), tiny()]
    rows, wrong = bench.run(both, ["additions"], "cpu", 0.01, 60.0, ENV, None, Console())
    assert wrong == 1
    assert {row.workload for row in rows} == {"igva-2"}
    assert "no such luck" in capsys.readouterr().out


def test_igva_kernels_bench_hands_over(capsys):
    assert cli.main(["bench", "--device", "cpu", "--suite", "none"]) == 0
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert stop.value.code == 0
    assert "--compare" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["info", "--compare"])


def test_igva_kernels_bench_outside_of_a_checkout_says_what_to_do(tmp_path):
    shutil.copytree(ROOT / "igva_kernels", tmp_path / "igva_kernels", ignore=shutil.ignore_patterns("*.so", "__py*"))
    command = [sys.executable, "-m", "igva_kernels", "bench"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install -e '.[bench]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_the_gpu_suite_without_a_gpu_says_so(capsys, tmp_path):
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("no CUDA device") == 2


def test_a_small_call_takes_the_host_less_than_plain_torch():
    found = host.measure("cpu")
    plain = found.pop("reference")
    assert found, "no backend serves this CPU"
    for name, times in found.items():
        assert all(ours < theirs for ours, theirs in zip(times, plain, strict=True)), (name, times, plain)


@pytest.mark.gpu
@pytest.mark.plain_memory
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_calls_and_graph_replays_are_measured_on_cold_inputs():
    workload, timer = tiny(dtype="bf16"), measure.CudaTimer()
    assert len(measure.rotated(workload, workload.draw("cuda"), timer)) > 1
    chosen = {"plain": providers.providers(workload, "cuda")["plain"]}
    timer.copies_bytes = 0
    figures = list(measure.measure(workload, chosen, timer, machine("cuda"), budget=0.01))
    assert [f.timing for f in figures] == ["eager", "graph", "wall"]
    assert all(f.ms.p50 > 0 for f in figures)
    assert figures[0].peak_bytes > 0


def test_a_case_of_the_suite_is_a_case_of_verify():
    """Shapes are written once: the suite draws and runs what ``igva-kernels verify`` judges."""
    assert all(isinstance(w.case, Case) for w in workloads.cpu_suite() if not w.is_model)
