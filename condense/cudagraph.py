"""Steps that are captured as CUDA graphs, so that the host launches one graph instead of many kernels.

A step that can be captured reads and writes tensors that stay in place. What changes from one step to the next comes
from such tensors as well: a counter on the device keys its random draws (``condense.rng``), and learning rates and
batches are copied into place before the step.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from condense.compute import compiled_or_eager

WARM_UP = 2
"""Number of calls that run a step as it is, before the call that captures it."""

_Function = TypeVar("_Function", bound=Callable[..., Any])

_fusing: ContextVar[bool] = ContextVar("fusing", default=False)


class Graphed:
    """A step without arguments or result, which is captured as a CUDA graph and replayed.

    Every call takes one step. The first ``WARM_UP`` calls run the function as it is, in which libraries are initialised
    and functions are compiled. The next call captures it, and later calls replay the graph. If the function cannot be
    captured, or if it draws from the global generator of the GPU, it is always run as it is, with one warning. On other
    devices it is always run as it is.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, *, name: str, compile: bool = False) -> None:  # noqa: A002
        """``name`` stands in the warning. With ``compile``, functions that are ``fused`` are compiled in the step."""
        self._step, self._device, self._name, self._compile = step, device, name, compile
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._captures = device.type == "cuda" and torch.cuda.is_available()

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif not self._captures:
            self._run()
        elif self._calls < WARM_UP:
            self._calls += 1
            self._warm_up()
        else:
            self._capture()

    def _run(self) -> None:
        token = _fusing.set(self._compile)
        try:
            self._step()
        finally:
            _fusing.reset(token)

    def _warm_up(self) -> None:
        before = torch.cuda.get_rng_state(self._device)
        with _side_stream(self._device):
            self._run()
        if not torch.equal(before, torch.cuda.get_rng_state(self._device)):
            self._give_up("it draws from the global generator of the GPU, for example for dropout")

    def _capture(self) -> None:
        graph, generator = torch.cuda.CUDAGraph(), _generator(self._device)
        state = generator.clone_state()
        try:
            # other threads, such as those of the compiler, may use the GPU in the meantime
            with _no_garbage_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except Exception as error:
            generator.graphsafe_set_state(state)  # a capture that fails leaves it unusable
            cause: BaseException = error
            while cause.__context__ is not None:  # the end of a capture raises an error of its own
                cause = cause.__context__
            self._give_up(next(iter(str(cause).splitlines()), type(cause).__name__))
            self._run()  # an error of the step itself is raised again here
        else:
            self._graph = graph
            graph.replay()

    def _give_up(self, reason: str) -> None:
        self._captures = False
        warnings.warn(f"{self._name} is not captured as a CUDA graph: {reason}", stacklevel=4)


class GraphedStep:
    """A numbered step, which is ``Graphed``: ``fn(number)``, where the number is a 0-d int64 tensor on the device.

    What the host has to prepare for a step, such as tensors that it reads from a file, ``fn`` gets from ``from_host``.
    """

    def __init__(self, fn: Callable[[Tensor], None], device: torch.device, *, name: str, compile: bool = False) -> None:  # noqa: A002
        """``name`` and ``compile`` as for ``Graphed``."""
        self._number, self._step = torch.zeros((), dtype=torch.int64, device=device), 0
        self._inputs: dict[str, tuple[Callable[[int], Any], Any]] = {}
        self._graphed = Graphed(lambda: fn(self._number), device, name=name, compile=compile)

    def __call__(self, step: int) -> None:
        self._step = step
        self._number.fill_(step)
        for prepare, place in self._inputs.values():
            copy_into(place, prepare(step))
        token = _current.set(self)
        try:
            self._graphed()
        finally:
            _current.reset(token)

    def input(self, name: str, prepare: Callable[[int], Any]) -> Any:
        """Return the place of an input; the first call makes it."""
        if name not in self._inputs:
            device = self._number.device
            place = tree_map_only(Tensor, lambda x: x.detach().to(device, copy=True), prepare(self._step))
            self._inputs[name] = prepare, place
        return self._inputs[name][1]


_current: ContextVar[GraphedStep | None] = ContextVar("current", default=None)


def from_host(step: int | Tensor, name: str, prepare: Callable[[int], Any]) -> Any:
    """Return ``prepare(step)``, a pytree of tensors of fixed shapes that the host prepares for a step.

    In a ``GraphedStep``, where ``step`` is a tensor, the host prepares it before each replay and copies it into place.
    ``prepare`` must then depend on nothing else that changes. ``name`` is unique within the step.
    """
    if isinstance(step, int):
        return prepare(step)
    current = _current.get()
    assert current is not None, "a step whose number is a tensor runs in a GraphedStep"
    return current.input(name, prepare)


def copy_into(place: Any, values: Any) -> None:
    """Copy the tensors of a pytree into those of another one, which stay in place."""
    for old, new in zip(tree_leaves(place), tree_leaves(values), strict=True):
        old.copy_(new, non_blocking=True)


def fused(*, dynamic: bool = False) -> Callable[[_Function], _Function]:
    """Mark a function that is compiled when a ``Graphed`` step with ``compile`` calls it.

    With ``dynamic`` one compiled variant serves all ints and shapes.
    """

    def mark(fn: _Function) -> _Function:
        @functools.wraps(fn)
        def call(*inputs: Any) -> Any:
            return _compiled(fn, dynamic)(*inputs) if _fusing.get() else fn(*inputs)

        return cast(_Function, call)

    return mark


@functools.cache
def _compiled(fn: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """Compile a fused function when it is first needed, since this imports the compiler."""
    return compiled_or_eager(fn, dynamic=dynamic)


def _generator(device: torch.device) -> torch.Generator:
    """Return the global generator of a GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect no garbage inside the context: to free an older graph would end a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Run the kernels of the context on a stream of their own, as CUDA graphs require of a warm-up."""
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield
    main.wait_stream(side)
