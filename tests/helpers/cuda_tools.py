"""Finds the CUDA toolkit, and builds the CUDA module with its kernels emulated on the CPU."""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from igva_kernels import registry
from igva_kernels.runtime.cuda import launch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
EMULATION = Path(__file__).parent / "cuda_emulation"
BUILT = ROOT / "build" / "cuda_tests"
BINDINGS = ["common/bindings", "weighted_mix/plan", "cuda/module", "dense/cuda/bindings", "deform_attn/cuda/bindings"]
BINDINGS += ["inject_tokens/cuda/bindings"]
BINDINGS += [f"weighted_mix/cuda/{name}" for name in ("program", "bindings", "gemm_bindings")]


@cache
def nvcc():
    """nvcc, or None."""
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return shutil.which(
        "nvcc", path=os.pathsep.join(map(str, [*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    )


@cache
def include():
    """The toolkit's headers, or None."""
    if nvcc() is None:
        return None
    said = subprocess.run([nvcc(), "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    found = re.search(r"TOP=(.*)", said)
    folder = Path(found[1].strip()) / "include" if found else None
    return folder if folder and (folder / "cuda_bf16.h").exists() else None


@cache
def cuobjdump():
    """cuobjdump, of the toolkit or of Triton's package, or None."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        packaged = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(packaged) if packaged.exists() else None
    return found


class Usage(NamedTuple):
    """One kernel of a cubin."""

    registers: int
    stack: int
    """Bytes per thread, spills included."""
    shared: int
    local: int


def compile_cubin(source, arch, folder):
    """``<source>.cu``, in whichever folder of ``csrc``, for one architecture, with the flags of the build."""
    cubin = Path(folder) / f"{source}.{arch}.cubin"
    command = [nvcc(), "-std=c++17", "-O3", "-Werror", "all-warnings", f"-I{SOURCES}", "-cubin"]
    (file,) = SOURCES.rglob(f"{source}.cu")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    done = subprocess.run([*command, target, str(file), "-o", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return cubin


def usage(binary, *options):
    """What every kernel of a cubin or a module uses, by mangled name."""
    command = [cuobjdump(), "--dump-resource-usage", *options, str(binary)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {name: Usage(*map(int, numbers)) for name, *numbers in re.findall(pattern, said.stdout)}


def machine_code(cubin):
    return subprocess.run([cuobjdump(), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout


def emulate(monkeypatch):
    """Sends CPU tensors to the emulated module, which is returned; the registry forgets what it chose before."""
    module, backends = emulated_module(), registry.all_backends()
    monkeypatch.setattr(launch, "module", lambda: module)
    monkeypatch.setitem(backends, "cuda", replace(backends["cuda"], why_not=lambda *_: None))
    registry.choose.cache_clear()
    return module


def emulated_module():
    """The CUDA module with emulated kernels; built once per state of the sources."""
    import pybind11

    files = sorted([*SOURCES.rglob("*"), *EMULATION.glob("*")])
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()[:16]
    folder = BUILT / f"{state}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            _build(module, [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"])
    spec = importlib.util.spec_from_file_location("_cuda_emulated", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _build(module, pybind_flags):
    folder = module.parent
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-isystem", str(include()), f"-I{SOURCES}", f"-I{EMULATION}"]
    flags += ["-DIGVA_HOPPER", "-DIGVA_CUDA_MODULE=_cuda_emulated", *pybind_flags]
    (folder / "bindings.cpp").write_text("".join(f'#include "{name}.cpp"\n' for name in BINDINGS))
    sources = {"bindings.o": folder / "bindings.cpp", "kernels.o": EMULATION / "emulated.cpp"}
    compilations = [
        subprocess.Popen(["g++", *flags, "-c", str(source), "-o", str(folder / name)])
        for name, source in sources.items()
    ]
    assert all(compilation.wait() == 0 for compilation in compilations)
    temporary = module.with_suffix(".partial")
    subprocess.run(["g++", "-shared", *(str(folder / name) for name in sources), "-o", str(temporary)], check=True)
    temporary.rename(module)
