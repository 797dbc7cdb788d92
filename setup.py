"""Builds the C++ and CUDA modules with CMake and Ninja. What cannot be built is left out, and build_info.json says why.

Environment:
    IGVA_KERNELS_SKIP_NATIVE=1  build nothing: the package installs as pure Python
    IGVA_KERNELS_SKIP_CUDA=1    build the CPU module only
    IGVA_KERNELS_FORCE_CUDA=1   fail where the CUDA module cannot be built
    IGVA_KERNELS_SANITIZE=1     the CPU module alone, with AddressSanitizer and UBSan, built in build/sanitize
    IGVA_KERNELS_CUDA_ARCHS     architectures instead of the default list, as in "80;90a"
    CUDA_HOME                   the CUDA toolkit; otherwise nvcc from PATH or the pip package nvidia-cuda-nvcc
    MAX_JOBS                    parallel compilations; never more than the cores and the free memory allow
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "igva_kernels"
MODULES = ("_native", "_cuda")
BUILD_INFO = "build_info.json"
BYTES_PER_JOB = 1536 << 20
"""Free memory that one parallel compilation is allowed, in bytes."""
SANITIZE = os.environ.get("IGVA_KERNELS_SANITIZE") == "1"
if SANITIZE:
    os.environ["IGVA_KERNELS_SKIP_CUDA"] = "1"


class CMakeBuild(build_ext):
    """Runs CMake for the two modules and records what was built, or why it was not."""

    def build_extensions(self) -> None:
        if SANITIZE and self.inplace:
            raise RuntimeError("IGVA_KERNELS_SANITIZE=1: built in place, it would replace the ordinary module")
        files = {name: Path(self.get_ext_fullpath(f"{PACKAGE}.{name}")).resolve() for name in MODULES}
        package = files["_native"].parent
        package.mkdir(parents=True, exist_ok=True)
        for file in files.values():
            file.unlink(missing_ok=True)  # an in-place build may have left an older one
        info = self._build(package)
        (package / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")
        for name, reason in (("CPU", info["reason"]), ("CUDA", info["cuda"]["reason"])):
            if reason:
                warnings.warn(f"{PACKAGE}: installing without {name} kernels: {reason}", stacklevel=1)
        if SANITIZE and info["reason"]:
            raise RuntimeError(f"IGVA_KERNELS_SANITIZE=1, but there is no CPU module: {info['reason']}")
        if info["cuda"]["reason"] and os.environ.get("IGVA_KERNELS_FORCE_CUDA") == "1":
            raise RuntimeError(f"IGVA_KERNELS_FORCE_CUDA=1, but there is no CUDA module: {info['cuda']['reason']}")

    def _build(self, package: Path) -> dict[str, Any]:
        """The record of the build; each module's ``reason`` is empty if it was built."""
        info: dict[str, Any] = {"version": self.distribution.get_version(), "reason": "", "cuda": {"reason": ""}}
        if os.environ.get("IGVA_KERNELS_SKIP_NATIVE") == "1":
            info["reason"] = info["cuda"]["reason"] = "the package was installed with IGVA_KERNELS_SKIP_NATIVE=1"
            return info
        build = Path(self.build_temp).resolve() / "cmake"
        try:
            self._configure(build, package)
            info = json.loads((build / BUILD_INFO).read_text())
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            info["reason"] = info["cuda"]["reason"] = _failure("C++", error)
            return info
        # One after the other, so that a failure of one leaves the other.
        for module, name, record in (("_native", "C++", info), ("_cuda", "CUDA", info["cuda"])):
            if record["reason"]:
                continue
            try:
                _run("cmake", "--build", str(build), "-j", str(self._jobs()), "--target", module)
                _run("cmake", "--install", str(build), "--component", module)
            except (OSError, subprocess.CalledProcessError) as error:
                record["reason"] = _failure(name, error)
        return info

    def _configure(self, build: Path, package: Path) -> None:
        import pybind11

        _run(
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--fresh",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DIGVA_KERNELS_VERSION={self.distribution.get_version()}",
        )  # fmt: skip

    def _jobs(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        asked = int(os.environ.get("MAX_JOBS") or self.parallel or cores)
        return max(1, min(asked, cores, _free_bytes() // BYTES_PER_JOB))

    def copy_extensions_to_source(self) -> None:
        """In-place builds: the modules and their record go into the source tree."""
        for name in MODULES:
            (ROOT / PACKAGE / Path(self.get_ext_filename(name))).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        self.copy_file(str(Path(self.build_lib) / PACKAGE / BUILD_INFO), str(ROOT / PACKAGE / BUILD_INFO))


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    done.check_returncode()


def _failure(name: str, error: Exception) -> str:
    output = error.output if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = (output or "").strip().splitlines()[-20:]
    return "\n".join([f"the {name} build failed when the package was installed:", *lines])


def _free_bytes() -> int:
    """Free bytes of memory: the machine's, or the container's limit if that is less."""
    limits = [sys.maxsize]
    for file, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable:\s+(\d+)", 1024),
        ("/sys/fs/cgroup/memory.max", r"^(\d+)$", 1),
    ):
        if Path(file).exists() and (found := re.search(pattern, Path(file).read_text())):
            limits.append(int(found[1]) * unit)
    return min(limits)


setup(
    ext_modules=[Extension(f"{PACKAGE}.{name}", sources=[], optional=True) for name in MODULES],
    cmdclass={"build_ext": CMakeBuild},
    options={"build": {"build_base": "build/sanitize"}} if SANITIZE else {},
)
