"""The name of a machine: it contains all that figures depend on, so that no two kinds of machine share a name."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from igva_kernels import info

CPUINFO = Path("/proc/cpuinfo")

SETS = {
    "scalar": r"scalar|sse|avx$",
    "AVX2": r"avx2",
    "AVX-512": r"avx512",
    "AVX-512-BF16": r"avx512.*[bf][fp]16|avx10",
    "AMX": r".*amx",
}
"""Instruction sets by which products and kernels differ, weakest first, and patterns of what CPUs, oneDNN and our
switch call them. A name that matches several means the last of them."""
SWITCHES = ("IGVA_KERNELS_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that restrict a CPU to less than it has."""


def device_name(device: str) -> str:
    """A GPU's name, or a CPU's with family, model, stepping and the best instruction set that may be used.

    Args:
        device: "cpu" or "cuda".
    """
    if device != "cpu":
        return torch.cuda.get_device_name()
    cpu = info.collect()["cpu"]
    kin = kind(CPUINFO.read_text() if CPUINFO.exists() else "")
    usable = instruction_set([*cpu["features"], cpu["torch_capability"]], os.environ)
    return f"{cpu['name']} ({', '.join(filter(None, (kin, usable)))})"


def kind(cpuinfo: str) -> str:
    """ "family 25 model 1 stepping 1" from the text of /proc/cpuinfo; "" if it does not say."""
    fields = {"cpu family": "family", "model": "model", "stepping": "stepping"}
    numbers = {name: re.search(rf"^{key}\s*: (\d+)$", cpuinfo, re.MULTILINE) for key, name in fields.items()}
    return " ".join(f"{name} {found[1]}" for name, found in numbers.items() if found)


def instruction_set(features: Iterable[str], environment: Mapping[str, str]) -> str:
    """The best of ``SETS`` among ``features``; if a switch allows less, that set and the name of the switch."""
    levels = list(SETS)
    has = max((level for level in map(_level, features) if level is not None), default=None)
    if has is None:
        return platform.machine()
    held = {name: level for name in SWITCHES if (level := _level(environment.get(name, ""))) is not None}
    least = min(held, key=lambda name: held[name], default="")
    return f"{levels[held[least]]} by {least}" if least and held[least] < has else levels[has]


def _level(name: str) -> int | None:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    fitting = [level for level, pattern in enumerate(SETS.values()) if re.match(pattern, plain)]
    return fitting[-1] if fitting else None


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
