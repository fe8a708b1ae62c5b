"""Steps that are captured as CUDA graphs, so that the host launches one graph instead of many kernels.

A step that can be captured reads and writes tensors that stay in place. What changes from one step to the next comes
from such tensors as well: a counter on the device keys its random draws (``condense.rng``), and learning rates and
batches are copied into place before the step.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch

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
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run()
        except Exception as error:
            self._give_up(next(iter(str(error).splitlines()), type(error).__name__))
            self._run()  # an error of the step itself is raised again here
        else:
            self._graph = graph
            graph.replay()

    def _give_up(self, reason: str) -> None:
        self._captures = False
        warnings.warn(f"{self._name} is not captured as a CUDA graph: {reason}", stacklevel=4)


def fused(*, dynamic: bool = False) -> Callable[[_Function], _Function]:
    """Mark a function that is compiled when a ``Graphed`` step with ``compile`` calls it.

    With ``dynamic`` one compiled variant serves all ints and shapes.
    """

    def mark(fn: _Function) -> _Function:
        compiled = compiled_or_eager(fn, dynamic=dynamic)

        @functools.wraps(fn)
        def call(*inputs: Any) -> Any:
            return compiled(*inputs) if _fusing.get() else fn(*inputs)

        return cast(_Function, call)

    return mark


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Run the kernels of the context on a stream of their own, as CUDA graphs require of a warm-up."""
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield
    main.wait_stream(side)
