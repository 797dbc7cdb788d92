"""Inference as CUDA graphs: a module or function that is recorded once per layout of its arguments, and replayed."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from enum import Enum
from itertools import chain
from operator import attrgetter, is_not
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

from igva_kernels.ops.weighted_mix import MixPlan
from igva_kernels.runtime.context import autocast_dtype, why_only_torch

P = ParamSpec("P")
T = TypeVar("T")

WARM_UPS = 3
"""Calls before a recording: they compile kernels and fill caches, which a recording must not do."""

_VALUES: tuple[type, ...] = (bool, int, float, complex, str, bytes, Enum, MixPlan)
_VALUES += (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


class GraphLimitWarning(UserWarning):
    """A graph was dropped for a new one, because ``max_graphs`` of them exist."""


def graphed(
    function: Callable[P, T], *, modules: Iterable[nn.Module] = (), max_graphs: int = 16, copy_outputs: bool = True
) -> Graphed[P, T]:
    """``function`` for inference on a GPU, recorded as a CUDA graph per layout of its arguments, and then replayed.

    A replay costs the host one launch, whatever the function launches: it pays where the host is what a call waits for,
    as at small batches. It is called as ``function`` is, and returns the same values.

    The first call of a layout runs the function ``WARM_UPS`` times and records it, which takes a tenth of a second or
    more and waits for the GPU. A layout is the structure of the arguments, the shape, strides, dtype and device of each
    tensor, every other value, and torch's modes (autocast, gradients, inference mode, deterministic algorithms). Later
    calls copy their tensors to where the graph reads them; what is made inside the function is not copied, so that a
    function of the vision tower and the connector together copies pixels, not hidden states.

    Parameters and buffers may change in place (``load_state_dict``, an optimizer's step). Whatever else changes in the
    modules is noticed, and drops every graph: a parameter that was replaced or moved (``module.to``), a submodule or a
    hook that was put in, an attribute set to another object, ``train()``. Anything else that a function finds outside
    its arguments is frozen at the recording: values of globals and closures, the items of a list in an attribute, what
    an environment variable says. Calls from several threads take turns; inside torch.compile, or where the caller
    records a graph of its own, the function itself is called.

    Args:
        function: a module, a method of one, or any function of tensors that never waits for the GPU.
        modules: whose parameters and buffers the function reads, beside those of a module that is ``function`` itself
            or the owner of a method.
        max_graphs: how many layouts are kept. One more drops the one that was not used for longest, with a
            ``GraphLimitWarning``.
        copy_outputs: whether the caller owns what is returned. If False, the next call, of any layout, overwrites it.

    Raises:
        TypeError, ValueError: of a call: an argument that is neither a plain tensor nor a plain value, tensors that are
            not on one GPU, or one that requires a gradient; ``max_graphs`` below 1.
        ValueError, RuntimeError: of a first call: the output would require a gradient; the function reads tensors of no
            known module, changes its arguments, sets attributes, or waits for the GPU; torch cannot record it.
        NotImplementedError: of a call under forward-mode AD or a transform of torch.func.
    """
    return Graphed(function, tuple(modules), max_graphs, copy_outputs)


class Graphed(Generic[P, T]):
    """What ``graphed`` returns."""

    def __init__(
        self, function: Callable[P, T], modules: tuple[nn.Module, ...], max_graphs: int, copy_outputs: bool
    ) -> None:
        if not callable(function):
            raise TypeError(f"function: got {type(function).__name__}, need a module or another callable")
        if max_graphs < 1:
            raise ValueError(f"max_graphs: got {max_graphs}, need at least 1")
        self.function, self.modules = function, modules
        self.max_graphs, self.copy_outputs = max_graphs, copy_outputs
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._cards: dict[torch.device, _Card] = {}
        self._seen: Snapshot | None = None
        self._lock = threading.RLock()
        # What a graph reads is freed with this object, while its last replay may still run.
        weakref.finalize(self, _wait_for, self._cards).atexit = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``function`` returns for these arguments."""
        if torch.compiler.is_compiling() or getattr(_THREAD, "is_recording", False):
            return self.function(*args, **kwargs)
        tensors: list[Tensor] = []
        layout = layout_of((args, kwargs), tensors), _modes()
        device = _device_of(tensors, args, kwargs)
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return self.function(*args, **kwargs)
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
                raise ValueError(f"an argument of {_name(self.function)} requires a gradient: {_INFERENCE_ONLY}")
            reason = why_only_torch(tensors)
            if reason is not None:
                raise NotImplementedError(f"graphed: {reason}")
            with self._lock:
                graph = self._find(layout)
                if graph is None:
                    graph = self._record(layout, (args, kwargs), device)
                return self._replay(graph, tensors)

    def reset(self) -> None:
        """Drops every graph and its memory."""
        with self._lock:
            _wait_for(self._cards)  # a replay may still read what is freed here
            self._graphs.clear()
            self._seen = None

    @property
    def num_graphs(self) -> int:
        """Layouts that are recorded now."""
        return len(self._graphs)

    def __repr__(self) -> str:
        return f"graphed({self.function!r}, {self.num_graphs} of at most {self.max_graphs} layouts recorded)"

    def __reduce__(self) -> Any:
        """A copy records its own graphs."""
        return Graphed, (self.function, self.modules, self.max_graphs, self.copy_outputs)

    def _find(self, layout: Hashable) -> _Graph | None:
        if self._seen is not None and self._seen.is_outdated():
            self.reset()
        graph = self._graphs.get(layout)
        if graph is not None:
            self._graphs.move_to_end(layout)
        return graph

    def _record(self, layout: Hashable, arguments: Any, device: torch.device) -> _Graph:
        if len(self._graphs) >= self.max_graphs:
            _warn_of_limit(self.max_graphs)
            torch.cuda.synchronize(next(iter(self._graphs.values())).card.stream.device)
            self._graphs.popitem(last=False)
        if device not in self._cards:
            self._cards[device] = _Card(torch.cuda.Stream())
        card = self._cards[device]
        caller = torch.cuda.current_stream()
        card.stream.wait_stream(caller)
        with _ONE_AT_A_TIME:
            _THREAD.is_recording = True
            try:
                # Memory of the recording's own stream: that of another would be given away while a replay reads it.
                with torch.cuda.stream(card.stream):
                    graph = self._record_on(card, arguments)
            finally:
                _THREAD.is_recording = False
                caller.wait_stream(card.stream)
        self._graphs[layout] = graph
        return graph

    def _record_on(self, card: _Card, arguments: Any) -> _Graph:
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor).copy_(tensor), arguments)
        inputs = _tensors((args, kwargs))
        versions = [tensor._version for tensor in inputs]
        modules = owners(self.function, self.modules)
        dtype = autocast_dtype(card.stream.device)
        # Autocast would keep the cast of a weight from one call to the next, and a graph would not follow the weight.
        with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
            with Reads(inputs, modules, card.stream.device):
                outputs = self.function(*args, **kwargs)
            if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in _tensors(outputs)):
                raise ValueError(f"the output of {_name(self.function)} requires a gradient: {_INFERENCE_ONLY}")
            del outputs
            for _ in range(WARM_UPS - 1):
                self.function(*args, **kwargs)
            if self._seen is not None and self._seen.is_outdated():
                torch.cuda.synchronize()
                self._graphs.clear()
            self._seen = Snapshot(modules)
            graph = torch.cuda.CUDAGraph()
            pool = next((other.graph.pool() for other in self._graphs.values() if other.card is card), None)
            try:
                # Other threads may allocate memory meanwhile, which the default mode takes for a fault of this one.
                with torch.cuda.graph(graph, pool, card.stream, capture_error_mode="thread_local"):
                    outputs = self.function(*args, **kwargs)
            except Exception as error:
                raise RuntimeError(
                    f"{_name(self.function)} cannot be recorded as a CUDA graph; does it wait for the GPU, as for a "
                    f"shape that depends on values? {error.__context__ or error}"
                ) from error
        if self._seen.is_outdated():
            raise ValueError(f"{_name(self.function)} sets attributes of its modules at every call; a replay would not")
        changed = [t for t, version in zip(inputs, versions, strict=True) if t._version != version]
        if changed:
            raise ValueError(
                f"{_name(self.function)} changes an argument of shape {tuple(changed[0].shape)} in place; a graph "
                f"would change its own copy: return the result instead"
            )
        leaves, structure = tree_flatten(outputs)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_VALUES, type(None))):
                raise TypeError(f"{_name(self.function)} returns a {_kind(leaf)}, need {_NEED}")
        return _Graph(graph, inputs, leaves, structure, card)

    def _replay(self, graph: _Graph, tensors: list[Tensor]) -> Any:
        stream = torch.cuda.current_stream()
        stream.wait_event(graph.card.last)
        if tensors:
            with torch.no_grad():
                torch._foreach_copy_(graph.inputs, tensors)
        graph.graph.replay()
        outputs = graph.outputs
        if self.copy_outputs:
            outputs = [output.clone() if isinstance(output, Tensor) else output for output in outputs]
        graph.card.last.record(stream)
        return tree_unflatten(outputs, graph.structure)


def _wait_for(cards: Iterable[torch.device]) -> None:
    """Waits until the devices have ended what was asked of them."""
    for device in cards:
        torch.cuda.synchronize(device)


class _Card:
    """What the graphs of one device share: their turns, and a stream to record on.

    The stream is kept for good, because cuBLAS keeps a workspace for every stream that it has seen.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.last = torch.cuda.Event()
        """The end of the latest replay, for which the next one waits, on whichever stream: an event, because the stream
        may be gone by then."""


class _Graph(NamedTuple):
    """One recording."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    """Where it reads the tensors among the arguments."""
    outputs: list[Any]
    """The leaves of what the function returned; a replay writes the tensors among them."""
    structure: TreeSpec
    card: _Card


def layout_of(tree: Any, tensors: list[Tensor]) -> Hashable:
    """What a recording depends on of its arguments: everything but the numbers in tensors, which are added to a list.

    Raises:
        TypeError: something in it is neither a tensor nor a plain value; one object may stand for many values.
    """
    kind = type(tree)
    if kind is Tensor or kind is nn.Parameter:
        tensors.append(tree)
        return tree.shape, tree.stride(), tree.dtype, tree.device
    if kind in (tuple, list) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        return kind, *[layout_of(item, tensors) for item in tree]
    if kind is dict:
        return tuple(tree), *[layout_of(item, tensors) for item in tree.values()]
    if tree is None or isinstance(tree, _VALUES):
        # 1, 1.0 and True are equal, and so are 0.0 and -0.0.
        return kind, repr(tree) if isinstance(tree, (float, complex)) else tree
    raise TypeError(f"an argument holds a {_kind(tree)}, need {_NEED}")


class Snapshot:
    """What a recording has frozen of modules: their attributes, submodules and hooks, and where their tensors lie.

    A call looks through some hundred attributes, so that whatever is done per attribute is a loop of the interpreter's.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        names: list[dict[Any, Any]] = []
        for module in modules:
            # nn.Module keeps parameters, buffers, submodules and hooks in dicts among its attributes.
            own = module.__dict__
            names += [own, *(v for name, v in own.items() if name.startswith("_") and isinstance(v, dict))]
        self._empty = [each for each in names if not each]
        self._names = [each for each in names if each]
        self._sizes = list(map(len, self._names))
        self._values = list(self._now())
        self._tensors = [part for v in self._values if isinstance(v, Tensor) for part in _parts(v)]
        self._places = self._find()

    def is_outdated(self) -> bool:
        """Whether a replay may compute something else than a call of the modules as they are now."""
        return (
            any(self._empty)
            or list(map(len, self._names)) != self._sizes
            or any(map(is_not, self._now(), self._values))
            or self._find() != self._places
        )

    def _now(self) -> Iterable[Any]:
        return chain.from_iterable(map(dict.values, self._names))

    def _find(self) -> list[list[Any]]:
        return [list(map(get, self._tensors)) for get in _PLACE]


_PLACE: tuple[Callable[[Tensor], Any], ...] = (
    Tensor.data_ptr, Tensor.stride, attrgetter("shape"), attrgetter("dtype"), attrgetter("requires_grad"),
)  # fmt: skip


def owners(function: Callable[..., Any], modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules whose tensors ``function`` may read, submodules included, each once."""
    roots = (function, getattr(function, "__self__", None), *modules)
    return list({id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}.values())


class Reads(TorchDispatchMode):
    """Refuses a call that reads what a recording would freeze, with nothing to tell that it has changed since.

    Raises:
        ValueError: of the call: it reads a tensor that is no input, belongs to no known module and was not made by it,
            or one on another device; or it takes a value from the GPU to the CPU or back.
    """

    def __init__(self, inputs: Sequence[Tensor], modules: Iterable[nn.Module], device: torch.device) -> None:
        super().__init__()
        dicts = (d for module in modules for d in (module._parameters, module._buffers, module.__dict__))
        held = (v for d in dicts for v in d.values() if isinstance(v, Tensor))
        self._given = {_storage(part) for tensor in (*inputs, *held) for part in _parts(tensor)}
        self._made: set[int] = set()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = [part for tensor in _tensors((args, kwargs)) for part in _parts(tensor) if part.numel()]
        for tensor in read:
            if _storage(tensor) not in self._made:
                self._check(tensor)
        result = func(*args, **(kwargs or {}))
        made = [part for tensor in _tensors(result) for part in _parts(tensor)]
        # A number on the CPU may meet tensors on the GPU.
        goes_over = read and not {t.device for t in made} <= {t.device for t in read}
        if func is _ITEM or goes_over or len({t.device for t in (*read, *made) if t.dim()}) > 1:
            raise ValueError(f"the function waits for the GPU or copies from the CPU ({func}), which no graph can do")
        self._made.update(map(_storage, made))
        return result

    def _check(self, tensor: Tensor) -> None:
        what = f"the function reads a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}"
        if _storage(tensor) not in self._given:
            raise ValueError(
                f"{what} that is neither an argument nor a parameter or buffer of a known module: pass it as an "
                f"argument, or name the module that owns it in graphed(..., modules=[...])"
            )
        if tensor.device != self._device:
            raise ValueError(f"{what} on {tensor.device}, need {self._device}: a graph would freeze its value")


_ITEM = torch.ops.aten._local_scalar_dense.default

_THREAD = threading.local()
_ONE_AT_A_TIME = threading.Lock()
"""torch records one graph at a time in a process."""

_NEED = "plain tensors, numbers, strings, None, dtypes, devices or plans, in tuples, lists and dicts"
_INFERENCE_ONLY = (
    "graphed is for inference. Call it under torch.no_grad() or torch.inference_mode(); to train with CUDA graphs, "
    "give the module to torch.cuda.make_graphed_callables"
)


def _modes() -> Hashable:
    """What torch does differently for the same arguments."""
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
    )  # fmt: skip


def _device_of(tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The one CUDA device of a call."""
    if not torch.cuda.is_available():
        raise ValueError("graphed: torch sees no CUDA device, which CUDA graphs need; call the function itself")
    if not tensors:
        return torch.device("cuda", torch.cuda.current_device())
    device = tensors[0].device
    if device.type == "cuda" and all(tensor.device == device for tensor in tensors):
        return device
    leaves, _ = tree_flatten_with_path((list(args), kwargs))
    places = [f"{keystr(path[1:])} on {leaf.device}" for path, leaf in leaves if isinstance(leaf, Tensor)]
    raise ValueError(f"arguments: got {', '.join(places)}; a CUDA graph needs all tensors on one GPU")


def _warn_of_limit(limit: int) -> None:
    warnings.warn(
        f"graphed: a layout beyond max_graphs={limit} drops the graph that was not used for longest; raise max_graphs, "
        f"or pad batches to fewer sizes",
        GraphLimitWarning,
        stacklevel=4,
    )


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those inside a quantised or distributed one."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
