"""The command: what it prints, and what its exit status tells."""

import json
import os
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
    assert cli.main(["tune"]) == 1
    assert "igva-kernels tune: " in capsys.readouterr().err
