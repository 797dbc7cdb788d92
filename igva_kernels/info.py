"""What this installation can do and, where it cannot, why not: the first thing to paste into a bug report."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from igva_kernels.registry import REFERENCE, BackendStatus, Operator, all_backends, backends, operators
from igva_kernels.runtime import native
from igva_kernels.runtime.cpu.products import describe
from igva_kernels.verify import DTYPES
from igva_kernels.version import __version__

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "sentence-transformers",
    "accelerate",
    "flash-attn",
    "numpy",
)

SERVED = DTYPES | {"fp64": torch.float64}
"""The dtypes in which a backend is asked; ``verify`` judges none in fp64, which it measures the others by."""

# The features that decide which CPU kernels and which GEMMs run; all other flags would only be noise.
CPU_FEATURES = ("avx2", "fma3", "f16c", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")


def collect() -> dict[str, Any]:
    """Versions, CPU, GPUs, what was built, and the backends, as plain data."""
    return {
        "igva_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "gpus": _gpus(),
        "build": native.build_info(),
        "backends": [_backend(status) for status in backends()],
        "operators": {name: _implementations(operator) for name, operator in operators().items()},
    }


def render(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    cpu = report["cpu"]
    lines = [
        ("igva_kernels", report["igva_kernels"]),
        ("python", f"{report['python']} on {report['platform']}"),
        *((name, version or "not installed") for name, version in report["packages"].items()),
        ("cpu", f"{cpu['name']}, torch uses {cpu['torch_capability']} and {cpu['threads']} of {cpu['cores']} cores"),
        ("cpu features", " ".join(cpu["features"]) or "unknown"),
        *((f"gpu {i}", gpu) for i, gpu in enumerate(report["gpus"])),
        *([] if report["gpus"] else [("gpu", "none")]),
        *((f"products in {name}", text) for name, text in cpu["products"].items()),
    ]
    text = [f"{name:22}{value}" for name, value in lines]
    text += ["", "backends"]
    for backend in report["backends"]:
        dtypes = f", in {', '.join(backend['dtypes'])}" if backend["dtypes"] else ""
        answer = f"yes, on {', '.join(backend['devices'])}" if backend["available"] else f"no: {backend['reason']}"
        text.append(f"  {backend['name']:20}{answer}{dtypes}")
        text += [f"    {note}" for note in backend["notes"]]
    text += ["", "operators"]
    for name, implementations in report["operators"].items():
        text.append(f"  {name:20}{', '.join(implementations)}")
        text += [f"    {backend}: {note}" for backend, notes in implementations.items() for note in notes]
    return "\n".join(text)


def _backend(status: BackendStatus) -> dict[str, Any]:
    """What is said of a backend; of plain torch, which is not asked, neither dtypes nor notes."""
    backend = all_backends().get(status.name)
    if backend is None:
        return status._asdict() | {"dtypes": [], "notes": []}
    devices = [torch.device(device) for device in status.devices]
    dtypes = [n for n, dtype in SERVED.items() if any(backend.why_not(device, dtype) is None for device in devices)]
    return status._asdict() | {"dtypes": dtypes, "notes": backend.notes()}


def _implementations(operator: Operator) -> dict[str, list[str]]:
    """The implementations of an operator that can run here, each with its notes."""
    found = {status.name: operator.implementation(status.name) for status in backends() if status.available}
    return {
        name: [] if found[name] is None else found[name].notes() for name in found if name == REFERENCE or found[name]
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    # Older versions of torch cannot name the features.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "name": known.get("cpu_name") or platform.processor() or platform.machine(),
        "cores": known.get("num_physical_cores") or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "features": [name for name in CPU_FEATURES if known.get(name)],
        "products": {name: describe(dtype) for name, dtype in DTYPES.items()},
    }


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]
