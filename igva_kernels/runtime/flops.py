"""What torch's FlopCounterMode counts for an operator.

Its module takes more than a second to import and brings Triton along, so formulas wait until somebody else imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
_WAITING: dict[Any, Callable[..., int]] = {}


def register_flops(packet: Any, formula: Callable[..., int]) -> None:
    """Tells torch how many floating-point operations a call of an operator counts for.

    Args:
        packet: the operator, ``torch.ops.igva_kernels.<name>``.
        formula: takes the arguments of the call, tensors among them.
    """
    _WAITING[packet] = formula
    if COUNTER in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    register = sys.modules[COUNTER].register_flop_formula
    while _WAITING:
        packet, formula = _WAITING.popitem()
        register(packet, get_raw=True)(lambda *args, out_val, formula=formula, **kwargs: formula(*args, **kwargs))


class _WhenImported(MetaPathFinder):
    """Finds nothing by itself; registers what waits once torch's counter has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
