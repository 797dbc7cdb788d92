"""The native module: OpenMP, Python's threads, instruction sets, and what is said where it cannot serve."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import cpu_kernels
import pytest
import torch
from cpu_kernels import MODULE, assert_same, every_kernel, inputs_of_kernels, needs_module

import igva_kernels as ik
from igva_kernels import cli, registry
from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.runtime import native
from igva_kernels.runtime.cpu import BACKEND
from igva_kernels.runtime.cpu import products as gemm
from igva_kernels.runtime.cpu.features import this_cpu

pytestmark = needs_module


# ---- OpenMP --------------------------------------------------------------------------------------------------------


def run_python(code, environment=None):
    """A process of its own, with these variables and no others that concern OpenMP."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=inherited | (environment or {})
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_process_has_one_openmp_runtime_and_torch_brought_it():
    done = run_python(
        "import re, torch, igva_kernels.runtime.native as native\n"
        "omp = lambda line: re.match('lib(g|i)?omp', line.rsplit('/', 1)[-1])\n"
        "runtimes = lambda: {line.split()[-1] for line in open('/proc/self/maps') if omp(line)}\n"
        "before = runtimes()\n"
        "assert native.load()[0] is not None\n"
        "assert runtimes() == before and len(before) == 1, (before, runtimes())\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="how ELF resolves symbols")
def test_without_an_openmp_runtime_the_import_fails_and_nothing_crashes():
    done = run_python(
        "import importlib.machinery, importlib.util\n"
        f"loader = importlib.machinery.ExtensionFileLoader('_native', {MODULE.__file__!r})\n"
        "try:\n"
        "    importlib.util.module_from_spec(importlib.util.spec_from_loader('_native', loader))\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert native.build_info()["openmp"] == "OFF" or "GOMP" in done.stdout or "omp_" in done.stdout


@pytest.mark.usefixtures("own_products", "restored_threads")
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_no_number_of_threads_changes_a_bit(isa, threads):
    inputs = inputs_of_kernels()
    torch.set_num_threads(1)
    alone = every_kernel(*inputs)
    torch.set_num_threads(threads)
    assert_same(every_kernel(*inputs), alone)


@pytest.mark.usefixtures("own_products", "restored_threads")
def test_several_python_threads_call_the_kernels_at_once():
    inputs = inputs_of_kernels()
    alone = every_kernel(*inputs)
    results = [None] * 4

    def call(i):
        torch.set_num_threads(1 + i % 3)
        results[i] = [every_kernel(*inputs) for _ in range(5)]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(results))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for result in (result for of_one in results for result in of_one):
        assert_same(result, alone)


SMALL_TEAM = """
import ctypes, re, sys, torch, cpu_kernels as tests

torch.use_deterministic_algorithms(True)
tests.gemm.route = tests.routes(tests.gemm.OWN)
inputs = tests.inputs_of_kernels()
torch.set_num_threads(1)
alone = tests.every_kernel(*inputs)
torch.set_num_threads(4)
results = []
if sys.argv[1] == "nested":
    path = re.search(r"\\S*libgomp\\S*", open("/proc/self/maps").read())[0]
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: results.append(tests.every_kernel(*inputs)))
    ctypes.CDLL(path).GOMP_parallel(region, None, 2, 0)
else:
    results.append(tests.every_kernel(*inputs))
assert len(results) >= 1
for result in results:
    tests.assert_same(result, alone)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize(
    "setting",
    ["OMP_THREAD_LIMIT=1", "nested"]
    + [
        pytest.param(setting, marks=pytest.mark.slow)
        for setting in ("", "OMP_THREAD_LIMIT=3", "OMP_DYNAMIC=true", "OMP_MAX_ACTIVE_LEVELS=0")
    ],
)
def test_every_kernel_is_right_where_openmp_grants_fewer_threads_than_asked_for(setting):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    environment |= dict([setting.split("=")]) if "=" in setting else {}
    done = subprocess.run(
        [sys.executable, "-c", SMALL_TEAM, setting], capture_output=True, text=True, timeout=120,
        env=environment, cwd=Path(cpu_kernels.__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(native.build_info().get("openmp") == "OFF", reason="built without OpenMP")
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OMP_THREAD_LIMIT", "1"),
        pytest.param("OMP_NUM_THREADS", "1", marks=pytest.mark.slow),
        pytest.param("OMP_DYNAMIC", "true", marks=pytest.mark.slow),
        pytest.param("OMP_MAX_ACTIVE_LEVELS", "0", marks=pytest.mark.slow),
    ],
)
def test_fewer_threads_than_torch_asks_for_change_no_answer(variable, value):
    """A training step by our own products, and what it is without OpenMP."""
    done = run_python(
        "import torch, igva_kernels as ik\n"
        "from igva_kernels.runtime.cpu import products as gemm\n"
        "gemm.route = lambda dtype: gemm.Route(gemm.OWN, '')\n"
        "plan = ik.MixPlan.concat([0, 1])\n"
        "def run(impl, inputs, threads):\n"
        "    torch.set_num_threads(threads)\n"
        "    inputs = [x.detach().clone().requires_grad_() for x in inputs]\n"
        "    out = ik.layer_mix_mlp(inputs[:2], plan, None, *inputs[2:], impl=impl)\n"
        "    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    torch.manual_seed(0)\n"
        "    shapes = [(4, 200, 300)] * 2 + [(70, 600), (70,), (64, 70), (64,)]\n"
        "    inputs = [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes]\n"
        "    expected, alone, results = run('reference', inputs, 1), run('cpu', inputs, 1), run('cpu', inputs, 4)\n"
        "    for a, b, c in zip(results, expected, alone, strict=True):\n"
        "        error = float((a - b).float().norm() / b.float().norm())\n"
        "        assert error < 8 * torch.finfo(dtype).eps, (dtype, tuple(a.shape), error)\n"
        "        assert torch.equal(a, c), (dtype, tuple(a.shape))\n",
        {variable: value},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.environ.get("IGVA_KERNELS_SANITIZE") != "1", reason="not `make sanitize`")
def test_the_sanitizers_are_in_the_module_that_is_tested():
    assert native.build_info()["sanitizers"] == "address,undefined"


# ---- when it cannot serve ------------------------------------------------------------------------------------------


def test_why_not_names_the_reason(monkeypatch):
    assert BACKEND.why_not(torch.device("cpu"), torch.float16) is None
    assert "cuda" in BACKEND.why_not(torch.device("cuda"), torch.float32)
    assert "torch.int8" in BACKEND.why_not(torch.device("cpu"), torch.int8)
    monkeypatch.setattr(native, "load", lambda: (None, "no compiler"))
    assert BACKEND.why_not(torch.device("cpu"), torch.float32) == "no compiler"


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="isa: this CPU or this build has no avx9000"):
        MODULE.set_isa("avx9000")


@pytest.mark.skipif(not native.forced_isa(), reason="the environment names no instruction set")
def test_plain_torch_is_held_to_the_set_that_the_environment_names():
    held = {"scalar": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}[native.forced_isa()]
    assert torch.backends.cpu.get_cpu_capability() == held
    assert (
        os.environ["ONEDNN_MAX_CPU_ISA"] == {"scalar": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}[MODULE.isa()]
    )


@pytest.fixture
def forced_isa(monkeypatch):
    """Sets the variable, and loads the module again as a new process would."""

    def force(name):
        monkeypatch.setenv("IGVA_KERNELS_CPU_ISA", name)
        native.load.cache_clear()
        registry.choose.cache_clear()
        return native.load()

    best = MODULE.isa()
    yield force
    native.load.cache_clear()
    registry.choose.cache_clear()
    MODULE.set_isa(best)


@pytest.mark.parametrize("name", MODULE.isas() if MODULE else [])
def test_the_environment_forces_an_instruction_set(name, forced_isa, capsys):
    module, _ = forced_isa(f" {name.upper()}")
    assert module.isa() == name
    assert this_cpu().isa == name
    if name != "avx512":
        assert gemm.choose(torch.float32, this_cpu()).library == (gemm.OWN if name == "avx2" else gemm.TORCH)
    assert cli.main(["info"]) == 0
    assert f"uses {name}, as IGVA_KERNELS_CPU_ISA says" in capsys.readouterr().out


def test_an_instruction_set_that_cannot_be_forced_is_named_and_breaks_nothing_else(forced_isa, capsys):
    module, reason = forced_isa("avx9000")
    assert module is None
    assert reason.startswith(
        "IGVA_KERNELS_CPU_ISA: got 'avx9000', need one of the sets of this CPU and this build: scalar"
    )
    assert cli.main(["info"]) == 0
    assert reason in capsys.readouterr().out
    states, plan = [torch.randn(1, 3, 4) for _ in range(2)], MixPlan.concat([0, 1])
    assert torch.equal(ik.layer_mix(states, plan), torch.cat(states, -1))
    with pytest.raises(NotImplementedError, match="IGVA_KERNELS_CPU_ISA: got 'avx9000'"):
        ik.layer_mix(states, plan, impl="cpu")
