"""Which operators run."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

NAMESPACE = "igva_kernels"


class Dispatched(TorchDispatchMode):
    """Records every operator by name, and the calls ``(operator, args)`` of this package's own."""

    def __init__(self):
        super().__init__()
        self.names, self.calls = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        if func.namespace == NAMESPACE:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def ours(self):
        """The names of this package's own, without their namespace."""
        return [func.name().partition("::")[2] for func, _ in self.calls]


class Called(TorchFunctionMode):
    """The same for what Python calls, with tensors as autograd sees them; what autograd itself calls is not seen."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if str(getattr(func, "_qualified_op_name", "")).startswith(f"{NAMESPACE}::"):
            self.calls.append((func.default, args))
        return func(*args, **(kwargs or {}))


def registered_calls(case, impl, seed, detached=False):
    """The calls of this package's operators that a case makes: ``{operator: its arguments}``.

    The tensors of a forward require gradients as in the case, unless ``detached``; those of a backward never do.
    """
    with Called() as called, Dispatched() as dispatched:
        results = case.run(case.draw(seed, torch.float32, "cpu"), impl)
    assert called.calls, "what is not registered, no profiler or compiler sees"
    calls = {func: tree_map_only(torch.Tensor, torch.Tensor.detach, args) for func, args in dispatched.calls}
    assert {func for func, _ in called.calls} <= calls.keys(), "a dispatch mode must see it in eager too"
    assert len(calls) > 1 or len(results) == 1, "a gradient that no operator computes"
    return calls if detached else calls | dict(called.calls)
