"""Every test draws from the seed of the command line and finds NaN in memory that nobody has written.

Triton reads TRITON_INTERPRET when it is imported, so the tests marked ``interpreted`` need a process of their own:

    TRITON_INTERPRET=1 pytest tests/ops tests/runtime        them, and no others
    pytest                                                   all others
"""

import os
import sys

import pytest

# The variable that limits our kernels to an instruction set limits the libraries as well, which read their variables
# when torch is loaded: plain torch then computes as it would on such a CPU.
LIBRARY_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
LIBRARY_ISAS = {
    "scalar": ("SSE41", "SSE4_2", "default"),
    "avx2": ("AVX2", "AVX2", "avx2"),
    "avx512": ("AVX512_CORE", "AVX512", "avx512"),
}
if isa := os.environ.get("IGVA_KERNELS_CPU_ISA", "").strip().lower():
    assert "torch" not in sys.modules, "torch was loaded before IGVA_KERNELS_CPU_ISA could hold its libraries to a set"
    os.environ.update(zip(LIBRARY_VARIABLES, LIBRARY_ISAS[isa], strict=True))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import cpu_kernels  # noqa: E402
import torch  # noqa: E402  (after the variables that it reads)
from seeds import VARIABLE, seeded  # noqa: E402

from igva_kernels import testing  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of all random numbers; a right kernel passes with any")


def pytest_configure(config):
    os.environ[VARIABLE] = str(config.getoption("--seed"))


def pytest_report_header(config):
    return f"seed: {config.getoption('--seed')}"


def pytest_collection_modifyitems(config, items):
    others = [item for item in items if bool(item.get_closest_marker("interpreted")) != INTERPRETED]
    config.hook.pytest_deselected(items=others)
    left = set(others)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True, scope="session")
def _share_of_the_cores():
    """A worker leaves the others their share; the interpreter is serial, and its tensors are small."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(1 if INTERPRETED else max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True, scope="session")
def _extensions_of_this_run(tmp_path_factory):
    """What torch builds at run time (DeepSpeed needs one such module) is built anew, in this run's own folder.

    In the user's cache the build waits for a lock, and waits for ever if a killed run has left one behind.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "torch_extensions"))
        yield


@pytest.fixture(autouse=True)
def _few_draws_of_the_interpreter(monkeypatch):
    """The interpreter is slow: a small result may pass after one draw, and fails only after more of them."""
    if INTERPRETED:
        monkeypatch.setattr(testing, "FIRST_DRAWS", 1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(seeded())


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(request):
    """Deterministic mode fills the memory of ``torch.empty`` with NaN, and refuses what is not reproducible.

    ``@pytest.mark.plain_memory`` switches it off for tests of torch's own behaviour (timings, compiled code).
    """
    if request.node.get_closest_marker("plain_memory"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=cpu_kernels.isas())
def isa(request):
    """Every instruction set of this CPU, in turn."""
    best = cpu_kernels.MODULE.isa()
    cpu_kernels.MODULE.set_isa(request.param)
    yield request.param
    cpu_kernels.MODULE.set_isa(best)


@pytest.fixture(params=cpu_kernels.ROUTES)
def products(request, monkeypatch):
    """Products by torch and by ourselves, not only by who suits this CPU; in several blocks even if small."""
    monkeypatch.setattr(cpu_kernels.gemm, "route", cpu_kernels.routes(request.param))
    monkeypatch.setattr(cpu_kernels.backend, "BLOCK_BYTES", 0)
    return request.param


@pytest.fixture
def own_products(monkeypatch):
    """Every product by ourselves."""
    monkeypatch.setattr(cpu_kernels.gemm, "route", cpu_kernels.routes(cpu_kernels.gemm.OWN))


@pytest.fixture
def restored_threads():
    """torch's number of threads is afterwards what it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
