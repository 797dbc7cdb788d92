"""The compiled module: loaded once, when first asked for; where it is missing, the reason is kept, never raised."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (brings the OpenMP runtime that the module's symbols resolve to)

ISA_VARIABLE = "IGVA_KERNELS_CPU_ISA"
"""The environment variable that names the instruction set of the CPU kernels."""


@cache
def build_info() -> dict[str, Any]:
    """What was built when the package was installed: version, compiler, instruction sets, flags; ``reason`` says why
    nothing was. Empty where the package runs from a source tree that was never built."""
    try:
        return json.loads((Path(__file__).parents[1] / "build_info.json").read_text())
    except (OSError, ValueError):
        return {}


@cache
def load() -> tuple[ModuleType | None, str]:
    """``(module, "")``, or ``(None, why not)``. The module uses the best instruction set, or the one that is forced."""
    try:
        module = importlib.import_module("igva_kernels._native")
        if isa := forced_isa():
            set_isa(module, isa)
        return module, ""
    except ValueError as error:
        return None, str(error)
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            return None, f"the compiled module does not load: {error}"
        reason = build_info().get("reason")
        return None, reason or "the compiled module was never built; run `pip install .` with a C++ compiler"


def forced_isa(environment: Mapping[str, str] = os.environ) -> str:
    """The instruction set to which the environment limits the CPU kernels; empty where it names none."""
    return environment.get(ISA_VARIABLE, "").strip().lower()


def set_isa(module: ModuleType, isa: str) -> None:
    """Let the kernels use ``isa``.

    Raises:
        ValueError: this CPU or this build has no such set.
    """
    if isa not in module.isas():
        sets = ", ".join(module.isas())
        raise ValueError(f"{ISA_VARIABLE}: got {isa!r}, need one of the sets of this CPU and this build: {sets}")
    module.set_isa(isa)
