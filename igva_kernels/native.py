"""The compiled module: loaded once, when first asked for; where it is missing, the reason is kept, never raised."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (brings the OpenMP runtime that the module's symbols resolve to)


@cache
def build_info() -> dict[str, Any]:
    """What was built when the package was installed: version, compiler, instruction sets, flags; ``reason`` says why
    nothing was. Empty where the package runs from a source tree that was never built."""
    try:
        return json.loads((Path(__file__).parent / "build_info.json").read_text())
    except (OSError, ValueError):
        return {}


@cache
def load() -> tuple[ModuleType | None, str]:
    """``(module, "")``, or ``(None, why not)``."""
    try:
        return importlib.import_module("igva_kernels._native"), ""
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            return None, f"the compiled module does not load: {error}"
        reason = build_info().get("reason")
        return None, reason or "the compiled module was never built; run `pip install .` with a C++ compiler"
