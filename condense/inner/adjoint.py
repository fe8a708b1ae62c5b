"""Adjoints: methods of differentiating an inner training run.

With theta_{t+1} = step(theta_t, x_t, lr_t) and an outer loss L(theta_N), the adjoint lam_t = dL/dtheta_t
starts from lam_N and satisfies lam_t = lam_{t+1} . dstep/dtheta_t. The gradient of each input is
dL/dx_t = lam_{t+1} . dstep/dx_t. The state of momentum and Adam is treated in the same way: theta_t then stands for the
pair of theta_t and the state of the rule.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from condense.inner.rollout import Rollout
from condense.inner.rules import SGD, Adam, Params
from condense.plugins import Registry, subclass_of
from condense.rng import Draws
from condense.schema import Checked


@dataclass(frozen=True)
class Adjoint(Checked, ABC):
    """A method of running a roll-out and of backpropagating through it."""

    name: ClassVar[str]
    exact: ClassVar[bool]
    """Whether the gradient is that of the whole roll-out."""

    @property
    def captures(self) -> bool:
        """Whether a roll-out can be part of a CUDA graph: the host neither draws its length nor stores any of it."""
        return True

    def resolve(self, draws: Draws) -> Adjoint:
        """Return this adjoint with its random choices drawn; without any, return itself."""
        return self

    @abstractmethod
    def run(self, rollout: Rollout) -> Params:
        """Return the parameters after the last step."""


@dataclass(frozen=True)
class Exact(Adjoint):
    """The gradient of the full unroll, up to rounding, with a fraction of its memory.

    The forward pass stores a checkpoint for every step (the parameters and the state of the rule; if compiled, also the
    gradient) and no graph. The backward pass builds the graph of one step at a time. Random numbers that a step draws
    from the global generators, for example for dropout, are drawn again identically. Memory: N checkpoints and the
    graph of one step. (Wang et al., 2018.)
    """

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True
    snapshots: Literal["full", "host", "bfloat16"] = "full"
    """How checkpoints are stored. full: on the device. host: in host memory. bfloat16: rounded, which makes the
    gradient inexact."""

    @property
    def captures(self) -> bool:
        return self.snapshots != "host"

    def run(self, rollout: Rollout) -> Params:
        return _run_adjoint(rollout, every=1, propagate=True, snapshots=self.snapshots)


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """``Exact`` with every k-th checkpoint stored and the others recomputed, by one additional roll-out.

    It holds N/k + k checkpoints at a time, the fewest if ``every`` is near the square root of N. This pays off for very
    long roll-outs, whose checkpoints take more memory than the graph of a step. (Chen et al., 2016.)
    """

    name: ClassVar[str] = "checkpointed"
    exact: ClassVar[bool] = True
    every: int = 10
    """Number of steps between stored checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_steps(self.name, "every", self.every)

    def run(self, rollout: Rollout) -> Params:
        return _run_adjoint(rollout, every=self.every, propagate=True)


@dataclass(frozen=True)
class Full(Adjoint):
    """Plain autograd, which holds the graphs of all N steps at once; the reference for the other adjoints."""

    name: ClassVar[str] = "full"
    exact: ClassVar[bool] = True

    def run(self, rollout: Rollout) -> Params:
        _require_eager(self.name, rollout)
        if not rollout.recorded:
            return rollout.after(len(rollout)).start[0]
        point = rollout.start
        for t in range(len(rollout)):
            point = rollout.step(t, point)
        return point[0]


@dataclass(frozen=True)
class Truncated(Adjoint):
    """``Exact`` over the last steps only; earlier steps run without a graph and their inputs get no gradient.

    The window starts from the state that the rule has after the earlier steps. With a window of N or more it is
    ``Exact``.
    """

    name: ClassVar[str] = "truncated"
    exact: ClassVar[bool] = False
    window: int = 60
    """Number of steps that are differentiated."""
    burn_in: int | None = None
    """Number of steps before the window. The run ends with the window, and later batches are not used. Default: all
    steps but the window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_steps(self.name, "window", self.window)
        if self.burn_in is not None:
            _require_steps(self.name, "burn_in", self.burn_in, least=0)

    def run(self, rollout: Rollout) -> Params:
        if self.burn_in is not None:
            num_steps = self.burn_in + self.window
            if num_steps > len(rollout):
                raise ValueError(
                    f"{len(rollout)} batches are too few: burn_in {self.burn_in} and window {self.window} "
                    f"need {num_steps} steps; give {num_steps} batches"
                )
            rollout = rollout.until(num_steps)
        return Exact().run(rollout.after(max(len(rollout) - self.window, 0)))


@dataclass(frozen=True)
class RandomTruncated(Adjoint):
    """``Truncated`` after a random number of steps (RaT-BPTT: Feng et al., 2024).

    ``resolve(draws)`` draws the burn-in and returns the ``Truncated`` to unroll with, over ``burn_in + window``
    batches; ``run`` itself cannot draw. The defaults are the published ones.
    """

    name: ClassVar[str] = "random-truncated"
    exact: ClassVar[bool] = False
    lo: int = 0
    """Minimum number of steps before the window."""
    hi: int = 140
    """Maximum number of steps before the window."""
    window: int = 60
    """Number of steps that are differentiated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_steps(self.name, "window", self.window)
        if not 0 <= self.lo <= self.hi:
            raise ValueError(f"{self.name}: lo {self.lo} and hi {self.hi} are not a valid range; give 0 <= lo <= hi")

    @property
    def captures(self) -> bool:
        return False

    def resolve(self, draws: Draws) -> Truncated:
        """Draw the burn-in uniformly from {lo, ..., hi}, with draws on the CPU."""
        burn_in = draws.integer(self.lo, self.hi + 1)
        return Truncated(self.window, burn_in)

    def run(self, rollout: Rollout) -> Params:
        raise ValueError(f"{self.name} has no burn-in yet: it must be drawn first; pass adjoint.resolve(draws)")


@dataclass(frozen=True)
class Tesla(Adjoint):
    """INEXACT: the stop-gradient approximation of TESLA (Cui et al., 2023), for comparison.

    It differentiates theta_N = theta_0 - sum_t lr_t g_t with every g_t taken at a constant theta_t. The adjoint is
    lam_N at every step, which ignores the effect of a batch on later gradients. It equals ``Exact`` for one step.
    Deviation: the authors' code doubles the tuple of gradients instead of the gradient, which halves the gradient of
    the images.
    """

    name: ClassVar[str] = "tesla"
    exact: ClassVar[bool] = False

    def run(self, rollout: Rollout) -> Params:
        if rollout.rule != SGD():
            raise ValueError(f"tesla does not support {rollout.rule}: it needs plain SGD; give SGD(), or use Exact()")
        return _run_adjoint(rollout, every=1, propagate=False)


@dataclass(frozen=True)
class Higher(Adjoint):
    """The ``higher`` library (Grefenstette et al., 2019), a second reference that needs as much memory as ``Full``.

    It supports SGD, and Adam without ``eps_root``.
    """

    name: ClassVar[str] = "higher"
    exact: ClassVar[bool] = True

    def run(self, rollout: Rollout) -> Params:
        from higher.optim import get_diff_optim

        _require_eager(self.name, rollout)
        theta, rule = rollout.start[0], rollout.rule
        reference = [p.detach().clone().requires_grad_() for p in theta.values()]
        optimizer: torch.optim.Optimizer
        match rule:
            case SGD():
                optimizer = torch.optim.SGD(reference, lr=1.0, momentum=rule.momentum, weight_decay=rule.weight_decay)
            case Adam(eps_root=0.0):
                optimizer = torch.optim.Adam(reference, lr=1.0, betas=rule.betas)
            case _:
                raise ValueError(f"higher does not support {rule}: it has SGD and Adam(eps_root=0.0); use Exact()")
        diff_optimizer = get_diff_optim(optimizer, reference)
        params = [p if p.requires_grad else p.detach().requires_grad_() for p in theta.values()]
        for t, (item, lr) in enumerate(zip(rollout.batches, rollout.lrs, strict=True)):
            override: dict[str, list[Any]] = {"lr": [lr]}
            if isinstance(rule, Adam):
                # higher adds eps before the bias correction of the square root, torch.optim after it
                override["eps"] = [rule.eps * (1 - rule.betas[1] ** (t + 1)) ** 0.5]
            with torch.enable_grad():
                loss = rollout.loss_fn(dict(zip(theta, params, strict=True)), rollout.prepare(item))
                params = diff_optimizer.step(loss, params=params, override=override)
        return dict(zip(theta, params if rollout.recorded else [p.detach() for p in params], strict=True))


ADJOINTS: Registry[type[Adjoint]] = Registry(
    "adjoint",
    "condense.adjoints",
    {kind.name: kind for kind in (Exact, Checkpointed, Full, Truncated, RandomTruncated, Tesla, Higher)},
    subclass_of(Adjoint),
)


def _require_steps(owner: str, field: str, value: int, least: int = 1) -> None:
    if value < least:
        raise ValueError(f"{owner}: {field} is {value}: it is a number of steps; give {least} or more")


def _require_eager(owner: str, rollout: Rollout) -> None:
    if rollout.compile:
        raise ValueError(f"{owner} cannot be compiled: it is a reference for tests; use Exact(), or compile=False")


def _run_adjoint(rollout: Rollout, every: int, propagate: bool, snapshots: str = "full") -> Params:
    if not rollout.recorded:
        return rollout.after(len(rollout)).start[0]
    outputs = _Unrolled.apply(rollout, every, propagate, snapshots, *rollout.sources)
    return dict(zip(rollout.start[0], outputs, strict=True))


class _Unrolled(torch.autograd.Function):
    """The function from the inputs that require grad to theta_N.

    It stores every ``every``-th checkpoint, and the state of the random generators before every step. Without
    ``propagate`` the adjoint is lam_N in the whole backward pass.
    """

    @staticmethod
    def forward(ctx: Any, rollout: Rollout, every: int, propagate: bool, snapshots: str, *sources: Tensor) -> Any:
        ctx.rollout, ctx.every, ctx.propagate = rollout, every, propagate
        ctx.checkpoints = _Checkpoints(len(range(0, len(rollout), every)), snapshots)
        ctx.draws = []
        point = rollout.start
        for t in range(len(rollout)):
            before = point
            ctx.draws.append(rollout.generators())
            point, grads = rollout.advance(t, before)
            if t % every == 0:
                ctx.checkpoints.put(t // every, (before, grads if every == 1 else {}))
        # autograd raises an error in the backward pass if a source was changed in place in between
        ctx.save_for_backward(*sources, *ctx.checkpoints.release())
        return tuple(point[0].values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        rollout = cast(Rollout, ctx.rollout)
        theta, state = rollout.start
        sources = rollout.sources
        checkpoints = ctx.checkpoints.restored(ctx.saved_tensors[len(sources) :])

        totals: dict[int, Tensor] = {}

        def add(source: Tensor, grad: Tensor) -> None:
            total = totals.get(id(source))
            totals[id(source)] = grad if total is None else total + grad

        lam = (dict(zip(theta, cotangents, strict=True)), tree_map(torch.zeros_like, state))
        for start in reversed(range(0, len(rollout), ctx.every)):
            stop = min(start + ctx.every, len(rollout))
            point, grads = checkpoints.get(start // ctx.every)
            segment = [(point, grads)]
            if ctx.every > 1:
                segment = []
                for t in range(start, stop):
                    with ctx.draws[t].replayed():
                        after, grads = rollout.advance(t, point)
                    segment.append((point, grads))
                    point = after
            for t in reversed(range(start, stop)):
                with ctx.draws[t].replayed():
                    lam_before, source_grads = rollout.pullback(t, *segment.pop(), lam)
                for source, grad in source_grads:
                    add(source, grad)
                if ctx.propagate:
                    lam = lam_before
        for p, grad in zip(tree_leaves(rollout.start), tree_leaves(lam), strict=True):
            add(p, grad)
        return (None, None, None, None, *(totals[id(source)] for source in sources))


class _Checkpoints:
    """A given number of trees of tensors of the same structure and shapes, stored in one table per leaf.

    The tables are allocated with the first tree. Checkpoints therefore do not fragment the memory by lying between
    larger temporary tensors.
    """

    def __init__(self, num: int, storage: str) -> None:
        self._num, self._storage = num, storage
        self._tables: tuple[Tensor, ...] = ()

    def put(self, row: int, tree: Any) -> None:
        leaves, self._spec = tree_flatten(tree)
        if not self._tables:
            self._like = [(x.dtype, x.device) for x in leaves]
            self._tables = tuple(self._table(x) for x in leaves)
        for table, x in zip(self._tables, leaves, strict=True):
            table[row].copy_(x)

    def get(self, row: int) -> Any:
        # copies, so that the inputs of a compiled step have the same properties at every step
        rows = zip(self._tables, self._like, strict=True)
        leaves = [table[row].to(device, dtype, copy=True) for table, (dtype, device) in rows]
        return tree_unflatten(leaves, self._spec)

    def release(self) -> tuple[Tensor, ...]:
        """Return the tables and drop the references to them."""
        tables, self._tables = self._tables, ()
        return tables

    def restored(self, tables: Sequence[Tensor]) -> _Checkpoints:
        """Return these checkpoints with the tables that ``release`` returned."""
        checkpoints = copy.copy(self)
        checkpoints._tables = tuple(tables)
        return checkpoints

    def _table(self, x: Tensor) -> Tensor:
        rounded = self._storage == "bfloat16" and x.dim()
        device = "cpu" if self._storage == "host" else x.device
        return torch.empty(self._num, *x.shape, dtype=torch.bfloat16 if rounded else x.dtype, device=device)
