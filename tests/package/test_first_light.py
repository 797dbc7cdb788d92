"""First light: whatever a step does, every other step's results come home; and the steps themselves, on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_suite, steps
from benchmarks.first_light import __main__ as first_light
from benchmarks.first_light import outside, report
from benchmarks.steps import Runner, Step

ROOT = Path(__file__).parents[2]

EMIT = "import os, signal, subprocess, sys, time\nfrom benchmarks.steps import emit\n"
RAW = "write = lambda text: os.write(int(os.environ['IGVA_KERNELS_STEP_CHANNEL']), text)\n"
SLEEPS = "[sys.executable, '-c', 'import time; time.sleep(1000)']"


def stub(name, code, limit=20.0, **options):
    return Step(name, limit, (sys.executable, "-c", EMIT + RAW + code), **options)


def run(out, listed, seconds=60.0, background=None):
    """The rows by step, and the seconds that it took."""
    start = time.monotonic()
    Runner(out, seconds).run(listed, background)
    took = time.monotonic() - start
    found = {}
    for line in (out / steps.RESULTS).read_text().splitlines():
        row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the results"))
        found.setdefault(row.pop("step"), []).append(row)
    return found, took


def status(rows):
    return rows[-1]["status"]


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


BAD = [
    stub("hangs", "emit(a=1)\ntime.sleep(1000)", limit=1.5),
    stub("does not obey", "signal.signal(15, signal.SIG_IGN)\nemit(pid=os.getpid())\nwhile True: pass", 1.5),
    stub("leaves children", f"""
a = subprocess.Popen({SLEEPS})
b = subprocess.Popen({SLEEPS}, start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        emit(pid=os.getpid())
        time.sleep(1000)
    os._exit(0)
emit(pid=a.pid)
emit(pid=b.pid)
time.sleep(0.5)
"""),
    stub("hangs with its pipes closed", "emit(a=1)\nos.closerange(0, 100)\ntime.sleep(1000)", limit=1.5),
    stub("dies", "emit(a=1)\nos.abort()"),
    stub("raises", "emit(a=1)\nraise ValueError('what it says')"),
    stub("half a line", "emit(a=1)\nwrite(b'{\"b\": 2')"),
    stub("no JSON", "write(b'nonsense\\n\\xff\\xfe\\n[1, 2]\\n')\nwrite(b'[' * 5000 + b'\\n')\nemit(a=1)"),
    stub("no numbers", "write(b'{\"a\": NaN}\\n{\"a\": [1e999]}\\n{\"a\": -Infinity}\\n')\nemit(a=float('nan'), b=2)"),
    stub("another's name", "emit(step='good', a=666)\nemit(a=1)"),
    stub("another's fields", "emit(status=0)\nemit(**{'self': 1, 'row': 2, 'a': 1})"),
    stub("says nothing", ""),
    stub("floods", "while True: emit(a=1)"),
    stub("floods with one line", "while True: write(b'x' * 4096)"),
    stub("prints", "emit(a=1)\nfor _ in range(100_000): print('x' * 100)\nprint('the end')"),
    Step("is not there", 5.0, ("/no/such/command",)),
]  # fmt: skip


def test_whatever_a_step_does_every_other_steps_results_come_home(tmp_path, capfd):
    good = [stub("good", "emit(a=1)\nemit(a=2)"), stub("good too", "emit(b=[1.5, None, 'x'])")]
    found, took = run(tmp_path / "out", [good[0], *BAD, good[1]])
    assert found["good"][:2] == [{"a": 1}, {"a": 2}]
    assert found["good too"][0] == {"b": [1.5, None, "x"]}
    assert status(found["good"]) == status(found["good too"]) == 0
    # What a bad one had found out comes home as well, and what it was.
    for name in ("hangs", "hangs with its pipes closed", "dies", "raises", "half a line", "another's name", "prints"):
        assert {"a": 1} in found[name], name
    assert {name: status(found[name]) for name in ("hangs", "dies", "raises", "says nothing", "is not there")} == {
        "hangs": "over its limit", "dies": -signal.SIGABRT, "raises": 1, "says nothing": "no results",
        "is not there": "not started",
    }  # fmt: skip
    assert status(found["floods"]) == status(found["floods with one line"]) == "too many results"
    refused = {name: [row["refused"] for row in rows if "refused" in row] for name, rows in found.items()}
    counts = {"half a line": 1, "no JSON": 4, "no numbers": 3, "another's name": 1, "another's fields": 1}
    assert {name: len(refused[name]) for name in counts} == counts
    assert {"a": None, "b": 2, "not_finite": ["a"]} in found["no numbers"]
    assert {"self": 1, "row": 2, "a": 1} in found["another's fields"]
    pids = [row["pid"] for name in ("does not obey", "leaves children") for row in found[name] if "pid" in row]
    assert len(pids) == 4
    assert not any(map(alive, pids))
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert all(file.is_file() and re.fullmatch(r"[A-Za-z0-9._-]+", file.name) for file in files)
    log = (tmp_path / "out" / steps.LOG).read_text()
    assert "what it says" in log and "the end" in log
    assert len(log) < 2 * steps.MOST_LOG_BYTES
    assert took < 40


def test_all_ends_at_the_deadline_and_what_was_left_out_is_named(tmp_path):
    hangs = [stub(f"hangs {i}", "emit(a=1)\ntime.sleep(1000)", limit=100.0) for i in range(3)]
    found, took = run(tmp_path, [*hangs, stub("good", "emit(a=1)")], seconds=4.0)
    assert took < 5
    assert found["hangs 0"][0] == {"a": 1}
    assert status(found["hangs 0"]) == "over its limit"
    assert status(found["good"]) == "left out"
    assert "end" in found


@pytest.mark.parametrize(
    ("code", "ended"),
    [("time.sleep(1)", 0), ("sys.exit(3)", 3), ("time.sleep(1000)", "over its limit")],
    ids=["succeeds", "fails", "hangs"],
)
def test_the_build_costs_only_what_needs_it(tmp_path, code, ended):
    listed = [
        stub("needs it", "emit(at=time.monotonic())", needs_background=True),
        stub("is quiet", "emit(at=time.monotonic())", is_quiet=True), stub("is not", "emit(at=time.monotonic())"),
    ]  # fmt: skip
    found, _ = run(tmp_path, listed, background=stub("build", f"print('told')\n{code}", limit=3.0))
    assert status(found["build"]) == ended
    assert status(found["needs it"]) == (0 if ended == 0 else "left out")
    assert status(found["is quiet"]) == status(found["is not"]) == 0
    assert found["is not"][0]["at"] < found["is quiet"][0]["at"]
    assert "told" in (tmp_path / "build.log").read_text()


def test_a_runner_that_is_ended_ends_its_steps(tmp_path):
    code = f"""
import sys
from pathlib import Path
from benchmarks.steps import Runner, Step
emits = "import os, time; from benchmarks.steps import emit; emit(pid=os.getpid()); time.sleep(1000)"
Runner(Path({str(tmp_path)!r}), 100).run([Step("hangs", 100, (sys.executable, "-c", emits))])
"""
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    results = tmp_path / steps.RESULTS
    until = time.monotonic() + 20
    while not results.exists() and time.monotonic() < until:
        time.sleep(0.1)
    pid = json.loads(results.read_text())["pid"]
    assert alive(pid)
    runner.terminate()
    assert runner.wait(20) == 128 + signal.SIGTERM
    assert not alive(pid)


def test_a_figure_that_cannot_be_had_does_not_cost_the_others(capsys, monkeypatch):
    monkeypatch.delenv(steps.CHANNEL, raising=False)
    assert not steps.figures({"B": 1}, a=lambda: 1 / 0, b=lambda: {"c": 2.0, "d": 3}, e=lambda: None)
    row = json.loads(capsys.readouterr().out)
    assert row == {"B": 1, "c": 2.0, "d": 3, "e": None, "errors": {"a": "ZeroDivisionError: division by zero"}}


# ---- the steps themselves --------------------------------------------------------------------------------------------


def rehearsed(out, names):
    """The rows of some steps, run on the CPU; all of them succeeded."""
    listed = [step for step in first_light.steps() if step.name in names]
    found, _ = run(out, [replace(s, environment={**s.environment, "CUDA_VISIBLE_DEVICES": ""}) for s in listed], 900.0)
    assert [status(found[step.name]) for step in listed] == [0] * len(names)
    return {name: found[name][:-1] for name in names}


def test_environment_and_checks_rehearse_on_a_cpu(tmp_path):
    found = rehearsed(tmp_path, ["env", "check-cuda-mix", "check-fused-mlp"])
    assert any(name == "reference" for name, *_ in found["env"][0]["backends"])
    checks = found["check-cuda-mix"] + found["check-fused-mlp"]
    assert len(checks) >= 4
    assert all(row["ok"] and row["same_bits"] and 0 < row["share_of_allowance"] <= 1 for row in checks)


@pytest.mark.slow
def test_all_that_needs_no_other_program_rehearses_on_a_cpu(tmp_path):
    listed = [step.name for step in first_light.steps()]
    # Here the steps of all backends are the same.
    names = [name for name in listed if not re.match("tests|memcheck|counters|compile-max|.*triton", name)]
    found = rehearsed(tmp_path, names)
    assert not [row for rows in found.values() for row in rows if "errors" in row or "refused" in row]
    assert all(row["ok"] for name, rows in found.items() if name.startswith("check") for row in rows)
    assert all(row["wrong"] == 0 for row in found["replays"])
    assert {row["part"] for row in found["ablate-fused"]} >= {"whole", "taps only", "no activation", "no bias"}
    assert all(row["wall_us"] > 0 for row in found["plain"])


def test_every_step_has_a_name_of_its_own_and_something_to_do(monkeypatch):
    names = [step.name for step in first_light.steps()]
    assert len(names) == len(set(names))
    called = []

    def module(name):
        def find(function):
            def call(*args, **options):
                called.append(f"{name}.{function}")
                return True

            return call

        return type("Module", (), {"__getattr__": lambda self, function: find(function)})()

    import benchmarks.first_light as package

    for name in ("checks", "times", "outside"):
        monkeypatch.setattr(package, name, module(name), raising=False)
    assert all(first_light.run_step(name) for name in names)
    assert len(called) == len(names)


def test_the_kernels_that_could_hang_come_after_all_that_does_not_need_them():
    names = [step.name for step in first_light.steps()]
    first = next(i for i, name in enumerate(names) if "fused" in name)
    assert {"plain", "time-triton", "time-cuda", "compile", "counters-mix"} <= set(names[:first])
    assert names[-1] == "memcheck"


NCU = """
==PROF== Connected to process 1
==PROF== Profiling "mix" - 0: 0%....100% - 2 passes
something that the program printed
"ID","Process ID","Kernel Name","Block Size","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","void mix<int, 4>(float*)","(256, 1, 1)","(9, 1, 1)","Command","dram__bytes_read.sum","byte","1,234,567"
"0","1","void mix<int, 4>(float*)","(256, 1, 1)","(9, 1, 1)","Command","gpu__time_duration.sum","ns","1500"
"1","1","gemm","(128, 1, 1)","(3, 1, 1)","Command","gpu__time_duration.sum","ns","n/a"
"1","1","gemm"
"""


def test_counters_are_read_from_what_ncu_prints():
    one, other = outside.kernels(NCU.splitlines())
    assert one["kernel"] == "void mix<int, 4>(float*)"
    assert (one["read_bytes"], one["ns"], one["grid"]) == (1234567.0, 1500.0, "(9, 1, 1)")
    assert other == {"kernel": "gemm", "grid": "(3, 1, 1)", "block": "(128, 1, 1)"}


def test_counters_come_by_sections_where_ncu_does_not_know_a_metric(tmp_path, monkeypatch, capsys):
    ncu = tmp_path / "ncu"
    ncu.write_text(f"""#!{sys.executable}
import sys
print('''{NCU}''' if "--section" in sys.argv else "==ERROR== Failed to find metric")
""")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv(steps.CHANNEL, raising=False)
    assert outside.counters("mix-cuda")
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row.get("kernel", "")[-13:] for row in told] == ["", "t, 4>(float*)", "gemm"]
    assert "Failed to find metric" in told[0]["errors"]["ncu"]


def test_tests_report_their_failures_at_once_and_their_counts(monkeypatch, capsys):
    monkeypatch.delenv(steps.CHANNEL, raising=False)
    reporter = outside.Reporter()
    for outcome in ("passed", "failed", "skipped"):
        reporter.pytest_runtest_logreport(
            SimpleNamespace(when="call", outcome=outcome, nodeid=f"test_{outcome}", longrepr="a\nwhy")
        )
    reporter.pytest_runtest_logreport(SimpleNamespace(when="teardown", outcome="passed", nodeid="", longrepr=None))
    reporter.count(status=1)
    failure, counts = map(json.loads, capsys.readouterr().out.splitlines())
    assert failure == {"test": "test_failed", "when": "call", "why": "why"}
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "pytest": {"status": 1}}


def test_a_report_is_made_of_whatever_came_home():
    env = {"step": "env", "name": "A Card", "smi": "1, 2", "python": "3", "torch": "2", "triton": "3"}
    lines = [{"step": "run", "date": "today", "revision": "abc"}, env]
    assert "## A Card, first light" in "\n".join(report.section(lines))
    lines += [
        {"step": "time-cuda", "B": 1, "mix_us": 10.0, "mlp_us": None, "errors": {"mlp_us": "no"}},
        {"step": "compile", "form": "additions", "B": 4, "graph_us": 11.0, "wall_us": 12.0},
        {"step": "compile", "form": "published", "B": 4, "graph_us": 13.0, "wall_us": 14.0},
        {"step": "train-cuda", "provider": "plain", "B": 4, "peak_mib": 8, "wall_us": 30.0},
        {"step": "train-cuda", "provider": "train-cuda", "B": 4, "peak_mib": 4, "wall_us": 15.0},
        {"step": "ablate-fused", "part": "whole", "overlapped": True, "B": 4, "us": 21.0},
        {"step": "ablate-cuda", "part": "whole", "overlapped": False, "B": 4, "us": 22.0},
        {"step": "deform-cuda", "provider": "cuda", "dtype": "bfloat16", "B": 1, "mode": "both", "wall_us": 31.0},
        {"step": "counters-mix", "target": "mix-cuda", "kernel": "mix", "ns": 1500.0, "dram_pct": 88.0,
         "warp_cycles_per_issue": 8.0, "long_scoreboard_per_issue": 4.0, "barrier_per_issue": 1.0},
        {"step": "tests", "passed": 7, "failed": 1, "skipped": 2}, {"step": "replays", "status": "over its limit"},
    ]  # fmt: skip
    told = "\n".join(report.section(lines))
    for part in ("11 / 12", "13 / 14", "2.00", "21 / 22", "31", "50 / 12.5", "7 passed, 1 failed, 2 skipped, before"):
        assert part in told


def test_the_gpu_suite_measures_first_and_no_test_gates_it(tmp_path):
    names = [step.name for step in gpu_suite.steps(tmp_path, 450, True, [])]
    assert names[:2] == ["tune", "suite"]
    assert {"tests", "tests-large", "memcheck"} <= set(names)
