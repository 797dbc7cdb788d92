"""The command: what it prints, and what its exit status tells."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

import pytest
import torch

from igva_kernels import cli, info, registry, verify
from igva_kernels.runtime import native
from igva_kernels.runtime.backend import Backend
from igva_kernels.testing import Verdict
from igva_kernels.version import __version__


def test_info_names_every_backend_and_why_it_cannot_run(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for status in registry.backends():
        assert status.name in text
        assert status.available or status.reason in text
    assert __version__ in text


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == version("torch")
    backends = {backend["name"]: backend for backend in report["backends"]}
    assert [*backends] == ["reference", *registry.all_backends()]
    assert {"reference", "cpu"} <= set(report["operators"]["weighted_mix"]) or not backends["cpu"]["available"]
    assert report["build"] == native.build_info()


def test_info_says_what_a_backend_says_of_itself(monkeypatch, capsys):
    """Its dtypes, fp64 too, and its notes, whether or not it can run."""
    takes = (torch.float64, torch.bfloat16)
    toy = Backend("toy", 0, ("cpu",), lambda _, dtype: None if dtype in takes else "", lambda: ["built by hand"])
    away = Backend("away", 1, ("xpu",), lambda *_: "it is elsewhere", lambda: ["built by them"])
    monkeypatch.setattr(info, "all_backends", lambda: {"toy": toy, "away": away})
    statuses = [
        registry.BackendStatus("toy", True, ("cpu",), ""),
        registry.BackendStatus("away", False, (), "it is elsewhere"),
    ]
    monkeypatch.setattr(info, "backends", lambda: statuses)
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("backends") + 1 :][:4] == [
        "  toy                 yes, on cpu, in bf16, fp64", "    built by hand",
        "  away                no: it is elsewhere", "    built by them",
    ]  # fmt: skip


@pytest.mark.skipif(native.load()[0] is None, reason=native.load()[1])
def test_info_says_by_what_the_cpu_kernels_were_built_and_which_they_use(monkeypatch, capsys):
    monkeypatch.setenv(native.ISA_VARIABLE, native.load()[0].isa())
    cli.main(["info"])
    lines = capsys.readouterr().out.splitlines()
    cpu = next(i for i, line in enumerate(lines) if line.startswith("  cpu "))
    assert lines[cpu].endswith("in fp32, bf16, fp16, fp64")
    assert native.build_info()["compiler"] in lines[cpu + 1]
    assert lines[cpu + 1].endswith(f"; uses {native.load()[0].isa()}, as {native.ISA_VARIABLE} says")


def test_info_says_what_is_not_installed(monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(info.metadata, "version", missing)
    assert cli.main(["info"]) == 0
    assert "not installed" in capsys.readouterr().out


def test_info_counts_the_cores_and_not_the_threads_where_torch_names_no_features(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    cpu = info.collect()["cpu"]
    assert (cpu["threads"], cpu["cores"]) == (1000, os.cpu_count())


@pytest.mark.parametrize("command", ["info", "demo"])
def test_a_plain_install(command):
    """With torch only, info works and the demo says what to install."""
    blocked = ["rich", "matplotlib", "transformers", "triton", "PIL", "typer", "sentence_transformers"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}));"
        f"from igva_kernels.cli import main; sys.exit(main([{command!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if command == "info":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2
        assert "pip install 'igva-kernels[demo]'" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_verify_refuses_a_backend_that_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(verify, "backends", lambda: [registry.BackendStatus("cuda", False, (), "no such device")])
    assert cli.main(["verify", "--backend", "cuda", "--quick"]) == 2
    assert "no such device" in capsys.readouterr().err


def test_verify_without_any_backend(monkeypatch, capsys):
    statuses = [registry.BackendStatus(name, False, (), "not here") for name in registry.all_backends()]
    monkeypatch.setattr(verify, "backends", lambda: statuses)
    assert cli.main(["verify", "--quick"]) == 2
    assert "igva-kernels info" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--verbose"]])
@pytest.mark.parametrize(("error", "status"), [(1.0, 0), (3.0, 1), (float("nan"), 1)])
def test_verify_exit_status(monkeypatch, capsys, error, status, flags):
    verdicts = [Verdict("output", 0.5, 1.0, 2.0), Verdict("grad bias1", error, 1.0, 2.0)]
    monkeypatch.setattr(verify, "verify", lambda *_: iter([verify.Row("a case", "fp32", "cpu", "cpu", verdicts)]))
    assert cli.main(["verify", *flags]) == status
    assert ("WRONG" in capsys.readouterr().out) == bool(status)


def test_unknown_backend_is_a_usage_error():
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", "--backend", "tpu"])
    assert stop.value.code == 2


def test_module_and_command_are_the_same():
    done = subprocess.run([sys.executable, "-m", "igva_kernels", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == __version__
    commands = [point for point in entry_points(group="console_scripts") if point.name == "igva-kernels"]
    assert all(point.load() is cli.main for point in commands)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would tune")
def test_tune_without_a_gpu_says_why_it_cannot(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["tune"]) == 2
    assert "igva-kernels tune: " in capsys.readouterr().err


def command(*args, **options):
    """``igva-kernels`` as a process that buffers, whose output and errors are read unless ``options`` say otherwise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-m", "igva_kernels", *args], **options, env=buffered, text=True)


VERIFY = ["verify", "--quick", "--backend", "cpu", "--dtype", "fp32"]
built = pytest.mark.skipif(native.load()[0] is None, reason=native.load()[1])


@pytest.mark.parametrize(
    "args", [["info"], ["--help"], pytest.param(VERIFY, marks=[built, pytest.mark.slow])], ids=lambda args: args[0]
)
def test_a_reader_that_goes_away_ends_the_command_quietly_as_sigpipe_would(args):
    reader, writer = os.pipe()
    os.close(reader)
    process = command(*args, stdout=writer)
    os.close(writer)
    assert (process.communicate(timeout=300)[1], process.returncode) == ("", 128 + signal.SIGPIPE)


@pytest.mark.slow
def test_the_demo_leaves_a_reader_that_goes_away_to_the_command(tmp_path):
    """rich would exit with 1, which says that the fused connector is wrong."""
    pytest.importorskip("igva_kernels.demo", reason="needs the extra 'demo'")
    reader, writer = os.pipe()
    process = command("demo", "--output", str(tmp_path), "--image", str(tmp_path), stdout=writer)
    os.close(writer)
    with open(reader) as opened:
        opened.readline()  # the package prints it, the next line is rich's
    assert (process.communicate(timeout=300)[1], process.returncode) == ("", 128 + signal.SIGPIPE)


def test_output_that_cannot_be_written_is_a_message():
    with open("/dev/full", "w") as full:
        process = command("info", stdout=full)
        said = process.communicate(timeout=300)[1]
    assert (said, process.returncode) == ("igva-kernels info: [Errno 28] No space left on device\n", 2)


@pytest.mark.slow
@built
def test_ctrl_c_ends_the_command_quietly():
    process = command(*VERIFY)
    process.stdout.readline()  # it comes with the first result, and many follow
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=300)[1], process.returncode) == ("", 128 + signal.SIGINT)


@pytest.mark.parametrize("fault", [ValueError, KeyError, ImportError])
def test_a_fault_of_the_package_keeps_its_traceback(monkeypatch, fault):
    def collect():
        raise fault("a fault")

    monkeypatch.setattr(info, "collect", collect)
    with pytest.raises(fault, match="a fault"):
        cli.main(["info"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["convert", "a", "b", "--config", "{"], "--config: got '{', which is no JSON: "),
        (["convert", "a", "b", "--config", "[]"], "--config: got '[]', need a JSON object"),
        (["verify", "--seed", "-1"], "--seed: got '-1', need a whole number from 0"),
        (["demo", "--steps", "few"], "--steps: got 'few', need a whole number from 0"),
    ],
)
def test_an_argument_that_cannot_be_read_is_a_usage_error_that_names_it(capsys, args, said):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("args", [["demo", "--output"], ["convert", "source"]], ids=["demo", "convert"])
def test_an_output_that_cannot_be_written_is_told_before_the_work_is_done(tmp_path, capsys, args):
    (tmp_path / "file").touch()
    assert cli.main([*args, str(tmp_path / "file" / "folder")]) == 2
    assert f"cannot write to {tmp_path / 'file'}: Not a directory" in capsys.readouterr().err


def test_bench_outside_a_checkout_says_where_the_benchmarks_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "igva_kernels" / "cli.py"))
    assert cli.main(["bench", "--quick"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("igva-kernels bench: no benchmarks beside") and "pip install -e '.[bench]'" in line
