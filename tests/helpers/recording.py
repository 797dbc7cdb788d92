"""Which operators run."""

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Records every operator by name, and the calls ``(operator, args)`` of this package's own."""

    def __init__(self):
        super().__init__()
        self.names, self.calls = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        if func.namespace == "igva_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def ours(self):
        """The names of this package's own, without their namespace."""
        return [func.name().partition("::")[2] for func, _ in self.calls]
