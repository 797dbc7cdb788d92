"""What is shipped is complete and builds from itself; without a compiler the package still installs and says why."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from igva_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


def run(*command, cwd, **environment):
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_pure(folder, **environment):
    """The package as `pip install` lays it out, built into ``folder``, and its build record."""
    lib = folder / "lib"
    run(
        sys.executable, "setup.py", "-q", "build", "--build-lib", str(lib), "--build-temp", str(folder / "temp"),
        "--build-base", str(folder / "base"), cwd=ROOT, IGVA_KERNELS_SKIP_CUDA="1", **environment,
    )  # fmt: skip
    assert not list(lib.glob("igva_kernels/*.so"))
    return lib, json.loads((lib / "igva_kernels" / "build_info.json").read_text())


# An editable installation would lend its compiled module to the package under test.
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""

USE_WITHOUT_KERNELS = """
import warnings
warnings.simplefilter("error")
import torch, igva_kernels as ik
cpu = {s.name: s for s in ik.backends()}["cpu"]
assert not cpu.available
print(cpu.reason)
h = [torch.randn(2, 5, 8) for _ in range(3)]
plan = ik.MixPlan.concat([0, 2])
assert ik.layer_mix(h, plan, skip_tokens=1).shape == (2, 4, 16)
try:
    ik.layer_mix(h, plan, impl="cpu")
except NotImplementedError as error:
    assert cpu.reason in str(error)
else:
    raise AssertionError("impl='cpu' was served")
"""


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"IGVA_KERNELS_SKIP_NATIVE": "1"}, "IGVA_KERNELS_SKIP_NATIVE=1"),
        ({"CXX": "/bin/false"}, "the C++ build failed when the package was installed"),
    ],
)
def test_without_a_compiler_the_package_installs_and_keeps_the_reason(environment, why, tmp_path):
    pytest.importorskip("pybind11")
    lib, info = build_pure(tmp_path, **environment)
    assert info["version"] == __version__
    assert why in info["reason"]
    said = run(sys.executable, "-c", ALONE + USE_WITHOUT_KERNELS, cwd=tmp_path, PYTHONPATH=str(lib))
    assert why in said


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools is older than what pyproject.toml asks for")
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "build_info.json")
    shutil.copytree(ROOT, source, ignore=skipped)
    code = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    return source, archive


def test_the_sdist_holds_everything_that_builds_and_tests_it(sdist):
    source, archive = sdist
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    for folder in ("csrc", "docs", "igva_kernels", "tests", "benchmarks", "examples", "tools"):
        files = {str(p.relative_to(source)) for p in (source / folder).rglob("*") if p.is_file()}
        assert not {name for name in files - held if "__pycache__" not in name}
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held
    assert archive.name == f"igva_kernels-{__version__}.tar.gz"


USE_WHEEL = """
import re
import torch
runtimes = lambda: {l.split()[-1] for l in open("/proc/self/maps") if re.match("lib(g|i)?omp", l.rsplit("/", 1)[-1])}
before = runtimes()
import igva_kernels as ik
from igva_kernels.runtime import native
h = [torch.randn(2, 5, 8) for _ in range(7)]
plan = ik.MixPlan.igva(6, 3)
w = torch.rand(2, 3)
torch.testing.assert_close(ik.layer_mix(h, plan, w, impl="cpu"), ik.layer_mix(h, plan, w, impl="reference"))
assert before == runtimes() and len(before) == 1, (before, runtimes())
print(ik.__file__, native.build_info()["version"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_a_wheel_built_from_the_sdist_in_isolation_works(sdist, tmp_path):
    _, archive = sdist
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(archive), cwd=tmp_path, IGVA_KERNELS_SKIP_CUDA="1")
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("igva_kernels/_native") for name in names)
    info = json.loads(zipfile.ZipFile(wheel).read("igva_kernels/build_info.json"))
    assert info["reason"] == "" and "IGVA_KERNELS_SKIP_CUDA=1" in info["cuda"]["reason"]
    assert not [name for name in names if re.match("lib(g|i)?omp", Path(name).name)], "a second OpenMP runtime"
    assert not [name for name in names if name.split("/")[0] in ("tests", "csrc")]
    target = tmp_path / "installed"
    run(*pip, "install", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    said = run(sys.executable, "-c", ALONE + USE_WHEEL, cwd=tmp_path, PYTHONPATH=str(target))
    assert str(target) in said and __version__ in said
