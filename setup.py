"""Builds the C++ module with CMake and Ninja. Without a working compiler the package installs as pure Python.

Environment: IGVA_KERNELS_SKIP_NATIVE=1 builds nothing; MAX_JOBS bounds the parallel compilations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "igva_kernels"
BUILD_INFO = "build_info.json"


class CMakeBuild(build_ext):
    """Runs CMake for the one extension module and records what was built, or why nothing was."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        package = module.parent
        package.mkdir(parents=True, exist_ok=True)
        if os.environ.get("IGVA_KERNELS_SKIP_NATIVE") == "1":
            self._record_missing(package, module, "the package was installed with IGVA_KERNELS_SKIP_NATIVE=1")
            return
        try:
            self._run_cmake(package)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            reason = _last_lines(error.output) if isinstance(error, subprocess.CalledProcessError) else str(error)
            self._record_missing(package, module, f"the C++ build failed when the package was installed: {reason}")
            warnings.warn(f"{PACKAGE}: the C++ build failed, installing without CPU kernels:\n{reason}", stacklevel=1)

    def _run_cmake(self, package: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        jobs = os.environ.get("MAX_JOBS") or str(self.parallel or os.cpu_count() or 1)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--fresh",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DIGVA_KERNELS_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(build), "-j", jobs, "--target", "install"]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout)
            done.check_returncode()

    def _record_missing(self, package: Path, module: Path, reason: str) -> None:
        module.unlink(missing_ok=True)  # an in-place build may have left an older one
        (package / BUILD_INFO).write_text(
            json.dumps({"version": self.distribution.get_version(), "reason": reason}, indent=2) + "\n"
        )

    def copy_extensions_to_source(self) -> None:
        """In-place builds: the module and its record go into the source tree."""
        super().copy_extensions_to_source()
        self.copy_file(str(Path(self.build_lib) / PACKAGE / BUILD_INFO), str(ROOT / PACKAGE / BUILD_INFO))


def _last_lines(output: str | None, count: int = 20) -> str:
    return "\n".join((output or "").strip().splitlines()[-count:])


setup(
    ext_modules=[Extension(f"{PACKAGE}._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
